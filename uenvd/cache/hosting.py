"""What the writer of a blob in a shared directory does for the nodes that read it meanwhile (`uenvd.cache.partview`).

It fetches early what they wish for (`uenvd.cache.wishes`), and makes durable soon what was waited for here or there: only what its map calls
durable may be shown by others, and on NFS nobody else sees bytes before they are flushed. Both in a thread of its own, at most every
`LOOK_S`, and never longer than a fifth of the time, so that a slow file system does not hold the pull up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final

from uenvd.cache.partial import Partial
from uenvd.cache.wishes import Wish
from uenvd.errors import InUse, StorageError

log = logging.getLogger(__name__)

LOOK_S: Final = 0.25
SILENT_S: Final = 30.0
"""Who waits asks anew every few seconds (`uenvd.daemon.following`); a wish that stays the same for so long is a dead node's."""
_REST: Final = 4
"""A pause is at least so many times as long as the look or flush before it took."""
_END_S: Final = 0.15
_MAX_PENDING: Final = 4096


class Hosting:
    """A context manager around a transfer into a `Partial`; does nothing in a directory that no other node sees.

    Args:
        partial: stays the caller's.
        want: called, in the thread, with bytes ``[first, end)`` that another node waits for.

    """

    def __init__(self, partial: Partial, want: Callable[[int, int], None]) -> None:
        self._partial = partial
        self._want = want
        self._over = False
        self._noted = False
        self._state = threading.Condition()
        self._asked: dict[str, tuple[Wish, float]] = {}
        """By token: the last wish, and when it was seen first (monotonic)."""
        self._pending: set[tuple[int, int]] = set()
        """Asked for by others, and not known to be durable."""
        self._thread = threading.Thread(
            target=self._run, name=f"host {partial.descriptor.digest[7:19]}", daemon=True
        )

    def __enter__(self) -> Hosting:
        if self._partial.wishes is not None:
            self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        with self._state:
            self._over = True
            self._state.notify_all()
        if self._thread.is_alive():
            self._thread.join(_END_S)

    def note(self) -> None:
        """Bytes came that somebody here has waited for: others will. Any thread may call it."""
        with self._state:
            self._noted = True
            self._state.notify_all()

    # -- the thread

    def _run(self) -> None:
        look_s = show_s = time.monotonic()
        try:
            while self._rest(look_s, show_s):
                began_s = time.monotonic()
                if began_s >= look_s:
                    self._look()
                    look_s = _next_s(began_s)
                began_s = time.monotonic()
                if began_s >= show_s and self._show():
                    show_s = _next_s(began_s)
        except (StorageError, InUse) as error:
            log.debug("%s: nothing is done for nodes that follow: %s", self._partial.path, error)
        except Exception:
            log.exception("%s: looking after nodes that follow failed", self._partial.path)

    def _rest(self, look_s: float, show_s: float) -> bool:
        """Sleep until it is time to look, or there is something to show and time for it; return False when it is over."""
        with self._state:
            while not self._over:
                due_s = min(look_s, show_s) if self._noted else look_s
                if (left_s := due_s - time.monotonic()) <= 0:
                    return True
                self._state.wait(left_s)
        return False

    def _look(self) -> None:
        wishes = self._partial.wishes
        assert wishes is not None
        try:
            found = wishes.read(self._partial.descriptor.size_bytes)
        except StorageError as error:
            log.debug("%s", error)
            return
        now_s = time.monotonic()
        asked, self._asked = self._asked, {}
        for token, wish in found.items():
            known, since_s = asked.get(token, (None, now_s))
            if known == wish:
                self._asked[token] = wish, since_s
                if now_s - since_s > SILENT_S:
                    wishes.withdraw(token)
                continue
            self._asked[token] = wish, now_s
            if len(self._pending) < _MAX_PENDING:
                for first, end in wish.ranges:
                    self._pending.add((first, end))
                    self._want(first, end)

    def _show(self) -> bool:
        """Make durable what somebody waits for, if it is here; tell whether there was something."""
        here = {one for one in self._pending if self._partial.covers(*one)}
        with self._state:
            noted, self._noted = self._noted, False
        if here or noted:
            if self._partial.undurable_bytes:
                self._partial.sync()
            self._pending -= here
        return bool(here) or noted


def _next_s(began_s: float) -> float:
    """Return when (monotonic) something may be done again that began then and ends now."""
    now_s = time.monotonic()
    return max(began_s + LOOK_S, now_s + _REST * (now_s - began_s))
