"""Request slots in shared memory: what a killed worker had in hand, its successor finds there and answers.

A slot is a page of state and a buffer. The kernel writes a request straight into the buffer (readv(2)), so there is no moment at which it
has left the kernel's queue and is not in the slot. The buffer begins with the request's header, whose ``unique`` (bytes 8 to 15) is never 0
for a request in hand: a worker zeroes it after its reply.

State, at the slot's start: u64 monotonic time of `Slot.begin` in ns, u32 attempts, u32 parked, u64 that time again, which outlives the
request, then u64 monotonic time since which the request waits for bytes of the image. One process at a time uses a slot, others read the
state: what they see may be a moment old.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Iterator

from uenvd.errors import InternalError

STATE_BYTES = 64
BUFFER_BYTES = 8192
"""As `uenvd.fuse.protocol.init.negotiate` arranges it with the kernel (FUSE_MIN_READ_BUFFER)."""
STRIDE_BYTES = STATE_BYTES + BUFFER_BYTES
_UNIQUE_OFFSET = 8
_BEGUN_OFFSET = 16
_WAITING_OFFSET = 24
_LENGTH = struct.Struct("=I")
_U32 = struct.Struct("=I")
_U64 = struct.Struct("=Q")
_STATE = struct.Struct("=QII")
_BEGUN = struct.Struct("=QIIQ")
_NOTHING = bytes(8)


class Slot:
    """One request in hand, or none."""

    __slots__ = ("_state", "_unique", "buffer", "vector")

    def __init__(self, memory: memoryview) -> None:
        self._state = memory[:STATE_BYTES]
        self.buffer = memory[STATE_BYTES:STRIDE_BYTES]
        """Where readv puts the request; its header at offset 0."""
        self.vector = [self.buffer]
        """The buffer as `os.readv` wants it."""
        self._unique = self.buffer[_UNIQUE_OFFSET : _UNIQUE_OFFSET + 8]

    def busy(self) -> bool:
        """Tell whether a request is in hand (or was, when its worker was killed)."""
        return self._unique != _NOTHING

    @property
    def unique(self) -> int:
        """The number of the request; 0 when there is none."""
        number: int = _U64.unpack(self._unique)[0]
        return number

    @property
    def length(self) -> int:
        """How many bytes the request has, by its own header; at most the buffer."""
        length: int = _LENGTH.unpack_from(self.buffer)[0]
        return min(length, BUFFER_BYTES)

    @property
    def started_ns(self) -> int:
        """When work on the request began (`time.monotonic_ns`); 0 before."""
        started: int = _U64.unpack_from(self._state)[0]
        return started

    @property
    def attempts(self) -> int:
        """How often work on the request was begun."""
        attempts: int = _U32.unpack_from(self._state, 8)[0]
        return attempts

    @property
    def parked(self) -> bool:
        """Whether the request waits for bytes of the image that are still on their way: nobody hangs."""
        return bool(_U32.unpack_from(self._state, 12)[0])

    @parked.setter
    def parked(self, parked: bool) -> None:
        _U32.pack_into(self._state, 12, parked)

    def begin(self) -> int:
        """Stamp the time, count the attempt; return how many that makes."""
        attempts = self.attempts + 1
        now_ns = time.monotonic_ns()
        _BEGUN.pack_into(self._state, 0, now_ns, attempts, 0, now_ns)
        return attempts

    def begin_first(self) -> int:
        """`begin` of a request that was read just now: its first attempt. Return the time (`time.monotonic_ns`)."""
        now_ns = time.monotonic_ns()
        _BEGUN.pack_into(self._state, 0, now_ns, 1, 0, now_ns)
        return now_ns

    @property
    def begun_ns(self) -> int:
        """When work on a request was begun here last, whether it is answered or not (`time.monotonic_ns`); 0: never."""
        begun: int = _U64.unpack_from(self._state, _BEGUN_OFFSET)[0]
        return begun

    @property
    def waiting_ns(self) -> int:
        """Since when the request waits for bytes of the image (`time.monotonic_ns`), whichever worker had it; 0 if it never did."""
        since: int = _U64.unpack_from(self._state, _WAITING_OFFSET)[0]
        return since

    def park(self) -> None:
        """Let the request wait for bytes of the image."""
        self.parked = True
        if not self.waiting_ns:
            _U64.pack_into(self._state, _WAITING_OFFSET, time.monotonic_ns())

    def rewind(self) -> None:
        """Forget the attempts, keep the request."""
        _STATE.pack_into(self._state, 0, 0, 0, 0)

    def clear_first(self) -> None:
        """`clear` of a request that never waited for bytes of the image."""
        self._unique[:] = _NOTHING
        _STATE.pack_into(self._state, 0, 0, 0, 0)

    def clear(self) -> None:
        """Forget the request: it is answered."""
        self._unique[:] = _NOTHING
        _STATE.pack_into(self._state, 0, 0, 0, 0)
        if self.waiting_ns:
            _U64.pack_into(self._state, _WAITING_OFFSET, 0)


class Slots:
    """All slots of one connection. A worker gets some of them for its own: `some`."""

    def __init__(self, memory: memoryview | mmap.mmap, count: int) -> None:
        """Lay the slots out in ``memory``, which has `size_bytes` at least and was all zeros at first."""
        view = memoryview(memory).cast("B")
        if count < 1 or len(view) < self.size_bytes(count):
            raise InternalError(f"{count} request slots in {len(view)} bytes")
        self._slots = tuple(Slot(view[i * STRIDE_BYTES : (i + 1) * STRIDE_BYTES]) for i in range(count))

    @staticmethod
    def size_bytes(count: int) -> int:
        """Return how much memory so many slots need."""
        return count * STRIDE_BYTES

    @classmethod
    def new_memory(cls, count: int) -> int:
        """Return a memfd with room for so many slots; the caller owns it. Raises `OSError`."""
        descriptor = os.memfd_create("uenvd-slots", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, cls.size_bytes(count))
        return descriptor

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, i: int) -> Slot:
        return self._slots[i]

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    def some(self, first: int, count: int) -> tuple[Slot, ...]:
        """Return ``count`` slots from ``first`` on: those of one worker."""
        return self._slots[first : first + count]
