"""An image file as a `uenvd.fuse.protocol.Source`: complete, or still arriving."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import struct
from contextlib import suppress
from typing import Final

from uenvd.fuse.arrival import Board
from uenvd.fuse.protocol import Missing

WANT: Final = struct.Struct("=cQQ")
"""What a worker tells its supervisor: ``W``, first byte, end byte."""
WOKEN: Final = b"H"
"""What it hears when bytes have come."""
SETTLED: Final = b"S"
"""What a worker says when it needs to hear of no more bytes, and may sleep in read(2) from now on."""
_MAX_WAKES: Final = 64


class FileSource:
    """The bytes of a file from an offset on.

    Args:
        image_fd: open for reading; stays the caller's.
        offset_bytes: where in the file the image begins.

    """

    def __init__(self, image_fd: int, offset_bytes: int = 0) -> None:
        self.fd = image_fd
        self.offset_bytes = offset_bytes

    def read(self, pos_bytes: int, size_bytes: int) -> bytes:
        """Return the bytes; fewer at the end of the file. Raises `OSError`."""
        return os.pread(self.fd, size_bytes, self.offset_bytes + pos_bytes)

    def size_bytes(self) -> int:
        """Return the size of the image. Raises `OSError`."""
        return max(0, os.fstat(self.fd).st_size - self.offset_bytes)

    def want(self, first_byte: int, end_byte: int) -> None:
        """Nothing is ever missing."""

    def woken(self) -> None:
        """Nobody wakes."""

    def will_need(self, pos_bytes: int, size_bytes: int) -> None:
        """Let the kernel read ahead."""
        with suppress(OSError):
            os.posix_fadvise(self.fd, self.offset_bytes + pos_bytes, size_bytes, os.POSIX_FADV_WILLNEED)

    def done_with(self, pos_bytes: int, size_bytes: int) -> None:
        """Let the kernel forget the pages of the file but the last, which the bytes after these share."""
        start = (self.offset_bytes + pos_bytes) & -mmap.PAGESIZE
        size = ((self.offset_bytes + pos_bytes + size_bytes) & -mmap.PAGESIZE) - start
        if size > 0:  # a length of 0 would mean: to the end of the file
            with suppress(OSError):
                os.posix_fadvise(self.fd, start, size, os.POSIX_FADV_DONTNEED)


class ArrivingSource(FileSource):
    """The bytes of a file that is still being written: only chunks that the board shows are read.

    Args:
        image_fd: the file, open for reading; stays the caller's.
        board: which chunks are here.
        channel: to the supervisor: wants go out, and it is readable when something has come.

    """

    def __init__(self, image_fd: int, board: Board, channel: socket.socket) -> None:
        super().__init__(image_fd)
        self.board = board
        self._channel = channel
        self._wanted: set[tuple[int, int]] = set()

    @property
    def complete(self) -> bool:
        """Whether everything is here: then a `FileSource` does, too."""
        return self.board.complete

    def read(self, pos_bytes: int, size_bytes: int) -> bytes:
        """Return the bytes; fewer at the end of the image only. Raises `Missing`, `OSError`."""
        board = self.board
        numbers = board.chunks_of(pos_bytes, pos_bytes + size_bytes)
        board.note_read(numbers)
        if not board.covers(numbers):
            runs = list(board.missing(numbers))
            if runs:
                raise Missing(board.span(runs[0])[0], board.span(runs[-1])[1])
        size_bytes = max(0, min(size_bytes, board.size_bytes - pos_bytes))
        try:
            data = os.pread(self.fd, size_bytes, pos_bytes)
        except OSError as error:
            if error.errno != errno.ESTALE or board.complete or not numbers:
                raise
            # Removed on its server, because somebody else brings the image now: another file will come.
            raise Missing(*board.span(numbers)) from error
        if len(data) != size_bytes:
            raise OSError(errno.EIO, f"the file of the image has become shorter, at {pos_bytes + len(data)}")
        return data

    def size_bytes(self) -> int:
        """Return the size that the image will have."""
        size_bytes: int = self.board.size_bytes
        return size_bytes

    def want(self, first_byte: int, end_byte: int) -> None:
        """Ask for missing bytes; what was asked for since the last wake is not asked for again."""
        wanted = (first_byte, end_byte)
        if wanted not in self._wanted:
            self._wanted.add(wanted)
            with suppress(OSError):
                self._channel.send(WANT.pack(b"W", first_byte, end_byte))

    def woken(self) -> None:
        """Take what the supervisor said off the channel."""
        self._wanted = {
            (first, end)
            for first, end in self._wanted
            if not self.board.covers(self.board.chunks_of(first, end))
        }
        with suppress(OSError):
            for _ in range(_MAX_WAKES):
                if not self._channel.recv(16, socket.MSG_DONTWAIT):
                    break

    def give_up(self, missing: Missing, waited_s: float) -> OSError | None:
        """Return the error for a reader who has waited so long; None while he may wait on."""
        board = self.board
        if waited_s < board.deadline_s:
            return None
        # So that the next reader's wish is heard again.
        self._wanted.discard((missing.first_byte, missing.end_byte))
        number = board.chunks_of(missing.first_byte, missing.end_byte).start
        why = board.cause or "nobody brings it"
        return OSError(
            errno.EIO, f"chunk {number} of the image did not come within {board.deadline_s:.0f} s: {why}"
        )
