"""The map of a part: which of its bytes were written, and which of them are durable.

A log of lines beside the file: a header with the blob's size and the boot of the machine that writes, ``w FIRST END`` for bytes that were
written, ``d`` where everything before it is durable (``fdatasync`` of the file, then of the map). After ``kill -9`` the page cache has what was
written, so the same boot of the same machine trusts every line; any other trusts only what comes before the last ``d``.
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


def written(ranges: Iterable[tuple[int, int]]) -> bytes:
    """Return the lines that say that ``[first, end)`` of each pair were written."""
    return "".join(f"w {first} {end}\n" for first, end in ranges).encode()


def whole(size_bytes: int, durable: Iterable[tuple[int, int]], held: Iterable[tuple[int, int]]) -> bytes:
    """Return the map of a blob of that size: what is durable, and what was written."""
    header = f"{_MAGIC} {size_bytes} {boot_id()}\n".encode()
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
    lines = read_bounded(path, MAX_MAP_BYTES).split(b"\n")
    match lines[0].split():
        case [magic, size, boot] if magic == _MAGIC.encode() and _is_number(size):
            size_bytes = int(size)
        case _:
            return -1, "", Ranges(), Ranges()
    held, durable, since = Ranges(), Ranges(), list[tuple[int, int]]()
    for line in lines[1:-1]:
        match line.split():
            case [b"w", first, end] if (
                _is_number(first) and _is_number(end) and int(first) < int(end) <= size_bytes
            ):
                held.add(int(first), int(end))
                since.append((int(first), int(end)))
            case [b"d"]:
                for first_byte, end_byte in since:
                    durable.add(first_byte, end_byte)
                since.clear()
            case _:
                break
    return size_bytes, boot.decode(errors="replace"), held, durable


def _is_number(text: bytes) -> bool:
    return text.isdigit() and len(text) <= 19


def boot_id() -> str:
    """Return what tells this boot of this machine from all others; where that cannot be known, something new each time."""
    try:
        return _BOOT_ID.read_text().strip() or "unknown"
    except OSError:
        return os.urandom(16).hex()
