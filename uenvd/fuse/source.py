"""A complete image file as a `uenvd.fuse.protocol.Source`."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress


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
