"""Which job used which image: a small file that outlives the daemon, for `uenvctl job`.

JSON lines, one for each image of each step on this node. The file is turned over at `MAX_FILE_BYTES`, and one older file is kept, so it never
takes more than twice that. Only root can read it; the daemon shows a user his own jobs.

Concurrency: `note` is synchronous and only queues; one task (`run`) writes, in a thread. `steps_of` reads in a thread of its caller. What is
queued when the daemon is killed is lost; a line that was torn by a crash is passed over.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import trio

log = logging.getLogger(__name__)

MAX_FILE_BYTES: Final = 4 << 20
MAX_QUEUED: Final = 10_000
MAX_ANSWERED: Final = 1000
"""Images that one answer names; the newest ones."""


class Used(NamedTuple):
    """One image of one job step. ``digest`` is None for a file of the user's own, whose ``label`` is its path; ``time`` is seconds of the epoch."""

    job: int
    step: int
    uid: int
    label: str
    digest: str | None
    mount: str
    views: Sequence[str]
    time: float


class Journal:
    """The file ``jobs.jsonl`` in a directory, and ``jobs.jsonl.1`` before it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "jobs.jsonl"
        self._queue: deque[Used] = deque(maxlen=MAX_QUEUED)
        self._wanted = trio.Event()
        self._failing = False

    @property
    def _older(self) -> Path:
        return self.path.with_name(self.path.name + ".1")

    def note(self, used: Used) -> None:
        """Take note of an image that a step uses; no checkpoint, no I/O."""
        self._queue.append(used)
        self._wanted.set()

    async def run(self) -> None:
        """Write what is noted until cancelled, and then what is left."""
        try:
            while True:
                await self._wanted.wait()
                self._wanted = trio.Event()
                await trio.to_thread.run_sync(self.flush)
        finally:
            self.flush()

    def flush(self) -> None:
        """Write what is queued (blocking). A file system that refuses costs the entries and one line in the log."""
        entries = []
        while self._queue:
            entries.append(self._queue.popleft())
        if not entries:
            return
        data = b"".join(json.dumps(one._asdict(), separators=(",", ":")).encode() + b"\n" for one in entries)
        try:
            self._append(data)
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning("%s: cannot be written: %s", self.path, error.strerror or error)
            self._failing = True

    def _append(self, data: bytes) -> None:
        self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.path, flags, 0o600)
        try:
            size_bytes = os.fstat(descriptor).st_size
            if size_bytes and size_bytes + len(data) > MAX_FILE_BYTES:
                self.path.replace(self._older)
                os.close(descriptor)
                descriptor = os.open(self.path, flags, 0o600)
                size_bytes = 0
            if size_bytes and os.pread(descriptor, 1, size_bytes - 1) != b"\n":
                data = b"\n" + data  # a crash tore the last line
            while data:
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)

    def steps_of(self, job: int, uid: int | None) -> list[dict[str, Any]]:
        """Return what a job used on this node, oldest first (blocking); with ``uid``, only what that user did."""
        self.flush()
        mark = f'{{"job":{job},'.encode()
        found = []
        for path in (self._older, self.path):
            try:
                lines = path.read_bytes().splitlines()
            except OSError:
                continue
            for line in lines:
                if not line.startswith(mark):
                    continue
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if uid is None or entry.get("uid") == uid:
                    entry.pop("job")
                    found.append(entry)
        return found[-MAX_ANSWERED:]


def now_s() -> float:
    """Return the time of an entry, milliseconds being enough."""
    return round(time.time(), 3)
