"""The superblock: 96 bytes, little-endian, at the start of the image.

Offset, width, field: 0 u32 magic; 4 u32 inode count; 8 u32 mkfs time; 12 u32 block size; 16 u32 fragment count; 20 u16 compressor;
22 u16 log2 of the block size; 24 u16 flags; 26 u16 id count; 28 u16 major, 30 u16 minor version; 32 u64 root inode reference;
40 u64 bytes used; then u64 positions of the tables: 48 ids, 56 xattrs, 64 inodes, 72 directories, 80 fragments, 88 export.
An absent table has position 2^64-1.

Source: Linux fs/squashfs/squashfs_fs.h (``struct squashfs_super_block``), super.c (``squashfs_fill_super``) for the checks.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from uenvd.errors import FormatError
from uenvd.squashfs.base import ABSENT, InodeRef, damaged

SUPERBLOCK_BYTES = 96
METADATA_BLOCK_BYTES = 8192
"""Size of a decoded metadata block; only the last one of a table is shorter (SQUASHFS_METADATA_SIZE)."""
MIN_BLOCK_BYTES = 4 << 10
MAX_BLOCK_BYTES = 1 << 20

_MAGIC = 0x73717368
_LAYOUT = struct.Struct("<IIIIIHHHHHHQQQQQQQQ")
_FLAG_COMPRESSOR_OPTIONS = 0x0400
_MAX_IMAGE_BYTES = 1 << 63


class Compressor(enum.Enum):
    """The one compression of an image, by its number in the superblock."""

    GZIP = 1
    LZMA = 2
    LZO = 3
    XZ = 4
    LZ4 = 5
    ZSTD = 6


@dataclass(frozen=True, slots=True)
class Superblock:
    """A checked superblock. Positions are absolute, in bytes; tables lie in the order of the fields, all before ``bytes_used``."""

    inode_count: int
    mkfs_time_s: int
    block_size_bytes: int
    """Power of two, 4 KiB..1 MiB."""
    fragment_count: int
    compressor: Compressor
    has_compressor_options: bool
    id_count: int
    """1..65535."""
    root: InodeRef
    bytes_used: int
    """The image without the padding at its end."""
    inode_table_pos: int
    directory_table_pos: int
    fragment_table_pos: int | None
    """None when the image has no fragments."""
    export_table_pos: int | None
    id_table_pos: int
    xattr_table_pos: int | None

    @classmethod
    def parse(cls, data: bytes, size_bytes: int | None = None) -> Superblock:
        """Parse and check the first 96 bytes of an image whose file has ``size_bytes`` (None: unknown).

        Raises `FormatError` when they are no superblock of squashfs 4.0, contradict themselves, or the file is shorter than the image.
        """
        if len(data) < SUPERBLOCK_BYTES:
            raise FormatError(f"not a squashfs image: {len(data)} bytes are too few")
        # fmt: off
        (magic, inode_count, mkfs_time, block_size, fragment_count, compressor, block_log, flags, id_count, major, minor,
         root, bytes_used, id_table, xattr_table, inode_table, directory_table, fragment_table, export_table) = _LAYOUT.unpack_from(data)
        # fmt: on
        if magic != _MAGIC:
            raise FormatError(
                f"not a squashfs image: it begins with {data[:4].hex(' ')} and not with 68 73 71 73"
            )
        if (major, minor) != (4, 0):
            raise FormatError(f"squashfs version {major}.{minor} is not supported, only 4.0")
        if not (12 <= block_log <= 20 and block_size == 1 << block_log):
            raise damaged(f"block size {block_size} with log2 {block_log}")
        try:
            known = Compressor(compressor)
        except ValueError:
            raise damaged(f"unknown compressor {compressor}") from None
        if id_count == 0:
            raise damaged("it has no user or group ids")
        if not SUPERBLOCK_BYTES <= bytes_used < _MAX_IMAGE_BYTES:
            raise damaged(f"bytes used is {bytes_used}")
        if size_bytes is not None and bytes_used > size_bytes:
            raise FormatError(
                f"truncated squashfs image: it should have {bytes_used} bytes but has {size_bytes}",
                hint="copy or download the file again",
            )
        fragments = fragment_table if fragment_count else ABSENT
        tables = [("inode", inode_table), ("directory", directory_table)]
        optional = (
            ("fragment", fragments),
            ("export", export_table),
            ("id", id_table),
            ("xattr", xattr_table),
        )
        tables += [(name, pos) for name, pos in optional if pos != ABSENT or name == "id"]
        if fragment_count and fragment_table == ABSENT:
            raise damaged(f"{fragment_count} fragments but no fragment table")
        before = SUPERBLOCK_BYTES
        for name, pos in tables:
            if not before <= pos < bytes_used:
                raise damaged(f"{name} table at {pos}, not within {before}..{bytes_used}")
            before = pos
        if root >> 16 >= directory_table - inode_table:
            raise damaged(f"root inode {root:#x} lies outside of the inode table")
        return cls(
            inode_count=inode_count,
            mkfs_time_s=mkfs_time,
            block_size_bytes=block_size,
            fragment_count=fragment_count,
            compressor=known,
            has_compressor_options=bool(flags & _FLAG_COMPRESSOR_OPTIONS),
            id_count=id_count,
            root=InodeRef(root),
            bytes_used=bytes_used,
            inode_table_pos=inode_table,
            directory_table_pos=directory_table,
            fragment_table_pos=None if fragments == ABSENT else fragments,
            export_table_pos=None if export_table == ABSENT else export_table,
            id_table_pos=id_table,
            xattr_table_pos=None if xattr_table == ABSENT else xattr_table,
        )
