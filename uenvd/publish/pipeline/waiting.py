"""Waiting that ends early for a signal: SIGINT, SIGTERM and SIGHUP ask a run to stop; a second one stops it at once."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Final

_ASKED: Final = (signal.SIGINT, signal.SIGTERM)


class Waker:
    """Notices signals between two steps of a run."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        """The signal that asked to stop."""
        self._read, self._write = -1, -1

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM over; for the main thread."""
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        before = {number: signal.signal(number, self._handle) for number in _ASKED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(self._read)
            os.close(self._write)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, b"\0")

    def wait(self, seconds: float, fds: Sequence[int] = ()) -> None:
        """Sleep; return early when one of ``fds`` is readable or a signal has come (at once, if one has come before)."""
        end = time.monotonic() + seconds
        poll = select.poll()
        for fd in (self._read, *fds):
            poll.register(fd, select.POLLIN)
        if self.asked is not None and not fds:
            # The byte stays in the pipe: what is waited for now is the end of what was asked to stop.
            time.sleep(min(seconds, 0.1))
            return
        poll.poll(max(0.0, end - time.monotonic()) * 1000)


class Terminated(KeyboardInterrupt):
    """SIGTERM came: everything is put away as after Ctrl-C."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end this process as Ctrl-C does: through every ``finally``. For the main thread."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        # Once: what is put away now shall not be interrupted by a second one.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
