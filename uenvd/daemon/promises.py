"""What a label meant when a job first asked: its later steps get the same image, also when the tag has moved meanwhile.

Needed only for jobs that were submitted where no uenvd runs; the others carry digests from their submission. Pure; in memory, so that a
restart of the daemon forgets it (the steps that were told a digest keep it).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

MAX_PROMISES: Final = 4096


class Promises:
    """Description list by job, as it was first resolved; the least recently used are forgotten first."""

    def __init__(self, limit: int = MAX_PROMISES) -> None:
        self._limit = limit
        self._kept: OrderedDict[tuple[int, str, str | None], str] = OrderedDict()

    def recall(self, job: int | None, uenv: str, cwd: str | None) -> str | None:
        """Return what ``uenv``, seen from the directory ``cwd``, means to this job; None: not asked before, or no job."""
        if job is None or (job, uenv, cwd) not in self._kept:
            return None
        self._kept.move_to_end((job, uenv, cwd))
        return self._kept[job, uenv, cwd]

    def keep(self, job: int | None, uenv: str, cwd: str | None, resolved: str) -> None:
        """Remember the first answer; without a job nothing is remembered."""
        if job is None:
            return
        self._kept.setdefault((job, uenv, cwd), resolved)
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)
