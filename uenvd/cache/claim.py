"""Who writes a blob (`Claim`): one process of one node, or of all nodes that share a directory.

Two kinds of claim, one protocol. `FlockClaim` is for a directory of this node: a kernel lock, which ends with the process. `HeartbeatClaim`
is for a directory that many nodes share: a file made with O_EXCL, whose holder renews its time every `BEAT_S`. It is stale when

* it was made under this boot of this machine, in this pid namespace, by a process that is gone (known at once), or
* **this** process has watched it for `STALE_S` of its own monotonic clock, and it did not change.

No two clocks are compared: neither the nodes' nor the server's (Lustre takes times from the client, NFS from the server), so a wrong clock
neither keeps a dead claim alive nor breaks a live one. A holder who could not renew for `FENCE_S` counts himself out before anybody else may.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from uenvd.cache.identity import CacheUser
from uenvd.errors import InUse, StorageError
from uenvd.oci.files import storage_error, storage_errors

log = logging.getLogger(__name__)

BEAT_S: Final = 2.0
FENCE_S: Final = 15.0
STALE_S: Final = 30.0
_LOOK_S: Final = 1.0
"""A holder looks at most this often whether the claim still has its name."""
_MAX_CLAIM_BYTES: Final = 4096
_STALE_ATTEMPTS: Final = 8
_STALE_PAUSE_S: Final = 0.01

T = TypeVar("T")

_given_up: Final[set[str]] = set()
"""Tokens of claims that this process gave back while the file system did not let it remove them."""


class Holder(NamedTuple):
    """The process that made a claim."""

    host: str
    boot: str
    pid_namespace: int
    pid: int
    started: int
    """Clock ticks after boot, field 22 of proc_pid_stat(5): tells a process from a later one with its pid."""

    @classmethod
    def myself(cls) -> Holder:
        """Describe this process."""
        pid = os.getpid()
        return cls(socket.gethostname(), boot_id(), _pid_namespace(), pid, _started(pid) or 0)

    def is_gone(self) -> bool:
        """Tell whether it is known for certain that the process has ended; False when that cannot be known here."""
        if self.boot != boot_id() or self.pid_namespace != _pid_namespace():
            return False
        return _started(self.pid) != self.started


def boot_id() -> str:
    """Return what names this boot of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116 -- a number, not a place


def _started(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


class Watch:
    """How long things have not changed while this process looked. Thread-safe; remembers `MAX` of them."""

    MAX: Final = 10_000

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[object, float]] = {}

    def unchanged_s(self, name: str, state: object) -> float:
        """Note the present state of ``name``; return for how many seconds it has been seen in this state."""
        now_s = self._clock()
        with self._lock:
            known = self._seen.get(name)
            if known is not None and known[0] == state:
                return now_s - known[1]
            self._seen.pop(name, None)
            self._seen[name] = (state, now_s)
            while len(self._seen) > self.MAX:
                del self._seen[next(iter(self._seen))]
            return 0.0


class Claim(Protocol):
    """The right to write one blob, against every other thread, process and node."""

    def check(self) -> None:
        """Raise `InUse` when the right was lost."""
        ...

    def release(self) -> None:
        """Give it up; does nothing the second time."""
        ...


class FlockClaim:
    """A claim among the processes of one node: an exclusive lock on a file of its own, which is removed with it."""

    def __init__(self, path: Path, user: CacheUser) -> None:
        """Take it. Raises `InUse`, `StorageError`."""
        self._path = path
        self._user = user
        self._lock = threading.Lock()
        self._fd = _open_locked(path)

    def check(self) -> None:
        """Do nothing: a kernel lock is not lost."""

    def release(self) -> None:
        """Give it back. Does nothing when it is lost or given back already."""
        with self._lock, self._user:
            if self._fd >= 0:
                # Under the lock: nobody else can have it as his.
                with suppress(OSError):
                    self._path.unlink()
                os.close(self._fd)
                self._fd = -1


