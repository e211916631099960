"""Metadata blocks: the unit in which all tables are stored.

A block is a u16 header and its bytes: bits 0-14 are the stored size (1..8192), bit 15 says that it is stored uncompressed. It decodes to
8192 bytes, the last one of a table to less. Entries straddle blocks. Source: Linux fs/squashfs/block.c, cache.c.

Concurrency: `MetadataStore` may be used by many threads; a `Cursor` belongs to one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from uenvd.squashfs.base import GenerationCache, ReadAt, damaged
from uenvd.squashfs.compression import Inflate
from uenvd.squashfs.superblock import METADATA_BLOCK_BYTES

HEADER_BYTES = 2
STORED_UNCOMPRESSED = 0x8000
MAX_STORED_BYTES = HEADER_BYTES + METADATA_BLOCK_BYTES
"""On-disk size of a metadata block, header included."""

_ENTRY_OVERHEAD_BYTES = 200
"""What a cached block costs beside its bytes: the objects, the dictionary slot."""


@dataclass(frozen=True, slots=True)
class Region:
    """A run of metadata blocks in the image: ``[start, end)``, absolute, in bytes. No walk leaves it."""

    name: str
    start: int
    end: int

    def decoded_bound_bytes(self) -> int:
        """Return an upper bound of what the region can decode to."""
        return (self.end - self.start) // (HEADER_BYTES + 1) * METADATA_BLOCK_BYTES


class MetadataStore:
    """Decoded metadata blocks by their position, at most ``cache_bytes`` of them in memory."""

    __slots__ = ("_cache", "_image_end", "_inflate", "_read")

    def __init__(self, read: ReadAt, image_end: int, inflate: Inflate, cache_bytes: int) -> None:
        self._read = read
        self._image_end = image_end
        self._inflate = inflate
        self._cache: GenerationCache[int, tuple[bytes, int]] = GenerationCache(cache_bytes)

    def block(self, region: Region, pos: int) -> tuple[bytes, int]:
        """Return the decoded block at ``pos`` (1..8192 bytes) and the position of the next one.

        Raises `FormatError` when the block is not wholly inside ``region`` or is damaged.
        """
        entry = self._cache.get(pos)
        if entry is None:
            if not region.start <= pos < region.end - HEADER_BYTES:
                raise damaged(
                    f"metadata block at {pos} outside of the {region.name} ({region.start}..{region.end})"
                )
            entry = self._decode(region, pos)
            self._cache.put(pos, entry, len(entry[0]) + _ENTRY_OVERHEAD_BYTES)
        if pos < region.start or entry[1] > region.end:
            raise damaged(
                f"metadata block at {pos} outside of the {region.name} ({region.start}..{region.end})"
            )
        return entry

    def _decode(self, region: Region, pos: int) -> tuple[bytes, int]:
        # One read for header and body: a read of the image costs far more than the bytes that are too many.
        raw = self._read(pos, min(MAX_STORED_BYTES, self._image_end - pos))
        if len(raw) < HEADER_BYTES:
            raise damaged(f"it ends inside the {region.name}, at {pos}")
        header = raw[0] | raw[1] << 8
        stored = header & ~STORED_UNCOMPRESSED
        if not 0 < stored <= METADATA_BLOCK_BYTES:
            raise damaged(f"metadata block at {pos} ({region.name}) of {stored} bytes")
        end = HEADER_BYTES + stored
        if len(raw) < end:
            raise damaged(f"it ends inside the {region.name}, at {pos}")
        data = raw[HEADER_BYTES:end]
        if not header & STORED_UNCOMPRESSED:
            data = self._inflate(data, METADATA_BLOCK_BYTES)
            if not data:
                raise damaged(f"empty metadata block at {pos} ({region.name})")
        return data, pos + end


class Cursor:
    """Reads on from one place in a region, from block to block."""

    __slots__ = ("_data", "_next", "_offset", "_pos", "_region", "_store")

    def __init__(self, store: MetadataStore, region: Region, block: int, offset: int) -> None:
        """Start at ``offset`` in the decoded block that lies ``block`` bytes after the region's start. Raises `FormatError`."""
        self._store = store
        self._region = region
        self._pos = region.start + block
        self._data, self._next = store.block(region, self._pos)
        if not 0 <= offset <= len(self._data):
            raise damaged(f"offset {offset} in a metadata block of {len(self._data)} bytes ({region.name})")
        self._offset = offset

    def _advance(self) -> None:
        self._pos = self._next
        self._data, self._next = self._store.block(self._region, self._pos)
        self._offset = 0

    def take(self, size_bytes: int) -> bytes:
        """Return the next bytes. Raises `FormatError` when the region ends before."""
        start = self._offset
        stop = start + size_bytes
        if stop <= len(self._data):
            self._offset = stop
            return self._data[start:stop]
        if size_bytes > self._region.decoded_bound_bytes():
            raise damaged(f"{size_bytes} bytes do not fit into the {self._region.name}")
        parts = [self._data[start:]]
        missing = stop - len(self._data)
        while missing > 0:
            self._advance()
            part = self._data[:missing]
            self._offset = len(part)
            missing -= len(part)
            parts.append(part)
        return b"".join(parts)

    def skip(self, size_bytes: int) -> None:
        """Go on over the next bytes. Raises `FormatError` when the region ends before."""
        missing = size_bytes
        while self._offset + missing > len(self._data):
            missing -= len(self._data) - self._offset
            self._advance()
        self._offset += missing

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """Return the next fields. Raises `FormatError` when the region ends before."""
        stop = self._offset + layout.size
        if stop <= len(self._data):
            fields = layout.unpack_from(self._data, self._offset)
            self._offset = stop
            return fields
        return layout.unpack(self.take(layout.size))

    def tell(self) -> tuple[int, int]:
        """Return the place as (block relative to the region, offset); the end of a block is the start of the next."""
        if self._offset == len(self._data):
            return self._next - self._region.start, 0
        return self._pos - self._region.start, self._offset
