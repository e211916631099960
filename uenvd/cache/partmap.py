"""The map of a part: which of its bytes were written, and which of them are durable.

A log of lines beside the file: a header with the blob's size, the boot of the machine that writes, and a word that no other map has; ``w FIRST END``
for bytes that were written; ``d OFFSET`` where every line that begins before that place of the map is durable (``fdatasync`` of the file, then of
the map; other lines may be written meanwhile), ``d`` where everything before it is. After ``kill -9`` the page cache has what was written, so the
same boot of the same machine trusts every line; any other trusts only what is durable.

What is durable is never written again as long as the file exists, whoever goes on with it; unless its writer finds it wrong. So nodes that read
a part while another one writes it (`uenvd.cache.partview`) show their readers only that, once they have verified it themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from uenvd.cache.ranges import Ranges
from uenvd.errors import StorageError
from uenvd.oci.files import read_bounded

MAX_MAP_BYTES: Final = 64 << 20
DURABLE: Final = b"d\n"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MAGIC = "uenvd-map-1"
_MAX_LINE_BYTES: Final = 256
HEADER_BYTES: Final = 256
"""A header is no longer than that."""


def written(ranges: Iterable[tuple[int, int]]) -> bytes:
    """Return the lines that say that ``[first, end)`` of each pair were written."""
    return "".join(f"w {first} {end}\n" for first, end in ranges).encode()


def durable_before(offset_bytes: int) -> bytes:
    """Return the line that says that all lines which begin before this place of the map are durable."""
    return b"d %d\n" % offset_bytes


def whole(size_bytes: int, durable: Iterable[tuple[int, int]], held: Iterable[tuple[int, int]]) -> bytes:
    """Return the map of a blob of that size: what is durable, and what was written."""
    header = f"{_MAGIC} {size_bytes} {boot_id()} {os.urandom(8).hex()}\n".encode()
    return header + written(durable) + DURABLE + written(held)


def map_of(path: Path) -> Path:
    """Return where the map of a part lies."""
    return path.with_suffix(".map")


def received_bytes(path: Path) -> int:
    """Return how many bytes of a part were received, as far as its writer has said so by now; 0 without one."""
    try:
        _size, _boot, held, _durable = _read_map(map_of(path))
        return held.total_bytes if path.exists() else 0
    except (OSError, StorageError):
        return 0


def trusted(path: Path, size_bytes: int, found_bytes: int) -> tuple[Ranges, Ranges]:
    """Return (bytes of a part that may be gone on with, those of them that are durable), none behind the end of the file."""
    try:
        size, boot, held, durable = _read_map(map_of(path))
    except (OSError, StorageError):
        return Ranges(), Ranges()
    if size != size_bytes or found_bytes > size_bytes:
        return Ranges(), Ranges()
    if boot != boot_id():
        held = Ranges(durable)
    for ranges in (held, durable):
        ranges.remove(found_bytes, size_bytes)
    return held, durable


def _read_map(path: Path) -> tuple[int, str, Ranges, Ranges]:
    """Return (size of the blob, boot id, everything written, everything durable). What follows a damaged line is ignored."""
    reader = MapReader()
    reader.feed(read_bounded(path, MAX_MAP_BYTES))
    return reader.size_bytes, reader.boot, reader.held, reader.durable


class MapReader:
    """Reads a map as it grows. Pure; bounded by `MAX_MAP_BYTES` and by what the map says."""

    def __init__(self) -> None:
        self.size_bytes = -1
        """Of the blob; -1 until there is a header that makes sense."""
        self.boot = ""
        self.held = Ranges()
        """Everything written."""
        self.durable = Ranges()
        """Nobody writes there any more: whoever goes on with the part, on whatever node, believes these lines."""
        self.damaged = False
        """There was a line that makes no sense; nothing behind it counts."""
        self.fed_bytes = 0
        self._rest = b""
        self._since: list[tuple[int, int, int]] = []
        """(Place of the line, first byte, end) of what is not known to be durable."""
        self._taken_bytes = 0

    def feed(self, data: bytes) -> bool:
        """Take what follows what was fed before; return whether more is durable now. The end of a line that is not complete yet may come later."""
        self.fed_bytes += len(data)
        before = self.durable.total_bytes
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        self.damaged = self.damaged or self.fed_bytes > MAX_MAP_BYTES or len(self._rest) > _MAX_LINE_BYTES
        for line in lines:
            if self.damaged:
                break
            self._take(line.split())
            self._taken_bytes += len(line) + 1
        return self.durable.total_bytes > before

    def _take(self, words: list[bytes]) -> None:
        match words:
            case [magic, size, boot, *_unique] if (
                self.size_bytes < 0 and magic == _MAGIC.encode() and _is_number(size)
            ):
                self.size_bytes, self.boot = int(size), boot.decode(errors="replace")
            case [b"w", first, end] if (
                _is_number(first) and _is_number(end) and int(first) < int(end) <= self.size_bytes
            ):
                self.held.add(int(first), int(end))
                self._since.append((self._taken_bytes, int(first), int(end)))
            case [b"d"] if self.size_bytes >= 0:
                self._are_durable(self._taken_bytes)
            case [b"d", offset] if self.size_bytes >= 0 and _is_number(offset):
                self._are_durable(int(offset))
            case _:
                self.damaged = True

    def _are_durable(self, before_bytes: int) -> None:
        """Believe the lines that begin before this place."""
        for at, first, end in self._since:
            if at < before_bytes:
                self.durable.add(first, end)
        self._since = [one for one in self._since if one[0] >= before_bytes]


def _is_number(text: bytes) -> bool:
    return text.isdigit() and len(text) <= 19


def boot_id() -> str:
    """Return what tells this boot of this machine from all others; where that cannot be known, something new each time."""
    try:
        return _BOOT_ID.read_text().strip() or "unknown"
    except OSError:
        return os.urandom(16).hex()
