"""The blobs of one cache directory: found, opened under a lease, written under a claim, removed when nobody reads them.

A directory belongs to one node, or is shared by many (``shared``). What differs:

=====================  ==================================================  ============================================================
                       one node                                            shared
=====================  ==================================================  ============================================================
one writer             a kernel lock (flock)                               a heartbeat file (`uenvd.cache.claim`)
readers (leases)       shared kernel lock on the open blob; ends with the  heartbeat file of the node (`uenvd.cache.leases`); ends when
                       last copy of the descriptor                         the daemon says so, or with the grace
last use               mtime of the blob                                   mtime of ``used/<hex>``: a changed mtime of the blob would
                                                                           make every NFS client throw its cached pages away
=====================  ==================================================  ============================================================
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from uenvd.cache.claim import FlockClaim, HeartbeatClaim, Watch, look_at, refresh, unless_stale
from uenvd.cache.identity import CacheUser, as_user
from uenvd.cache.leases import NodeLeases, held_anywhere
from uenvd.cache.partmap import received_bytes
from uenvd.cache.partview import PartView
from uenvd.cache.pauses import Pauses
from uenvd.cache.wishes import DIRECTORY as WISHES
from uenvd.cache.wishes import Wishes
from uenvd.errors import InUse, NotFound, StorageError
from uenvd.oci.files import storage_errors, sync_directory
from uenvd.oci.reference import is_digest

log = logging.getLogger(__name__)

_MAX_PARTS: Final = 1000
_GOING_MODE: Final = 0o604
"""Mode of a blob that a node is just removing from a shared directory; one that nobody gives a file otherwise."""
_WISH_KEPT_S: Final = 600.0
"""Wishes are written anew every few seconds."""

GRACE_S: Final = 3600.0
_ABSENT_S: Final = 1.0
"""A shared directory is asked again for a blob that was not there, or that somebody writes, at most this often at first (`uenvd.cache.pauses`)."""


class Blobs:
    """Blobs below ``root``. Thread-safe; methods block and raise `StorageError`.

    Args:
        root: the directory.
        user: whose rights are used.
        node: this daemon's name among those that share the directory; None if it belongs to this node alone.
        grace_s: how long a node may not renew its leases before they end.

    """

    def __init__(
        self, root: Path, user: CacheUser, *, node: str | None = None, grace_s: float = GRACE_S
    ) -> None:
        self.root = root
        self.user = user
        self.shared = node is not None
        self.grace_s = grace_s
        self.directory = root / "blobs" / "sha256"
        self.partial = root / "partial"
        self.claims = root / "claims"
        self.quarantine = root / "quarantine"
        self.checks = root / "scrub"
        self._used = root / "used"
        self._trash = root / "trash"
        self._lease_files = root / "leases"
        self._wishes = root / WISHES
        self.watch = Watch()
        self.leases = NodeLeases(self._lease_files, node, user) if node is not None else None
        self._absent, self._busy, self._measured = Pauses(), Pauses(), Pauses()
        self._parts: dict[str, int] = {}

    @property
    def directories(self) -> tuple[Path, ...]:
        """Return what has to exist."""
        common = (self.directory, self.partial, self.claims, self.quarantine, self.checks)
        return (*common, self._used, self._trash, self._lease_files, self._wishes) if self.shared else common

    def path(self, digest: str) -> Path:
        """Return where a blob is or would be. Raises `StorageError` for what is no digest."""
        if not is_digest(digest):
            raise StorageError(f"{digest!r} is no sha256 digest")
        return self.directory / digest.removeprefix("sha256:")

    # -- finding

    @as_user
    def has(self, digest: str) -> bool:
        """Tell whether a blob is here, complete and verified. Of a shared directory the answer No may be a second old."""
        path = self.path(digest)
        if not self.shared:
            return _exists(path)
        if self._absent.is_fresh(digest):
            return False
        with storage_errors(path, "looking for"):
            try:
                os.close(self._open_now(path, digest))
            except NotFound:
                self._absent.note(digest, _ABSENT_S)
                return False
        return True

    @as_user
    def present(self, digests: Iterable[str]) -> set[str]:
        """Return which of many blobs are here; for lists, where a question for each would be too many."""
        if self.shared:
            self._refreshed()
        return {digest for digest in digests if _exists(self.path(digest))}

    def _open_now(self, path: Path, digest: str) -> int:
        """Open a blob of a shared directory as the server has it now. Raises `NotFound`, OSError."""
        # Opened, not looked up: an NFS client answers a look-up from its cache, also with No (for up to a minute). So it does with a name
        # that leads elsewhere now: what is opened may be a blob that is being removed.
        for again in (False, True):
            try:
                return _open_staying(path, digest)
            except NotFound:
                if again or not self._refreshed():
                    raise
        raise AssertionError

    def _refreshed(self) -> bool:
        try:
            refresh(self.directory)
        except FileNotFoundError:
            return False
        except OSError as error:
            log.debug("%s cannot be opened: %s", self.directory, error.strerror)
            return False
        return True

    # -- reading

    @as_user
    def open(self, digest: str) -> int:
        """Return a read-only descriptor of a blob, which is leased from then on. The caller closes it. Raises `NotFound`."""
        path = self.path(digest)
        return self._open_shared(path, digest) if self.shared else self._open_locked(path, digest)

    def _open_locked(self, path: Path, digest: str) -> int:
        while True:
            with storage_errors(path, "opening"):
                fd = _open_blob(path, digest)
            try:
                with storage_errors(path, "locking"):
                    fcntl.flock(fd, fcntl.LOCK_SH)
                    gone = os.fstat(fd).st_nlink == 0
            except BaseException:
                os.close(fd)
                raise
            if not gone:
                self.touch(digest)
                return fd
            # Evicted between the open and the lock.
            os.close(fd)

    def _open_shared(self, path: Path, digest: str) -> int:
        assert self.leases is not None
        if not self.has(digest):
            raise NotFound(f"the blob {digest} is not in the cache")
        # Before the open: whoever removes it looks for leases after he took the name away and marked it.
        self.leases.take(path.name)
        with storage_errors(path, "opening"):
            fd = self._open_now(path, digest)
        self.touch(digest)
        return fd

    @as_user
    def open_unused(self, digest: str) -> int:
        """Return a read-only descriptor of a blob without a lease or a note of its use: what is read may be gone. Raises `NotFound`."""
        path = self.path(digest)
        with storage_errors(path, "opening"):
            return _open_blob(path, digest)

    @as_user
    def touch(self, digest: str) -> None:
        """Note that a blob is used now. Not noting it is no error."""
        path = self.path(digest)
        with suppress(OSError):
            if self.shared:
                (self._used / path.name).touch(mode=0o644)
            else:
                os.utime(path)

    @as_user
    def last_use_s(self, digest: str) -> float | None:
        """Return when a blob was used last, seconds since the epoch; None if it is not here."""
        path = self.path(digest)
        try:
            last_s = path.stat().st_mtime
            if self.shared:
                with suppress(FileNotFoundError):
                    last_s = max(last_s, (self._used / path.name).stat().st_mtime)
        except OSError:
            return None
        return last_s

    def held(self) -> dict[str, list[str]]:
        """Return hex digest -> nodes that have a lease in a shared directory. Raises `StorageError`."""
        if not self.shared:
            return {}
        with self.user, storage_errors(self._lease_files, "reading the leases in"):
            return held_anywhere(self._lease_files, self.watch, self.grace_s)

    @as_user
    def is_leased(self, digest: str, held: dict[str, list[str]]) -> bool:
        """Tell whether somebody reads the blob; ``held`` is what `held` said. A guess: only `remove` knows."""
        path = self.path(digest)
        if self.shared:
            return path.name in held
        try:
            with exclusive(path):
                return False
        except InUse:
            return True
        except OSError:
            return False

    # -- writing

    @as_user
    def claim(self, digest: str) -> FlockClaim | HeartbeatClaim:
        """Take the right to write a blob. Raises `InUse` while another process, thread or node has it."""
        name = self.path(digest).name
        path = self.claims / f"{name}.claim"
        if not self.shared:
            return FlockClaim(path, self.user)
        if self._busy.is_fresh(digest):
            raise InUse(f"another process or node is pulling {name}")

        def ended() -> None:
            self._absent.forget(digest)
            self._busy.forget(digest)

        try:
            claim = HeartbeatClaim(path, self.user, self.watch, on_release=ended)
        except InUse:
            self._busy.note(digest, _ABSENT_S)
            raise
        self._absent.forget(digest)  # its former holder may have finished it in this second
        if claim.inherited:
            # Its holder may live and still write into the files that he has open; they must not become ours.
            self.drop_part(name)
        return claim

    def part_path(self, digest: str) -> Path:
        """Return where the bytes of an unfinished pull are."""
        return self.partial / f"{self.path(digest).name}.part"

    def wishes(self, digest: str) -> Wishes | None:
        """Return what other nodes ask of the writer of a blob; None in a directory that they do not see."""
        return Wishes(self._wishes, self.path(digest).name, self.user) if self.shared else None

    @as_user
    def follow(self, digest: str, size_bytes: int) -> PartView | None:
        """Return what another process or node is writing of a blob of a shared directory; the caller closes it. None if nobody writes it.

        Takes a lease: it holds when the part becomes the blob. Raises `StorageError`.
        """
        wishes, name = self.wishes(digest), self.path(digest).name
        if wishes is None or self.leases is None:
            return None
        claim = self.claims / f"{name}.claim"
        with storage_errors(claim, "looking for"):
            if look_at(claim) is None:
                self.look_anew(digest)
                return None
        self.leases.take(name)
        return PartView(self.part_path(digest), claim, size_bytes, self.user, wishes)

    def look_anew(self, digest: str) -> None:
        """Have the next questions for a blob and for the right to write it asked at once."""
        self._absent.forget(digest)
        self._busy.forget(digest)

    @as_user
    def part_bytes(self, digest: str, *, exact: bool = False) -> int:
        """Return how many bytes an unfinished pull has, as far as its writer has said so (0 without one).

        Of a shared directory the answer may be a few seconds old unless it has to be ``exact``.
        """
        if self.shared and not exact and self._measured.is_fresh(digest):
            return self._parts.get(digest, 0)
        found = received_bytes(self.part_path(digest))
        if self.shared:
            if len(self._parts) >= _MAX_PARTS:
                self._parts.clear()
            self._parts[digest] = found
            self._measured.note(digest, _ABSENT_S)
        return found

    @as_user
    def drop_part(self, name: str) -> int:
        """Remove what an unfinished pull of a blob (hex digest) left, under its claim; return how many bytes that freed."""
        return sum(removed(self.partial / f"{name}.{kind}") for kind in ("part", "map"))

    # -- removing

    @as_user
    def remove(self, digest: str) -> int:
        """Remove a blob and what is left of pulls of it; return how many bytes that freed. Raises `InUse`."""
        name = self.path(digest).name
        with storage_errors(self.path(digest), "removing"):
            freed = 0
            if (self.partial / f"{name}.part").exists() or self.shared:
                claim = self.claim(digest)
                try:
                    freed += self.drop_part(name)
                    if self.shared:
                        return freed + self._remove_shared(digest)
                finally:
                    claim.release()
            with suppress(FileNotFoundError), exclusive(self.path(digest)):
                freed += removed(self.path(digest))
            return freed

    def _remove_shared(self, digest: str) -> int:
        path = self.path(digest)
        aside = self._trash / f"{path.name}.{secrets.token_hex(6)}"
        try:
            path.rename(aside)
        except FileNotFoundError:
            return 0
        return self._finish_removal(aside)

    def _finish_removal(self, aside: Path) -> int:
        """Remove a blob that has no name any more; put it back if a lease names it. Raises `InUse` then."""
        name = aside.name.partition(".")[0]
        # A reader whose NFS client believes the old name still opens it, and sees this, if not the reader's lease is seen here.
        with suppress(OSError):
            aside.chmod(_GOING_MODE)
        try:
            holders = held_anywhere(self._lease_files, self.watch, self.grace_s, sure=True).get(name)
        except OSError:
            self._put_back(aside, name)
            raise
        if holders:
            self._put_back(aside, name)
            raise InUse(f"{name} is read by {len(holders)} other nodes ({', '.join(holders[:3])})")
        with suppress(OSError):
            (self._used / name).unlink()
        return removed(aside)

    def _put_back(self, aside: Path, name: str) -> None:
        # Linked, not renamed: it may have been pulled anew meanwhile, and that one has readers, too. Then this one stays where it is for
        # those who have it open, and goes when the lease does (`sweep`).
        with suppress(OSError):
            aside.chmod(0o644)
        with suppress(FileExistsError):
            os.link(aside, self.directory / name)
            sync_directory(self.directory)
            aside.unlink(missing_ok=True)

    @as_user
    def set_aside(self, digest: str) -> None:
        """Take a damaged blob out of use, without a word to those who have it open."""
        path = self.path(digest)
        with storage_errors(path, "putting into quarantine"), suppress(FileNotFoundError):
            path.rename(self.quarantine / f"{path.name}.{secrets.token_hex(6)}")
            sync_directory(self.directory)

    @as_user
    def sweep(self, part_kept_s: float, quarantine_kept_s: float) -> None:
        """Drop what nobody will finish or look at: parts, claims, quarantined blobs, removals that a crash interrupted."""
        with suppress(FileNotFoundError):
            for part in self.partial.glob("*.part"):
                self._sweep_part(part, part_kept_s)
        if not self.shared:
            for claim in self.claims.glob("*.claim"):
                with suppress(OSError, InUse, StorageError):
                    FlockClaim(claim, self.user).release()
        for wish in self._wishes.iterdir() if self._wishes.exists() else ():
            with suppress(OSError):
                if time.time() - wish.stat().st_mtime > _WISH_KEPT_S:
                    wish.unlink()
        held = self.held()
        for directory, kept_s in ((self.quarantine, quarantine_kept_s), (self._trash, 600.0)):
            for path in directory.glob("*.*") if directory.exists() else ():
                with suppress(OSError, InUse):
                    if time.time() - path.stat().st_ctime <= kept_s:
                        continue
                    if directory == self._trash:
                        self._finish_removal(path)
                    elif self.shared and path.name.partition(".")[0] not in held:
                        removed(path)
                    elif not self.shared:
                        with exclusive(path):
                            removed(path)

    def _sweep_part(self, part: Path, kept_s: float) -> None:
        with suppress(OSError, InUse, StorageError):
            if _exists(self.directory / part.stem) or time.time() - part.stat().st_mtime > kept_s:
                claim = self.claim(f"sha256:{part.stem}")
                try:
                    self.drop_part(part.stem)
                finally:
                    claim.release()

    @as_user
    def used_bytes(self) -> int:
        """Return how many bytes blobs, parts and quarantine occupy."""
        # A part that became a blob has two names for a moment; on NFS as long as a worker reads it.
        found: dict[int, int] = {}
        with storage_errors(self.root, "looking at the cache in"):
            for directory in (self.directory, self.partial, self.quarantine):
                with os.scandir(directory) as entries:
                    for entry in entries:
                        with suppress(FileNotFoundError):
                            status = entry.stat(follow_symlinks=False)
                            found[status.st_ino] = status.st_blocks * 512
        return sum(found.values())

    @as_user
    def free_bytes(self) -> int:
        """Return how many bytes the file system has for an ordinary user."""
        with storage_errors(self.root, "looking at the file system of"):
            room = os.statvfs(self.root)
        return room.f_bavail * room.f_frsize


def _open_blob(path: Path, digest: str) -> int:
    try:
        return unless_stale(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), path.parent)
    except FileNotFoundError as error:
        raise NotFound(f"the blob {digest} is not in the cache") from error


def _open_staying(path: Path, digest: str) -> int:
    """Open a blob that nobody is removing. Raises `NotFound`, OSError."""
    fd = _open_blob(path, digest)
    try:
        if stat.S_IMODE(os.fstat(fd).st_mode) != _GOING_MODE:
            return fd
    except OSError as error:
        if error.errno not in {errno.ESTALE, errno.ENOENT}:  # removed by now, as NFS says it, and FUSE
            os.close(fd)
            raise
    os.close(fd)
    raise NotFound(f"the blob {digest} is being removed from the cache")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file inside the ``with`` block. Raises `InUse` at once if anybody has a lock on it, OSError."""
    # Open for writing: some file systems give an exclusive lock only then.
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(f"{path.name} is in use") from None
        yield
    finally:
        os.close(fd)


def removed(path: Path) -> int:
    """Unlink a file and return how many bytes that freed; 0 if it is gone already. Raises OSError."""
    try:
        size = path.stat().st_blocks * 512
        path.unlink()
    except FileNotFoundError:
        return 0
    return size
