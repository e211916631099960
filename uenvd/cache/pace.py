"""How many connections a transfer uses. Pure: the caller tells the time.

Several connections help where each is limited (a long way, a server or proxy that limits each, TLS on one core). Where the processor or the
line is the limit they only get into each other's way: on two cores that also run the registry, four are a fifth slower than one. So a transfer
begins with one. Where that one keeps this side busy it stays alone; where it waits for bytes all are tried, and what was faster is kept.
Now and then that is done again. No connection is closed for it, which would be to throw away what is on its way: those that are too many end
with their pieces.
"""

from __future__ import annotations

from typing import Final

WARM_S: Final = 0.01
SETTLE_S: Final = 0.05
ALONE_S: Final = 0.02
ALONE_BYTES: Final = 1 << 20
WAITING: Final = 0.3
"""Which part of its time a connection has to wait for bytes for others to be worth a try."""
WINDOW_S: Final = 0.1
WINDOW_BYTES: Final = 4 << 20
LONGEST_WINDOW_S: Final = 0.5
WORTH: Final = 1.25
"""How much faster all connections have to be than one."""
LOOK_S: Final = 0.25
"""To look whether the one connection waits costs nothing."""
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
        self._waited_s = 0.0
        self._alone_rate = 0.0
        self._hold_s = self._next_hold_s = HOLD_S
        self._keeps_busy = connections == 1

    @property
    def alone(self) -> bool:
        """Whether one connection does all that this side can: others will hardly be tried soon."""
        return self._keeps_busy and self.allowed == 1 and self._phase in {"hold", "decided"}

    @property
    def decided(self) -> bool:
        """Whether nothing is measured any more: `gained` need not be told."""
        return self._phase == "decided"

    @property
    def is_timing_one(self) -> bool:
        """Whether it is found out at the moment what one connection has: in small steps that is known sooner."""
        return self._phase in {"warm", "alone"}

    def gained(self, count: int, now_s: float, waited_s: float, connections: int) -> None:
        """Note bytes, over whichever of the ``connections`` that are in use now, and how long it did nothing until they came."""
        if self._phase == "decided":
            return
        if self._since is None:
            self._since = now_s
        self._bytes += count
        self._waited_s += waited_s
        seconds = now_s - self._since
        match self._phase:
            case "warm" if seconds >= WARM_S:
                self._enter("alone", now_s)
            case "settle" if seconds >= SETTLE_S:
                self._enter("all", now_s)
            case "alone" if self._measured(seconds, ALONE_S, ALONE_BYTES):
                if self._waited_s < WAITING * seconds:
                    self._hold(now_s)
                else:
                    self._alone_rate = self._bytes / seconds
                    self.allowed = self._limit
                    self._enter("settle", now_s)
            case "all" if self._measured(seconds, WINDOW_S, WINDOW_BYTES):
                if self._bytes / seconds >= WORTH * self._alone_rate:
                    self._phase = "decided"
                else:
                    self.allowed = 1
                    self._hold(now_s)
            case "hold" if seconds >= self._hold_s and connections <= 1:
                self._enter("alone", now_s)

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

    def _hold(self, now_s: float) -> None:
        """Stay with one for a while, longer each time."""
        self._keeps_busy = self._phase == "alone"
        if self._keeps_busy:
            self._hold_s = LOOK_S
        else:
            self._hold_s = self._next_hold_s
            self._next_hold_s = min(2 * self._next_hold_s, LONGEST_HOLD_S)
        self._enter("hold", now_s)

    def _measured(self, seconds: float, window_s: float, window_bytes: int) -> bool:
        return seconds >= LONGEST_WINDOW_S or (seconds >= window_s and self._bytes >= window_bytes)

    def _enter(self, phase: str, now_s: float) -> None:
        self._phase, self._since, self._bytes, self._waited_s = phase, now_s, 0, 0.0
