"""Where the hash of a transfer gets its bytes: in order, before their turn, too many, wrong ones."""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from uenvd.cache.inorder import BACKLOG, Budget, Hand, InOrder
from uenvd.cache.partial import Partial
from uenvd.errors import Cancelled
from uenvd.oci.manifest import Descriptor

UNIT = 1000
UNITS = 64
DATA = random.Random(3).randbytes(UNIT * UNITS)
LAYER = Descriptor("x", "sha256:" + hashlib.sha256(DATA).hexdigest(), len(DATA))


class Claimed:
    def check(self) -> None:
        pass

    def release(self) -> None:
        pass


class Line:
    """A partial, its line, and one connection."""

    def __init__(self, partial: Partial, kept: Budget) -> None:
        self.partial = partial
        self.over = False
        self.line = InOrder(partial, lambda: self.over, kept)
        self.hand = Hand(self.line)

    def write(self, unit: int) -> bool:
        """Write a unit as a connection does; tell whether it was handed on."""
        first = unit * UNIT
        self.hand.buffer[:UNIT] = DATA[first : first + UNIT]
        mark = self.partial.write_at(first, self.hand.buffer[:UNIT])
        taken = self.hand.passes_on(first, 0, UNIT, mark, self.partial.offset_bytes)
        if not taken:
            self.line.nudge()
        return taken

    def is_hashed(self) -> bool:
        return self.partial.hashed_bytes == len(DATA)


@pytest.fixture
def read_back(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each reading back of the file gave."""
    counts: list[int] = []
    preadv = os.preadv

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        counts.append(preadv(fd, buffers, offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counted)
    return counts


@contextmanager
def a_line(tmp_path: Path, *, kept: int = UNITS) -> Iterator[Line]:
    """A line whose hash runs in a thread."""
    with Partial(LAYER, tmp_path / "blob.part", tmp_path / "blob", Claimed()) as partial:
        line = Line(partial, Budget(kept))
        thread = threading.Thread(target=line.line.run, args=(line.is_hashed,))
        thread.start()
        try:
            yield line
            thread.join(20)
            assert not thread.is_alive()
            partial.commit()
            assert (tmp_path / "blob").read_bytes() == DATA
        finally:
            line.over = True
            thread.join(20)


def test_what_comes_in_order_is_not_read_back(tmp_path: Path, read_back: list[int]) -> None:
    with a_line(tmp_path) as line:
        assert all(line.write(unit) for unit in range(UNITS))
    assert sum(read_back) <= UNIT, "it looks once, at the beginning, what is there already"


@pytest.mark.parametrize("seed", range(5))
def test_what_comes_before_its_turn_is_kept(tmp_path: Path, read_back: list[int], seed: int) -> None:
    units = list(range(UNITS))
    random.Random(seed).shuffle(units)
    with a_line(tmp_path) as line:
        assert all(line.write(unit) for unit in units)
    assert sum(read_back) <= UNIT


@pytest.mark.parametrize("kept", [0, 3])
def test_what_there_is_no_memory_for_is_read_back(tmp_path: Path, read_back: list[int], kept: int) -> None:
    with a_line(tmp_path, kept=kept) as line:
        taken = [line.write(unit) for unit in range(UNITS - 1, -1, -1)]
        assert taken.count(True) <= kept + 1, "the first in the blob is in order"
    assert sum(read_back) >= taken.count(False) * UNIT


def test_memory_is_given_back(tmp_path: Path) -> None:
    kept = Budget(UNITS)
    with Partial(LAYER, tmp_path / "blob.part", tmp_path / "blob", Claimed()) as partial:
        line = Line(partial, kept)
        for unit in range(UNITS - 1, UNITS // 2, -1):
            assert line.write(unit)
        line.over = True
        line.line.run(line.is_hashed)
        assert not line.write(UNITS // 4), "nothing is taken after the end"
    assert all(kept.take() for _ in range(UNITS)) and not kept.take()


def test_a_hash_that_is_behind_holds_the_connection_until_the_end(tmp_path: Path) -> None:
    with Partial(LAYER, tmp_path / "blob.part", tmp_path / "blob", Claimed()) as partial:
        line = Line(partial, Budget(0))
        for unit in range(BACKLOG):
            assert line.write(unit)
        timer = threading.Timer(0.05, setattr, (line, "over", True))
        timer.start()
        with pytest.raises(Cancelled):
            line.write(BACKLOG)
        timer.join()


def test_bytes_that_were_forgotten_are_not_hashed_from_memory(tmp_path: Path) -> None:
    with a_line(tmp_path) as line:
        line.hand.buffer[:UNIT] = bytes(UNIT)  # wrong ones, kept until it is their turn
        mark = line.partial.write_at(UNIT, line.hand.buffer[:UNIT])
        assert line.hand.passes_on(UNIT, 0, UNIT, mark, line.partial.offset_bytes)
        line.partial.discard(UNIT, 2 * UNIT)
        for unit in range(UNITS):
            line.write(unit)


def test_bytes_that_another_connection_brought_are_not_hashed_from_this_buffer(tmp_path: Path) -> None:
    with a_line(tmp_path) as line:
        line.write(0)
        line.hand.buffer[:UNIT] = bytes(UNIT)
        mark = line.partial.write_at(UNIT // 2, line.hand.buffer[:UNIT])
        assert mark is None and not line.hand.passes_on(UNIT // 2, 0, UNIT, mark, UNIT)
        line.partial.discard(UNIT, 2 * UNIT)
        for unit in range(1, UNITS):
            line.write(unit)


def test_what_was_there_before_is_read_back(tmp_path: Path, read_back: list[int]) -> None:
    with Partial(LAYER, tmp_path / "blob.part", tmp_path / "blob", Claimed()) as partial:
        partial.write_at(0, DATA[: 10 * UNIT])
    with a_line(tmp_path) as line:
        for unit in range(10, UNITS):
            line.write(unit)
    assert sum(read_back) >= 10 * UNIT


def test_no_memory_is_held_after_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffers: list[weakref.ref[mmap.mmap]] = []

    class Seen(mmap.mmap):
        def __new__(cls, *arguments: int) -> Seen:
            made = super().__new__(cls, *arguments)
            buffers.append(weakref.ref(made))
            return made

    monkeypatch.setattr(mmap, "mmap", Seen)
    with a_line(tmp_path) as line:
        assert all(line.write(unit) for unit in range(UNITS - 1, -1, -1))
    assert len(buffers) > UNITS // 2
    assert [one() is None for one in buffers].count(False) <= 1, "the one in the hand"
