"""Stages as processes of this machine, as many at a time as its cores and its memory allow."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from uenvd.errors import DispatchFailed, InternalError
from uenvd.publish.pipeline.executors import JobState, Output, Phase
from uenvd.publish.pipeline.files import JobFiles
from uenvd.publish.pipeline.tasks import Task
from uenvd.publish.pipeline.waiting import Waker

PARENT_VARIABLE: Final = "UENVD_PUBLISH_PARENT"
"""Says to a stage that it shall end when the process of this number does."""
DEFAULT_MEMORY_BYTES: Final = 2 << 30
"""What a stage is thought to need: images are built in memory."""
_POLITE_S: Final = 30.0
"""How long a stage may take to end its own processes after SIGTERM."""
_PR_SET_PDEATHSIG: Final = 1


def available_memory_bytes() -> int:
    """Return how much memory the machine and the limits of this process's cgroup leave."""
    found = [_meminfo()]
    with contextlib.suppress(OSError, StopIteration, ValueError):
        own = next(
            line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")
        )
        group = Path("/sys/fs/cgroup") / own.strip("/")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text()))
    return max(0, min(found))


def _meminfo() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def slots(cores: int, memory_bytes: int, each_bytes: int, wanted: int | None = None) -> int:
    """Return how many stages run at a time: at least 1, at most ``wanted`` if given, else what cores and memory allow."""
    if wanted is not None:
        return max(1, wanted)
    return max(1, min(cores, memory_bytes // max(1, each_bytes)))


def follow_parent() -> None:
    """End with the run that started this stage (a SIGTERM comes when it dies); nothing where no run did."""
    text = os.environ.pop(PARENT_VARIABLE, "")
    if not text:
        return
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise InternalError(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if str(os.getppid()) != text:  # it died before
        raise KeyboardInterrupt


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    pidfd: int


class LocalExecutor:
    """Implements `Executor`. ``command(task)`` are the words of a stage's command."""

    name = "local"
    queues = False
    poll_s = 1.0

    def __init__(
        self,
        command: Callable[[Task], Sequence[str]],
        files: JobFiles,
        waker: Waker,
        *,
        jobs: int | None = None,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
    ) -> None:
        self._command = command
        self._files = files
        self._waker = waker
        self.slots = slots(len(os.sched_getaffinity(0)), available_memory_bytes(), memory_bytes, jobs)
        self._running: dict[str, _Running] = {}
        self._ended: dict[str, int] = {}

    def find(self, tasks: Sequence[Task]) -> Mapping[str, str]:
        """Return nothing: stages end with their run."""
        del tasks
        return {}

    def free(self) -> bool:
        """Whether a slot is free."""
        return len(self._running) < self.slots

    def start(self, task: Task, after: str | None) -> str:
        """Start a process."""
        assert after is None
        self._files.clear(task)
        stdout, stderr = self._files.stdout(task), self._files.log(task)
        try:
            with stdout.open("wb") as out, stderr.open("wb") as err:
                process = self._popen(self._command(task), out, err)
        except OSError as error:
            raise DispatchFailed(f"{task.name} cannot be started: {error}") from error
        job = str(process.pid)
        self._running[job] = _Running(process, os.pidfd_open(process.pid))
        return job

    @staticmethod
    def _popen(command: Sequence[str], out: IO[bytes], err: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
            # Ctrl-C at a terminal is for the run, which then ends its stages one by one.
            start_new_session=True,
        )

    def states(self, jobs: Mapping[str, Task]) -> Mapping[str, JobState]:
        """Return who still runs."""
        found = {}
        for job in jobs:
            running = self._running.get(job)
            if running is not None and running.process.poll() is not None:
                self._forget(job)
            status = self._ended.get(job)
            if job in self._running:
                found[job] = JobState(Phase.RUNNING)
            elif status is not None and status >= 0:
                found[job] = JobState(Phase.ENDED, status)
            else:
                how = "it is gone" if status is None else f"killed by {signal.Signals(-status).name}"
                found[job] = JobState(Phase.ENDED, None, how)
        return found

    def _forget(self, job: str) -> None:
        running = self._running.pop(job)
        os.close(running.pidfd)
        self._ended[job] = running.process.returncode

    def output(self, job: str, task: Task) -> Output:
        """Return what the process wrote."""
        del job
        return self._files.output(task)

    def cancel(self, jobs: Mapping[str, Task]) -> None:
        """Ask processes to end, and make them."""
        self._end([running for job, running in self._running.items() if job in jobs])
        self.states(jobs)

    @staticmethod
    def _end(mine: Sequence[_Running]) -> None:
        for running in mine:
            running.process.terminate()
        for running in mine:
            try:
                running.process.wait(_POLITE_S)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(running.process.pid, signal.SIGKILL)
                running.process.wait()

    def wait(self, seconds: float) -> None:
        """Wait for the end of a process."""
        self._waker.wait(seconds, [running.pidfd for running in self._running.values()])

    def close(self) -> None:
        """End what still runs."""
        self._end(list(self._running.values()))
        for job in list(self._running):
            self._forget(job)


def stage_command(words: Sequence[str]) -> tuple[str, ...]:
    """Return the command that runs ``uenvd-publish`` with these words by this very installation."""
    return (sys.executable, "-P", "-m", "uenvd.publish.main", *words)
