"""The process that waits for the end of a supervisor and all its workers, to be the next.

The *active* supervisor and its workers hold the writing end of a pipe, the *life pipe*, and nobody else does; its standby, forked from it,
waits at the reading end. Workers end with the active supervisor (PR_SET_PDEATHSIG). So a hang-up means that it and all its workers are gone,
and that none of them will touch the request slots any more.

For a moment there may be two standbys, a new one in place of one that knows too little. A new one writes its number where both see it before
it lets go of the writing end, so whoever sees the hang-up sees who is the newest: that one takes over, the other ends. Numbers are even and
odd in turn, each kind has its own place: a slow standby must not write over the number of one that is newer. If the newest was killed, too,
within that moment, nobody takes over: the listening socket then refuses connections, and the daemon starts others.
(tests/unit/fuse/test_succession_model.py goes through all of this.)

Sources: poll(2), pidfd_open(2), pipe(7).
"""

from __future__ import annotations

import logging
import mmap
import os
import select
import signal
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple

from uenvd.fuse.workforce import thread_states

_log = logging.getLogger("uenvd-fs")

_RETRY_S: Final = 0.1
_SHORT_LIFE_S: Final = 1.0
_NUMBER: Final = struct.Struct("=Q")
_NUMBERS: Final = struct.Struct("=QQ")


class _Child(NamedTuple):
    pid: int
    pidfd: int
    born_s: float


class Standby:
    """What a supervisor has to do with its standby; the standby has a copy of it.

    Args:
        label: for the log.
        look_s: how often the two look whether the other one was stopped (SIGSTOP); None: never.

    """

    def __init__(self, label: str, look_s: float | None) -> None:
        self._label = label
        self._look_s = look_s
        self._life_r, self._life_w = os.pipe2(os.O_CLOEXEC)
        self._child: _Child | None = None
        self._numbers = mmap.mmap(-1, _NUMBERS.size)
        """The numbers of the standbys forked last, which all of them see: the last even and the last odd one."""
        self._number = 0
        """In a standby: its own; in the active one: that of its standby."""
        self._next_s = 0.0
        self.stale = False
        """There is none, or it knows too little: another one is wanted."""

    @property
    def pid(self) -> int | None:
        """Of the one there is."""
        return None if self._child is None else self._child.pid

    @property
    def pidfd(self) -> int | None:
        """Readable when it has ended; then call `ended`."""
        return None if self._child is None else self._child.pidfd

    @property
    def due_s(self) -> float | None:
        """When `fork` is to be called (monotonic)."""
        return self._next_s if self.stale else None

    def fork(self, in_child: Callable[[], None]) -> bool:
        """Fork a standby that knows what this process knows now, in place of the one there is.

        ``in_child`` is called in it first. Returns True in the standby, when its turn has come and predecessor and workers are gone.
        """
        active, active_pidfd = os.getpid(), -1
        try:
            active_pidfd = os.pidfd_open(active)
            pid = os.fork()
        except OSError as error:
            if active_pidfd >= 0:
                os.close(active_pidfd)
            _log.warning("%s: no standby can be started: %s", self._label, error.strerror)
            self._next_s = time.monotonic() + _RETRY_S
            return False
        if pid == 0:
            in_child()
            self._number += 1
            self._wait_for_turn(active, active_pidfd)
            os.close(active_pidfd)
            self._succeed()
            return True
        os.close(active_pidfd)
        self._number += 1
        former, self._child = self._child, _Child(pid, os.pidfd_open(pid), time.monotonic())
        self.stale = False
        if former is not None:
            _end(former)
        return False

    def ended(self) -> None:
        """Take note of its end: another one is wanted."""
        assert self._child is not None
        os.waitid(os.P_PIDFD, self._child.pidfd, os.WEXITED)
        os.close(self._child.pidfd)
        self.stale = True
        now_s = time.monotonic()
        self._next_s = now_s + (_RETRY_S if now_s - self._child.born_s < _SHORT_LIFE_S else 0.0)
        self._child = None

    def end(self) -> None:
        """End it, and want no other."""
        self.stale = False
        if self._child is not None:
            _end(self._child)
            self._child = None

    def end_if_stopped(self) -> None:
        """End it if somebody has stopped it."""
        if self._child is not None:
            _end_if_stopped(self._label, self._child.pid, self._child.pidfd)

    def forget(self) -> None:
        """In a new process: the standby is that of the one that forked it."""
        if self._child is not None:
            os.close(self._child.pidfd)
            self._child = None

    def become_worker(self) -> None:
        """In a new worker: keep the writing end of the life pipe, nothing else."""
        self.forget()
        self._numbers.close()
        os.close(self._life_r)

    def _wait_for_turn(self, active: int, active_pidfd: int) -> None:
        """Wait for the end of the active one and all its workers; end here if a newer standby has seen it, too."""
        self.forget()
        _NUMBER.pack_into(self._numbers, self._number % 2 * _NUMBER.size, self._number)
        os.close(self._life_w)
        poll = select.poll()
        poll.register(self._life_r, 0)
        while not poll.poll(None if self._look_s is None else self._look_s * 1000):
            _end_if_stopped(self._label, active, active_pidfd)
        if max(_NUMBERS.unpack_from(self._numbers)) != self._number:
            os._exit(0)

    def _succeed(self) -> None:
        """Be the active one."""
        os.close(self._life_r)
        self._life_r, self._life_w = os.pipe2(os.O_CLOEXEC)
        self.stale, self._next_s = True, 0.0


def _end(child: _Child) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
    os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
    os.close(child.pidfd)


def _end_if_stopped(label: str, pid: int, pidfd: int) -> None:
    if "T" in thread_states(pid):
        _log.error("%s: pid %d is stopped; it is replaced", label, pid)
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
