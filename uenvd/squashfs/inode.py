"""Inodes: all fourteen types, decoded into one value.

Every inode begins with u16 type, u16 mode, u16 index of the uid, u16 index of the gid, u32 mtime, u32 inode number. Types 1-7 are the basic
ones, 8-14 the extended ones of the same kinds. What follows is beside each layout below. Source: Linux fs/squashfs/squashfs_fs.h, inode.c.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

from uenvd.squashfs.base import InodeRef, damaged
from uenvd.squashfs.metadata import Cursor

NO_XATTRS = 0xFFFF_FFFF
NO_FRAGMENT = 0xFFFF_FFFF
MAX_FILE_BYTES = (1 << 63) - 1
"""The largest loff_t."""
MAX_SYMLINK_BYTES = 4096
"""PATH_MAX of Linux; the kernel's reader refuses more than a page."""


class Kind(enum.Enum):
    """What an inode is; the value is its basic type number, which directory entries use too."""

    DIRECTORY = 1
    FILE = 2
    SYMLINK = 3
    BLOCK_DEVICE = 4
    CHAR_DEVICE = 5
    FIFO = 6
    SOCKET = 7


KINDS: tuple[Kind, ...] = tuple(Kind)
"""By type number - 1."""


class Inode(NamedTuple):
    """One decoded inode. The fields after ``xattr_index`` are for this package: where the inode's content lies."""

    ref: InodeRef
    inode_number: int
    """1..2^32-1; the same for all names of a hard-linked file."""
    kind: Kind
    mode: int
    """Permission bits, setuid, setgid, sticky: 0..0o7777."""
    uid: int
    gid: int
    mtime_s: int
    """Unsigned, 0..2^32-1."""
    nlink: int
    size_bytes: int
    """File: its size. Symlink: length of the target. Directory: as stored and as the kernel shows it, size of the listing + 3. Else 0."""
    rdev: int
    """Device number as `os.makedev` makes it; 0 for what is no device."""
    xattr_index: int | None

    parent_number: int = 0
    """Directory: inode number of the directory that holds it."""
    content_block: int = 0
    """Metadata block of: a directory's listing (relative to the directory table), a file's block list or a symlink's target
    (relative to the inode table)."""
    content_offset: int = 0
    """Offset in that decoded block."""
    index_block: int = 0
    """Directory: place of the index in the inode table."""
    index_offset: int = 0
    index_count: int = 0
    """Directory: number of entries of the index, 0 where there is none."""
    data_pos: int = 0
    """File: absolute position of its first block."""
    fragment_index: int | None = None
    """File: entry of the fragment table whose block holds the tail."""
    fragment_offset: int = 0


_HEADER = struct.Struct("<HHHHII")
_DIRECTORY = struct.Struct(
    "<IIHHI"
)  # listing block, nlink, listing size + 3, listing offset, parent's inode number
_DIRECTORY_X = struct.Struct(
    "<IIIIHHI"
)  # nlink, size + 3, listing block, parent, index count, listing offset, xattrs; then the index
_FILE = struct.Struct(
    "<IIII"
)  # data position, fragment, offset in it, size; then the u32 sizes of the blocks
_FILE_X = struct.Struct(
    "<QQQIIII"
)  # data position, size, sparse bytes, nlink, fragment, offset, xattrs; then the sizes
_SYMLINK = struct.Struct("<II")  # nlink, length; then the target, then (extended) u32 xattrs
_DEVICE = struct.Struct("<II")  # nlink, device; then (extended) u32 xattrs
_IPC = struct.Struct("<I")  # nlink; then (extended) u32 xattrs
_U32 = struct.Struct("<I")


def _device(encoded: int) -> int:
    """Decode a device number: 12 bits major at bit 8; minor in bits 0-7 and 20-31 (``new_decode_dev`` of Linux)."""
    return os.makedev(encoded >> 8 & 0xFFF, encoded & 0xFF | encoded >> 12 & 0xFFF00)


Facts = tuple[Kind, int, int, int, int, int, int, int, int]
"""Kind, inode number, mode, nlink, uid, gid, rdev, size in bytes, mtime in s: as in `Inode`."""

BASIC_INODE = struct.Struct("<HHHHIIIIII")
"""The header, and as many bytes as the basic file and the basic directory have; a basic symbolic link has fewer, and something follows it."""


BASIC_FILE_BYTES = BASIC_INODE.size


def basic_facts(block: bytes, offset: int, ids: Sequence[int]) -> Facts | None:
    """Decode the facts of a basic file, directory or link that lies in one block.

    None for every other inode, and for one that `parse` would refuse.
    """
    if offset + BASIC_INODE.size > len(block):
        return None
    number_type, mode, uid, gid, mtime_s, inode_number, a, b, c, d = BASIC_INODE.unpack_from(block, offset)
    count = len(ids)
    if inode_number == 0 or uid >= count or gid >= count:
        return None
    if number_type == 2:
        return Kind.FILE, inode_number, mode & 0o7777, 1, ids[uid], ids[gid], 0, d, mtime_s
    if number_type == 1:
        return Kind.DIRECTORY, inode_number, mode & 0o7777, b, ids[uid], ids[gid], 0, c & 0xFFFF, mtime_s
    if number_type == 3 and b <= MAX_SYMLINK_BYTES:
        return Kind.SYMLINK, inode_number, mode & 0o7777, a, ids[uid], ids[gid], 0, b, mtime_s
    return None


