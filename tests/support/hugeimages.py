"""Valid images of unusual size, made in a moment: a directory of 100,000 entries, 200,000 files, a file beyond 4 GiB."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import groupby

from support.images import content
from support.rawimage import DIR, FILE, NONE, RawImage, place, run
from uenvd.squashfs import InodeRef

_STORED = 1 << 24
_FRAGMENT = content(4096, 11)
_RUN = 256
_INDEX_BYTES = 8192

Entry = tuple[bytes, int, int, int]
"""Name, inode reference, inode number, type."""


def small_content(number: int) -> bytes:
    """Return the content of the file of this number in `directory_of` and `tree_of`."""
    start, size = number % 3000, number % 91
    return _FRAGMENT[start : start + size]


def _new() -> RawImage:
    raw = RawImage(data=_FRAGMENT, fragments=[(96, len(_FRAGMENT) | _STORED)])
    # Grown in place: bytes would be copied for each inode.
    raw.inodes = bytearray()  # type: ignore[assignment]
    raw.listings = bytearray()  # type: ignore[assignment]
    return raw


def _file(raw: RawImage, number: int) -> InodeRef:
    size = number % 91
    return raw.file(number, size, fragment=0 if size else NONE, offset=number % 3000 if size else 0)


def _runs(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Cut a listing where a run must end: another block of inodes, or 256 entries."""
    for _block, group in groupby(entries, key=lambda entry: entry[1] >> 16):
        same = list(group)
        yield from (same[at : at + _RUN] for at in range(0, len(same), _RUN))


def _finish(raw: RawImage, inodes: int) -> bytes:
    raw.superblock["inode_count"] = inodes
    image = raw.build()
    return image + bytes(-len(image) % 4096)  # a loop device ends at a whole sector


def directory_of(count: int) -> tuple[bytes, list[bytes]]:
    """Return an image whose root holds ``count`` files, with an index, and their names in order."""
    raw = _new()
    names = [b"entry-%07d" % number for number in range(1, count + 1)]
    entries = [(name, _file(raw, number), number, FILE) for number, name in enumerate(names, 1)]
    listing = bytearray()
    index: list[tuple[int, int, bytes]] = []
    for part in _runs(entries):
        block = place(len(listing))[0]
        if len(listing) // _INDEX_BYTES > len(index):
            index.append((len(listing), block, part[0][0]))
        listing += run(part, base=part[0][2])
    raw.indexed(count + 1, bytes(listing), index, parent=count + 2)
    return _finish(raw, count + 1), names


def tree_of(directories: int, files_each: int) -> bytes:
    """Return an image with ``dNNNN/fNNN``; the numbers of the files, from 1, go on from directory to directory."""
    raw = _new()
    total = directories * files_each
    root = total + directories + 1
    top: list[Entry] = []
    for directory in range(directories):
        first = directory * files_each + 1
        entries = [
            (b"f%03d" % place_in, _file(raw, first + place_in), first + place_in, FILE)
            for place_in in range(files_each)
        ]
        listing = b"".join(run(part, base=part[0][2]) for part in _runs(entries))
        number = total + directory + 1
        top.append((b"d%04d" % directory, raw.directory(number, listing, parent=root), number, DIR))
    listing = b"".join(run(part, base=part[0][2]) for part in _runs(top))
    raw.directory(root, listing, parent=root + 1)
    return _finish(raw, root)


def file_of(size_bytes: int, pieces: dict[int, bytes]) -> bytes:
    """Return an image with one file, ``huge``, all holes but for ``pieces``: offset -> bytes, each within one block of 1 MiB."""
    block = 1 << 20
    blocks: dict[int, bytearray] = {}
    for offset, piece in pieces.items():
        number, start = divmod(offset, block)
        data = blocks.setdefault(number, bytearray(min(block, size_bytes - number * block)))
        assert start + len(piece) <= len(data)
        data[start : start + len(piece)] = piece
    raw = RawImage(block_size=block, data=b"".join(bytes(blocks[number]) for number in sorted(blocks)))
    count = -(-size_bytes // block)
    words = [len(blocks[number]) | _STORED if number in blocks else 0 for number in range(count)]
    holes = size_bytes - sum(map(len, blocks.values()))
    body = struct.pack("<QQQIIII", 96, size_bytes, holes, 1, NONE, 0, NONE) + struct.pack(
        f"<{count}I", *words
    )
    ref = raw.inode(FILE + 7, 1, body, mode=0o644)
    raw.directory(2, run([(b"huge", ref, 1, FILE)]), parent=3)
    return _finish(raw, 2)
