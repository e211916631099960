"""What the kernel gets: a header of 16 bytes (length, -errno, unique) and a body.

Everything about an image may be remembered for good, so every answer says so (`FOREVER_S`).
"""

from __future__ import annotations

import stat
import struct
from typing import NamedTuple

FOREVER_S = 10 * 365 * 86400

OUT = struct.Struct("=IiQ")
OUT_BYTES = 16
ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
"""ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev, blksize, flags."""
ENTRY = struct.Struct("=QQQQII")
"""nodeid, generation, entry_valid, attr_valid, their nanoseconds; an `ATTR` follows."""
ENTRY_ATTR = struct.Struct("=QQQQIIQQQQQQIIIIIIIIII")
DIRENT = struct.Struct("=QQII")
"""ino, offset of the next, name length, type; the name follows, padded with zeros to 8 bytes."""
DIRENT_PLUS = struct.Struct("=QQQQIIQQQQQQIIIIIIIIIIQQII")
"""`ENTRY`, `ATTR`, `DIRENT`."""
DIRENT_PLUS_BYTES = DIRENT_PLUS.size
PADDING = tuple(bytes(size) for size in range(8))
_ATTR_OUT = struct.Struct("=QII")
_STATFS = struct.Struct("=QQQQQIIII24x")
_SIZE = struct.Struct("=II")
_STORE = struct.Struct("=IiQQQII")

NOTIFY_STORE = 4
NOTIFY_RESEND = 7

NO_ENTRY = ENTRY.pack(0, 0, FOREVER_S, 0, 0, 0) + bytes(ATTR.size)
"""Body of LOOKUP: there is no such name, for good."""
ATTR_PREFIX = _ATTR_OUT.pack(FOREVER_S, 0, 0)
"""An `ATTR` after it is the body of GETATTR."""

RESEND = OUT.pack(OUT_BYTES, NOTIFY_RESEND, 0)
"""Notification: send every request again that was read and not answered."""

BLOCK_SIZE_BYTES = 4096
"""``st_blksize``. Programs choose their buffers by it; blocks of the image are far too large for that."""


class Attributes(NamedTuple):
    """What stat(2) tells. ``mode`` with the type bits; times are ``mtime_s`` all three; ``blocks`` in units of 512 bytes."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size_bytes: int
    mtime_s: int
    blocks: int


def answer(unique: int, body: bytes) -> bytes:
    """Return the whole reply."""
    return OUT.pack(OUT_BYTES + len(body), 0, unique) + body


def refusal(unique: int, errno: int) -> bytes:
    """Return the whole reply that says why not; ``errno`` is positive."""
    return OUT.pack(OUT_BYTES, -errno, unique)


def attr(attributes: Attributes) -> bytes:
    """Return ``struct fuse_attr``."""
    ino, mode, nlink, uid, gid, rdev, size_bytes, mtime_s, blocks = attributes
    # fmt: off
    return ATTR.pack(ino, size_bytes, blocks, mtime_s, mtime_s, mtime_s, 0, 0, 0, mode, nlink, uid, gid, kernel_device(rdev),
                     BLOCK_SIZE_BYTES, 0)
    # fmt: on


def entry(attributes: Attributes) -> bytes:
    """Return the body of LOOKUP."""
    return ENTRY.pack(attributes.ino, 0, FOREVER_S, FOREVER_S, 0, 0) + attr(attributes)


def dirent(name: bytes, ino: int, next_offset: int, mode: int) -> bytes:
    """Return one entry of READDIR."""
    size = len(name)
    return DIRENT.pack(ino, next_offset, size, mode >> 12) + name + bytes(-size % 8)


def dirent_plus(name: bytes, attributes: Attributes, next_offset: int) -> bytes:
    """Return one entry of READDIRPLUS."""
    ino, mode, nlink, uid, gid, rdev, size_bytes, mtime_s, blocks = attributes
    size = len(name)
    # fmt: off
    head: bytes = DIRENT_PLUS.pack(ino, 0, FOREVER_S, FOREVER_S, 0, 0,
                                   ino, size_bytes, blocks, mtime_s, mtime_s, mtime_s, 0, 0, 0, mode, nlink, uid, gid,
                                   kernel_device(rdev), BLOCK_SIZE_BYTES, 0,
                                   ino, next_offset, size, mode >> 12)
    # fmt: on
    return head + name + PADDING[-size % 8]


def kernel_device(rdev: int) -> int:
    """Return a device number of `os.makedev` as the kernel packs it into 32 bits (``new_encode_dev``)."""
    if not rdev:
        return 0
    major = rdev >> 8 & 0xFFF | rdev >> 32 & 0xFFFFF000
    minor = rdev & 0xFF | rdev >> 12 & 0xFFFFFF00
    return (minor & 0xFF | (major & 0xFFF) << 8 | (minor & ~0xFF) << 12) & 0xFFFF_FFFF


def statfs(blocks: int, block_size_bytes: int, files: int, name_max_bytes: int) -> bytes:
    """Return the body of STATFS for a full file system."""
    return _STATFS.pack(blocks, 0, 0, files, 0, block_size_bytes, name_max_bytes, block_size_bytes, 0)


def xattr_size(size_bytes: int) -> bytes:
    """Return the body of GETXATTR or LISTXATTR where only the size is wanted."""
    return _SIZE.pack(size_bytes, 0)


def store_header(ino: int, offset_bytes: int, size_bytes: int) -> bytes:
    """Return the beginning of a notification; ``size_bytes`` bytes of the file, which follow, go into the page cache."""
    return _STORE.pack(40 + size_bytes, NOTIFY_STORE, 0, ino, offset_bytes, size_bytes, 0)


def root_attributes_reply(
    unique: int,
    *,
    mode: int = 0o755,
    uid: int = 0,
    gid: int = 0,
    mtime_s: int = 0,
    valid_s: int = 0,
) -> bytes:
    """Return a reply to GETATTR of the root (nodeid 1) for an image that is not there yet: a directory.

    ``valid_s`` is how long the kernel may believe it; 0: it asks again each time.
    """
    attributes = Attributes(1, stat.S_IFDIR | mode, 2, uid, gid, 0, 0, mtime_s, 0)
    return answer(unique, _ATTR_OUT.pack(valid_s, 0, 0) + attr(attributes))
