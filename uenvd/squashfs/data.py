"""File content: which blocks of the image a read needs.

A file's data are consecutive stored blocks, their u32 sizes listed after the inode: bits 0-23 the stored size, bit 24 stored uncompressed,
size 0 a hole of one block. Each block decodes to the block size; the last one of a file without fragment to the rest. With a fragment the
rest (less than a block) lies at an offset in a decoded block that files share. Source: Linux fs/squashfs/file.c.

The position of block i is the sum of all sizes before it. For long lists `BlockLists` remembers that sum at every `_STRIDE`-th block.
"""

from __future__ import annotations

import functools
import struct
from array import array
from typing import NamedTuple

from uenvd.errors import FormatError
from uenvd.squashfs.base import GenerationCache, damaged
from uenvd.squashfs.inode import Inode
from uenvd.squashfs.metadata import Cursor, MetadataStore, Region
from uenvd.squashfs.superblock import SUPERBLOCK_BYTES
from uenvd.squashfs.tables import BLOCK_UNCOMPRESSED

_STRIDE = 512
_MAX_CHECKPOINTS = 4096
"""Per file: 96 KiB of memory, 2 million blocks. Reads beyond go on from the last one."""
_CACHED_FILES = 64
MAX_LISTED_BLOCKS = 1 << 27
"""Of one file: 16 TiB in blocks of 128 KiB, the largest file of ext4. The list of a file that is all holes compresses a thousandfold, so
the image's size hardly bounds the time to walk it; this does, to a few seconds."""


class Block(NamedTuple):
    """One stored block of data; hashable, equal for all files that share it: a cache key."""

    pos_bytes: int
    """Absolute position in the image; 0 for a hole."""
    stored_bytes: int
    """0: a hole, nothing is stored and the block is zeros."""
    compressed: bool
    decoded_bytes: int
    """At most the block size. Exactly what it decodes to, or, where not ``exact``, at most."""
    exact: bool = True
    """False for compressed fragment blocks, whose decoded size is stored nowhere."""


_new_block = functools.partial(tuple.__new__, Block)


class Span(NamedTuple):
    """One block that a read needs, and the slice of the decoded block that answers it."""

    block: Block
    start: int
    stop: int

    def cut(self, decoded: bytes) -> bytes:
        """Return the slice. Raises `FormatError` when the block is too short for it, which a plain slice would hide."""
        if len(decoded) < self.stop:
            raise damaged(
                f"a fragment block at {self.block.pos_bytes} unpacks to {len(decoded)} bytes, not to {self.stop}"
            )
        if self.start == 0 and self.stop == len(decoded):
            return decoded
        return decoded[self.start : self.stop]


