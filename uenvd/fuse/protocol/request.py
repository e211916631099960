"""What the kernel asks.

A request is a header of 40 bytes (length, opcode, unique, nodeid, uid, gid, pid, length of extensions) and its arguments, in the byte
order of the machine. Every function here takes a buffer that begins with the header, and the request's length as read.

Raises: `ProtocolError`, for requests that the kernel does not make.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

from uenvd.errors import ProtocolError

Buffer = bytes | bytearray | memoryview


class Opcode(enum.IntEnum):
    """``enum fuse_opcode``: what a read-only tree can be asked. Others are answered ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    READLINK = 5
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    GETXATTR = 22
    LISTXATTR = 23
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    ACCESS = 34
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    READDIRPLUS = 44
    LSEEK = 46
    STATX = 52


UNANSWERED = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})
"""Requests for which the kernel waits for no reply. (INTERRUPT has leave to be ignored: the request that it is about is answered soon.)"""

HEADER = struct.Struct("=IIQQIIIHH")
HEADER_BYTES = 40
MIN_READ_BYTES = 8192
"""FUSE_MIN_READ_BUFFER: the kernel refuses a smaller buffer."""
NAME_OFFSET_XATTR = HEADER_BYTES + 8

_READ = struct.Struct("=QQI")
_READ_BYTES = HEADER_BYTES + 40  # struct fuse_read_in
_XATTR = struct.Struct("=II")
MAX_READ_BYTES = 64 << 20
"""More than any kernel asks at once; bounds what a reply can be made to hold."""


class Header(NamedTuple):
    """``struct fuse_in_header``."""

    length: int
    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    extensions: int
    padding: int


def parse_header(request: Buffer, length: int) -> Header:
    """Return the header of a request of ``length`` bytes."""
    if length < HEADER_BYTES or len(request) < length:
        raise ProtocolError(f"a FUSE request of {length} bytes")
    header = Header._make(HEADER.unpack_from(request))
    if header.length != length:
        raise ProtocolError(f"a FUSE request of {length} bytes that says it has {header.length}")
    return header


def read_range(request: Buffer, length: int) -> tuple[int, int]:
    """Return (offset, size in bytes) of READ, READDIR and READDIRPLUS."""
    if length < _READ_BYTES:
        raise ProtocolError(f"a FUSE read request of {length} bytes")
    _handle, offset, size = _READ.unpack_from(request, HEADER_BYTES)
    if size > MAX_READ_BYTES or offset >= 1 << 63:
        raise ProtocolError(f"a FUSE read of {size} bytes at {offset}")
    return offset, size


def name(request: Buffer, length: int, start: int = HEADER_BYTES) -> bytes:
    """Return the name at the end of LOOKUP; of GETXATTR with ``start`` `NAME_OFFSET_XATTR`."""
    found = bytes(request[start:length])
    end = found.find(b"\0")
    if end <= 0:
        raise ProtocolError("a name in a FUSE request is empty or has no end")
    return found[:end]


def xattr_size(request: Buffer, length: int) -> int:
    """Return the room for the answer of GETXATTR and LISTXATTR in bytes; 0: only its size is wanted."""
    if length < HEADER_BYTES + _XATTR.size:
        raise ProtocolError(f"a FUSE xattr request of {length} bytes")
    size: int = _XATTR.unpack_from(request, HEADER_BYTES)[0]
    return size
