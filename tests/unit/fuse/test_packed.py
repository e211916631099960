"""Packed replies say what the tree says, and listings are packed ahead for who walks, and for nobody else."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.images import build_tree, make_image
from uenvd.fuse.packed import _MAX_AHEAD, Packed
from uenvd.fuse.protocol import reply as r
from uenvd.fuse.tree import ROOT_INO, Tree

ROOM = 1 << 20


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed")
    tree = build_tree(directory / "tree", many=1500)
    for number in range(3):
        (tree / f"walked/{number}/below").mkdir(parents=True)
        (tree / f"walked/{number}/file").write_bytes(b"x")
    os.chmod(tree / "walked/0/file", 0o4755)
    (tree / ("n" * 255)).write_bytes(b"")
    return make_image(tree, directory / "image")


@pytest.fixture(params=[True, False], ids=["masked", "as it is"])
def tree(request: pytest.FixtureRequest, image: Path) -> Iterator[Tree]:
    fd = os.open(image, os.O_RDONLY)
    yield Tree(fd, mask_privileged=request.param)
    os.close(fd)


def directories(tree: Tree) -> list[int]:
    found = [ROOT_INO]
    for node in found:  # grows
        for one in tree.listing(node, 2):
            if stat.S_ISDIR(one.attributes.mode):
                found.append(one.attributes.ino)
    return found


def pack_ahead(packed: Packed) -> list[int]:
    """Do all there is to do; return the numbers of the directories in order."""
    order: list[int] = []
    while packed.wanted:
        before = set(packed._ready)
        packed.work()
        order += packed._ready - before
    return order


def test_every_entry_as_the_tree_has_it(tree: Tree) -> None:
    packed = Packed(tree)
    for node in directories(tree):
        listed = list(tree.listing(node, 0))
        assert packed.listing(node, 0, ROOM) == b"".join(
            r.dirent_plus(one.name, one.attributes, one.next_offset) for one in listed
        )
        for one in listed[2:]:
            assert packed.lookup(node, one.name) == r.entry(one.attributes)


def test_a_listing_in_pieces(tree: Tree) -> None:
    packed = Packed(tree)
    node = max(directories(tree), key=lambda node: len(list(tree.listing(node, 0))))
    listed = list(tree.listing(node, 0))
    whole = packed.listing(node, 0, ROOM)
    pieces, offset = b"", 0
    while piece := packed.listing(node, offset, 4096):
        assert len(piece) <= 4096
        while piece:
            (one,) = [listed[offset]]
            size = len(r.dirent_plus(*one))
            pieces, piece, offset = pieces + piece[:size], piece[size:], one.next_offset
    assert pieces == whole and offset == len(listed)
    assert packed.listing(node, offset + 10, 4096) == b""


def test_names_that_are_not_there(tree: Tree) -> None:
    packed = Packed(tree)
    assert packed.lookup(ROOT_INO, b"absent") == r.NO_ENTRY
    with pytest.raises(OSError) as caught:
        packed.lookup(ROOT_INO, b"n" * 256)
    assert caught.value.errno == errno.ENAMETOOLONG
    file = tree.lookup(ROOT_INO, b"n" * 255)
    assert file is not None
    with pytest.raises(NotADirectoryError):
        packed.lookup(file.ino, b"x")
    with pytest.raises(NotADirectoryError):
        packed.listing(file.ino, 0, ROOM)


def test_who_walks_finds_listings_packed(tree: Tree) -> None:
    packed = Packed(tree)
    packed.listing(ROOT_INO, 0, ROOM)
    steps = pack_ahead(packed)
    assert steps == [], "one listing is no walk"
    walked = tree.lookup(ROOT_INO, b"walked")
    assert walked is not None
    packed.listing(walked.ino, 0, ROOM)
    order = pack_ahead(packed)
    expected = []
    for number in range(3):
        child = tree.lookup(walked.ino, b"%d" % number)
        assert child is not None
        below = tree.lookup(child.ino, b"below")
        assert below is not None
        expected += [child.ino, below.ino]
    assert order == expected, "in the order in which find(1) comes by"
    packed.listing(expected[0], 0, ROOM)
    assert expected[0] not in packed._ready


def test_work_ahead_is_bounded(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for number in range(100):
        (tree / f"walked/{number}").mkdir(parents=True)
    fd = os.open(make_image(tree, tmp_path / "image"), os.O_RDONLY)
    try:
        image = Tree(fd)
        packed = Packed(image)
        walked = image.lookup(ROOT_INO, b"walked")
        assert walked is not None
        packed.listing(ROOT_INO, 0, ROOM)
        packed.listing(walked.ino, 0, ROOM)
        assert len(pack_ahead(packed)) == len(packed._ready) == _MAX_AHEAD
        other = next(node for node in packed._expected if node not in packed._ready)
        packed.listing(other, 0, ROOM)
        assert not packed._ready, "who goes elsewhere is followed there"
    finally:
        os.close(fd)
