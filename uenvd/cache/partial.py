"""A blob on its way into the store: one file, one writer, resumable, verified before it gets its name."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from uenvd.errors import DigestMismatch, InUse, StorageFull
from uenvd.oci.files import storage_error, storage_errors, sync_directory
from uenvd.oci.manifest import Descriptor
from uenvd.oci.remote import never

REREAD_BYTES: Final = 1 << 20
FLUSH_BYTES: Final = 256 << 20
"""How much may wait to reach the disk: then the end of a pull of many GB is no long stop."""


class Partial:
    """Bytes 0..`offset_bytes` of a blob, under an exclusive lock (flock) that ends with the process.

    Made by `Store.begin`. It ends with exactly one of `commit`, `keep`, `abort`; as a context manager it is kept unless one
    of them was called. Not for use by several threads.
    """

    def __init__(self, descriptor: Descriptor, path: Path, target: Path) -> None:
        """Open or continue ``path``. Raises `InUse` if another writer has it, `StorageError`, `StorageFull`."""
        self.descriptor = descriptor
        self.path = path
        self._target = target
        self._hasher = hashlib.sha256()
        self._hashed_bytes = 0
        self._unflushed_bytes = 0
        self._fd = _open_locked(path)
        try:
            with storage_errors(path, "continuing"):
                self.offset_bytes = os.fstat(self._fd).st_size
                if self.offset_bytes > descriptor.size_bytes:
                    os.ftruncate(self._fd, 0)
                    self.offset_bytes = 0
                os.lseek(self._fd, self.offset_bytes, os.SEEK_SET)
            self._check_room()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.keep()

    def catch_up(self, cancelled: Callable[[], bool] = never) -> None:
        """Hash the bytes that an earlier writer left. `write` and `commit` do it too; here it can be cancelled between pieces."""
        while self._hashed_bytes < self.offset_bytes and not cancelled():
            with storage_errors(self.path, "reading back"):
                piece = os.pread(
                    self._fd, min(REREAD_BYTES, self.offset_bytes - self._hashed_bytes), self._hashed_bytes
                )
            if not piece:
                raise DigestMismatch(f"{self.path} became shorter while it was written")
            self._hasher.update(piece)
            self._hashed_bytes += len(piece)

    def write(self, data: bytes) -> None:
        """Append. Raises `DigestMismatch` for more bytes than the descriptor says, `StorageFull`, `StorageError`.

        When there is no room the file is removed: it would keep the others from theirs.
        """
        if self.offset_bytes + len(data) > self.descriptor.size_bytes:
            self.abort()
            raise DigestMismatch(
                f"more than the {self.descriptor.size_bytes} bytes of {self.descriptor.digest} arrived"
            )
        self.catch_up()
        self._hasher.update(data)
        self._hashed_bytes += len(data)
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
            self._unflushed_bytes += len(data)
            if self._unflushed_bytes >= FLUSH_BYTES:
                os.fdatasync(self._fd)
                self._unflushed_bytes = 0
        except OSError as error:
            failure = storage_error(error, self.path, "writing")
            if isinstance(failure, StorageFull):
                self.abort()
            else:
                # The bytes on disk may lie behind those hashed; let a successor look again.
                self.keep()
            raise failure from error
        self.offset_bytes += len(data)

    def commit(self) -> None:
        """Check size and digest of the whole, make it durable and give it its name. Raises `DigestMismatch` after removing it."""
        self.catch_up()
        found = f"sha256:{self._hasher.hexdigest()}"
        if self.offset_bytes != self.descriptor.size_bytes or found != self.descriptor.digest:
            size = self.offset_bytes
            self.abort()
            raise DigestMismatch(
                f"{size} bytes with the digest {found} arrived where {self.descriptor.size_bytes} bytes with"
                f" {self.descriptor.digest} were asked for"
            )
        try:
            with storage_errors(self._target, "storing"):
                os.fchmod(self._fd, 0o644)
                os.fsync(self._fd)
                self.path.rename(self._target)
                sync_directory(self._target.parent)
        finally:
            self._close()

    def keep(self) -> None:
        """End and leave the bytes for a later `Store.begin`. Does nothing after an end."""
        self._close()

    def abort(self) -> None:
        """End and remove the bytes. Does nothing after an end."""
        if self._fd >= 0:
            # Unlinked under the lock: nobody else can have opened it as theirs.
            with suppress(OSError):
                self.path.unlink()
            self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _check_room(self) -> None:
        """Refuse at once what cannot fit; space may still run out later."""
        with storage_errors(self.path, "looking at the file system of"):
            room = os.fstatvfs(self._fd)
        free = room.f_bavail * room.f_frsize
        needed = self.descriptor.size_bytes - self.offset_bytes
        if needed > free:
            raise StorageFull(
                f"no room left: {self.descriptor.digest} needs {needed} more bytes in {self.path.parent}, {free} are free"
            )


def _open_locked(path: Path) -> int:
    """Open ``path`` under an exclusive lock. Raises `InUse` if it is taken, `StorageError`."""
    while True:
        with storage_errors(path, "opening"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise InUse(f"another process is pulling {path.name.removesuffix('.part')}") from None
        except OSError as error:
            os.close(fd)
            raise storage_error(error, path, "locking") from error
        try:
            named = path.stat()
            if (named.st_dev, named.st_ino) == (os.fstat(fd).st_dev, os.fstat(fd).st_ino):
                return fd
        except OSError:
            pass
        # Its former writer committed or removed it between the open and the lock.
        os.close(fd)
