"""What nodes that follow a pull into a shared directory ask of its writer: small files in ``wishes/``, one for each node and blob.

``wishes/<hex>.<token>`` names ranges of the blob that readers of a node wait for, after a number that is another one whenever the node asks
anew. A file is replaced as a whole and removed when nobody waits any more. The directory belongs to ``cache.user`` alone; all the same nothing
in it can do more than have bytes fetched earlier: at most `MAX_FILES` files are looked at, `MAX_BYTES` of each, and what makes no sense is ignored.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from uenvd.cache.claim import unless_stale
from uenvd.cache.identity import CacheUser, as_user
from uenvd.oci.files import storage_errors, write_atomically

DIRECTORY: Final = "wishes"
MAX_FILES: Final = 16
"""Looked at by the writer at a time, and there at a time for one blob: nodes run the same program, so a few speak for all."""
MAX_BYTES: Final = 2048
MAX_RANGES: Final = 32
MAX_RANGE_BYTES: Final = 64 << 20
_MAGIC: Final = "uenvd-wish-1"


class Wish(NamedTuple):
    """What one node asks for."""

    number: int
    """Another one each time it asks anew."""
    ranges: tuple[tuple[int, int], ...]
    """Bytes ``[first, end)``."""


def encode(wish: Wish) -> bytes:
    """Return a wish as it is written; ranges that are too many or too long are cut."""
    ranges = [(first, min(end, first + MAX_RANGE_BYTES)) for first, end in wish.ranges[:MAX_RANGES]]
    lines = [f"{_MAGIC} {wish.number}", *(f"{first} {end}" for first, end in ranges), ""]
    return "\n".join(lines).encode()


def decode(data: bytes, size_bytes: int) -> Wish | None:
    """Return what a file asks for of a blob of ``size_bytes``; None if it makes no sense. What follows a bad line is ignored."""
    lines = data[:MAX_BYTES].split(b"\n")[:-1]
    match lines[0].split() if lines else []:
        case [magic, number] if magic == _MAGIC.encode() and _is_number(number):
            asked = int(number)
        case _:
            return None
    ranges = []
    for line in lines[1 : 1 + MAX_RANGES]:
        match line.split():
            case [first, end] if (
                _is_number(first) and _is_number(end) and int(first) < int(end) <= size_bytes
            ):
                ranges.append((int(first), min(int(end), int(first) + MAX_RANGE_BYTES)))
            case _:
                break
    return Wish(asked, tuple(ranges))


def _is_number(text: bytes) -> bool:
    return text.isdigit() and len(text) <= 19


class Wishes:
    """The wishes for one blob of a shared directory. Methods block and raise `StorageError`.

    Args:
        directory: of all wishes.
        name: hex digest of the blob.
        user: whose rights are used.

    """

    def __init__(self, directory: Path, name: str, user: CacheUser) -> None:
        self.user = user
        self._directory = directory
        self._name = name

    @as_user
    def put(self, token: str, wish: Wish) -> bool:
        """Ask for bytes in place of what ``token`` asked for before; False if so many others ask that nobody would look at it."""
        path = self._path(token)
        with storage_errors(path, "writing"):
            others = self._names()
            if len(others) >= MAX_FILES and path.name not in others:
                return False
            write_atomically(path, encode(wish), durable=False)
        return True

    @as_user
    def withdraw(self, token: str) -> None:
        """Ask for nothing any more. That it cannot be said is no error: who does not ask anew is not heard for long."""
        with suppress(OSError):
            self._path(token).unlink()

    @as_user
    def read(self, size_bytes: int) -> dict[str, Wish]:
        """Return what is asked for at this moment of a blob of ``size_bytes``, by token."""
        found = {}
        with storage_errors(self._directory, "looking for wishes in"):
            for name in self._names()[:MAX_FILES]:
                try:
                    data = unless_stale(partial(_read, self._directory / name), self._directory)
                except OSError:
                    continue  # replaced or withdrawn just now
                wish = decode(data, size_bytes)
                if wish is not None:
                    found[name.partition(".")[2]] = wish
        return found

    def _path(self, token: str) -> Path:
        return self._directory / f"{self._name}.{token}"

    def _names(self) -> list[str]:
        # Opening a directory makes an NFS client ask its server. One that is not there is that of an older uenvd: nobody asks.
        try:
            return [path.name for path in self._directory.iterdir() if path.name.startswith(f"{self._name}.")]
        except FileNotFoundError:
            return []


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return os.read(fd, MAX_BYTES)
    finally:
        os.close(fd)
