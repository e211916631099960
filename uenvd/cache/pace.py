"""How many connections a transfer uses. Pure: the caller tells the time.

Several connections help where each is limited (a long way, a server or proxy that limits each, TLS on one core). Where the processor or the
line is the limit they only get into each other's way: on two cores that also run the registry, four are a fifth slower than one. So a transfer
begins with one, tries all, and keeps what was faster; it tries again now and then.
"""

from __future__ import annotations

from typing import Final

WARM_S: Final = 0.05
WINDOW_S: Final = 0.1
WINDOW_BYTES: Final = 4 << 20
LONGEST_WINDOW_S: Final = 0.5
WORTH: Final = 1.25
"""How much faster all connections have to be than one."""
HOLD_S: Final = 2.0
LONGEST_HOLD_S: Final = 60.0


class Pace:
    """The number of connections that may be used now: `allowed`."""

    def __init__(self, connections: int) -> None:
        self.allowed = 1
        self._most = self._limit = connections
        self._phase = "warm" if connections > 1 else "decided"
        self._since: float | None = None
        self._bytes = 0
        self._alone_rate = 0.0
        self._hold_s = HOLD_S

    def gained(self, count: int, now_s: float) -> bool:
        """Note bytes that arrived, over whichever connection; tell whether the transfer has just gone back to one."""
        if self._phase == "decided":
            return False
        if self._since is None:
            self._since = now_s
        self._bytes += count
        seconds = now_s - self._since
        match self._phase:
            case "warm" | "settle" if seconds >= WARM_S:
                self._enter("alone" if self._phase == "warm" else "all", now_s)
            case "alone" if self._measured(seconds):
                self._alone_rate = self._bytes / seconds
                self.allowed = self._limit
                self._enter("settle", now_s)
            case "all" if self._measured(seconds):
                if self._bytes / seconds >= WORTH * self._alone_rate:
                    self._phase = "decided"
                    return False
                self.allowed = 1
                self._enter("hold", now_s)
                return True
            case "hold" if seconds >= self._hold_s:
                self._hold_s = min(2 * self._hold_s, LONGEST_HOLD_S)
                self._enter("alone", now_s)
        return False

    def refused(self) -> None:
        """Note that the place asks for less (429, 503)."""
        self._limit = max(1, min(self._limit, self.allowed) // 2)
        self.allowed = min(self.allowed, self._limit)

    def served(self) -> None:
        """Note a piece that came without trouble."""
        if self._limit < self._most:
            self._limit += 1
            if self._phase == "decided":
                self.allowed = self._limit

    def _measured(self, seconds: float) -> bool:
        return seconds >= LONGEST_WINDOW_S or (seconds >= WINDOW_S and self._bytes >= WINDOW_BYTES)

    def _enter(self, phase: str, now_s: float) -> None:
        self._phase, self._since, self._bytes = phase, now_s, 0
