"""Which bytes of a blob are here: a set of half-open ranges. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Ranges:
    """A set of byte positions as sorted, disjoint ranges ``[first, end)`` that do not touch. Not safe for threads."""

    __slots__ = ("_ends", "_firsts", "total_bytes")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._firsts: list[int] = []
        self._ends: list[int] = []
        self.total_bytes = 0
        for first, end in ranges:
            self.add(first, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._firsts, self._ends, strict=True)

    def __len__(self) -> int:
        return len(self._firsts)

    def add(self, first: int, end: int) -> None:
        """Add ``[first, end)``; what is there already stays."""
        if first >= end:
            return
        low = bisect_left(self._ends, first)
        high = bisect_right(self._firsts, end)
        if low < high:
            first = min(first, self._firsts[low])
            end = max(end, self._ends[high - 1])
            self.total_bytes -= sum(self._ends[low:high]) - sum(self._firsts[low:high])
        self._firsts[low:high] = [first]
        self._ends[low:high] = [end]
        self.total_bytes += end - first

    def remove(self, first: int, end: int) -> None:
        """Take ``[first, end)`` out, as far as it is there."""
        if first >= end:
            return
        low = bisect_right(self._ends, first)
        high = bisect_left(self._firsts, end)
        if low >= high:
            return
        left, right = self._firsts[low], self._ends[high - 1]
        self.total_bytes -= sum(self._ends[low:high]) - sum(self._firsts[low:high])
        kept = [(a, b) for a, b in ((left, first), (end, right)) if a < b]
        self._firsts[low:high] = [a for a, _ in kept]
        self._ends[low:high] = [b for _, b in kept]
        self.total_bytes += sum(b - a for a, b in kept)

    def run_from(self, position: int) -> int:
        """Return the end of the range that holds ``position``, or ``position`` if none does."""
        index = bisect_right(self._firsts, position) - 1
        return max(position, self._ends[index]) if index >= 0 else position

    def covers(self, first: int, end: int) -> bool:
        """Tell whether every byte of ``[first, end)`` is there."""
        return first >= end or self.run_from(first) >= end

    def gaps(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield what of ``[first, end)`` is not there, in order. The set must not be changed meanwhile."""
        at = first
        for index in range(bisect_right(self._ends, first), len(self._firsts)):
            if self._firsts[index] >= end:
                break
            if at < self._firsts[index]:
                yield at, self._firsts[index]
            at = self._ends[index]
        if at < end:
            yield at, end
