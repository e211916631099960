"""Extended attributes.

At the table's position: u64 position of the attribute blocks, u32 count of sets, u32 unused, then the positions of the blocks of the
set table. A set (16 bytes): u64 reference of its first attribute, u32 number of attributes, u32 size in memory. An attribute: u16 type,
u16 name length, name without prefix; u32 value length, value. Type bits 0-7 are the prefix, bit 8 says that the value is the u64
reference of a (u32 length, value) elsewhere, so that equal values are stored once. References are relative to the attribute blocks.

Source: Linux fs/squashfs/xattr.c, xattr_id.c.
"""

from __future__ import annotations

import struct

from uenvd.errors import FormatError
from uenvd.squashfs.base import ReadAt, damaged, read_exactly
from uenvd.squashfs.metadata import Cursor, MetadataStore, Region
from uenvd.squashfs.superblock import SUPERBLOCK_BYTES
from uenvd.squashfs.tables import BlockArray

MAX_NAME_BYTES = 255
"""XATTR_NAME_MAX of Linux, prefix included."""
MAX_VALUE_BYTES = 64 << 10
"""XATTR_SIZE_MAX of Linux."""
MAX_COUNT = 4096
MAX_TOTAL_BYTES = 4 << 20
"""Names and values of one inode. Stored once, a value can be named by many attributes, so the image's size is no bound."""

_PREFIXES = (b"user.", b"trusted.", b"security.")
_TYPE_MASK = 0xFF
_OUT_OF_LINE = 0x100
_HEADER = struct.Struct("<QII")
_SET = struct.Struct("<QII")
_NAME = struct.Struct("<HH")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class XattrTable:
    """The attribute sets of an image."""

    __slots__ = ("_attributes", "_sets", "_store")

    def __init__(self, read: ReadAt, store: MetadataStore, pos: int, end: int) -> None:
        """Load the table's header. Raises `FormatError`."""
        start, count, _unused = _HEADER.unpack(read_exactly(read, pos, _HEADER.size, "xattr table"))
        self._store = store
        self._sets: BlockArray | None = None
        self._attributes: Region | None = None
        if count:
            sets = BlockArray(
                read, store, "xattr set table", pos, count, _SET.size, header_bytes=_HEADER.size, end=end
            )
            if not SUPERBLOCK_BYTES <= start < sets.region.start:
                raise damaged(f"xattrs at {start}, their set table at {sets.region.start}")
            self._sets = sets
            self._attributes = Region("xattrs", start, sets.region.start)

    def read(self, index: int) -> dict[bytes, bytes]:
        """Return the attributes of one set by their full names; of two with one name the first.

        Attributes with a prefix that this reader does not know are left out, as in the kernel. Raises `FormatError`, also beyond
        `MAX_COUNT` and `MAX_TOTAL_BYTES`.
        """
        if self._sets is None or self._attributes is None:
            raise damaged(f"xattr set {index} in an empty table")
        ref, count, _size = _SET.unpack(self._sets.entry(index))
        if count > MAX_COUNT:
            raise FormatError(
                f"an inode of the squashfs image has {count} extended attributes, more than {MAX_COUNT}"
            )
        found: dict[bytes, bytes] = {}
        if count == 0:
            return found
        cursor = Cursor(self._store, self._attributes, ref >> 16, ref & 0xFFFF)
        total = 0
        for _ in range(count):
            kind, name_bytes = cursor.unpack(_NAME)
            prefix = _PREFIXES[kind & _TYPE_MASK] if kind & _TYPE_MASK < len(_PREFIXES) else None
            if not 0 < name_bytes <= MAX_NAME_BYTES:
                raise damaged(f"xattr name of {name_bytes} bytes")
            name = cursor.take(name_bytes)
            if b"\0" in name:
                raise damaged("xattr name with a NUL byte")
            value = self._value(cursor, out_of_line=bool(kind & _OUT_OF_LINE))
            total += name_bytes + len(value)
            if total > MAX_TOTAL_BYTES:
                raise FormatError(
                    f"extended attributes of an inode of the squashfs image have more than {MAX_TOTAL_BYTES} bytes"
                )
            if prefix is not None:
                found.setdefault(prefix + name, value)
        return found

    def _value(self, cursor: Cursor, *, out_of_line: bool) -> bytes:
        (size,) = cursor.unpack(_U32)
        if out_of_line:
            if size != _U64.size or self._attributes is None:
                raise damaged(f"reference of an xattr value of {size} bytes")
            (ref,) = cursor.unpack(_U64)
            cursor = Cursor(self._store, self._attributes, ref >> 16, ref & 0xFFFF)
            (size,) = cursor.unpack(_U32)
        if size > MAX_VALUE_BYTES:
            raise damaged(f"xattr value of {size} bytes")
        return cursor.take(size)
