"""The batch script of a stage, for Slurm. Pure.

The resource request of a target is what existing pipelines write in ``variables``: ``SLURM_PARTITION``, ``SLURM_TIMELIMIT`` ...; all other
variables are set for the job, those of the build among them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from uenvd.errors import UsageError
from uenvd.publish.pipeline.tasks import Task

COMMENT_PREFIX: Final = "uenvd-publish:"
REQUESTS: Final[Mapping[str, str]] = {
    "SLURM_ACCOUNT": "account",
    "SLURM_CONSTRAINT": "constraint",
    "SLURM_CPUS_PER_TASK": "cpus-per-task",
    "SLURM_EXCLUSIVE": "exclusive",
    "SLURM_GPUS_PER_NODE": "gpus-per-node",
    "SLURM_JOB_NUM_NODES": "nodes",
    "SLURM_JOB_PARTITION": "partition",
    "SLURM_MEM": "mem",
    "SLURM_MEM_PER_CPU": "mem-per-cpu",
    "SLURM_NTASKS": "ntasks",
    "SLURM_PARTITION": "partition",
    "SLURM_QOS": "qos",
    "SLURM_RESERVATION": "reservation",
    "SLURM_TIMELIMIT": "time",
}
"""Variable -> option of sbatch."""
_OPTION = re.compile(r"-[-A-Za-z0-9]+(=.*|\s.*)?")


def requests(task: Task, extra: Sequence[str] = ()) -> list[str]:
    """Return the options of sbatch for a task's resources; ``extra`` come last, so that they count. Raises `UsageError`."""
    found = {}
    if task.cell.partition:
        found["partition"] = task.cell.partition
    for name, value in task.cell.variables.items():
        option = REQUESTS.get(name)
        if option is not None:
            found[option] = value
    words = [f"--{option}" + (f"={value}" if value else "") for option, value in found.items()]
    for option in extra:
        if not _OPTION.fullmatch(option) or "\n" in option:
            raise UsageError(f"{option!r} is no option of sbatch", hint="--sbatch-option=--time=2:00:00")
    words += extra
    for word in words:
        if "\n" in word or "\0" in word:
            raise UsageError(f"{task.name}: the variable for {word.partition('=')[0]} has a line break")
    return words


def directives(
    task: Task, stdout: str, log: str, *, after: str | None, extra: Sequence[str] = ()
) -> list[str]:
    """Return all options of a task's job: name, key, files, dependency, resources."""
    words = [
        f"--job-name={task.name}",
        f"--comment={COMMENT_PREFIX}{task.key}",
        f"--output={stdout.replace('%', '%%')}",
        f"--error={log.replace('%', '%%')}",
        "--open-mode=truncate",
        "--requeue",
    ]
    if after is not None:
        words += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    return words + requests(task, extra)


def body(task: Task, command: Sequence[str], *, before: Sequence[str] = ()) -> str:
    """Return the script: the target's variables, lines ``before``, and the command of the stage."""
    lines = [
        f"export {name}={shlex.quote(value)}"
        for name, value in task.cell.variables.items()
        if name not in REQUESTS
    ]
    lines += [*before, f"exec {shlex.join(command)}"]
    return "\n".join(lines) + "\n"


def batch_script(
    task: Task, command: Sequence[str], options: Sequence[str] = (), *, before: Sequence[str] = ()
) -> str:
    """Return a script for sbatch, with its options in it."""
    head = ["#!/bin/bash -l", *(f"#SBATCH {_directive(option)}" for option in options)]
    return "\n".join(head) + "\n" + body(task, command, before=before)


def _directive(option: str) -> str:
    name, equals, value = option.partition("=")
    if equals and re.search(r"[\s'\"\\#]", value):
        value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return name + equals + value


def stage_directory(base: Path, task: Task) -> Path:
    """Return the directory of one task below a directory that the job's machine sees."""
    return base / task.key
