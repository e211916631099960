"""A worker on the processor of the one thread that asks: to and fro between two processes is a switch there, and a wake-up elsewhere.

A thread that asks alone sleeps while it waits for its answer. A worker on another processor has to be woken, answers, and sleeps again while
the asker, on a processor that has gone idle meanwhile, is woken: on bare metal some microseconds each, in a virtual machine a halted processor
comes back through the hypervisor, 30 µs and more each. The kernel's scheduler prefers an idle processor for who is woken
(``select_idle_sibling`` in kernel/sched/fair.c; ``fuse_dev_wake_and_unlock`` gives no hint of a synchronous wake-up), so only affinity helps,
and only if the asker stays: so it is done for one who is bound to a single processor, as Slurm binds the tasks of a job.

Whether it helps is measured, not assumed: the time between an answer and the next request, for a stride of requests there and elsewhere. The
asker may share his processor with others. The worker never leaves the processors that it was given.

Sources: sched_setaffinity(2), sched_getaffinity(2).
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final

STRIDE: Final = 32
"""Requests after which their times are judged."""
_BETTER: Final = 0.8
"""So much shorter must the time be beside the asker, for the loss of a processor that works at the same time."""
_WORSE: Final = 1.5
"""So much longer must it be elsewhere, than when it was compared last, to compare at once."""
_QUEUED_NS: Final = 1500
"""A request that comes so soon after an answer was there before: no two switches are as fast."""
_MAX_PAUSE: Final = 256
"""Strides between two attempts."""


class Placement:
    """Where one worker runs. For the thread that serves.

    Args:
        wanted: whether the worker may be moved at all.

    """

    def __init__(self, *, wanted: bool = True) -> None:
        self._given = os.sched_getaffinity(0)
        self.possible = wanted and len(self._given) > 1
        self.beside = False
        """Whether the worker is bound to the asker's processor."""
        self._gaps_ns: list[int] = []
        self._asker = 0
        self._elsewhere_ns = 0
        """The usual time between an answer and a request, elsewhere; 0: not known."""
        self._pause = 1
        """Strides from a failed attempt to the next."""
        self._left = 0
        """Of it."""

    def note(self, asker: int, gap_ns: int) -> None:
        """Take notice of the time between an answer and the next request, which came from a thread that asks alone. May move the worker."""
        self._gaps_ns.append(gap_ns)
        if len(self._gaps_ns) < STRIDE:
            return
        gaps_ns = sorted(self._gaps_ns)
        self._gaps_ns.clear()
        # What the asker does by himself makes single times longer, never shorter.
        usual_ns = gaps_ns[STRIDE // 4]
        if asker != self._asker:
            self.leave()
            self._asker, self._elsewhere_ns, self._pause, self._left = asker, 0, 1, 0
        elif usual_ns < _QUEUED_NS:
            self._fail()  # he does not wait for each answer: there is work for two processors
        elif not self.beside:
            self._consider(usual_ns)
        elif usual_ns > self._elsewhere_ns * _BETTER:
            self._fail()

    def leave(self) -> None:
        """Be wherever there is room: others ask, too."""
        self._gaps_ns.clear()
        if self.beside:
            self.beside = False
            self._bind(self._given)

    def _consider(self, usual_ns: int) -> None:
        if self._elsewhere_ns and usual_ns > self._elsewhere_ns * _WORSE:
            self._left, self._pause = 0, 1
        if self._left:
            self._left -= 1
            return
        self._elsewhere_ns = usual_ns
        processors = _processors_of(self._asker)
        self.beside = len(processors) == 1 and processors <= self._given and self._bind(processors)
        if not self.beside:
            self._fail()

    def _fail(self) -> None:
        """It is no better there, or not any more, or cannot be."""
        self.leave()
        self._left = self._pause
        self._pause = min(self._pause * 2, _MAX_PAUSE)

    def _bind(self, processors: set[int]) -> bool:
        """Run there only. The set that may be used may have become smaller meanwhile: the kernel refuses what is not in it."""
        with suppress(OSError):
            os.sched_setaffinity(0, processors)
            return True
        return False


def _processors_of(thread: int) -> set[int]:
    """Return the processors that a thread may use; none if there is no such thread."""
    with suppress(OSError):
        return os.sched_getaffinity(thread)
    return set()
