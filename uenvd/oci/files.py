"""Small file operations that a crash or a second process cannot leave half done."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from uenvd.errors import NotFound, StorageError, StorageFull

COPY_BYTES: Final = 1 << 20
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_LOCK_PATIENCE_S: Final = 30.0


@contextmanager
def storage_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an `OSError` of the block into `StorageFull` or `StorageError` that name the path and what was tried."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path, doing) from error


def storage_error(error: OSError, path: Path, doing: str) -> StorageError:
    """Return the error of our tree for an `OSError` met while ``doing`` something with ``path``."""
    why = error.strerror or type(error).__name__
    if error.errno in _FULL:
        return StorageFull(f"no room left: {doing} {path}: {why}")
    hints = {
        errno.EROFS: "the file system is mounted read-only; choose another directory or remount it",
        errno.EACCES: "check the owner and mode of the directory, and as which user this program runs",
        errno.EPERM: "check the owner and mode of the directory, and as which user this program runs",
        errno.ENOENT: "the directory was removed or its file system is not mounted",
        errno.ENOTDIR: "a file lies where a directory is expected",
        errno.EIO: "the file system reports damage: see the kernel's log",
    }
    return StorageError(f"{doing} {path}: {why}", hint=hints.get(error.errno or 0, ""))


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace a file: readers see the old or the new content; with ``durable`` also after a power failure. Raises `OSError`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames and removals in a directory durable. Raises `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def locked(path: Path, patience_s: float = _LOCK_PATIENCE_S) -> Iterator[None]:
    """Hold an exclusive lock (flock on a file of its own, which stays) against threads and processes. Raises `OSError`, `StorageError`."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        end = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise StorageError(
                        f"{path} has been locked by another process for {patience_s:g} s",
                        hint=f"see who holds it: fuser {path}",
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """Return the content of a file of at most ``limit_bytes``. Raises `OSError`, and `StorageError` for a larger one."""
    with path.open("rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise StorageError(f"{path} has more than the {limit_bytes} bytes that are allowed")
    return data


def hash_file(path: Path) -> tuple[str, int]:
    """Return (``sha256:<hex>``, size in bytes) of a file. Raises `OSError`."""
    hasher, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(COPY_BYTES):
            hasher.update(piece)
            done += len(piece)
    return f"sha256:{hasher.hexdigest()}", done


def pieces_of(path: Path, offset_bytes: int, check: Callable[[], None], missing: str) -> Iterator[bytes]:
    """Yield a file from an offset on in pieces of 1 MiB; ``check`` runs before each. Raises `NotFound` with the text ``missing``."""
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise NotFound(missing) from error
    with file:
        file.seek(offset_bytes)
        while True:
            check()
            piece = file.read(COPY_BYTES)
            if not piece:
                return
            yield piece
