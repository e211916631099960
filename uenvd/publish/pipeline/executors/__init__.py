"""Where the stages of a plan run: as processes of this machine, as Slurm jobs, or through FirecREST."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from uenvd.publish.pipeline.tasks import Task


class Phase(Enum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True)
class JobState:
    """What an executor knows of a job."""

    phase: Phase
    status: int | None = None
    """Exit status of a job that has ended; None where it was cancelled, killed or lost."""
    reason: str = ""
    """Why it waits, or how it ended, for humans."""


@dataclass(frozen=True)
class Output:
    """What a job left."""

    stdout: str
    """Its result is in it, if it came to its end."""
    log: str
    """Where its messages are: a file of this machine."""
    tail: str
    """The last lines of them."""


class Executor(Protocol):
    """Runs stages. One thread; every method returns in bounded time. All raise `DispatchFailed`."""

    name: str
    queues: bool
    """Whether it takes jobs that wait for others. Else a job is given to it when it can run (`free`)."""
    poll_s: float
    """How often it likes to be asked."""

    def find(self, tasks: Sequence[Task]) -> Mapping[str, str]:
        """Return task key -> job for jobs of an earlier run that still wait or run."""
        ...

    def free(self) -> bool:
        """Whether one more job can run now."""
        ...

    def start(self, task: Task, after: str | None) -> str:
        """Start a job, or queue it behind another that must pass; return its name at the executor."""
        ...

    def states(self, jobs: Mapping[str, Task]) -> Mapping[str, JobState]:
        """Return the states of all these jobs."""
        ...

    def output(self, job: str, task: Task) -> Output:
        """Return what an ended job left."""
        ...

    def cancel(self, jobs: Mapping[str, Task]) -> None:
        """End jobs; returns when they have ended, or when that cannot be waited for any longer."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait for a change, at most so long; return early when a signal has come."""
        ...

    def close(self) -> None:
        """Let go of what it holds; jobs that it queued go on."""
        ...
