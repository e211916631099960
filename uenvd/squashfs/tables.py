"""The look-up tables: ids, fragments, export.

Each is an array of fixed-size entries in metadata blocks, and, at the position that the superblock names, a plain array of u64 positions
of these blocks. The blocks lie directly before the array. Source: Linux fs/squashfs/id.c, fragment.c, export.c, which make the same checks.
"""

from __future__ import annotations

import struct
import sys
from array import array
from dataclasses import dataclass

from uenvd.errors import FormatError
from uenvd.squashfs.base import InodeRef, ReadAt, damaged, read_exactly
from uenvd.squashfs.metadata import MAX_STORED_BYTES, Cursor, MetadataStore, Region
from uenvd.squashfs.superblock import METADATA_BLOCK_BYTES, SUPERBLOCK_BYTES

MAX_POINTERS = 1 << 16
"""Metadata blocks of one table: 33 million fragments, 67 million inodes. Bounds the memory for their positions to 512 KiB."""

BLOCK_UNCOMPRESSED = 1 << 24
"""Bit of a u32 block size: stored uncompressed. The bits above it are zero."""

_FRAGMENT = struct.Struct("<QII")
_U64 = struct.Struct("<Q")


class BlockArray:
    """Entries of ``entry_bytes`` (a divisor of 8192) at fixed places of metadata blocks."""

    __slots__ = ("_count", "_entry_bytes", "_pointers", "_store", "region")

    def __init__(
        self,
        read: ReadAt,
        store: MetadataStore,
        name: str,
        pos: int,
        count: int,
        entry_bytes: int,
        *,
        header_bytes: int = 0,
        end: int,
    ) -> None:
        """Load the positions of the blocks of ``count`` (>= 1) entries.

        Args:
            read, store: the image.
            name: for error texts.
            pos: of the table; ``header_bytes`` later the array of block positions begins.
            count, entry_bytes: of the table.
            header_bytes: see ``pos``.
            end: where the array must end at the latest.

        Raises: `FormatError` when the array does not fit, or positions do not ascend by at most one block each up to ``pos``.
        """
        per_block = METADATA_BLOCK_BYTES // entry_bytes
        blocks = -(-count // per_block)
        if blocks > MAX_POINTERS:
            raise FormatError(f"the {name} of the squashfs image is too large: {count} entries")
        start = pos + header_bytes
        if start + 8 * blocks > end:
            raise damaged(f"{name} of {count} entries at {pos} goes beyond {end}")
        pointers = array("Q", read_exactly(read, start, 8 * blocks, name))
        if sys.byteorder == "big":
            pointers.byteswap()
        after = pos
        for pointer in reversed(pointers):
            if not SUPERBLOCK_BYTES <= pointer < after <= pointer + MAX_STORED_BYTES:
                raise damaged(f"{name}: metadata block at {pointer}, the next at {after}")
            after = pointer
        self.region = Region(name, pointers[0], pos)
        self._store = store
        self._pointers = pointers
        self._entry_bytes = entry_bytes
        self._count = count

    def entry(self, index: int) -> bytes:
        """Return the bytes of an entry. Raises `FormatError` when there is none of this index."""
        if not 0 <= index < self._count:
            raise damaged(f"{self.region.name} has no entry {index}, only {self._count}")
        block, offset = divmod(index * self._entry_bytes, METADATA_BLOCK_BYTES)
        data, _next = self._store.block(self.region, self._pointers[block])
        stop = offset + self._entry_bytes
        if stop > len(data):
            raise damaged(f"{self.region.name} ends before entry {index}")
        return data[offset:stop]


def load_ids(table: BlockArray, store: MetadataStore, count: int) -> tuple[int, ...]:
    """Return the ``count`` (<= 65535) user and group ids, u32 each. Raises `FormatError`."""
    raw = Cursor(store, table.region, 0, 0).take(4 * count)
    return struct.unpack(f"<{count}I", raw)


@dataclass(frozen=True, slots=True)
class Fragment:
    """Where the data block lies that holds the tails of several files."""

    pos: int
    stored_bytes: int
    """1..block size."""
    compressed: bool


def fragment(table: BlockArray, index: int, block_size_bytes: int, data_end: int) -> Fragment:
    """Return an entry of the fragment table: u64 position, u32 size with `BLOCK_UNCOMPRESSED`, u32 unused.

    Raises `FormatError` when there is none or its block is not inside the data area (``data_end``: absolute).
    """
    pos, size, _unused = _FRAGMENT.unpack(table.entry(index))
    stored = size & ~BLOCK_UNCOMPRESSED
    if not 0 < stored <= block_size_bytes:
        raise damaged(f"fragment block {index} of {stored} bytes")
    if not SUPERBLOCK_BYTES <= pos <= data_end - stored:
        raise damaged(f"fragment block {index} at {pos} outside of the data")
    return Fragment(pos, stored, not size & BLOCK_UNCOMPRESSED)


def exported(table: BlockArray, inode_number: int) -> InodeRef:
    """Return where the inode of this number (1...) lies. Raises `FormatError` when the table does not say."""
    (ref,) = _U64.unpack(table.entry(inode_number - 1))
    return InodeRef(ref)
