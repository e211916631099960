"""A part that another process or node is writing, read by one that follows it: only what its map calls durable, and only to be verified.

What makes that right on NFS, too:

* The map is opened anew each time, which makes a client ask its server, and read from where it ended the last time.
* Bytes are read through a descriptor that was opened after the map named them: pages that this client has kept since before (holes) are dropped
  then. It is opened from the descriptor that readers have got (``/proc/self/fd``), not by its name: so it is their file and shares their pages,
  whatever has that name meanwhile.
* What is durable is not written again by anybody (`uenvd.cache.partmap`), so what was verified once stays right.
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

from uenvd.cache.claim import look_at, refresh, unless_stale
from uenvd.cache.identity import CacheUser, as_user
from uenvd.cache.partmap import HEADER_BYTES, MapReader, map_of
from uenvd.cache.ranges import Ranges
from uenvd.cache.wishes import Wishes

_PIECE_BYTES: Final = 1 << 20
_GONE: Final = frozenset({errno.ENOENT, errno.ESTALE})


class Gone(Exception):
    """The file has no name any more, or is another one: nothing will come into it."""


class PartView:
    """One part of a shared directory, from outside. For one thread, but for `open_for_reader`. Methods block and raise `OSError`.

    Args:
        path: of the part.
        claim: of the claim of its writer.
        size_bytes: of the blob.
        user: whose rights are used.
        wishes: where its writer looks for what is asked for.

    """

    def __init__(self, path: Path, claim: Path, size_bytes: int, user: CacheUser, wishes: Wishes) -> None:
        self.path = path
        self.user = user
        self.wishes = wishes
        self.ended = False
        """The map has gone: its writer is ready, or has given up."""
        self._claim = claim
        self._size_bytes = size_bytes
        self._file_fd = self._fresh_fd = -1
        self._map = MapReader()
        self._header: bytes | None = None
        """Of the map: tells it from all others. The number of an inode does not, it is used again at once."""
        self._closing = threading.Lock()
        """For the one thing that other threads ask: a descriptor."""

    @property
    def has_file(self) -> bool:
        """Whether there was a part to be opened."""
        return self._file_fd >= 0

    @property
    def durable(self) -> Ranges:
        """What may be looked at, as far as is known here."""
        return self._map.durable

    @as_user
    def look(self) -> bool:
        """See what the writer has said since the last time; return whether it was something. Raises `Gone`, `OSError`."""
        if self._file_fd < 0:
            found = _opened(self.path)
            if found is None:
                return False
            self._file_fd = found
        return unless_stale(self._look_at_map, self.path.parent)

    def _look_at_map(self) -> bool:
        fd = _opened(map_of(self.path))
        if fd is None:
            self.ended = True
            self.check()
            return False
        try:
            return self._read_map(fd)
        finally:
            os.close(fd)

    def _read_map(self, fd: int) -> bool:
        known, self._header = self._header, os.pread(fd, HEADER_BYTES, 0).partition(b"\n")[0]
        shorter = os.fstat(fd).st_size < self._map.fed_bytes
        fresh = known != self._header or shorter or self._map.damaged
        if fresh:
            # Written anew: by its writer, by who goes on with the part, or it is that of another part.
            if known is not None:
                self.check()
            self._map = MapReader()
        self.ended = False
        news = False
        while not self._map.damaged and (data := os.pread(fd, _PIECE_BYTES, self._map.fed_bytes)):
            news = self._map.feed(data) or news
        if self._map.size_bytes not in (-1, self._size_bytes):
            self._map = MapReader()
            return False
        if news or fresh:
            self._close_fresh()
        return news

    @as_user
    def check(self) -> None:
        """Raise `Gone` if what was opened was removed, or another file has its name. That it became the blob is neither. Raises `OSError`."""
        if self._file_fd < 0:
            return
        try:
            self._close_fresh()
            mine = os.fstat(self._fresh())
        except OSError as error:
            if error.errno not in _GONE:
                raise
            raise Gone(f"{self.path.name} was removed") from None
        if mine.st_nlink == 0 or self._named() not in (None, (mine.st_dev, mine.st_ino)):
            raise Gone(f"{self.path.name} was removed")

    def _named(self) -> tuple[int, int] | None:
        """Return what tells the file that has the name now; None if there is none."""
        fd = _opened(self.path)
        if fd is None:
            return None
        try:
            status = os.fstat(fd)
            return status.st_dev, status.st_ino
        finally:
            os.close(fd)

    def read(self, first: int, size_bytes: int) -> bytes:
        """Return bytes of the part as they are on the server now, right or wrong; fewer behind its end. Raises `Gone`, `OSError`."""
        try:
            with self.user:
                fd = self._fresh()
            return _read_all(fd, first, size_bytes)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            raise Gone(f"{self.path.name} was removed") from None

    def again(self) -> None:
        """Ask the server anew at the next `read`: what was read was not right yet."""
        self._close_fresh()

    @as_user
    def open_for_reader(self) -> int:
        """Return a read-only descriptor of the file; the caller closes it. What may be read of it is the caller's to know. Raises `OSError`."""
        with self._closing:
            mine = os.dup(self._file_fd)
        try:
            return _reopened(mine)
        finally:
            os.close(mine)

    @as_user
    def writer(self) -> str:
        """Return the name of the node that writes; empty if it cannot be known."""
        with suppress(OSError):
            seen = look_at(self._claim)
            if seen is not None and seen.holder is not None:
                return seen.holder.host
        return ""

    def close(self) -> None:
        """Close our descriptors; what was given out lives on."""
        self._close_fresh()
        with self._closing:
            if self._file_fd >= 0:
                os.close(self._file_fd)
                self._file_fd = -1

    def _fresh(self) -> int:
        if self._fresh_fd < 0:
            self._fresh_fd = _reopened(self._file_fd)
        return self._fresh_fd

    def _close_fresh(self) -> None:
        if self._fresh_fd >= 0:
            os.close(self._fresh_fd)
            self._fresh_fd = -1


def _opened(path: Path) -> int | None:
    """Open what has a name on the server now; None if nothing has."""
    for again in (False, True):
        try:
            return unless_stale(
                lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), path.parent
            )
        except OSError as error:
            if error.errno not in _GONE:
                raise
        if not again:
            # An NFS client remembers for up to a minute that there was nothing.
            with suppress(FileNotFoundError):
                refresh(path.parent)
    return None


def _reopened(fd: int) -> int:
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    with suppress(OSError):
        os.posix_fadvise(again, 0, 0, os.POSIX_FADV_RANDOM)  # to read ahead would be to keep holes
    return again


def _read_all(fd: int, first: int, size_bytes: int) -> bytes:
    data = os.pread(fd, size_bytes, first)
    while 0 < len(data) < size_bytes:
        more = os.pread(fd, size_bytes - len(data), first + len(data))
        if not more:
            break
        data += more
    return data
