"""What nodes ask of the writer of a blob: bounded, and nothing that makes no sense does harm."""

import os
from pathlib import Path

import pytest

from uenvd.cache import wishes as w
from uenvd.cache.identity import CacheUser
from uenvd.cache.wishes import Wish, Wishes, decode, encode

SIZE = 1000
HEX = "ab" * 32


@pytest.fixture
def wishes(tmp_path: Path) -> Wishes:
    return Wishes(tmp_path, HEX, CacheUser())


def test_what_is_put_is_read_by_the_writer_until_it_is_withdrawn(tmp_path: Path, wishes: Wishes) -> None:
    assert wishes.read(SIZE) == {}
    assert wishes.put("a", Wish(1, ((5, 10), (20, 30))))
    assert wishes.put("b", Wish(1, ((0, SIZE),)))
    assert wishes.put("a", Wish(2, ((5, 6),)))
    assert wishes.read(SIZE) == {"a": Wish(2, ((5, 6),)), "b": Wish(1, ((0, SIZE),))}
    wishes.withdraw("a")
    wishes.withdraw("a")
    assert list(wishes.read(SIZE)) == ["b"]
    assert Wishes(tmp_path, "cd" * 32, CacheUser()).read(SIZE) == {}, "each blob has its own"


def test_there_are_few_of_them_at_a_time(wishes: Wishes) -> None:
    for number in range(w.MAX_FILES):
        assert wishes.put(f"n{number}", Wish(1, ((0, 1),)))
    assert not wishes.put("late", Wish(1, ((0, 1),)))
    assert wishes.put("n3", Wish(2, ((1, 2),))), "who asks already may ask for something else"
    assert len(wishes.read(SIZE)) == w.MAX_FILES
    wishes.withdraw("n3")
    assert wishes.put("late", Wish(1, ((0, 1),)))


@pytest.mark.parametrize(
    ("data", "ranges"),
    [
        (b"", None),
        (b"uenvd-wish-1 1", None),
        (b"uenvd-wish-9 1\n0 1\n", None),
        (b"uenvd-wish-1 x\n0 1\n", None),
        (b"\xff\0" * 9999, None),
        (b"uenvd-wish-1 1\n", ()),
        (b"uenvd-wish-1 1\n0 1\n5 5\n6 7\n", ((0, 1),)),
        (b"uenvd-wish-1 1\n0 1\n9 8\n", ((0, 1),)),
        (b"uenvd-wish-1 1\n0 1\n0 1001\n", ((0, 1),)),
        (b"uenvd-wish-1 1\n0 1\n-1 5\n", ((0, 1),)),
        (b"uenvd-wish-1 1\n0 1\n1 2 3\n", ((0, 1),)),
        (b"uenvd-wish-1 1\n0 1\n" + b"9" * 30 + b" 5\n", ((0, 1),)),
        (b"uenvd-wish-1 1\n0 1\n2 3", ((0, 1),)),
    ],
)
def test_what_makes_no_sense_is_ignored(data: bytes, ranges: tuple[tuple[int, int], ...] | None) -> None:
    found = decode(data, SIZE)
    assert (None if found is None else found.ranges) == ranges


def test_no_wish_is_longer_than_is_read() -> None:
    far = 10**18
    wish = Wish(10**9, tuple((far + number, far * 9) for number in range(100)))
    data = encode(wish)
    assert len(data) <= w.MAX_BYTES
    found = decode(data, far * 9)
    assert found is not None
    assert len(found.ranges) == w.MAX_RANGES
    assert all(end - first <= w.MAX_RANGE_BYTES for first, end in found.ranges)


def test_files_that_are_no_wishes_hold_nobody_up(tmp_path: Path, wishes: Wishes) -> None:
    os.mkfifo(tmp_path / f"{HEX}.fifo")
    (tmp_path / f"{HEX}.directory").mkdir()
    (tmp_path / f"{HEX}.link").symlink_to("/etc/passwd")
    (tmp_path / f"{HEX}.large").write_bytes(b"x" * 100_000)
    wishes.put("a", Wish(1, ((0, 1),)))
    assert list(wishes.read(SIZE)) == ["a"]


def test_a_directory_that_is_not_there_means_that_nobody_asks(tmp_path: Path) -> None:
    assert Wishes(tmp_path / "none", HEX, CacheUser()).read(SIZE) == {}
