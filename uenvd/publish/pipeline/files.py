"""The working directory of a run: who has it, what each job printed, and what is known of every stage."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from uenvd.errors import StorageError
from uenvd.oci.files import storage_errors, write_atomically
from uenvd.publish.pipeline.executors import Output
from uenvd.publish.pipeline.tasks import Task

JOBS: Final = "jobs"
STATE: Final = "state.json"
_LOCK: Final = "lock"
_MAX_OUTPUT_BYTES: Final = 4 << 20
_TAIL_BYTES: Final = 64 << 10
_TAIL_LINES: Final = 15


class JobFiles:
    """``jobs/<stage>-<cell>.out`` has the result of a job, ``.log`` its messages."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / JOBS

    def prepare(self) -> None:
        """Make the directory. Raises `StorageError`."""
        with storage_errors(self._directory, "make"):
            self._directory.mkdir(parents=True, exist_ok=True)

    def stdout(self, task: Task) -> Path:
        """Return where a job prints its result."""
        return self._directory / f"{task.file_stem}.out"

    def log(self, task: Task) -> Path:
        """Return where a job writes its messages."""
        return self._directory / f"{task.file_stem}.log"

    def clear(self, task: Task) -> None:
        """Remove what an earlier job of this task left: nobody shall take it for what the next one says."""
        for path in (self.stdout(task), self.log(task)):
            with storage_errors(path, "remove"):
                path.unlink(missing_ok=True)

    def keep(self, task: Task, stdout: str, log: str) -> None:
        """Write down what a job printed elsewhere."""
        write_atomically(self.stdout(task), stdout.encode(), durable=False)
        write_atomically(self.log(task), log.encode(), durable=False)

    def output(self, task: Task) -> Output:
        """Return what a job has written so far."""
        return Output(
            read_end(self.stdout(task), _MAX_OUTPUT_BYTES), str(self.log(task)), last_lines(self.log(task))
        )

    def last_line(self, task: Task) -> str:
        """Return the last of a job's messages."""
        return last_lines(self.log(task), 1).strip()


def read_end(path: Path, limit_bytes: int) -> str:
    """Return the last ``limit_bytes`` of a file; nothing if it cannot be read."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - limit_bytes))
            return file.read(limit_bytes).decode(errors="replace")
    except OSError:
        return ""


def last_lines(path: Path, count: int = _TAIL_LINES) -> str:
    """Return the last lines of a file that have something in them."""
    lines = [line.rstrip() for line in read_end(path, _TAIL_BYTES).splitlines() if line.strip()]
    return "\n".join(lines[-count:])


@contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Own a working directory: one run at a time. Raises `StorageError`."""
    with storage_errors(directory, "make"):
        directory.mkdir(parents=True, exist_ok=True)
        # Not inherited by stages: a run that was killed no longer has it, whatever of it still ends.
        file = (directory / _LOCK).open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"another run has {directory}", hint="wait for it, or name another: --work DIR"
            ) from None
        yield


def load_state(directory: Path) -> Mapping[str, Any]:
    """Return what an earlier run wrote down, by task key; nothing where it cannot be read: the registry and the queue know better."""
    try:
        body = json.loads((directory / STATE).read_text())
        tasks = body["tasks"]
        return tasks if isinstance(tasks, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def save_state(directory: Path, tasks: Mapping[str, Mapping[str, object]]) -> None:
    """Write down what is known. Raises `StorageError`."""
    path = directory / STATE
    with storage_errors(path, "write"):
        write_atomically(
            path, (json.dumps({"schema": 1, "tasks": tasks}, indent=1) + "\n").encode(), durable=False
        )
