"""INIT: what the kernel offers, what we take, and what has to be known of it for the life of the connection."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from uenvd.errors import ProtocolError
from uenvd.fuse.protocol.reply import answer
from uenvd.fuse.protocol.request import HEADER, HEADER_BYTES, MIN_READ_BYTES, Buffer, Opcode, parse_header

MAJOR = 7
MINOR = 38
"""Ours; the connection speaks the smaller of the two sides'."""
MIN_MINOR = 28
"""Linux 4.20: max_pages, cached symlinks. The oldest system of today's sites has 7.34 (Linux 5.14)."""

ASYNC_READ = 1 << 0
BIG_WRITES = 1 << 5
DO_READDIRPLUS = 1 << 13
NO_OPEN_SUPPORT = 1 << 17
PARALLEL_DIROPS = 1 << 18
MAX_PAGES = 1 << 22
CACHE_SYMLINKS = 1 << 23
NO_OPENDIR_SUPPORT = 1 << 24
INIT_EXT = 1 << 30
HAS_RESEND = 1 << 39

_WANTED = (
    ASYNC_READ
    | BIG_WRITES
    | DO_READDIRPLUS
    | NO_OPEN_SUPPORT
    | PARALLEL_DIROPS
    | MAX_PAGES
    | CACHE_SYMLINKS
    | NO_OPENDIR_SUPPORT
    | INIT_EXT
    | HAS_RESEND
)
_NEEDED = NO_OPEN_SUPPORT | NO_OPENDIR_SUPPORT
"""Without them the kernel would give us handles to remember, and a server here has no state."""

MAX_REQUEST_PAGES = 32
"""128 KiB, one block of most images: the kernel splits a window of its readahead into as many requests, which the workers answer at once,
and whoever waits for one page (a fault in a mapped library) waits for one block. The cost of a request is a tenth of a block's."""
MAX_BACKGROUND = 64
CONGESTION_THRESHOLD = 48
_MAX_WRITE_BYTES = 4096
"""The smallest the kernel takes: nobody writes, and it bounds the buffer that a request needs."""

_IN = struct.Struct("=IIII")
_IN_FLAGS2 = struct.Struct("=I")
_OUT = struct.Struct("=IIIIHHIIHHIIH22x")
_OUT_BYTES = 64


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What INIT agreed on. A successor of any process of ours needs it, the kernel says it once."""

    minor: int
    flags: int
    """Of the 64 bits of INIT flags those that both sides have."""
    max_readahead_bytes: int
    max_pages: int
    """Bound of one READ, in pages."""
    buffer_bytes: int = MIN_READ_BYTES
    """What a buffer for requests must have at least."""

    @property
    def resend(self) -> bool:
        """Whether the kernel knows FUSE_NOTIFY_RESEND (Linux 6.9)."""
        return bool(self.flags & HAS_RESEND)

    def to_wire(self) -> dict[str, int]:
        """Return what JSON can carry."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Negotiated:
        """Undo `to_wire`. Raises `ProtocolError`."""
        try:
            fields = {name: wire[name] for name in cls.__dataclass_fields__}
        except (KeyError, TypeError) as error:
            raise ProtocolError("the state of a FUSE connection is incomplete") from error
        if not all(isinstance(value, int) and 0 <= value < 1 << 64 for value in fields.values()):
            raise ProtocolError("the state of a FUSE connection is malformed")
        return cls(**fields)


def is_init(request: Buffer) -> bool:
    """Tell whether these bytes are an INIT request: the first one of a connection, and no other."""
    return len(request) >= HEADER_BYTES and HEADER.unpack_from(request)[1] == Opcode.INIT


def negotiate(
    request: Buffer, *, max_readahead_bytes: int = 4 << 20, max_pages: int = MAX_REQUEST_PAGES
) -> tuple[bytes, Negotiated]:
    """Answer INIT.

    Args:
        request: the bytes read, exactly as many as there were.
        max_readahead_bytes: bound of the kernel's readahead (what it does by itself is decided by ``read_ahead_kb`` of the mount's bdi).
        max_pages: bound of one READ.

    Returns:
        The reply to write, and what was agreed.

    Raises:
        ProtocolError: no INIT, or a kernel before Linux 4.20.

    """
    length = len(request)
    header = parse_header(request, length)
    if header.opcode != Opcode.INIT or length < HEADER_BYTES + _IN.size:
        raise ProtocolError("the FUSE connection does not begin with INIT")
    major, minor, _readahead, flags = _IN.unpack_from(request, HEADER_BYTES)
    if flags & INIT_EXT and length >= HEADER_BYTES + _IN.size + _IN_FLAGS2.size:
        flags |= _IN_FLAGS2.unpack_from(request, HEADER_BYTES + _IN.size)[0] << 32
    if major != MAJOR or minor < MIN_MINOR or flags & _NEEDED != _NEEDED:
        raise ProtocolError(
            f"the kernel's FUSE protocol {major}.{minor} does not do, 7.{MIN_MINOR} is needed",
            hint="use Linux 4.20 or newer, or the pyfuse3 transport",
        )
    flags &= _WANTED
    agreed = Negotiated(
        minor=min(minor, MINOR),
        flags=flags,
        max_readahead_bytes=max_readahead_bytes,
        max_pages=max(1, min(max_pages, 0xFFFF)),
    )
    body = _OUT.pack(
        MAJOR,
        MINOR,
        agreed.max_readahead_bytes,
        flags & 0xFFFF_FFFF,
        MAX_BACKGROUND,
        CONGESTION_THRESHOLD,
        _MAX_WRITE_BYTES,
        1_000_000_000,
        agreed.max_pages,
        0,
        flags >> 32,
        0,
        0,
    )
    return answer(header.unique, body), agreed
