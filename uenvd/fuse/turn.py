"""Whose turn it is to wait for the kernel's next request: one worker's, while the others sleep until he has something long to do.

The kernel wakes the worker that has slept longest, so workers that all wait would take every second request each: cold caches, a processor to
be woken for each request, everything known twice. The turn is a POSIX record lock (`uenvd.fuse.shared` says why): a killed worker loses it.
Who decodes a block gives it away first, so requests are never held up by work.

A worker that is stopped (SIGSTOP, a debugger) while it has the turn would hold up everybody: whoever waits looks after some seconds whether
requests wait, too, and then serves without the turn.
"""

from __future__ import annotations

import errno
import fcntl
import select
import signal
from contextlib import suppress
from types import FrameType

_OFFSET = 1 << 49
"""The byte of the memfd whose lock it is."""
_PATIENCE_S = 5.0


class _Impatient(BaseException):
    """Ends the wait for the lock; not an `Exception`, so that nothing on the way swallows it."""


class Turn:
    """The turn of one worker. For the main thread of a process: it takes the handler of SIGALRM and ITIMER_REAL."""

    def __init__(self, lock_fd: int | None, fuse_fd: int) -> None:
        """``lock_fd``: a file that all workers share; None for a worker that has no others, whose turn it always is."""
        self._fd = lock_fd
        self._requests = select.poll()
        self._requests.register(fuse_fd, select.POLLIN)
        self.mine = lock_fd is None
        self._waiting = False
        if lock_fd is not None:
            signal.signal(signal.SIGALRM, self._alarm)

    def take(self) -> None:
        """Wait for the turn. Afterwards one may read requests: because it is ours, or because its owner does not. Raises `OSError`."""
        while not self.mine:
            self.mine = self._locked_at_once() or self._locked()
            if not self.mine and self._requests.poll(0):
                return

    def give(self) -> None:
        """Let another worker have it, before work that takes a while. Raises `OSError`."""
        if self.mine and self._fd is not None:
            self.mine = False
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, _OFFSET)

    def requested(self) -> bool:
        """Tell whether a request waits."""
        return bool(self._requests.poll(0))

    def _locked(self) -> bool:
        """Wait for the lock with patience."""
        assert self._fd is not None
        with suppress(_Impatient):
            signal.setitimer(signal.ITIMER_REAL, _PATIENCE_S)
            self._waiting = True
            fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, _OFFSET)
            self._waiting = False
            return True
        return self._locked_at_once()  # the alarm may have come when we had it

    def _locked_at_once(self) -> bool:
        assert self._fd is not None
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _OFFSET)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            return False
        return True

    def _alarm(self, _number: int, _frame: FrameType | None) -> None:
        if self._waiting:
            self._waiting = False
            raise _Impatient
