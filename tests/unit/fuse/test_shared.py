"""Decoded blocks shared by processes: right bytes, bounded memory, nobody's death holds anybody up."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator

import pytest

from uenvd.fuse.shared import SharedBlocks
from uenvd.squashfs import Block

SIZE = 4096


@pytest.fixture
def shared() -> Iterator[SharedBlocks]:
    made = SharedBlocks.create(1 << 20)
    made.attach(SIZE)
    yield made
    os.close(made.fd)


def block(number: int) -> Block:
    return Block(96 + 1000 * number, 1000, True, SIZE)


def content(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE)


def in_child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def test_slices(shared: SharedBlocks) -> None:
    assert shared.get(block(1), 0, 10) is None
    shared.put(block(1), content(1))
    assert shared.has(block(1))
    assert shared.get(block(1), 0, SIZE) == content(1)
    assert shared.get(block(1), 100, 300) == content(1)[100:300]
    shared.put(block(2), b"short")
    assert shared.get(block(2), 1, 5) == b"hort"
    assert shared.get(block(2), 1, 6) is None, "beyond the block"
    shared.put(block(3), bytes(SIZE + 1))
    assert not shared.has(block(3)), "larger than a block can be"


def test_memory_is_bounded_and_every_hit_right(shared: SharedBlocks) -> None:
    for number in range(2000):
        shared.put(block(number), content(number))
    hits = 0
    for number in range(2000):
        data = shared.get(block(number), 0, SIZE)
        hits += data is not None
        assert data in (None, content(number))
    assert 100 < hits <= (1 << 20) // SIZE


@pytest.mark.parametrize("size_bytes", [0, 4096, 20_000, 40_000])
def test_little_memory(size_bytes: int) -> None:
    made = SharedBlocks.create(size_bytes)
    made.attach(SIZE)
    for number in range(50):
        made.put(block(number), content(number))
        assert made.get(block(number), 0, SIZE) in (None, content(number))
    os.close(made.fd)


def test_processes_at_once_see_whole_blocks(shared: SharedBlocks) -> None:
    def work() -> None:
        rng = random.Random(os.getpid())
        for _ in range(3000):
            number = rng.randrange(600)
            data = shared.get(block(number), 0, SIZE)
            if data is None:
                shared.put(block(number), content(number))
            elif data != content(number):
                os._exit(3)

    pids = [in_child(work) for _ in range(3)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]


def test_a_block_is_decoded_once(shared: SharedBlocks) -> None:
    counted, count = os.pipe()
    gate, open_gate = os.pipe()

    def work() -> None:
        os.read(gate, 1)
        with shared.decoding(block(5)):
            if shared.get(block(5), 0, SIZE) is None:
                os.write(count, b"x")
                shared.put(block(5), content(5))
        if shared.get(block(5), 0, SIZE) != content(5):
            os._exit(3)

    pids = [in_child(work) for _ in range(4)]
    os.write(open_gate, b"    ")
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    os.close(count)
    assert os.read(counted, 10) == b"x"
    for fd in (counted, gate, open_gate):
        os.close(fd)


def test_killed_while_decoding(shared: SharedBlocks) -> None:
    told, tell = os.pipe()

    def work() -> None:
        with shared.decoding(block(6)):
            os.write(tell, b"x")
            signal.pause()

    pid = in_child(work)
    os.read(told, 1)
    assert not shared.begin_ahead(block(6)), "somebody is at it"
    with shared.decoding(block(6)):
        pass  # after some patience: he does not come to an end
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert shared.begin_ahead(block(6)), "the kernel has let go of his lock"
    shared.end_ahead(block(6))
    os.close(told)
    os.close(tell)
