"""Places for a cache that get into trouble on demand: a file system that fills up, turns read-only, disappears, answers EIO."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.nfsdouble import BROKEN, NOBODY, mounted
from uenvd.cache.directory import Directory
from uenvd.cache.identity import CacheUser
from uenvd.cache.store import Store

SIZE_BYTES = 16 << 20


class Place:
    """An ordinary directory. ``store()`` makes a cache of its own in it."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.kinds: tuple[str, ...] = ("vanished", "bits")
        self._number = 0
        self._ails: list[str] = []
        self.cache = top

    def store(self) -> Store:
        """Make a new cache, and remove the last one."""
        self.clear()
        self._number += 1
        self.cache = self.top / f"cache{self._number}"
        store = self.make()
        store.prepare()
        return store

    def make(self) -> Store:
        """Make the object."""
        return Store(self.cache)

    def clear(self) -> None:
        """Remove the last cache."""
        if self.cache != self.top:
            shutil.rmtree(self.cache, ignore_errors=True)

    def harm(self, kind: str, chance: random.Random) -> None:
        """Begin a trouble; it lasts until `heal`, but for bits that flip."""
        self._ails.append(kind)
        if kind == "vanished":
            self.cache.rename(self.top / "elsewhere")
        else:
            self._flip(chance)

    def heal(self) -> None:
        """End all troubles."""
        for kind in self._ails:
            self.undo(kind)
        self._ails = []

    def undo(self, kind: str) -> None:
        """End one trouble."""
        if kind == "vanished":
            # What somebody made in its place meanwhile is no part of the cache.
            shutil.rmtree(self.cache, ignore_errors=True)
            (self.top / "elsewhere").rename(self.cache)

    def _flip(self, chance: random.Random) -> None:
        """What a disk or another program does to the parts while nobody writes them."""
        for path in sorted((self.cache / "partial").iterdir()):
            size = path.stat().st_size
            if size and chance.random() < 0.7:
                with path.open("r+b") as file:
                    if chance.random() < 0.3:
                        file.truncate(chance.randrange(size))
                    else:
                        file.seek(chance.randrange(size))
                        file.write(bytes([chance.randrange(256)]))


class SmallDisk(Place):
    """A file system of its own."""

    def __init__(self, top: Path) -> None:
        super().__init__(top)
        self.kinds = ("full", "read-only", "vanished", "bits")

    def harm(self, kind: str, chance: random.Random) -> None:
        """See `Place.harm`."""
        match kind:
            case "full":
                self._ails.append(kind)
                room = os.statvfs(self.top)
                left = chance.choice([0, chance.randrange(64) << 10])
                fd = os.open(self.top / "ballast", os.O_WRONLY | os.O_CREAT)
                try:
                    at, step = 0, max(4096, room.f_bavail * room.f_frsize - left)
                    while step >= 4096:  # others write meanwhile
                        try:
                            os.posix_fallocate(fd, at, step)
                            at += step
                        except OSError:
                            step //= 2
                        if left:
                            break
                finally:
                    os.close(fd)
            case "read-only":
                # Refused while a file is open for writing, as on a real disk; then there is no fault.
                done = subprocess.run(
                    ["mount", "-o", "remount,ro", self.top], check=False, capture_output=True
                )
                if done.returncode == 0:
                    self._ails.append(kind)
            case _:
                super().harm(kind, chance)

    def undo(self, kind: str) -> None:
        """See `Place.undo`."""
        match kind:
            case "full":
                (self.top / "ballast").unlink()
            case "read-only":
                subprocess.run(["mount", "-o", "remount,rw", self.top], check=True)
            case _:
                super().undo(kind)


class FileServer(Place):
    """A shared directory on a file server that can stop to answer."""

    def __init__(self, top: Path, server: Path) -> None:
        super().__init__(top)
        self.kinds = ("eio",)
        self._server = server

    def make(self) -> Store:
        """See `Place.make`."""
        return Store(None, Directory(self.cache, CacheUser(NOBODY, NOBODY), node="n"))

    def clear(self) -> None:
        """See `Place.clear`: on the server, whose files are not root's here."""
        if self.cache != self.top:
            shutil.rmtree(self._server / self.cache.name, ignore_errors=True)

    def harm(self, kind: str, chance: random.Random) -> None:
        """See `Place.harm`."""
        self._ails.append(kind)
        (self._server / BROKEN).touch()

    def undo(self, kind: str) -> None:
        """See `Place.undo`."""
        (self._server / BROKEN).unlink(missing_ok=True)


@contextmanager
def places(top: Path) -> Iterator[list[Place]]:
    """Make one of each kind; those that need mounts only as root."""
    (top / "plain").mkdir()
    found = [Place(top / "plain")]
    if os.geteuid() != 0:
        yield found
        return
    disk, server = top / "disk", top / "server"
    for path in (disk, server):
        path.mkdir()
        size = f"size={SIZE_BYTES},mode=0755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", path], check=True)
    try:
        os.chown(server, NOBODY, NOBODY)
        with mounted(server, top / "nfs", squash=True) as nfs:
            found += [SmallDisk(disk), FileServer(nfs, server)]
            yield found
    finally:
        for path in (disk, server):
            subprocess.run(["umount", "-l", path], check=False)
