"""Calls of the cache from the daemon's tasks: in threads of their own, each with a deadline.

A hard-mounted file system whose server is gone does not fail, it waits; so may any call of the cache. In trio's common threads a few of those
would stop everything else of the daemon. Here they stop at most `THREADS` threads, and the request ends by its deadline with an error
that says so. The thread itself cannot be stopped: it ends with the trouble.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import trio

from uenvd.daemon.threads import ThreadLimit
from uenvd.errors import StorageError

T = TypeVar("T")

THREADS: Final = 32
ANSWER_S: Final = 20.0
"""For what reads or writes a few small files."""
CHANGE_S: Final = 90.0
"""For what waits for other nodes, too, or removes images."""


_threads: Final = ThreadLimit("threads of the cache", THREADS)


async def call(
    work: Callable[..., T],
    *args: Any,  # noqa: ANN401 -- handed through
    deadline_s: float = ANSWER_S,
    dispose: Callable[[T], None] | None = None,
) -> T:
    """Return ``work(*args)``. Raises what it raises, and `StorageError` when it takes longer than ``deadline_s``.

    ``dispose`` gets a result that nobody waits for any more (a descriptor to close), in a thread.
    """
    attempt = _Attempt(lambda: work(*args), dispose)
    try:
        with trio.fail_after(deadline_s):
            result = await trio.to_thread.run_sync(
                attempt.run, limiter=_threads.limiter(), abandon_on_cancel=True
            )
            attempt.taken = True
            return result
    except trio.TooSlowError:
        raise StorageError(
            f"the file system of the cache has not answered for {deadline_s:g} s",
            hint="see whether its server is up; nothing has to be restarted when it is back",
        ) from None
    finally:
        attempt.leave()


class _Attempt(Generic[T]):
    """One call, and what becomes of its result."""

    def __init__(self, work: Callable[[], T], dispose: Callable[[T], None] | None) -> None:
        self._work = work
        self._dispose = dispose
        self._lock = threading.Lock()
        self._results: list[T] = []
        self._left = False
        self.taken = False
        """The caller has the result."""

    def run(self) -> T:
        """Do it (in the thread)."""
        result = self._work()
        with self._lock:
            self._results.append(result)
            orphaned = self._left
        if orphaned:
            self._drop()
        return result

    def leave(self) -> None:
        """The caller goes on, with the result or without it."""
        with self._lock:
            self._left = True
            orphaned = bool(self._results) and not self.taken
        if orphaned:
            threading.Thread(target=self._drop, name="dispose", daemon=True).start()

    def _drop(self) -> None:
        if self._dispose is not None:
            self._dispose(self._results.pop())
