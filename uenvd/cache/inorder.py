"""The hash of a blob on its way: from the connections' buffers, as far as memory goes, else from the file.

Reading a blob back for its hash costs half as much as writing it. So a connection hands on the buffer that it has just written, and receives
into another one. Bytes that come in order are hashed at once; where the hash is `BACKLOG` buffers behind the connection waits, for what
has to be read back once is followed by more of it. What comes before its turn is kept while all transfers of the process together keep no
more than `KEPT_BYTES`, else it is read back later.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Final

from uenvd.cache.partial import Partial
from uenvd.errors import Cancelled

BUFFER_BYTES: Final = 2 << 20
"""Of one huge page. What passes from thread to thread costs a wake-up, which on a virtual machine takes longer than to copy 512 KiB."""
BACKLOG: Final = 4
LAG_BYTES: Final = 8 << 20
"""So near to what is hashed bytes count as in order."""
KEPT_BYTES: Final = 72 << 20
"""What three connections bring of their pieces while a fourth brings the first one."""
_TICK_S: Final = 0.1


class Budget:
    """How many buffers may be kept. Safe for threads."""

    def __init__(self, buffers: int) -> None:
        self._left = buffers
        self._state = threading.Lock()

    def take(self) -> bool:
        """Take one, if there is one left."""
        with self._state:
            taken = self._left > 0
            self._left -= taken
            return taken

    def give(self) -> None:
        """Give one back."""
        with self._state:
            self._left += 1


_kept = Budget(KEPT_BYTES // BUFFER_BYTES)


@dataclass(frozen=True, slots=True)
class _Written:
    """Bytes that were written and are to be hashed."""

    first: int
    data: memoryview
    mark: int
    buffer: memoryview
    """Of which they are a part; nobody else uses it."""
    release: Callable[[], None]


class Hand:
    """The buffer of one connection; belongs to its thread."""

    def __init__(self, line: InOrder) -> None:
        self.buffer = line.another()
        self._line = line

    def passes_on(self, first: int, start: int, end: int, mark: int | None, frontier: int) -> bool:
        """Say that ``buffer[start:end]`` was written at ``first``; where this returns true it will be hashed, and ``buffer`` is another one.

        Args:
            first: place in the blob.
            start: place in the buffer.
            end: end in the buffer.
            mark: what `Partial.write_at` returned.
            frontier: up to where the blob is there without a gap.

        Raises `Cancelled` when the transfer is over.

        """
        if mark is None or not self._line.put(first, self.buffer[start:end], mark, self.buffer, frontier):
            return False
        self.buffer = self._line.another()
        return True


class InOrder:
    """Hashes a `Partial` in one thread (`run`), fed by others.

    Args:
        partial: what is hashed.
        over: whether the transfer has ended.
        kept: how many buffers may be kept until it is their turn.

    """

    def __init__(self, partial: Partial, over: Callable[[], bool], kept: Budget = _kept) -> None:
        self._partial = partial
        self._over = over
        self._kept = kept
        self._ready: SimpleQueue[_Written | None] = SimpleQueue()
        self._waiting: dict[int, _Written] = {}
        """By their first byte; of the thread in `run`."""
        self._behind = False
        """There may be bytes that nobody hands on. Others are on their way here as soon as they are written: reading them back would be in vain."""
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        self._room = threading.Semaphore(BACKLOG)
        self._state = threading.Lock()
        self._closed = False
        self._queued_end = 0
        self._nudged = False

    def another(self) -> memoryview:
        """Return a buffer."""
        try:
            return self._free.get_nowait()
        except Empty:
            # Not from the heap, which would keep what many transfers had at a time.
            pages = mmap.mmap(-1, BUFFER_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a kernel without huge pages
                pages.madvise(mmap.MADV_HUGEPAGE)
            return memoryview(pages)

    def put(self, first: int, data: memoryview, mark: int, buffer: memoryview, frontier: int) -> bool:
        """Hand bytes on with the buffer that they are in, and tell whether they were taken. May wait; raises `Cancelled`."""
        if self._is_in_order(first, frontier):
            if not self._room.acquire(timeout=_TICK_S):
                # Bytes before them may have been forgotten as wrong: then this connection may be the one that has to bring them.
                if self._over():
                    raise Cancelled("the transfer is over")
                return False
            self._queued_end = first + len(data)
            release: Callable[[], None] = self._room.release
        elif self._kept.take():
            release = self._kept.give
        else:
            return False
        with self._state:
            if not self._closed:
                self._ready.put(_Written(first, data, mark, buffer, release))
                return True
        release()
        return False

    def nudge(self) -> None:
        """Say that there may be something to read back, or nothing more to come."""
        if not self._nudged:
            self._nudged = True
            self._ready.put(None)

    def run(self, until: Callable[[], bool]) -> None:
        """Hash until ``until``, which is asked after each step, or the end of the transfer. Raises as `Partial.catch_up`."""
        self.nudge()
        try:
            while not self._over() and not until():
                self._sort_in()
                self._advance()
        finally:
            with self._state:
                self._closed = True
            self._sort_in(wait=False)
            for written in self._waiting.values():
                written.release()
            self._waiting.clear()
            self._free = SimpleQueue()  # who holds this object holds no memory

    def _is_in_order(self, first: int, frontier: int) -> bool:
        """Tell whether bytes that begin at ``first`` follow, nearly, what was hashed or handed on."""
        reached = max(self._queued_end, self._partial.hashed_bytes)
        return reached <= first <= min(frontier, reached + LAG_BYTES)

    def _sort_in(self, *, wait: bool = True) -> None:
        try:
            written = self._ready.get(wait, _TICK_S)
        except Empty:
            self._behind = True
            return
        try:
            while True:
                if written is None:
                    self._nudged, self._behind = False, True
                else:
                    self._done(self._waiting.pop(written.first, None))
                    self._waiting[written.first] = written
                written = self._ready.get_nowait()
        except Empty:
            pass

    def _advance(self) -> None:
        """Hash what can be hashed; return early when there is news."""
        while not self._over():
            at = self._partial.hashed_bytes
            for first in [one for one in self._waiting if one <= at]:
                written = self._waiting.pop(first)
                self._partial.hash_written(first, written.data, written.mark)
                self._done(written)
            if self._partial.hashed_bytes == at and self._behind:
                end = min(self._waiting, default=self._partial.descriptor.size_bytes)
                self._partial.catch_up(self._has_news, end)
                self._behind = self._partial.hashed_bytes == end or self._has_news()
            if self._partial.hashed_bytes == at or not self._ready.empty():
                return

    def _done(self, written: _Written | None) -> None:
        if written is not None:
            written.release()
            self._free.put(written.buffer)

    def _has_news(self) -> bool:
        return self._over() or not self._ready.empty()
