"""The blobs of a cache are read again, slowly, so that a bad disk is found before a job finds it.

One blob after the other, the one whose last check is longest ago first, at a bounded rate, with the idle class of the I/O scheduler
(ioprio_set(2)) and without filling the page cache. When a blob was checked last is the mtime of ``scrub/<hex>``, so the round goes on where
it was, also on another node. A blob that does not have its digest goes into quarantine; who has it open keeps it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from uenvd.cache.directory import Directory
from uenvd.errors import NotFound
from uenvd.oci.files import storage_errors
from uenvd.oci.reference import is_digest

log = logging.getLogger(__name__)

_PIECE_BYTES: Final = 1 << 20
_IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS: Final = 1
_IOPRIO_IDLE: Final = 3 << 13  # IOPRIO_PRIO_VALUE(IOPRIO_CLASS_IDLE, 0), include/uapi/linux/ioprio.h


@dataclass(frozen=True)
class Scrubbed:
    """What one step did."""

    digest: str
    size_bytes: int
    damaged: bool


def next_blob(directory: Directory, interval_s: float, now_s: float | None = None) -> str | None:
    """Return the digest of the blob whose check is due and longest ago; None if none is due. Raises `StorageError`."""
    now_s = time.time() if now_s is None else now_s
    oldest, chosen = now_s - interval_s, None
    marks = directory.blobs.checks
    with directory.user, storage_errors(directory.root, "looking for what to check in"):
        checked = _mtimes(marks)
        blobs = _mtimes(directory.blobs.directory)
        for name in blobs:
            if name not in checked and is_digest(f"sha256:{name}"):
                # Its digest was checked when it was stored, lately or long ago.
                checked[name] = now_s - interval_s / 2 - 1
                (marks / name).touch(mode=0o644)
                os.utime(marks / name, (checked[name], checked[name]))
            if checked.get(name, oldest) < oldest:
                oldest, chosen = checked[name], name
        for name in checked.keys() - blobs.keys():
            with suppress(OSError):
                (marks / name).unlink()
    return None if chosen is None else f"sha256:{chosen}"


def scrub_blob(
    directory: Directory, digest: str, rate_bytes_per_s: int, stopped: Callable[[], bool]
) -> Scrubbed | None:
    """Read one blob again and note that; None if it is gone or ``stopped()`` came true. Raises `StorageError`.

    Blocks for size / rate. Looks at ``stopped`` at least each second.
    """
    be_idle()
    path = directory.blobs.path(digest)
    hasher, done = hashlib.sha256(), 0
    began_s = time.monotonic()
    try:
        fd = directory.blobs.open_unused(digest)
    except NotFound:
        return None
    try:
        while True:
            with storage_errors(path, "reading"):
                piece = os.pread(fd, _PIECE_BYTES, done)
                with suppress(OSError):
                    os.posix_fadvise(fd, done, len(piece), os.POSIX_FADV_DONTNEED)
            if not piece:
                break
            hasher.update(piece)
            done += len(piece)
            while (ahead_s := done / rate_bytes_per_s - (time.monotonic() - began_s)) > 0:
                if stopped():
                    return None
                time.sleep(min(ahead_s, 0.5))
            if stopped():
                return None
    finally:
        os.close(fd)
    damaged = f"sha256:{hasher.hexdigest()}" != digest
    if damaged:
        log.error("%s is damaged and goes into quarantine", path)
        directory.discard_damaged(digest)
    else:
        with directory.user, storage_errors(path, "noting the check of"):
            (directory.blobs.checks / path.name).touch(mode=0o644)
    return Scrubbed(digest, done, damaged)


def be_idle() -> None:
    """Put this thread into the idle class of the I/O scheduler, where the system has one; for good, so use a thread of its own."""
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(
            ctypes.c_long(number), _IOPRIO_WHO_PROCESS, threading.get_native_id(), _IOPRIO_IDLE
        )


def _mtimes(directory: Path) -> dict[str, float]:
    found = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                found[entry.name] = entry.stat(follow_symlinks=False).st_mtime
    return found