def listed_blocks(inode: Inode, block_size_bytes: int) -> int:
    """Return how many blocks the list of a file has: a tail in a fragment is not among them."""
    if inode.fragment_index is not None:
        return inode.size_bytes // block_size_bytes
    return -(-inode.size_bytes // block_size_bytes)


def short_list(
    sizes: bytes, offset: int, count: int, pos: int, file_bytes: int, block_bytes: int, data_end: int
) -> list[Block] | None:
    """Return the first ``count`` blocks of a file of ``file_bytes``; their u32 sizes lie in ``sizes`` from ``offset`` on.

    None where `BlockLists.blocks` would raise. ``pos`` is the position of the first block, ``data_end`` the end of the data area.
    """
    found: list[Block] = []
    rest = file_bytes
    for word in struct.unpack_from(f"<{count}I", sizes, offset):
        decoded = min(block_bytes, rest)
        rest -= decoded
        if word == 0:
            found.append(_new_block((0, 0, False, decoded, True)))
            continue
        stored = word & ~BLOCK_UNCOMPRESSED
        compressed = stored == word
        if not 0 < stored <= block_bytes or not (compressed or stored == decoded):
            return None
        if not SUPERBLOCK_BYTES <= pos <= data_end - stored:
            return None
        found.append(_new_block((pos, stored, compressed, decoded, True)))
        pos += stored
    return found


class BlockLists:
    """The block lists of files. Concurrency: as `MetadataStore`; two threads at one long file may compute a checkpoint twice."""

    __slots__ = ("_block_size_bytes", "_checkpoints", "_data_end", "_inodes", "_last", "_store")

    def __init__(self, store: MetadataStore, inodes: Region, block_size_bytes: int, data_end: int) -> None:
        self._store = store
        self._inodes = inodes
        self._block_size_bytes = block_size_bytes
        self._data_end = data_end
        self._checkpoints: GenerationCache[tuple[int, int], array[int]] = GenerationCache(_CACHED_FILES)
        self._last = (-1, -1, 0, 0, 0, 0)
        """Where the last call began: a file (place of its list), index of the block, its position, place of its size."""

    def blocks(self, inode: Inode, first: int, count: int) -> list[Block]:
        """Return the blocks ``first .. first + count - 1`` of the file's list (``count`` >= 1, all of them in the list).

        Raises `FormatError` when the list leaves the inode table or a block the data area.
        """
        if listed_blocks(inode, self._block_size_bytes) > MAX_LISTED_BLOCKS:
            raise FormatError(
                f"a file of {inode.size_bytes} bytes in the squashfs image has more than {MAX_LISTED_BLOCKS} blocks"
            )
        if 4 * (first + count) > self._inodes.decoded_bound_bytes():
            raise damaged(f"file {inode.ref:#x} of {inode.size_bytes} bytes: its block list cannot fit")
        index, pos, cursor = self._nearest(inode, first)
        pos = self._sum(cursor, first - index, pos)
        self._last = (inode.content_block, inode.content_offset, first, pos, *cursor.tell())
        size = self._block_size_bytes
        found: list[Block] = []
        for i, word in enumerate(struct.unpack(f"<{count}I", cursor.take(4 * count)), first):
            decoded = min(size, inode.size_bytes - i * size)
            if word == 0:
                found.append(Block(0, 0, False, decoded))
                continue
            stored = word & ~BLOCK_UNCOMPRESSED
            compressed = not word & BLOCK_UNCOMPRESSED
            if not 0 < stored <= size or not (compressed or stored == decoded):
                raise damaged(f"block {i} of file {inode.ref:#x}: {stored} bytes stored for {decoded}")
            if not SUPERBLOCK_BYTES <= pos <= self._data_end - stored:
                raise damaged(f"block {i} of file {inode.ref:#x} at {pos} outside of the data")
            found.append(Block(pos, stored, compressed, decoded))
            pos += stored
        return found

    def _nearest(self, inode: Inode, first: int) -> tuple[int, int, Cursor]:
        """Return (index of a block at or before ``first``, its position, a cursor at its size): less than `_STRIDE` blocks before."""
        pos, block, offset = inode.data_pos, inode.content_block, inode.content_offset
        known_block, known_offset, index, known_pos, *place = self._last
        if known_block == block and known_offset == offset and 0 <= first - index < _STRIDE:
            return index, known_pos, Cursor(self._store, self._inodes, *place)
        wanted = min(first // _STRIDE, _MAX_CHECKPOINTS)
        if wanted == 0:
            return 0, pos, Cursor(self._store, self._inodes, block, offset)
        key = (block, offset)
        # Flat triples: position of the block, then place of its size. Replaced as a whole, so that threads never see half of one.
        points = array("Q", self._checkpoints.get(key) or ())
        index = min(wanted, len(points) // 3)
        if index:
            pos, block, offset = points[3 * index - 3 : 3 * index]
        cursor = Cursor(self._store, self._inodes, block, offset)
        if index < wanted:
            for _ in range(index, wanted):
                pos = self._sum(cursor, _STRIDE, pos)
                points.extend((pos, *cursor.tell()))
            self._checkpoints.put(key, points)
        return wanted * _STRIDE, pos, cursor

    def _sum(self, cursor: Cursor, count: int, pos: int) -> int:
        """Return ``pos`` plus the stored sizes of the next ``count`` blocks."""
        while count:
            n = min(count, _STRIDE)
            raw = cursor.take(4 * n)
            flags = raw[3::4]
            uncompressed = flags.count(1)
            if uncompressed + flags.count(0) != n:
                raise damaged("a data block with unknown flags")
            pos += sum(struct.unpack(f"<{n}I", raw)) - uncompressed * BLOCK_UNCOMPRESSED
            if pos > self._data_end:
                raise damaged(f"a file's blocks reach beyond the data, to {pos}")
            count -= n
        return pos
