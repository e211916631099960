"""What a label meant when a job first asked: its later steps get the same image, also when the tag has moved meanwhile.

Needed only for jobs that were submitted where no uenvd runs; the others carry digests from their submission.

A small file keeps the answers over a restart of the daemon: JSON lines, each an array of job, description list, directory and answer, the
first line of a key counts. Only root can read it. It is written anew without what is forgotten when a daemon starts, and when it has
twice as many lines as there are answers to keep. A file system that refuses costs the memory over a restart, and a line in the log.

Concurrency: `recall` and `keep` are synchronous and do no I/O; `save` blocks, and may be called from several threads.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import OrderedDict, deque
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

MAX_PROMISES: Final = 4096
MAX_FILE_BYTES: Final = 16 << 20
"""Of what an older daemon left, no more is read."""

Key = tuple[int, str, str | None]


class Promises:
    """Description list by job, as it was first resolved; the least recently used are forgotten first.

    Args:
        path: the file; None: nothing outlives this object. What is in it is remembered.
        limit: so many answers are kept.

    """

    def __init__(self, path: Path | None = None, *, limit: int = MAX_PROMISES) -> None:
        self._limit = limit
        self._path = path
        self._kept: OrderedDict[Key, str] = OrderedDict()
        self._unsaved: deque[tuple[Key, str]] = deque()
        self._whole: list[tuple[Key, str]] | None = None
        """All there is to keep, when the file has grown too long."""
        self._lines = 0
        self._lock = threading.Lock()
        self._failing = False
        if path is not None:
            self._load(path)

    def recall(self, job: int | None, uenv: str, cwd: str | None) -> str | None:
        """Return what ``uenv``, seen from the directory ``cwd``, means to this job; None: not asked before, or no job."""
        if job is None or (job, uenv, cwd) not in self._kept:
            return None
        self._kept.move_to_end((job, uenv, cwd))
        return self._kept[job, uenv, cwd]

    def keep(self, job: int | None, uenv: str, cwd: str | None, resolved: str) -> bool:
        """Remember the first answer; without a job nothing is remembered. Return whether there is something to `save`."""
        if job is not None and (job, uenv, cwd) not in self._kept:
            self._remember((job, uenv, cwd), resolved)
            if self._path is not None:
                self._unsaved.append(((job, uenv, cwd), resolved))
                if self._lines + len(self._unsaved) > 2 * self._limit:
                    self._whole = list(self._kept.items())
        return bool(self._unsaved)

    def save(self) -> None:
        """Write what is not in the file yet (blocking); when it returns, a daemon that is started now knows it."""
        with self._lock:
            unsaved = []
            while self._unsaved:
                unsaved.append(self._unsaved.popleft())
            if not unsaved or self._path is None:
                return
            whole, self._whole = self._whole, None
            try:
                if whole is not None:
                    self._write_anew(self._path, whole)
                else:
                    _write(self._path, _lines(unsaved), os.O_APPEND)
                    self._lines += len(unsaved)
                self._failing = False
            except OSError as error:
                self._complain(error)

    def _remember(self, key: Key, resolved: str) -> None:
        self._kept[key] = resolved
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)

    def _load(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                lines = file.read(MAX_FILE_BYTES).splitlines()
        except FileNotFoundError:
            return
        except OSError as error:
            self._complain(error)
            return
        for line in lines:
            entry = _parse(line)
            if entry is not None and entry[0] not in self._kept:
                self._remember(*entry)
        try:
            self._write_anew(path, list(self._kept.items()))
        except OSError as error:
            self._complain(error)

    def _write_anew(self, path: Path, kept: list[tuple[Key, str]]) -> None:
        new = path.with_name(path.name + ".new")
        _write(new, _lines(kept), os.O_TRUNC)
        new.replace(path)
        self._lines = len(kept)

    def _complain(self, error: OSError) -> None:
        if not self._failing:
            log.warning("%s: cannot be used: %s", self._path, error.strerror or error)
        self._failing = True


def _lines(entries: list[tuple[Key, str]]) -> bytes:
    return b"".join(json.dumps([*key, resolved]).encode() + b"\n" for key, resolved in entries)


def _parse(line: bytes) -> tuple[Key, str] | None:
    """Return what a line says; None of one that a crash tore."""
    try:
        job, uenv, cwd, resolved = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return None
    if (
        type(job) is int
        and isinstance(uenv, str)
        and isinstance(cwd, str | None)
        and isinstance(resolved, str)
    ):
        return (job, uenv, cwd), resolved
    return None


def _write(path: Path, data: bytes, how: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | how
    descriptor = os.open(path, flags, 0o600)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    finally:
        os.close(descriptor)
