"""Limits on the threads that one kind of blocking call may have, so that calls which hang stop only their own kind."""

from __future__ import annotations

import trio


class ThreadLimit:
    """At most ``count`` threads in each run of trio: a capacity limiter belongs to one run, and tests have many."""

    def __init__(self, kind: str, count: int) -> None:
        self._of_run: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar(kind)
        self._count = count

    def limiter(self) -> trio.CapacityLimiter:
        """Return the limiter of the present run, for `trio.to_thread.run_sync`."""
        try:
            return self._of_run.get()
        except LookupError:
            limiter = trio.CapacityLimiter(self._count)
            self._of_run.set(limiter)
            return limiter
