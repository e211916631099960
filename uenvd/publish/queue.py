"""Which jobs may hold images by digest: what Slurm says of its queue."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from uenvd.errors import ResourceMissing

_TIMEOUT_S: Final = 60
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Queue:
    """The jobs that are pending or running."""

    oldest: datetime | None
    """When the oldest was submitted, with a time zone; None without jobs."""
    digests: frozenset[str]
    """That comments of jobs name."""
    jobs: int


def read_queue(program: str = "squeue") -> Queue | None:
    """Return all users' jobs on all clusters; None on a machine without Slurm.

    A job's environment, where ``SLURM_UENVD_IMAGES`` is, is shown to nobody: so any job that was submitted before an image was retired may hold it.
    Raises `ResourceMissing` where Slurm is there and does not answer: what is not known must not be taken for nothing.
    """
    try:
        done = subprocess.run(
            [program, "--all", "--noheader", "--format=%A|%V|%k"],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        return None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _silent(str(error)) from error
    if done.returncode != 0:
        raise _silent(done.stderr.strip()[:200])
    return parse_queue(done.stdout)


def parse_queue(text: str) -> Queue:
    """Parse lines ``job|time of submission|comment``; times are local ones. Raises `ResourceMissing` for anything else."""
    times, digests = [], set()
    lines = [line for line in text.splitlines() if line.strip()]
    for line in lines:
        _job, _, rest = line.partition("|")
        when, _, comment = rest.partition("|")
        try:
            times.append(datetime.fromisoformat(when).astimezone())
        except ValueError as error:
            raise _silent(f"{line[:80]!r} is no line of a queue") from error
        digests |= set(_DIGEST.findall(comment))
    return Queue(min(times, default=None), frozenset(digests), len(lines))


def _silent(why: str) -> ResourceMissing:
    return ResourceMissing(
        f"squeue does not say which jobs there are: {why}",
        hint="jobs in the queue hold images; when you know that none does: --no-queue",
    )
