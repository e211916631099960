"""What is removed from a cache when room is needed. Pure: what is there in, what goes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """One squashfs blob with the images that use it."""

    layer: str
    """Digest of the blob."""
    manifests: tuple[str, ...]
    """Digests of the images' manifests."""
    names: tuple[str, ...]
    """``repository:tag``, for people."""
    size_bytes: int
    last_use_s: float
    """Seconds since the epoch."""
    kept: str | None = None
    """Why it may not go: ``pinned``, ``in use``; None if it may."""


@dataclass(frozen=True)
class Room:
    """How full a cache is, in bytes. ``quota_bytes`` None: only the file system limits it."""

    used_bytes: int
    free_bytes: int
    quota_bytes: int | None
    high: float = 0.95
    """Of the quota: above it the cache is brought down to ``low``."""
    low: float = 0.80

    @property
    def room_bytes(self) -> int:
        """How much more may be stored."""
        if self.quota_bytes is None:
            return self.free_bytes
        return max(0, min(self.free_bytes, self.quota_bytes - self.used_bytes))

    def excess_bytes(self, needed_bytes: int = 0) -> int:
        """Return how much has to go so that ``needed_bytes`` more fit: 0, or down to the low water mark.

        Without a quota: only what the newcomer lacks.
        """
        if self.quota_bytes is not None and self.used_bytes + needed_bytes > self.quota_bytes * self.high:
            wanted = self.used_bytes + needed_bytes - int(self.quota_bytes * self.low)
            # A newcomer larger than the low water mark empties the cache, no more.
            return max(0, min(wanted, self.used_bytes))
        return max(0, needed_bytes - self.free_bytes)


def victims(candidates: Sequence[Candidate], excess_bytes: int) -> list[Candidate]:
    """Return what goes, the least recently used first, until at least ``excess_bytes`` are gained or nothing more may go."""
    chosen: list[Candidate] = []
    gained = 0
    for candidate in sorted(candidates, key=lambda one: (one.last_use_s, one.layer)):
        if gained >= excess_bytes:
            break
        if candidate.kept is None:
            chosen.append(candidate)
            gained += candidate.size_bytes
    return chosen
