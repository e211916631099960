"""Whoever serves is killed at every line of the code that touches a request slot: the kernel gets one answer to each request all the same.

The kernel is played: requests that were read and not answered, and only these, take an answer. A kill is an exception that nothing on the way
catches, raised by a line tracer. What the dead one left is the shared memory, from which its successor goes on.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import pytest

from uenvd.fuse import attend as attend_module
from uenvd.fuse import channel as channel_module
from uenvd.fuse import slots as slots_module
from uenvd.fuse.attend import Attendant
from uenvd.fuse.channel import Channel
from uenvd.fuse.faults import Faults
from uenvd.fuse.protocol import Missing, Negotiated, Opcode
from uenvd.fuse.protocol import reply as r
from uenvd.fuse.protocol import request as q
from uenvd.fuse.slots import Slots

SLOTS = 4
FILES = frozenset(module.__file__ for module in (attend_module, channel_module, slots_module))


class Killed(BaseException):
    """SIGKILL."""


class Kernel:
    """The queues of one connection. Its descriptor is always readable: reading tells that there is nothing."""

    def __init__(self, fd: int, requests: Sequence[bytes]) -> None:
        self.fd = fd
        self.pending = deque(requests)
        self.in_hand: set[int] = set()
        self.answers: dict[int, list[int]] = {}
        """Errnos of the replies to each request."""
        self.asked = {
            q.HEADER.unpack_from(one)[2]
            for one in requests
            if q.HEADER.unpack_from(one)[1] not in q.UNANSWERED
        }

    def read(self, _fd: int, vector: Sequence[memoryview]) -> int:
        if not self.pending:
            raise OSError(errno.ENODEV, "nothing more will come")
        request = self.pending.popleft()
        vector[0][: len(request)] = request
        _length, opcode, unique, *_ = q.HEADER.unpack_from(request)
        if opcode not in q.UNANSWERED:
            self.in_hand.add(unique)
        return len(request)

    def write(self, _fd: int, data: bytes) -> int:
        length, error, unique = r.OUT.unpack_from(data)
        assert length == len(data)
        if unique not in self.in_hand:
            raise OSError(errno.ENOENT, "answered already")
        self.in_hand.remove(unique)
        self.answers.setdefault(unique, []).append(-error)
        return length

    def writev(self, fd: int, parts: Sequence[bytes]) -> int:
        return self.write(fd, b"".join(parts))


def request(unique: int, opcode: Opcode, node: int = 1, body: bytes = b"") -> bytes:
    return q.HEADER.pack(q.HEADER_BYTES + len(body), opcode, unique, node, 0, 0, 1, 0, 0) + body


class Source:
    """Bytes come as soon as they are wanted."""

    def __init__(self) -> None:
        self.wake_r, self.wake_w = os.pipe()
        self.here = False

    def want(self, _first: int, _end: int) -> None:
        os.write(self.wake_w, b"H")

    def woken(self) -> None:
        self.here = True
        os.read(self.wake_r, 16)

    def close(self) -> None:
        os.close(self.wake_r)
        os.close(self.wake_w)


class Tree:
    shared = None
    before_work: Callable[[], None]

    def __init__(self) -> None:
        self.source = Source()


class Answers:
    """READ needs bytes that are missing at first, everything else is answered at once."""

    last_read = None

    def __init__(self, tree: Tree, _faults: Faults) -> None:
        self._source = tree.source

    def answer(self, buffer: memoryview, _length: int) -> list[bytes] | None:
        _length, opcode, unique, *_ = q.HEADER.unpack_from(buffer)
        if opcode == Opcode.READ and not self._source.here:
            raise Missing(0, 1)
        return None if opcode in q.UNANSWERED else [r.OUT.pack(16, 0, unique)]


@pytest.fixture
def descriptor(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(channel_module, "Answers", Answers)
    monkeypatch.setattr(channel_module, "Ahead", lambda _tree: None)
    fd = os.memfd_create("kernel")
    yield fd
    os.close(fd)


def new_slots() -> Slots:
    return Slots(mmap.mmap(-1, Slots.size_bytes(SLOTS)), SLOTS)


def run(kernel: Kernel, step: Callable[[], object], lines: int | None) -> int | None:
    """Run a process until it ends, or is killed before it runs so many lines. Returns how many it ran, None when it was killed."""
    count = 0

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            if count == lines:
                raise Killed
            count += 1
        return trace

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "readv", kernel.read)
        patch.setattr(os, "writev", kernel.writev)
        patch.setattr(os, "write", lambda fd, data: (kernel.write if fd == kernel.fd else write)(fd, data))
        former = sys.gettrace()
        sys.settrace(trace)
        try:
            step()
        except Killed:
            return None
        finally:
            sys.settrace(former)
    return count


write = os.write


def attends(kernel: Kernel, slots: Slots, *, refusing: bool = False) -> Callable[[], object]:
    """A supervisor without an image, until the kernel has no more to ask."""

    def live() -> None:
        attendant = Attendant(kernel.fd, slots)
        attendant.begin(refusing=refusing)
        while not attendant.over:
            slot = attendant.take()
            if slot is not None:
                attendant.deal(slot)
            elif not attendant.has_room:
                return

    return live


def works(kernel: Kernel, slots: Slots, tree: Tree) -> Callable[[], object]:
    """A worker to which all slots belong."""
    return lambda: Channel(
        kernel.fd,
        tree,  # type: ignore[arg-type]
        Negotiated(41, 0, 1 << 20, 256),
        slots.some(0, SLOTS),
        Faults("x"),
        source_wake_fd=tree.source.wake_r,
    ).serve()


EARLY = (
    request(2, Opcode.GETATTR),
    request(4, Opcode.LOOKUP, body=b"one\0"),
    request(6, Opcode.FORGET, body=bytes(8)),
    request(5, Opcode.INTERRUPT, body=struct.pack("=Q", 4)),
    request(8, Opcode.LOOKUP, body=b"two\0"),
    request(9, Opcode.INTERRUPT, body=struct.pack("=Q", 99)),
    request(10, Opcode.GETATTR),
    request(12, Opcode.OPENDIR),
)
LATE = (
    request(2, Opcode.LOOKUP, body=b"one\0"),
    request(4, Opcode.READ, body=bytes(40)),
    request(6, Opcode.FORGET, body=bytes(8)),
    request(8, Opcode.READ, body=bytes(40)),
    request(10, Opcode.GETATTR),
)


def survive(descriptor: int, requests: Sequence[bytes], early: Sequence[int], late: Sequence[int]) -> Kernel:
    """Kill supervisors that attend, then workers, after so many lines each; let the last worker live to the end."""
    kernel, slots, tree = Kernel(descriptor, requests), new_slots(), Tree()
    try:
        for lines in early:
            run(kernel, attends(kernel, slots), lines)
        for lines in late:
            run(kernel, works(kernel, slots, tree), lines)
        assert run(kernel, works(kernel, slots, tree), None) is not None
    finally:
        tree.source.close()
    assert set(kernel.answers) == kernel.asked, f"never answered: {kernel.asked - set(kernel.answers)}"
    assert all(len(answers) == 1 for answers in kernel.answers.values())
    assert not any(slot.busy() for slot in slots)
    return kernel


def length_of(descriptor: int, requests: Sequence[bytes], *, early: bool) -> int:
    """Return how many lines a process runs that nobody kills."""
    kernel, slots, tree = Kernel(descriptor, requests), new_slots(), Tree()
    step = attends(kernel, slots) if early else works(kernel, slots, tree)
    count = run(kernel, step, None)
    tree.source.close()
    assert count is not None
    return count


def test_supervisor_never_sleeps_in_read(descriptor: int) -> None:
    """Its predecessor may have left the descriptor to workers, which do; then it could not hear of the image."""
    os.set_blocking(descriptor, True)
    Attendant(descriptor, new_slots()).begin()
    assert not os.get_blocking(descriptor)


def test_supervisor_that_attends(descriptor: int) -> None:
    for lines in range(length_of(descriptor, EARLY, early=True) + 1):
        kernel = survive(descriptor, EARLY, [lines], [])
        assert kernel.answers[8] == [0]
        assert kernel.answers[4] in ([0], [errno.EINTR])


def test_worker(descriptor: int) -> None:
    for lines in range(length_of(descriptor, LATE, early=False) + 1):
        kernel = survive(descriptor, LATE, [], [lines])
        assert set(map(tuple, kernel.answers.values())) == {(0,)}, "one death is no reason to refuse"


def test_several_in_a_row(descriptor: int) -> None:
    dice = random.Random(3)
    early, late = length_of(descriptor, EARLY, early=True), length_of(descriptor, LATE, early=False)
    for _ in range(400):
        deaths = [dice.randrange(early) for _ in range(dice.randrange(4))]
        survive(descriptor, EARLY, deaths, [dice.randrange(late) for _ in range(dice.randrange(3))])


def test_supervisor_that_refuses(descriptor: int) -> None:
    """Who comes after it refuses, too."""
    kernel, slots = Kernel(descriptor, EARLY), new_slots()
    whole = run(kernel, attends(kernel, slots, refusing=True), None)
    assert whole is not None
    assert set(map(tuple, kernel.answers.values())) == {(errno.EIO,)}
    for lines in range(whole + 1):
        kernel, slots = Kernel(descriptor, EARLY), new_slots()
        run(kernel, attends(kernel, slots, refusing=True), lines)
        run(kernel, attends(kernel, slots, refusing=True), None)
        assert set(kernel.answers) == kernel.asked
