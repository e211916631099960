"""A blob on its way into the store: one sparse file, written at any place, hashed in order, verified before it gets its name.

Beside the file ``<hex>.part`` lies its map ``<hex>.map`` (`uenvd.cache.partmap`), from which a writer after this one goes on, also after
``kill -9``. Nothing of it makes a byte trusted as *right*: `commit` hashes the whole.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from uenvd.cache import partmap
from uenvd.cache.claim import Claim
from uenvd.cache.identity import CacheUser
from uenvd.cache.partmap import map_of, trusted
from uenvd.cache.ranges import Ranges
from uenvd.cache.wishes import Wishes
from uenvd.errors import DigestMismatch, InUse, StorageError, StorageFull
from uenvd.oci.files import storage_error, storage_errors, sync_directory, write_atomically
from uenvd.oci.manifest import Descriptor
from uenvd.oci.remote import never

REREAD_BYTES: Final = 1 << 20
CHECK_CLAIM_BYTES: Final = 64 << 20
"""How much is written between two looks at the claim."""
_CLOSE_S: Final = 0.05
"""How long the end waits for writes that are under way; after that the last of them ends the rest."""
_NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


class Partial:
    """Bytes of a blob, under a claim that keeps other writers out.

    Made by `Store.begin`. It ends with exactly one of `commit`, `keep`, `abort`; as a context manager it is kept unless one of them was
    called. `write_at`, `sync`, `catch_up` and the properties may be used by several threads at once; after the end they raise `InUse`.
    """

    def __init__(
        self,
        descriptor: Descriptor,
        path: Path,
        target: Path,
        claim: Claim,
        user: CacheUser | None = None,
    ) -> None:
        """Open or continue ``path`` with the rights of ``user``. Gives the claim back at its end, also when this raises.

        Raises `StorageError`, `StorageFull`.
        """
        self.descriptor = descriptor
        self.path = path
        self.wishes: Wishes | None = None
        """What other nodes ask for, in a directory that they see."""
        self._target = target
        self._user = user or CacheUser()
        self._claim = claim
        self._fd = self._map_fd = -1
        self._held = Ranges()
        self._unrecorded: list[tuple[int, int]] = []
        self._undurable_bytes = 0
        self._unchecked_bytes = 0
        self._full = False
        self._unstored: StorageError | None = None
        """Why bytes that were written may be lost. The kernel says it once (fsync(2)), so nothing of the file is believed any more."""
        self._hasher = hashlib.sha256()
        self._hashed_bytes = 0
        self._discards = 0
        self._hashing = threading.Lock()
        self._syncing = threading.Lock()
        self._mapping = threading.RLock()
        self._map_bytes = 0
        # The kernel lets one writer at a time into a file, and the others spin: on two cores that costs more than the write.
        self._writing = threading.Lock()
        self._state = threading.Condition()
        self._writers: list[float] = []
        """When each operation that is under way began, monotonic."""
        self._ended = self._closed = False
        try:
            with self._user, storage_errors(path, "continuing"):
                self._fd = _open_part(path)
                found_bytes = os.fstat(self._fd).st_size
                self._held, durable = trusted(path, descriptor.size_bytes, found_bytes)
                if not self._held and found_bytes:
                    # Another file: somebody may still read verified bytes of this one.
                    os.close(self._fd)
                    path.unlink()
                    self._fd = os.open(
                        path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
                    )
                self._begin_map(durable)
            self.resumed_bytes = self._held.total_bytes
            self._check_room()
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.keep()

    # -- what is there

    @property
    def offset_bytes(self) -> int:
        """How many bytes are there from the beginning on, without a gap."""
        with self._state:
            return self._held.run_from(0)

    @property
    def held_bytes(self) -> int:
        """How many bytes are there, wherever."""
        with self._state:
            return self._held.total_bytes

    @property
    def held(self) -> Ranges:
        """A copy of the set of bytes that are there."""
        with self._state:
            return Ranges(self._held)

    def covers(self, first: int, end: int) -> bool:
        """Tell whether these bytes are there."""
        with self._state:
            return self._held.covers(first, end)

    @property
    def hashed_bytes(self) -> int:
        """How many bytes from the beginning on went into the hash."""
        return self._hashed_bytes

    @property
    def undurable_bytes(self) -> int:
        """How much was written since the last `sync`."""
        with self._state:
            return self._undurable_bytes

    @property
    def stuck_s(self) -> float:
        """For how long the oldest operation that is under way has not returned; 0 while there is none."""
        with self._state:
            return time.monotonic() - min(self._writers) if self._writers else 0.0

    def catch_up(self, cancelled: Callable[[], bool] = never, end: int | None = None) -> None:
        """Read back and hash what is there up to the first gap, or to ``end``. `commit` does it too; here it can be cancelled after each MiB."""
        buffer = bytearray(REREAD_BYTES)
        with self._hashing:
            while not cancelled():
                stop = self.offset_bytes if end is None else min(end, self.offset_bytes)
                if (left := stop - self._hashed_bytes) <= 0:
                    break
                view = memoryview(buffer)[: min(len(buffer), left)]
                with self._using(), self._errors("reading back"):
                    count = os.preadv(self._fd, [view], self._hashed_bytes)
                if not count:
                    self._claim.check()  # a successor removes what its former writer may still write to
                    raise DigestMismatch(f"{self.path} became shorter while it was written")
                self._hasher.update(view[:count])
                self._hashed_bytes += count

    def hash_written(self, first: int, data: memoryview, mark: int) -> None:
        """Hash, from memory, bytes that `write_at` has just written and given ``mark`` for. Does nothing unless they are next in order."""
        with self._hashing:
            with self._state:
                skip = self._hashed_bytes - first
                if mark != self._discards or not 0 <= skip < len(data):
                    return
            self._hasher.update(data[skip:])
            self._hashed_bytes += len(data) - skip

    def open_for_reader(self) -> int:
        """Return a read-only descriptor of the file, which `commit` makes the blob: a lease on it as `Store.open` gives one on this node.

        The caller closes it. What may be read of it is the caller's to know. Raises `StorageError`.
        """
        with self._using(), self._user, storage_errors(self.path, "opening"):
            fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if (
                    self.wishes is None
                ):  # leases of a shared directory are files; its lock manager may not answer
                    with suppress(OSError):
                        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BaseException:
                os.close(fd)
                raise
            return fd

    def read_at(self, first: int, size_bytes: int) -> bytes:
        """Return bytes that are there. Raises `ValueError` for others, `StorageError`."""
        with self._state:
            if not self._held.covers(first, first + size_bytes):
                raise ValueError(f"the bytes {first}..{first + size_bytes} are not there yet")
        with self._using(), self._errors("reading back"):
            return os.pread(self._fd, size_bytes, first)

    def check(self) -> None:
        """Raise `InUse` when the right to write was lost. Costs a look at the claim at most once a second."""
        self._claim.check()

    # -- writing

    def write(self, data: bytes) -> None:
        """Append at `offset_bytes`. Raises as `write_at`, and `DigestMismatch` (nothing is kept) for more bytes than the descriptor says."""
        first = self.offset_bytes
        if first + len(data) > self.descriptor.size_bytes:
            self.abort()
            raise DigestMismatch(
                f"more than the {self.descriptor.size_bytes} bytes of {self.descriptor.digest} arrived"
            )
        try:
            self.write_at(first, data)
        except StorageError:
            self.keep()
            raise

    def write_at(self, first: int, data: bytes | bytearray | memoryview) -> int | None:
        """Write bytes at their place in the blob, but none that is there already: it may have been hashed.

        Returns a mark for `hash_written`; None if some of them were there, so that the file may have others.
        Raises `StorageFull`, `StorageError`, `InUse` (the claim was lost, or after the end).
        When there is no room the end, whichever it is, removes the file: it would keep the others from theirs.
        """
        end = first + len(data)
        if not 0 <= first <= end <= self.descriptor.size_bytes:
            raise ValueError(
                f"bytes {first}..{end} are no part of a blob of {self.descriptor.size_bytes} bytes"
            )
        with self._using():
            self._check_claim(len(data))
            with self._writing:
                with self._state:
                    gaps = list(self._held.gaps(first, end))
                    mark = self._discards if gaps == [(first, end)] else None
                for at, stop in gaps:
                    self._write_all(memoryview(data)[at - first : stop - first], at)
                    with self._state:
                        self._held.add(at, stop)
                        self._undurable_bytes += stop - at
                        self._note(at, stop)
        return mark

    def _write_all(self, view: memoryview, at: int) -> None:
        try:
            while view:
                count = os.pwrite(self._fd, view, at)
                view, at = view[count:], at + count
        except OSError as error:
            raise self._failed(error, "writing") from error

    def discard(self, first: int, end: int) -> None:
        """Forget bytes that turned out to be wrong, so that they are fetched again."""
        with self._hashing, self._state:
            self._held.remove(first, end)
            self._discards += 1
            if first < self._hashed_bytes:
                self._hasher, self._hashed_bytes = hashlib.sha256(), 0
        with self._using(), self._syncing, self._user, storage_errors(self.path, "writing the map of"):
            self._begin_map(Ranges())

    def record(self) -> None:
        """Put what was written since the last time into the map, for a writer after this one."""
        with self._using():
            self._record()

    def sync(self) -> None:
        """Make what was written durable, and note that it is. Raises `StorageError`, `StorageFull`, `InUse` when a successor removed it."""
        with self._using(), self._syncing:
            with self._state:
                before, self._undurable_bytes = self._undurable_bytes, 0
            try:
                # Others write and record meanwhile.
                recorded_bytes = self._record()
                self._flush()
                self._append(partmap.durable_before(recorded_bytes))
                os.fdatasync(self._map_fd)
            except OSError as error:
                with self._state:
                    self._undurable_bytes += before
                raise self._not_stored(error) from error

    def _flush(self) -> None:
        os.fdatasync(self._fd)

    # -- the end

    def commit(self) -> None:
        """Check size and digest of the whole, make it durable and give it its name.

        Raises `DigestMismatch` after removing it, `InUse` when a successor removed it.
        """
        self.catch_up()
        found = f"sha256:{self._hasher.hexdigest()}"
        size = self.offset_bytes
        if size != self.descriptor.size_bytes or found != self.descriptor.digest:
            self.abort()
            raise DigestMismatch(
                f"{size} bytes with the digest {found} arrived where {self.descriptor.size_bytes} bytes with"
                f" {self.descriptor.digest} were asked for"
            )
        try:
            self._claim.check()
            with self._using(), self._user:
                try:
                    os.ftruncate(self._fd, size)
                    os.fchmod(self._fd, 0o644)
                    self._store()
                    self._publish()
                except OSError as error:
                    raise self._failed(error, "storing", self._target) from error
                with suppress(OSError):
                    map_of(self.path).unlink()
        finally:
            if self._unstored is not None:
                self.abort()
            self._close()

    def _store(self) -> None:
        if self._unstored is not None:
            raise StorageError(
                f"{self.path} could not be stored before: {self._unstored}", hint=self._unstored.hint
            )
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._not_stored(error) from error

    def _publish(self) -> None:
        """Give the open file its name. Not whatever has the name of the part now: a node that slept since it looked at its claim has lost it."""
        parent = os.open(self._target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # With a directory's descriptor os.link follows the link in /proc, as linkat(2) recommends (AT_SYMLINK_FOLLOW).
            os.link(f"/proc/self/fd/{self._fd}", self._target.name, dst_dir_fd=parent)
        except FileExistsError:
            pass  # verified bytes with this digest, which somebody may be reading
        except OSError as error:
            if error.errno not in _NO_LINKS or self._is_gone(error):
                raise
            self.path.rename(self._target)
        else:
            with suppress(OSError):
                if self._is_mine():
                    self.path.unlink()
        finally:
            os.close(parent)
        sync_directory(self._target.parent)

    def _is_mine(self) -> bool:
        named, mine = self.path.stat(follow_symlinks=False), os.fstat(self._fd)
        return (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino)

    def _is_gone(self, error: OSError) -> bool:
        """Tell whether something failed because a successor removed the file. NFS says it in several ways."""
        if error.errno == errno.ESTALE:
            return True
        try:
            return error.errno in {errno.ENOENT, *_NO_LINKS} and not self._is_mine()
        except OSError:
            return True

    def keep(self) -> None:
        """End and leave the bytes for a later `Store.begin`; remove them if the disk was full or some are lost. Does nothing after an end."""
        if self._full or self._unstored is not None:
            self.abort()
        elif not self._ended:
            with suppress(StorageError, InUse):
                self.record()
            self._close()

    def abort(self) -> None:
        """End and remove the bytes. Does nothing after an end."""
        if not self._ended:
            # Unlinked under the claim: nobody else can have opened it as theirs.
            with suppress(OSError, InUse), self._user:
                self._claim.check()
                if self._is_mine():
                    self.path.unlink()
                map_of(self.path).unlink()
            self._close()

    def _close(self) -> None:
        with self._state:
            self._ended = True
            end_s = time.monotonic() + _CLOSE_S
            while self._writers and (left_s := end_s - time.monotonic()) > 0:
                self._state.wait(left_s)
        self._finish()

    def _finish(self) -> None:
        """Give everything back, unless somebody is still writing: he does it then, and until then the claim holds."""
        with self._state:
            if self._writers or self._closed or not self._ended:
                return
            self._closed = True
            fds, self._fd, self._map_fd = (self._fd, self._map_fd), -1, -1
        for fd in fds:
            try:
                if fd >= 0:
                    os.close(fd)
            except OSError:
                # NFS writes what is left now, and it was refused: the next one begins anew.
                with suppress(OSError, InUse, StorageError), self._user:
                    self._claim.check()
                    map_of(self.path).unlink()
        self._claim.release()

    # -- inside

    def _using(self) -> _Using:
        return _Using(self)

    def _check_claim(self, written_bytes: int) -> None:
        with self._state:
            self._unchecked_bytes += written_bytes
            due = self._unchecked_bytes >= CHECK_CLAIM_BYTES
            if due:
                self._unchecked_bytes = 0
        if due:
            self._claim.check()

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._failed(error, doing) from error

    def _failed(self, error: OSError, doing: str, path: Path | None = None) -> StorageError | InUse:
        if self._is_gone(error):
            return InUse(f"{self.path.name} was removed by a successor")
        failure = storage_error(error, path or self.path, doing)
        self._full = self._full or isinstance(failure, StorageFull)
        return failure

    def _not_stored(self, error: OSError) -> StorageError | InUse:
        failure = self._failed(error, "storing")
        if isinstance(failure, StorageError):
            self._unstored = failure
        return failure

    def _note(self, first: int, end: int) -> None:
        last = self._unrecorded
        for index, (start, stop) in enumerate(last):
            if stop == first:
                last[index] = (start, end)
                return
        last.append((first, end))

    def _record(self) -> int:
        """Put what was written into the map; return how long that is now."""
        with self._mapping:
            with self._state:
                lines, self._unrecorded = self._unrecorded, []
            if lines:
                try:
                    self._append(partmap.written(lines))
                except OSError as error:
                    raise self._failed(error, "writing the map of") from error
            return self._map_bytes

    def _append(self, lines: bytes) -> None:
        with self._mapping:
            self._map_bytes += os.write(self._map_fd, lines)

    def _begin_map(self, durable: Ranges) -> None:
        """Write the map anew from what is held, and what of it is durable."""
        with self._mapping:
            with self._state:
                held, self._unrecorded = list(self._held), []
            path = map_of(self.path)
            text = partmap.whole(self.descriptor.size_bytes, durable, held)
            write_atomically(path, text, durable=len(durable) > 0)
            self._map_bytes = len(text)
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
            if self._map_fd >= 0:
                os.close(self._map_fd)
            self._map_fd = fd

    def _check_room(self) -> None:
        """Refuse at once what cannot fit; space may still run out later."""
        with storage_errors(self.path, "looking at the file system of"):
            room = os.fstatvfs(self._fd)
        free = room.f_bavail * room.f_frsize
        needed = self.descriptor.size_bytes - self._held.total_bytes
        if needed > free:
            raise StorageFull(
                f"no room left: {self.descriptor.digest} needs {needed} more bytes in {self.path.parent}, {free} are free"
            )


class _Using:
    """Keeps the descriptors of a `Partial` open inside the ``with`` block. A class of its own: it is entered for each write."""

    __slots__ = ("_began_s", "_partial")

    def __init__(self, partial: Partial) -> None:
        self._partial = partial

    def __enter__(self) -> None:
        partial = self._partial
        self._began_s = time.monotonic()
        with partial._state:
            if partial._ended:
                raise InUse(f"the transfer of {partial.descriptor.digest} has ended")
            partial._writers.append(self._began_s)

    def __exit__(self, *_exc: object) -> None:
        partial = self._partial
        with partial._state:
            partial._writers.remove(self._began_s)
            last = partial._ended and not partial._writers
            if not partial._writers:
                partial._state.notify_all()
        if last:
            partial._finish()


def _open_part(path: Path) -> int:
    """Open the file of a part. One that is a blob already (a crash between the two names of `Partial.commit`) is left alone. Raises OSError."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if os.fstat(fd).st_nlink <= 1:
            return fd
        os.close(fd)
        with suppress(FileNotFoundError):
            path.unlink()
