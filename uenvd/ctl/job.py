"""``uenvctl job``: which images the steps of a Slurm job used on this node."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from uenvd.ctl import output
from uenvd.ctl.arguments import FLAG, parse
from uenvd.ctl.client import Client, socket_path
from uenvd.errors import ProtocolError, UnknownJob, UsageError

HELP = """\
usage: uenvctl job ID

Show which images, by digest, the steps of a Slurm job used. Every node remembers the jobs that ran on it: ask on one of
the job's nodes. You see your own jobs; root sees all. For a task of an array (123_4) or a component of a heterogeneous
job (123+1) squeue or sacct is asked for its number.

  --json         {"job": N, "steps": [...]}, see docs/json.md
  --no-header    only the rows
  --socket PATH  uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control

examples:
  uenvctl job 31415
  uenvctl job 31415_7
  srun --jobid=31415 --overlap uenvctl job 31415           while it runs
  srun -w "$(sacct -XnPj 31415 -o NodeList)" -N1 -n1 uenvctl job 31415
"""

OPTIONS = {"--json": FLAG, "--no-header": FLAG}
TAKES = ()

_STEPS = {-5 % 2**32: "batch", -4 % 2**32: "extern", -6 % 2**32: "interactive"}
"""Step ids that are no numbers (slurm/slurm.h: SLURM_BATCH_SCRIPT, SLURM_EXTERN_CONT, SLURM_INTERACTIVE_STEP)."""

_MEMBER: Final = re.compile("[1-9][0-9]{0,9}[_+][0-9]{1,10}")
_SLURM_S: Final = 10.0


def main(argv: Sequence[str]) -> int:
    """Handle the command; return the exit status."""
    arguments = parse(argv, command="job", options=OPTIONS, words=(1, 1))
    if "--help" in arguments.flags:
        print(HELP, end="")
        return 0
    job = job_id(arguments.words[0])
    with Client(socket_path(arguments.values.get("--socket"), os.environ)) as client:
        frame = client.call("job", job=job).frame
    steps = frame.get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ProtocolError("uenvd's answer holds no list of steps")
    if not steps:
        raise UnknownJob(
            f"{os.uname().nodename} knows of no step of job {job} that used an image"
            + ("" if os.geteuid() == 0 else ", or the job is somebody else's"),
            hint=f"ask on a node where it ran: sacct -j {job} -X -o NodeList",
        )
    if "--json" in arguments.flags:
        output.data_json({"job": job, "steps": steps})
        return 0
    header = () if "--no-header" in arguments.flags else ("step", "time", "uenv", "views", "digest")
    output.data(output.table(header, [_row(step) for step in steps]))
    return 0


def job_id(text: str) -> int:
    """Return the number of a job; of a step, ``123.4``, that of its job. Raises `UsageError`."""
    number = text.partition(".")[0]
    if number.isascii() and number.isdigit() and 0 < int(number) < 2**32:
        return int(number)
    if _MEMBER.fullmatch(number):
        return _member_id(number)
    raise UsageError(f"'{text}' is no job id", hint="a job id is a number: squeue --me")


def _member_id(text: str) -> int:
    """Return the number of a task of an array or of a component, which is a job with a number that the text does not tell."""
    for command in (
        ("squeue", "-h", "-t", "all", "-o", "%A", "-j", text),
        ("sacct", "-XnPj", text, "-o", "JobIDRaw"),
    ):
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                stdin=subprocess.DEVNULL,
                text=True,
                errors="replace",
                timeout=_SLURM_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        numbers = done.stdout.split()
        if done.returncode == 0 and len(numbers) == 1 and re.fullmatch("[1-9][0-9]{0,9}", numbers[0]):
            return int(numbers[0])
    raise UsageError(
        f"neither squeue nor sacct knows the number of job {text}",
        hint=f"the whole job: uenvctl job {re.split('[_+]', text)[0]}",
    )


def _row(step: Mapping[str, Any]) -> tuple[str, ...]:
    number, when, views = step.get("step"), step.get("time"), step.get("views")
    shown = when if isinstance(when, str) else ""
    if isinstance(when, (int, float)) and 0 <= when < 2**40:
        shown = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when))
    return (
        _STEPS.get(number, str(number)) if isinstance(number, int) else str(number),
        shown,
        str(step.get("label")),
        ",".join(map(str, views)) if isinstance(views, list) else str(views or ""),
        str(step.get("digest") or ""),
    )
