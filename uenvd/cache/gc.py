"""One round of making room and cleaning up in a cache directory, and what it would do."""

from __future__ import annotations

from dataclasses import dataclass

from uenvd.cache.directory import Directory
from uenvd.cache.policy import Candidate, Room, victims


@dataclass(frozen=True)
class Round:
    """What a round found and did, or would do."""

    room: Room
    """Before it."""
    candidates: tuple[Candidate, ...]
    """Every image blob, the least recently used first."""
    victims: tuple[Candidate, ...]
    """Those that go if nobody takes them into use meanwhile."""
    freed_bytes: int
    """0 for a dry run."""


def collect(directory: Directory, *, dry_run: bool = False, wanted_bytes: int = 0) -> Round:
    """Bring a directory down to its low water mark if it is above the high one, and drop what no image refers to.

    ``wanted_bytes``: make at least that much room besides. Nothing that is in use or pinned goes. Raises `StorageError`.
    """
    room = directory.room()
    excess = max(room.excess_bytes(), wanted_bytes)
    candidates = tuple(sorted(directory.candidates(), key=lambda one: (one.last_use_s, one.layer)))
    chosen = tuple(victims(candidates, excess)) if excess else ()
    if dry_run:
        return Round(room, candidates, chosen, 0)
    directory.sweep()
    freed = directory.free(excess) if excess else 0
    return Round(room, candidates, chosen, freed + directory.collect())
