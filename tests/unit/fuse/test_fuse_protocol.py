"""The kernel's protocol: layouts written down a second time, INIT of old and new kernels, requests that no kernel makes."""

from __future__ import annotations

import json
import os
import stat
import struct

import pytest

from uenvd.errors import ProtocolError
from uenvd.fuse.protocol import Negotiated, Opcode, is_init, negotiate, root_attributes_reply
from uenvd.fuse.protocol import reply as r
from uenvd.fuse.protocol import request as q

LINUX_5_14 = 0x73FFFFFB
"""Flags that the kernel of today's systems offers: no INIT_EXT before 5.17 (bit 30 there is clear on 5.14)."""


def message(opcode: int, body: bytes, unique: int = 4, node: int = 1) -> bytes:
    return struct.pack("=IIQQIIIHH", 40 + len(body), opcode, unique, node, 0, 0, 0, 0, 0) + body


def init(minor: int, flags: int, flags2: int = 0, major: int = 7) -> bytes:
    return message(26, struct.pack("=IIIII", major, minor, 131072, flags, flags2) + bytes(44))


def test_init_of_a_new_kernel() -> None:
    reply, agreed = negotiate(init(45, 0xFFFFFFFF, 0xFFFFFFFF), max_readahead_bytes=1 << 20, max_pages=32)
    assert len(reply) == 16 + 64
    assert struct.unpack_from("=IiQ", reply) == (80, 0, 4)
    major, minor, readahead, flags, background, congestion, max_write, gran, pages, align, flags2 = (
        struct.unpack_from("=IIIIHHIIHHI", reply, 16)
    )
    assert (major, minor, readahead) == (7, 38, 1 << 20)
    assert (background, congestion, max_write, gran, pages, align) == (64, 48, 4096, 10**9, 32, 0)
    wanted = sum(1 << bit for bit in (0, 5, 13, 17, 18, 22, 23, 24, 30))
    assert flags == wanted
    assert flags2 == 1 << 7
    assert agreed.resend
    assert agreed.flags == flags | flags2 << 32


def test_init_of_an_old_kernel_gets_nothing_that_it_did_not_offer() -> None:
    request = init(34, LINUX_5_14 & ~(1 << 30), 0xFFFFFFFF)
    reply, agreed = negotiate(request)
    flags, flags2 = struct.unpack_from("=I", reply, 28)[0], struct.unpack_from("=I", reply, 48)[0]
    assert flags & ~LINUX_5_14 == 0
    assert flags2 == 0
    assert not agreed.resend
    assert agreed.minor == 34


@pytest.mark.parametrize(
    "request_bytes",
    [
        init(45, 0xFFFFFFFF, major=8),
        init(27, 0xFFFFFFFF),
        init(45, 0xFFFFFFFF & ~(1 << 17)),
        message(3, bytes(16)),
        init(45, 0)[:50],
        b"",
        b"\0" * 40,
    ],
)
def test_what_is_no_init_or_too_old(request_bytes: bytes) -> None:
    with pytest.raises(ProtocolError):
        negotiate(request_bytes)


def test_is_init() -> None:
    assert is_init(init(45, 0))
    assert not is_init(message(1, b"x\0"))
    assert not is_init(b"")


def test_agreement_survives_json() -> None:
    _, agreed = negotiate(init(45, 0xFFFFFFFF, 0xFFFFFFFF))
    assert Negotiated.from_wire(json.loads(json.dumps(agreed.to_wire()))) == agreed
    for bad in ({}, {**agreed.to_wire(), "flags": "x"}, {**agreed.to_wire(), "minor": -1}):
        with pytest.raises(ProtocolError):
            Negotiated.from_wire(bad)


def test_layouts() -> None:
    attributes = r.Attributes(5, stat.S_IFREG | 0o640, 2, 1000, 100, 0, 12345, 77, 25)
    body = r.entry(attributes)
    assert len(body) == 40 + 88
    node, generation, valid, attr_valid = struct.unpack_from("=QQQQ", body)
    assert (node, generation, valid, attr_valid) == (5, 0, r.FOREVER_S, r.FOREVER_S)
    assert struct.unpack_from("=QQQQQQIIIIIIIIII", body, 40) == (
        *(5, 12345, 25, 77, 77, 77, 0, 0, 0),
        *(stat.S_IFREG | 0o640, 2, 1000, 100, 0, 4096, 0),
    )
    assert len(r.NO_ENTRY) == 128
    assert struct.unpack_from("=QQQ", r.NO_ENTRY) == (0, 0, r.FOREVER_S)
    one = r.dirent(b"name", 9, 3, stat.S_IFDIR | 0o755)
    assert one == struct.pack("=QQII", 9, 3, 4, 4) + b"name\0\0\0\0"
    assert len(r.statfs(1, 4096, 2, 255)) == 80
    assert r.DIRENT_PLUS_BYTES == 40 + 88 + 24


@pytest.mark.parametrize("device", [(0, 0), (1, 3), (8, 17), (259, 1048575), (4095, 255)])
def test_device_numbers(device: tuple[int, int]) -> None:
    packed = r.kernel_device(os.makedev(*device))
    assert (packed >> 8 & 0xFFF, packed & 0xFF | packed >> 12 & 0xFFF00) == device


def test_root_of_an_image_that_is_not_there() -> None:
    reply = root_attributes_reply(8, valid_s=3)
    assert len(reply) == 16 + 16 + 88
    assert struct.unpack_from("=IiQ", reply) == (120, 0, 8)
    assert struct.unpack_from("=Q", reply, 16)[0] == 3
    assert struct.unpack_from("=I", reply, 16 + 16 + 60)[0] == stat.S_IFDIR | 0o755


def test_parsing() -> None:
    lookup = message(Opcode.LOOKUP, b"name\0")
    assert q.name(lookup, len(lookup)) == b"name"
    read = message(Opcode.READ, struct.pack("=QQIIQII", 0, 4096, 131072, 0, 0, 0, 0))
    assert q.read_range(read, len(read)) == (4096, 131072)
    getxattr = message(Opcode.GETXATTR, struct.pack("=II", 100, 0) + b"user.x\0")
    assert q.xattr_size(getxattr, len(getxattr)) == 100
    assert q.name(getxattr, len(getxattr), q.NAME_OFFSET_XATTR) == b"user.x"
    header = q.parse_header(read, len(read))
    assert (header.opcode, header.unique, header.nodeid) == (15, 4, 1)


@pytest.mark.parametrize(
    ("parse", "request_bytes"),
    [
        (q.parse_header, b"\0" * 39),
        (q.parse_header, message(1, b"")[:-1]),
        (q.parse_header, message(1, b"") + b"\0"),
        (q.read_range, message(15, b"\0" * 39)),
        (q.read_range, message(15, struct.pack("=QQIIQII", 0, 0, 1 << 31, 0, 0, 0, 0))),
        (q.read_range, message(15, struct.pack("=QQIIQII", 0, 1 << 63, 1, 0, 0, 0, 0))),
        (q.name, message(1, b"")),
        (q.name, message(1, b"\0")),
        (q.name, message(1, b"endless")),
        (q.xattr_size, message(22, b"\0" * 7)),
    ],
)
def test_what_no_kernel_asks(parse: object, request_bytes: bytes) -> None:
    assert callable(parse)
    with pytest.raises(ProtocolError):
        parse(request_bytes, len(request_bytes))
