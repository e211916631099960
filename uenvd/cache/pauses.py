"""Questions to a file server that are not asked again at once. Pure but for the clock.

A thousand nodes that wait for one image would ask their file server ten thousand times a second. So the pause between two questions grows
with the time that the node has been waiting, which costs it at most that share of the wait, and differs from node to node.
"""

from __future__ import annotations

import random
import threading
import time
from typing import Final

SHARE: Final = 0.1
LONGEST_S: Final = 5.0
_FORGET_S: Final = 4 * LONGEST_S


def pause_s(waited_s: float, least_s: float, longest_s: float = LONGEST_S) -> float:
    """Return the pause after a question to somebody who has been waiting for ``waited_s``: `SHARE` of that within the bounds, +-20 %."""
    return max(least_s, min(longest_s, SHARE * waited_s)) * random.uniform(0.8, 1.2)  # noqa: S311 -- spreads nodes


class Pauses:
    """By name: when a question was asked last, and for how long its answer counts. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: dict[str, tuple[float, float, float]] = {}
        """name -> (first time, last time, pause), seconds."""

    def is_fresh(self, name: str) -> bool:
        """Tell whether the last answer counts still."""
        with self._lock:
            _first_s, last_s, counts_s = self._asked.get(name, (0.0, 0.0, -1.0))
        return time.monotonic() - last_s < counts_s

    def note(self, name: str, least_s: float) -> None:
        """Note that it was asked now; the answer counts at least about ``least_s``."""
        now_s = time.monotonic()
        with self._lock:
            for old in [one for one, (_, last_s, _) in self._asked.items() if now_s - last_s > _FORGET_S]:
                del self._asked[old]
            first_s = self._asked.get(name, (now_s,))[0]
            self._asked[name] = (first_s, now_s, pause_s(now_s - first_s, least_s))

    def forget(self, name: str) -> None:
        """Ask anew the next time."""
        with self._lock:
            self._asked.pop(name, None)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._asked.clear()
