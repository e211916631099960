"""Which bytes of a blob to ask for next. Pure: a state that the threads of a transfer share under their own lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from uenvd.cache.ranges import Ranges

MIN_PIECE_BYTES: Final = 4 << 20
ALONE_PIECES: Final = 5
"""So many pieces are asked for at once where one connection is enough: each question costs a registry a new reader of its file."""
URGENT_PIECE_BYTES: Final = 4 << 20
HINT_PIECE_BYTES: Final = 2 << 20
"""Small, because a demand may have to wait for the end of one."""
CUT_BYTES: Final = 256 << 10
"""A demand for what a connection brings anyway within so many bytes waits for it."""


@dataclass(eq=False, slots=True)
class Task:
    """Bytes ``[at, end)`` that one connection fetches. ``end`` may shrink while it does: look at it before each read."""

    at: int
    end: int
    urgent: bool = False
    hurry_until: int = 0
    """Up to here somebody waits for what is on its way already: this connection must not give way to others."""


class Schedule:
    """The bytes of one blob: on disk, on their way, demanded, missing.

    The blob is filled from its beginning in pieces of ``piece_bytes``. The first ones are shorter, each by another part, so that connections
    come to the ends of theirs in turn: less has to be kept until it can be hashed. So are those near the end, where all should finish at
    about the same moment. What is demanded goes first. With ``fill`` false nothing else is fetched.
    """

    def __init__(
        self, size_bytes: int, held: Ranges, *, piece_bytes: int, connections: int, fill: bool = True
    ) -> None:
        self.size_bytes = size_bytes
        self.held = held
        self.fill = fill
        self._piece_bytes = piece_bytes
        self._connections = connections
        self._begun = 0
        self._tasks: list[Task] = []
        self._demands: deque[tuple[int, int]] = deque()
        self._hints: deque[tuple[int, int]] = deque()

    @property
    def complete(self) -> bool:
        """Whether every byte is on disk."""
        return self.held.total_bytes >= self.size_bytes

    @property
    def urgent(self) -> bool:
        """Whether something that was demanded is missing yet."""
        return any(True for demand in self._demands for _ in self.held.gaps(*demand)) or any(
            task.urgent for task in self._tasks
        )

    def demand(self, first: int, end: int) -> None:
        """Put bytes before all others. A connection that would reach them late gives them up."""
        first, end = max(0, first), min(end, self.size_bytes)
        if self.held.covers(first, end):
            return
        for task in self._tasks:
            if task.urgent or not first < task.end or not task.at < end:
                continue
            if task.at + CUT_BYTES < first:
                task.end = first
            else:
                task.hurry_until = max(task.hurry_until, end)
        self._demands.append((first, end))

    def hint(self, first: int, end: int) -> None:
        """Fetch bytes after what is demanded and before all others, also with ``fill`` false."""
        first, end = max(0, first), min(end, self.size_bytes)
        if first < end:
            self._hints.append((first, end))

    def take(self, *, urgent_only: bool = False, alone: bool = False) -> Task | None:
        """Return the next bytes to fetch; None when everything is on disk or on its way. Pair with `give_back`.

        ``urgent_only``: nothing but what was demanded. Who brings anything else gives way to demands, and must not be the one to bring them.
        ``alone``: no other connection is meant to help.
        """
        task = self._take_from(self._demands, URGENT_PIECE_BYTES, urgent=True)
        if task is None and not urgent_only:
            task = self._take_from(self._hints, HINT_PIECE_BYTES, urgent=False)
        if task is not None or urgent_only or not self.fill:
            return task
        gap = next(self._missing(0, self.size_bytes), None)
        if gap is None:
            return None
        self._begun = min(self._begun + 1, self._connections)
        turn = self._piece_bytes * self._begun // self._connections
        share = (self.size_bytes - self.held.total_bytes) // self._connections
        piece = min(self._piece_bytes, max(MIN_PIECE_BYTES, min(turn, share)))
        if alone:
            piece = ALONE_PIECES * self._piece_bytes
        return self._begin(gap[0], min(gap[1], gap[0] + piece), urgent=False)

    def _take_from(self, wishes: deque[tuple[int, int]], piece_bytes: int, *, urgent: bool) -> Task | None:
        """Begin with the first of these bytes that are neither here nor on their way; forget those that are here."""
        while wishes and self.held.covers(*wishes[0]):
            wishes.popleft()
        for first, end in wishes:
            gap = next(self._missing(first, end), None)
            if gap is not None:
                return self._begin(gap[0], min(gap[1], gap[0] + piece_bytes), urgent=urgent)
        return None

    def written(self, first: int, end: int) -> None:
        """Note that bytes are on disk."""
        self.held.add(first, end)

    def give_back(self, task: Task) -> None:
        """End a task; what it has not brought is missing again."""
        if task in self._tasks:
            self._tasks.remove(task)

    def cut_to_pieces(self) -> None:
        """Let others help with what one connection was to bring alone."""
        for task in self._tasks:
            task.end = min(task.end, task.at + self._piece_bytes)

    def discard(self, first: int, end: int) -> None:
        """Note that bytes on disk are wrong."""
        self.held.remove(first, end)

    def _begin(self, first: int, end: int, *, urgent: bool) -> Task:
        task = Task(first, end, urgent)
        self._tasks.append(task)
        return task

    def _missing(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield what of ``[first, end)`` is neither on disk nor on its way."""
        busy = Ranges((task.at, task.end) for task in self._tasks)
        for start, stop in self.held.gaps(first, end):
            yield from busy.gaps(start, stop)
