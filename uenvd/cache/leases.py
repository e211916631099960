"""Which blobs of a shared directory a node reads: one heartbeat file for each node, however many images it serves.

``leases/<node>.json`` names the blobs; its holder writes it before it opens a blob and renews its time every `RENEW_S`. Whoever wants to
remove a blob takes its name away and marks it first, looks at the leases afterwards, and puts it back if one names it: so either the reader
finds no blob or a marked one, or the remover finds the lease. A lease ends when its holder drops it, or when the file has not changed for the
whole grace while somebody watched (`uenvd.cache.claim`: no two clocks are compared). The file outlives the daemon: the images it served go on
being read.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from uenvd.cache.claim import Watch, boot_id, look_at, refresh
from uenvd.cache.identity import CacheUser, as_user
from uenvd.oci.files import storage_errors, write_atomically

log = logging.getLogger(__name__)

RENEW_S: Final = 60.0
JUST_TAKEN_S: Final = 120.0
"""A lease is kept at least this long: between the opening of a blob and the moment at which its reader is known."""
MAX_LEASE_BYTES: Final = 1 << 20


def node_name(run_dir: Path) -> str:
    """Return what tells a daemon from all others: host, boot, and the directory it runs in."""
    mark = f"{abs(hash_text(str(run_dir))):08x}"[:8]
    host = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in socket.gethostname())
    return f"{host[:64]}-{boot_id()[:8]}-{mark}"


def hash_text(text: str) -> int:
    """Return a number that is the same in every process, unlike hash()."""
    value = 0xCBF29CE484222325  # FNV-1a, 64 bit
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


class NodeLeases:
    """The leases of this daemon in one shared directory. Thread-safe; methods block and raise `StorageError`."""

    def __init__(self, directory: Path, node: str, user: CacheUser) -> None:
        self.user = user
        self.path = directory / f"{node}.json"
        self._lock = threading.Lock()
        self._held: dict[str, float] = {}
        """Hex digest -> when it was taken, monotonic."""
        self._left: set[str] = set()
        """Leases of this node's former daemon, which may have readers that nobody has told us of."""
        self._written: frozenset[str] | None = None

    @as_user
    def inherit(self) -> None:
        """Go on with the leases that this node's former daemon left."""
        with self._lock, storage_errors(self.path, "reading"):
            seen = look_at(self.path, MAX_LEASE_BYTES)
            if seen is not None:
                self._left = set(_blobs_of(seen.body))

    @as_user
    def take(self, name: str) -> None:
        """Hold a blob (hex digest), also against other nodes, from the return on."""
        with self._lock:
            self._held[name] = time.monotonic()
            if self._written is None or name not in self._written:
                self._write()

    @as_user
    def renew(self, used: Iterable[str], left: Iterable[str]) -> set[str]:
        """Keep what is used (hex digests) and what was taken just now, drop the rest; return what was dropped.

        ``left`` are those of `inherited` that still have a reader.
        """
        keep = set(used)
        now_s = time.monotonic()
        with self._lock:
            dropped = {
                name
                for name, taken_s in self._held.items()
                if name not in keep and now_s - taken_s > JUST_TAKEN_S
            }
            dropped |= self._left - set(left) - keep - self._held.keys()
            for name in dropped:
                self._held.pop(name, None)
            for name in keep:
                self._held.setdefault(name, now_s)
            self._left = (self._left & set(left)) - self._held.keys()
            if self._wanted() != self._written:
                self._write()
            elif self._written:
                try:
                    os.utime(self.path)
                except FileNotFoundError:
                    self._write()  # somebody took us for dead
                except OSError as error:
                    log.warning("%s cannot be renewed: %s", self.path, error.strerror)
        return dropped

    @as_user
    def drop(self, name: str) -> None:
        """Give a lease back before its time."""
        with self._lock:
            self._held.pop(name, None)
            self._left.discard(name)
            if self._wanted() != self._written:
                self._write()

    @property
    def inherited(self) -> set[str]:
        """The hex digests that a former daemon held and that nobody here has asked for since."""
        with self._lock:
            return set(self._left)

    @property
    def held(self) -> frozenset[str]:
        """The hex digests that are held."""
        with self._lock:
            return self._wanted()

    def _wanted(self) -> frozenset[str]:
        return frozenset(self._held) | frozenset(self._left)

    def _write(self) -> None:
        wanted = self._wanted()
        with storage_errors(self.path, "writing"):
            if wanted:
                body = {"schema": 1, "host": socket.gethostname(), "boot": boot_id(), "blobs": sorted(wanted)}
                write_atomically(self.path, json.dumps(body).encode())
            else:
                self.path.unlink(missing_ok=True)
        self._written = wanted


def held_anywhere(
    directory: Path, watch: Watch, grace_s: float, *, sure: bool = False
) -> dict[str, list[str]]:
    """Return hex digest -> nodes that hold it. A lease that has not changed for ``grace_s`` while we watched is removed.

    ``sure``: miss none, for who removes what nobody holds. Raises OSError: who cannot see all leases must not remove anything.
    """
    held: dict[str, list[str]] = {}
    if sure:
        _change(directory)
    refresh(directory)
    for entry in os.scandir(directory):
        if not entry.name.endswith(".json") or entry.name.startswith("."):
            continue
        path = Path(entry.path)
        seen = look_at(path, MAX_LEASE_BYTES)
        if seen is None:
            continue
        if watch.unchanged_s(str(path), seen.state) > grace_s:
            log.warning("the lease of %s was not renewed for %.0f s and is removed", path.stem, grace_s)
            with suppress(FileNotFoundError):
                path.unlink()
            continue
        for name in _blobs_of(seen.body):
            held.setdefault(name, []).append(path.stem)
    return held


def _change(directory: Path) -> None:
    """Make an NFS client list a directory anew. It does so after changes of its own; of others it hears by the directory's time, which does
    not tell two changes within one tick of the server's clock apart (4 ms where HZ is 250)."""
    path = directory / f".look.{os.getpid()}.{secrets.token_hex(6)}.tmp"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    path.unlink()


def _blobs_of(body: object) -> list[str]:
    match body:
        case {"blobs": list(names)}:
            return [name for name in names if isinstance(name, str) and len(name) == 64]
        case _:
            return []
