"""``uenvctl job``: which images the steps of a Slurm job used on this node."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from uenvd.ctl import output
from uenvd.ctl.arguments import FLAG, parse
from uenvd.ctl.client import Client, socket_path
from uenvd.errors import ProtocolError, UnknownJob, UsageError

HELP = """\
usage: uenvctl job ID

Show which images, by digest, the steps of a Slurm job used. Every node remembers the jobs that ran on it: ask on one of
the job's nodes. You see your own jobs; root sees all.

  --json         {"job": N, "steps": [...]}, see docs/json.md
  --no-header    only the rows
  --socket PATH  uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control

examples:
  uenvctl job 31415
  srun --jobid=31415 --overlap uenvctl job 31415           while it runs
  srun -w "$(sacct -XnPj 31415 -o NodeList)" -N1 -n1 uenvctl job 31415
"""

OPTIONS = {"--json": FLAG, "--no-header": FLAG}
TAKES = ()

_STEPS = {-5 % 2**32: "batch", -4 % 2**32: "extern", -6 % 2**32: "interactive"}
"""Step ids that are no numbers (slurm/slurm.h: SLURM_BATCH_SCRIPT, SLURM_EXTERN_CONT, SLURM_INTERACTIVE_STEP)."""


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
    if any(sign in text for sign in "_+"):
        # Tasks of an array and components of a heterogeneous job are jobs, with numbers that the text does not tell.
        raise UsageError(
            f"'{text}' is not the number of one job", hint=f"its number: sacct -XnPj {text} -o JobIDRaw"
        )
    raise UsageError(f"'{text}' is no job id", hint="a job id is a number: squeue --me")


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