def _open_locked(path: Path) -> int:
    while True:
        with storage_errors(path, "opening"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise InUse(f"another process is pulling {path.stem}") from None
        except OSError as error:
            os.close(fd)
            raise storage_error(error, path, "locking") from error
        try:
            named, mine = path.stat(), os.fstat(fd)
            if (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino):
                return fd
        except OSError:
            pass
        # Its former holder gave it back between the open and the lock.
        os.close(fd)


class HeartbeatClaim:
    """A claim among all processes of all nodes that see a directory (see the module)."""

    def __init__(
        self,
        path: Path,
        user: CacheUser,
        watch: Watch,
        *,
        renewed: bool = True,
        on_release: Callable[[], None] | None = None,
    ) -> None:
        """Take it, also from a holder that is dead. Raises `InUse`, `StorageError`.

        ``renewed`` False: for what takes much less than `FENCE_S`, without a thread.
        """
        self._path = path
        self._user = user
        self._on_release = on_release
        self._token = secrets.token_hex(12)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._lost = False
        self._released = False
        self.inherited = False
        """Taken from a holder who may still live, as far as can be known: he may still write to what he has open."""
        with user:
            self._fd = self._take(watch)
        self._renewed_s = self._looked_s = _clock()
        if renewed:
            # A descriptor of its own: a beat may be under way when the claim is given back, and numbers are used again.
            beating = threading.Thread(
                target=self._beat, args=(os.dup(self._fd),), name=f"claim {path.stem[:12]}", daemon=True
            )
            beating.start()

    def check(self) -> None:
        """Raise `InUse` if it was lost. Looks at the file at most once a second, so it may be called for each piece."""
        with self._lock:
            if not self._lost and _clock() - self._renewed_s > FENCE_S:
                self._lost = True
            if not self._lost and _clock() - self._looked_s > _LOOK_S:
                self._look()
            if self._lost or self._released:
                raise InUse(f"another node has taken over {self._path.stem}")

    def release(self) -> None:
        """Give it back. Does nothing when it is lost or given back already."""
        self._stop.set()
        with self._lock, self._user:
            if self._released:
                return
            self._released = True
            if not self._lost:
                try:
                    if self._is_mine():
                        self._path.unlink()
                except FileNotFoundError:
                    pass
                except OSError as error:
                    log.warning("%s cannot be given back: %s", self._path, error.strerror)
                    _given_up.add(self._token)
            with suppress(OSError):
                os.close(self._fd)
        if self._on_release is not None:
            self._on_release()

    def _take(self, watch: Watch) -> int:
        content = json.dumps({"token": self._token, **Holder.myself()._asdict()}).encode()
        for _ in range(8):
            with storage_errors(self._path, "claiming"):
                try:
                    fd = os.open(
                        self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
                    )
                except FileExistsError:
                    if not self._remove_dead(watch):
                        raise InUse(f"another process or node is pulling {self._path.stem}") from None
                    continue
                try:
                    os.write(fd, content)
                    os.fsync(fd)
                except BaseException:
                    os.close(fd)
                    with suppress(OSError):
                        self._path.unlink()
                    raise
                return fd
        raise InUse(f"others keep claiming {self._path.stem}")

    def _remove_dead(self, watch: Watch) -> bool:
        """Remove the claim that is there if its holder is dead; return whether there is a new chance."""
        seen = look_at(self._path)
        if seen is None:
            return True
        certain = seen.token in _given_up or (seen.holder is not None and seen.holder.is_gone())
        if not certain and watch.unchanged_s(str(self._path), seen.state) < STALE_S:
            return False
        # Moved before it is removed: of several who found it dead only one can have moved *this* file.
        aside = self._path.with_name(f".{self._path.name}.{self._token}.tmp")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return True
        moved = look_at(aside)
        if moved is not None and moved.token != seen.token:
            # A successor was faster, and this is his claim. If a third took the name meanwhile, the holder finds out himself.
            with suppress(OSError):
                os.link(aside, self._path)
            aside.unlink(missing_ok=True)
            return False
        aside.unlink(missing_ok=True)
        self.inherited = self.inherited or not certain
        log.info(
            "%s: its holder %s is gone", self._path.name, seen.holder.host if seen.holder else "(unknown)"
        )
        return True

    def _is_mine(self) -> bool:
        # Without this an NFS client shows the file that it has open under its name for a minute, whoever has the name.
        refresh(self._path.parent)
        seen = look_at(self._path)
        return seen is not None and seen.token == self._token

    def _look(self) -> None:
        """Find out whether the claim is ours still; an unreadable directory decides nothing."""
        try:
            with self._user:
                self._lost = not self._is_mine()
            self._looked_s = _clock()
        except OSError:
            pass

    def _beat(self, fd: int) -> None:
        try:
            while not self._stop.wait(BEAT_S):
                try:
                    with self._user:  # a descriptor is not enough: NFS asks who changes the time
                        os.utime(fd)
                    with self._lock:
                        if self._released:
                            return
                        self._renewed_s = _clock()
                        self._look()
                        if self._lost:
                            return
                except (OSError, StorageError) as error:
                    log.warning("%s cannot be renewed: %s", self._path, error)
        finally:
            os.close(fd)


def _clock() -> float:
    """Seconds that also pass while the machine sleeps: nobody may think he renewed a claim just before a long sleep."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Seen(NamedTuple):
    """A claim or lease file at one moment."""

    token: str
    holder: Holder | None
    state: object
    """Equal only as long as nobody renewed it."""
    body: Mapping[str, Any]


def look_at(path: Path, limit_bytes: int = _MAX_CLAIM_BYTES) -> Seen | None:
    """Read a heartbeat file as the server has it now; None if it is gone. Raises OSError."""
    try:
        status, data = unless_stale(lambda: _read(path, limit_bytes), path.parent)
    except FileNotFoundError:
        return None
    body: Any = {}
    holder = None
    with suppress(ValueError, RecursionError):
        body = json.loads(data)
    if not isinstance(body, dict):
        body = {}
    with suppress(KeyError, ValueError, TypeError):
        holder = Holder(
            str(body["host"]),
            str(body["boot"]),
            int(body["pid_namespace"]),
            int(body["pid"]),
            int(body["started"]),
        )
    state = (status.st_ino, status.st_mtime_ns, status.st_size)
    return Seen(str(body.get("token", "")), holder, state, body)


def refresh(directory: Path) -> None:
    """Make an NFS client ask its server what is in a directory now: opening it is what does that (close-to-open). Raises OSError."""
    os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def _read(path: Path, limit_bytes: int) -> tuple[os.stat_result, bytes]:
    # Opening is what makes NFS ask its server (close-to-open consistency); a stat may be an answer of a minute ago.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return os.fstat(fd), os.pread(fd, limit_bytes, 0)
    finally:
        os.close(fd)


def unless_stale(work: Callable[[], T], directory: Path) -> T:
    """Do something again that met a file in ``directory`` which another node was just replacing (ESTALE), a few times. Raises OSError."""
    for attempt in range(_STALE_ATTEMPTS):
        try:
            return work()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        # Where opening was enough for an NFS client (it has a delegation, or the file open already) it does not look the name up by itself.
        refresh(directory)
        time.sleep(attempt * _STALE_PAUSE_S)
    return work()