def basic_file(block: bytes, offset: int) -> tuple[int, int, int, int] | None:
    """Return data position, fragment (or `NO_FRAGMENT`), offset in it and size of the basic file at ``offset``; None if it is none.

    The inode's `BASIC_FILE_BYTES` lie in ``block``; the sizes of its blocks follow. Owner and number are not looked at.
    """
    number_type, _mode, _uid, _gid, _mtime_s, _number, pos, fragment, start, size = BASIC_INODE.unpack_from(
        block, offset
    )
    return (pos, fragment, start, size) if number_type == 2 else None


def inode_bytes(block: bytes, offset: int, block_size_bytes: int) -> int:
    """Return how long a basic file, directory or link at ``offset`` is; 0 for every other inode. `BASIC_FILE_BYTES` lie in ``block``."""
    number_type, _mode, _uid, _gid, _mtime_s, _number, _pos, b, _start, size = BASIC_INODE.unpack_from(
        block, offset
    )
    if number_type == 2:
        listed: int = size // block_size_bytes if b != NO_FRAGMENT else -(-size // block_size_bytes)
        return BASIC_FILE_BYTES + 4 * listed
    if number_type == 1:
        return BASIC_FILE_BYTES
    if number_type == 3:
        return _HEADER.size + _SYMLINK.size + int(b)
    return 0


def facts_of(inode: Inode) -> Facts:
    """Return the facts of a decoded inode."""
    # fmt: off
    return (inode.kind, inode.inode_number, inode.mode, inode.nlink, inode.uid, inode.gid, inode.rdev, inode.size_bytes,
            inode.mtime_s)
    # fmt: on


def parse(cursor: Cursor, ref: InodeRef, ids: Sequence[int]) -> Inode:
    """Decode the inode at which ``cursor`` stands; ``ids`` is the id table. Raises `FormatError`."""
    number_type, mode, uid_index, gid_index, mtime_s, inode_number = cursor.unpack(_HEADER)
    if not 1 <= number_type <= 14:
        raise damaged(f"inode {ref:#x} of unknown type {number_type}")
    if inode_number == 0:
        raise damaged(f"inode {ref:#x} has number 0")
    if uid_index >= len(ids) or gid_index >= len(ids):
        raise damaged(f"inode {ref:#x}: owner {uid_index}, group {gid_index} of only {len(ids)} ids")
    extended = number_type > 7
    kind = KINDS[(number_type - 1) % 7]
    nlink, size, rdev, xattrs = 1, 0, 0, NO_XATTRS
    parent = block = offset = index_block = index_offset = index_count = data_pos = fragment_offset = 0
    fragment = NO_FRAGMENT
    if kind is Kind.FILE:
        if extended:
            data_pos, size, _sparse, nlink, fragment, fragment_offset, xattrs = cursor.unpack(_FILE_X)
            if size > MAX_FILE_BYTES:
                raise damaged(f"file {ref:#x} of {size} bytes")
        else:
            data_pos, fragment, fragment_offset, size = cursor.unpack(_FILE)
        block, offset = cursor.tell()
    elif kind is Kind.DIRECTORY:
        if extended:
            nlink, size, block, parent, index_count, offset, xattrs = cursor.unpack(_DIRECTORY_X)
            index_block, index_offset = cursor.tell()
        else:
            block, nlink, size, offset, parent = cursor.unpack(_DIRECTORY)
    elif kind is Kind.SYMLINK:
        nlink, size = cursor.unpack(_SYMLINK)
        if size > MAX_SYMLINK_BYTES:
            raise damaged(f"symbolic link {ref:#x} of {size} bytes")
        block, offset = cursor.tell()
        if extended:
            cursor.skip(size)
            (xattrs,) = cursor.unpack(_U32)
    else:
        if kind is Kind.BLOCK_DEVICE or kind is Kind.CHAR_DEVICE:
            nlink, encoded = cursor.unpack(_DEVICE)
            rdev = _device(encoded)
        else:
            (nlink,) = cursor.unpack(_IPC)
        if extended:
            (xattrs,) = cursor.unpack(_U32)
    return Inode(
        ref=ref,
        inode_number=inode_number,
        kind=kind,
        mode=mode & 0o7777,
        uid=ids[uid_index],
        gid=ids[gid_index],
        mtime_s=mtime_s,
        nlink=nlink,
        size_bytes=size,
        rdev=rdev,
        xattr_index=None if xattrs == NO_XATTRS else xattrs,
        parent_number=parent,
        content_block=block,
        content_offset=offset,
        index_block=index_block,
        index_offset=index_offset,
        index_count=index_count,
        data_pos=data_pos,
        fragment_index=None if fragment == NO_FRAGMENT else fragment,
        fragment_offset=fragment_offset,
    )
