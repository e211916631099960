"""What workers know of an image that is still arriving: which of its chunks are here and verified. Memory that the daemon writes.

The daemon makes two memfds. The *board* says what is here; workers can only read it. In the *log* workers note when each chunk was first
read, from which the order of a trace is made; the daemon believes it to be no more than that.

Board: a page with the header, then u64 ends of the chunks, then one byte for each chunk, 1 when it may be served. A byte is set after the
chunk's bytes are in the file, so whoever sees it and reads the file afterwards sees them. Log: u32 for each chunk, ms since the board was made
plus 1, 0 for never.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Final

from uenvd.errors import FormatError

_log = logging.getLogger("uenvd-fs")

_MAGIC: Final = 0x3152_5241_564E_4555
_HEADER: Final = struct.Struct("=QQIIIIQ")
"""Magic; size of the image; chunks; complete; deadline in ms; bytes of the cause; time of making (monotonic, ns)."""
_COMPLETE_OFFSET: Final = 20
_CAUSE_LENGTH_OFFSET: Final = 28
_CAUSE_OFFSET: Final = 64
MAX_CAUSE_BYTES: Final = 1024
_ENDS_OFFSET: Final = 4096
_MAX_CHUNKS: Final = 1 << 16
_NOT_HERE: Final = b"\0"


class Board:
    """A board that somebody else writes, for a worker or supervisor.

    ``board_fd`` and ``log_fd`` stay the caller's. Raises `FormatError`, `OSError`.
    """

    def __init__(self, board_fd: int, log_fd: int | None = None, *, writable: bool = False) -> None:
        length = os.fstat(board_fd).st_size
        if length < _ENDS_OFFSET:
            raise FormatError("the board of an arriving image is too short")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._memory = memoryview(mmap.mmap(board_fd, length, mmap.MAP_SHARED, protection))
        magic, self.size_bytes, self.count, _complete, deadline_ms, _length, made_ns = _HEADER.unpack_from(
            self._memory
        )
        if magic != _MAGIC or self.count > _MAX_CHUNKS or length < _ENDS_OFFSET + 9 * self.count:
            raise FormatError("the board of an arriving image makes no sense")
        self.deadline_s: float = deadline_ms / 1000
        """How long a reader waits for bytes."""
        states_offset = _ENDS_OFFSET + 8 * self.count
        self.ends: Sequence[int] = self._memory[_ENDS_OFFSET:states_offset].cast("Q").tolist()
        self._states = self._memory[states_offset : states_offset + self.count]
        self._made_ns = made_ns
        self._log: memoryview | None = None
        if log_fd is not None:
            log = mmap.mmap(log_fd, max(4 * self.count, 1), mmap.MAP_SHARED)
            self._log = memoryview(log)[: 4 * self.count].cast("I")
        self._noted = bytearray(self.count)

    @property
    def complete(self) -> bool:
        """Whether all of it is here, verified as a whole."""
        return bool(self._memory[_COMPLETE_OFFSET])

    @property
    def cause(self) -> str:
        """Why bytes do not come; empty while they do."""
        (length,) = struct.unpack_from("=I", self._memory, _CAUSE_LENGTH_OFFSET)
        text = bytes(self._memory[_CAUSE_OFFSET : _CAUSE_OFFSET + min(length, MAX_CAUSE_BYTES)])
        return text.decode(errors="replace")

    def chunks_of(self, first_byte: int, end_byte: int) -> range:
        """Return the numbers of the chunks that hold ``[first_byte, end_byte)``, none for what is not in the image."""
        first, end = max(0, first_byte), min(end_byte, self.size_bytes)
        if first >= end:
            return range(0)
        return range(bisect_right(self.ends, first), bisect_right(self.ends, end - 1) + 1)

    def span(self, numbers: range) -> tuple[int, int]:
        """Return the bytes ``[first, end)`` of neighbouring chunks (at least one)."""
        return (self.ends[numbers.start - 1] if numbers.start else 0), self.ends[numbers.stop - 1]

    def is_here(self, number: int) -> bool:
        """Tell whether a chunk may be served."""
        return bool(self._states[number])

    def covers(self, numbers: range) -> bool:
        """Tell whether all these chunks may be served."""
        return _NOT_HERE not in self._states[numbers.start : numbers.stop].tobytes()

    def missing(self, numbers: range) -> Iterator[range]:
        """Yield the runs of those of these chunks that are not here."""
        start = None
        for number in numbers:
            if self._states[number]:
                if start is not None:
                    yield range(start, number)
                start = None
            elif start is None:
                start = number
        if start is not None:
            yield range(start, numbers.stop)

    def note_read(self, numbers: range) -> None:
        """Note in the log that chunks are read, if it is for the first time."""
        if self._log is None:
            return
        noted = self._noted
        for number in numbers:
            if not noted[number]:
                noted[number] = 1
                if not self._log[number]:
                    self._log[number] = ((time.monotonic_ns() - self._made_ns) // 1_000_000 + 1) & 0xFFFF_FFFF

    def first_reads(self) -> list[int]:
        """Return the numbers of the chunks that were read, in the order of the first time."""
        if self._log is None:
            return []
        found = [(when, number) for number, when in enumerate(self._log) if when]
        return [number for _when, number in sorted(found)]


class OwnBoard(Board):
    """A board that this process makes and writes. Close it."""

    def __init__(self, lengths: Sequence[int], deadline_s: float) -> None:
        """Make the memory for chunks of these lengths; none is here. Raises `OSError`."""
        self._fd = os.memfd_create("uenvd-arrival", os.MFD_CLOEXEC)
        self._log_fd = os.memfd_create("uenvd-reads", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, _ENDS_OFFSET + 9 * len(lengths))
        os.ftruncate(self._log_fd, max(4 * len(lengths), 1))
        ends, end = [], 0
        for length in lengths:
            end += length
            ends.append(end)
        header = _HEADER.pack(_MAGIC, end, len(lengths), 0, int(deadline_s * 1000), 0, time.monotonic_ns())
        os.pwrite(self._fd, header, 0)
        os.pwrite(self._fd, struct.pack(f"={len(ends)}Q", *ends), _ENDS_OFFSET)
        super().__init__(self._fd, self._log_fd, writable=True)

    def descriptors(self) -> dict[str, int]:
        """Return descriptors for those who serve: of the board one that cannot write; the caller owns them. Raises `OSError`."""
        reader = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        return {"board": reader, "reads": os.dup(self._log_fd)}

    def set_here(self, number: int) -> None:
        """Let a chunk be served. Its bytes are in the file."""
        self._states[number] = 1

    def set_complete(self) -> None:
        """Everything is here."""
        self._memory[_COMPLETE_OFFSET] = 1

    def set_cause(self, text: str) -> None:
        """Say why bytes do not come."""
        data = text.encode()[:MAX_CAUSE_BYTES]
        self._memory[_CAUSE_OFFSET : _CAUSE_OFFSET + len(data)] = data
        struct.pack_into("=I", self._memory, _CAUSE_LENGTH_OFFSET, len(data))

    def close(self) -> None:
        """Close our descriptors; what was given out lives on."""
        for descriptor in (self._fd, self._log_fd):
            os.close(descriptor)
        self._fd = self._log_fd = -1


def take_board(named: dict[str, list[int]]) -> Board | None:
    """Map the board among the descriptors that came with an image, and close what it came in; None if there is none (that can be used)."""
    descriptors = [one for name in ("board", "reads") for one in named.pop(name, [])]
    try:
        return Board(*descriptors[:2]) if len(descriptors) == 2 else None
    except (FormatError, OSError, ValueError) as error:
        _log.error("%s", error)
        return None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
