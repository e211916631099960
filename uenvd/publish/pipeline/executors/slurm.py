"""Stages as Slurm jobs: all of a cell's are queued at once, each behind the one before it (``afterok``).

A job is known by the key in its comment, so that jobs of a run that died are found again. States come from ``squeue`` and, when a job has
ended, from ``scontrol`` while the controller remembers it (MinJobAge), else from ``sacct`` where there is accounting.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from uenvd.errors import DispatchFailed, ResourceMissing
from uenvd.publish.pipeline.executors import JobState, Output, Phase
from uenvd.publish.pipeline.executors.script import COMMENT_PREFIX, batch_script, directives
from uenvd.publish.pipeline.files import JobFiles
from uenvd.publish.pipeline.tasks import Task
from uenvd.publish.pipeline.waiting import Waker
from uenvd.publish.provenance import ci_variables
from uenvd.publish.reframe.session import login_environ

POLL_S: Final = 5.0
PATIENCE_S: Final = 600.0
"""How long the controller may be out of reach before a run gives up; jobs go on."""
_ASK_S: Final = 60.0
_ATTEMPTS: Final = 3
_PAUSE_S: Final = 2.0
_CANCEL_S: Final = 60.0
_ID = re.compile(r"(\d+)(;.*)?")
_STAYS: Final = ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "XDG_CACHE_HOME")
"""Variables that the stages need beside those of a plain login: names of files, no secrets."""
_QUEUED: Final = frozenset(
    {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING", "RESV_DEL_HOLD"}
)
_LIVING: Final = frozenset(
    {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING"}
)


class SlurmExecutor:
    """Implements `Executor`."""

    name = "slurm"
    queues = True

    def __init__(
        self,
        command: Callable[[Task], Sequence[str]],
        files: JobFiles,
        waker: Waker,
        *,
        options: Sequence[str] = (),
        poll_s: float = POLL_S,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        environ = os.environ if environ is None else environ
        for program in ("sbatch", "squeue", "scontrol", "scancel"):
            if shutil.which(program, path=environ.get("PATH")) is None:
                raise ResourceMissing(f"there is no {program} here", hint="--executor local needs no Slurm")
        self.poll_s = poll_s
        self._command = command
        self._files = files
        self._waker = waker
        self._options = tuple(options)
        kept = {name: value for name, value in environ.items() if name in _STAYS or name.startswith("UENVD_")}
        kept |= ci_variables(environ)
        self._environ = {**login_environ(environ), **kept, "PATH": environ.get("PATH", os.defpath)}
        self._reached_s = time.monotonic()
        self._ended: dict[str, JobState] = {}

    def find(self, tasks: Sequence[Task]) -> Mapping[str, str]:
        """Return the jobs of an earlier run that still wait or run."""
        wanted = {task.key for task in tasks}
        found = {}
        for line in self._queue(["-o", "%A|%T|%k"]):
            job, state, comment = line.split("|", 2)
            key = comment.strip().removeprefix(COMMENT_PREFIX)
            if state in _QUEUED | _LIVING and key in wanted:
                found[key] = job
        return found

    def free(self) -> bool:
        """Whether a job can be queued: always."""
        return True

    def start(self, task: Task, after: str | None) -> str:
        """Queue a job. An sbatch that fails may have queued it all the same: that is looked up before it is tried again."""
        self._files.clear(task)
        options = directives(
            task, str(self._files.stdout(task)), str(self._files.log(task)), after=after, extra=self._options
        )
        script = batch_script(task, self._command(task), options)
        said = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE_S)
                there = self.find([task]).get(task.key)
                if there is not None:
                    return there
            status, out, said = self._run(["sbatch", "--parsable"], script)
            match = _ID.fullmatch(out.strip())
            if status == 0 and match is not None:
                return match.group(1)
            if status is not None and _final(said):
                break
        raise DispatchFailed(f"{task.name}: sbatch refused it: {_first(said)}")

    def states(self, jobs: Mapping[str, Task]) -> Mapping[str, JobState]:
        """Return the states of jobs. Raises `DispatchFailed` when the controller was out of reach for `PATIENCE_S`."""
        found = {job: self._ended[job] for job in jobs if job in self._ended}
        asked = [job for job in jobs if job not in found]
        if not asked:
            return found
        try:
            lines = self._queue(["-t", "all", "-o", "%A|%T|%r"])
        except DispatchFailed:
            if time.monotonic() - self._reached_s > PATIENCE_S:
                raise
            return found | {job: JobState(Phase.QUEUED, None, "Slurm does not answer") for job in asked}
        seen = {}
        for line in lines:
            job, state, reason = line.split("|", 2)
            seen[job] = (state, reason)
        for job in asked:
            state, reason = seen.get(job, ("", ""))
            if state in _QUEUED:
                found[job] = JobState(Phase.QUEUED, None, "" if reason == "None" else reason)
            elif state in _LIVING:
                found[job] = JobState(Phase.RUNNING)
            else:
                found[job] = self._ended[job] = self._how_it_ended(job, state)
        return found

    def output(self, job: str, task: Task) -> Output:
        """Return what the job wrote to the directory that all nodes see."""
        del job
        return self._files.output(task)

    def cancel(self, jobs: Mapping[str, Task]) -> None:
        """Cancel jobs and wait until they have ended."""
        if not jobs:
            return
        status, _out, said = self._run(["scancel", *jobs])
        if status is None:
            raise DispatchFailed(f"jobs {' '.join(jobs)} could not be cancelled: {_first(said)}")
        deadline = time.monotonic() + _CANCEL_S
        while time.monotonic() < deadline:
            living = {line.split("|")[0] for line in self._queue(["-o", "%A|%T"])}
            if living.isdisjoint(jobs):
                return
            time.sleep(min(1.0, self.poll_s))

    def wait(self, seconds: float) -> None:
        """Sleep."""
        self._waker.wait(seconds)

    def close(self) -> None:
        """Do nothing: jobs go on."""

    def _queue(self, options: Sequence[str]) -> list[str]:
        status, out, said = self._run(["squeue", "--me", "-h", *options])
        if status != 0:
            raise DispatchFailed(
                f"squeue does not answer: {_first(said)}",
                hint="the jobs go on; run the same command again later",
            )
        self._reached_s = time.monotonic()
        return [line for line in out.splitlines() if "|" in line]

    def _how_it_ended(self, job: str, state: str) -> JobState:
        """Return the exit status of an ended job, asking who may still know."""
        status, out, _said = self._run(["scontrol", "show", "job", "-o", job])
        if status == 0:
            fields = dict(word.split("=", 1) for word in out.split() if "=" in word)
            return ended(fields.get("JobState", state), fields.get("ExitCode", ""))
        if shutil.which("sacct", path=self._environ["PATH"]) is not None:
            status, out, _said = self._run(["sacct", "-X", "-n", "-P", "-o", "State,ExitCode", "-j", job])
            if status == 0 and "|" in out:
                said, _bar, code = out.splitlines()[0].partition("|")
                return ended(said, code)
        return (
            ended(state, "") if state else JobState(Phase.ENDED, None, "Slurm does not know the job any more")
        )

    def _run(self, command: Sequence[str], text: str = "") -> tuple[int | None, str, str]:
        """Return (exit status, stdout, stderr); the status is None when there was no answer in time."""
        try:
            done = subprocess.run(
                command,
                input=text,
                env=self._environ,
                capture_output=True,
                text=True,
                timeout=_ASK_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None, "", f"{command[0]} did not end within {_ASK_S:.0f} s"
        except OSError as error:
            return None, "", f"{command[0]}: {error.strerror}"
        return done.returncode, done.stdout, done.stderr


def ended(state: str, exit_code: str) -> JobState:
    """Return how a job ended, from its state and its ``status:signal``. Pure."""
    word = (state.split() or ["UNKNOWN"])[0]
    code, _colon, killer = exit_code.partition(":")
    if word == "COMPLETED":
        return JobState(Phase.ENDED, 0)
    if word == "FAILED" and code.isdigit() and killer in ("", "0"):
        return JobState(Phase.ENDED, int(code) or 1)
    reason = {
        "TIMEOUT": "its time limit was over",
        "OUT_OF_MEMORY": "it needed more memory than it had",
        "NODE_FAIL": "its node failed",
        "PREEMPTED": "it was preempted",
    }.get(word, f"Slurm says {word}" + (f", exit code {exit_code}" if exit_code not in ("", "0:0") else ""))
    return JobState(Phase.ENDED, None, reason)


def _final(said: str) -> bool:
    """Whether sbatch has refused for a reason that will not go away by itself."""
    return not any(
        word in said
        for word in ("timed out", "Unable to contact", "temporarily", "try again", "Resource temporarily")
    )


def _first(said: str) -> str:
    lines = [
        line.removeprefix("sbatch: ").removeprefix("error: ") for line in said.splitlines() if line.strip()
    ]
    return "; ".join(lines[:3]) or "no reason given"
