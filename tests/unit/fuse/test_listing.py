"""Listings in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import cast

import pytest

from uenvd.errors import FormatError
from uenvd.fuse.listing import Listings
from uenvd.squashfs import DirEntry, Image, Inode, InodeRef, Kind

HUGE = 1 << 20


class FakeImage:
    """Directories of numbered entries; counts how many entries were decoded."""

    def __init__(self, count: int, bad: int = -1) -> None:
        self.count = count
        self.bad = bad
        self.decoded = 0

    def entries(self, _directory: Inode) -> Iterator[DirEntry]:
        for i in range(self.count):
            self.decoded += 1
            if i == self.bad:
                raise FormatError("bad entry")
            yield DirEntry(b"%06d" % i, InodeRef(i), i + 1, Kind.FILE)


def directory(size_bytes: int) -> Inode:
    return Inode(InodeRef(0), 1, Kind.DIRECTORY, 0o755, 0, 0, 0, 2, size_bytes, 0, None)


def make(count: int, bad: int = -1) -> tuple[Listings, FakeImage]:
    fake = FakeImage(count, bad)
    return Listings(cast("Image", fake)), fake


def piece(listings: Listings, ino: int, size_bytes: int, start: int, count: int) -> list[int]:
    """Take ``count`` entries as readdir does: the next one is looked at and refused."""

    def take() -> Iterator[int]:
        with listings.open(ino, directory(size_bytes), start) as entries:
            for taken, (index, entry) in enumerate(entries):
                if taken == count:
                    return
                assert entry.name == b"%06d" % index
                yield index

    with closing(take()) as found:  # type: ignore[type-var]  # a generator
        return list(found)


@pytest.mark.parametrize("size_bytes", [1000, HUGE])
def test_pieces_make_the_whole(size_bytes: int) -> None:
    listings, fake = make(1000)
    got: list[int] = []
    while part := piece(listings, 7, size_bytes, len(got), 30):
        got += part
    assert got == list(range(1000))
    assert fake.decoded == 1000, "no piece started over"


def test_workers_that_take_turns_at_a_huge_directory_read_it_once_each() -> None:
    workers = [make(5000), make(5000)]
    got: list[int] = []
    while len(got) < 5000:
        listings, _fake = workers[len(got) // 40 % 3 % 2]
        got += piece(listings, 7, HUGE, len(got), 40)
    assert got == list(range(5000))
    assert [fake.decoded for _listings, fake in workers] <= [5000, 5000]


def test_readers_of_a_huge_directory_do_not_disturb_each_other() -> None:
    listings, fake = make(500)
    for start in range(0, 500, 50):
        for ino in (7, 8):
            assert piece(listings, ino, HUGE, start, 50) == list(range(start, start + 50))
    assert fake.decoded == 1000


def test_any_place_of_a_huge_directory() -> None:
    listings, _fake = make(500)
    for start in (400, 3, 499, 500, 501, 0):
        assert piece(listings, 7, HUGE, start, 2) == list(range(500))[start : start + 2]


def test_places_kept_are_bounded() -> None:
    listings, _fake = make(200)
    for start in range(190):
        piece(listings, 7, HUGE, start, 3)
    assert len(listings._cursors) <= 64


def test_whole_listings_kept_are_bounded() -> None:
    listings, _fake = make(3)
    for ino in range(100):
        piece(listings, ino, 200_000, 0, 3)
    assert len(listings._whole) <= 6
    assert listings._whole_bytes == 200_000 * len(listings._whole)


@pytest.mark.parametrize("size_bytes", [1000, HUGE])
def test_damage_is_met_again_and_never_an_early_end(size_bytes: int) -> None:
    listings, _fake = make(100, bad=60)
    for _attempt in range(3):
        with pytest.raises(FormatError):
            piece(listings, 7, size_bytes, 50, 30)
