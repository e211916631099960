"""All fourteen inode types, field by field."""

from __future__ import annotations

import os
import struct

import pytest

from support.rawimage import BLOCK, CHAR, DIR, FIFO, FILE, NONE, SOCKET, SYMLINK, RawImage
from uenvd.errors import FormatError
from uenvd.squashfs import Inode, InodeRef, Kind


def only(kind: int, body: bytes, **fields: int) -> Inode:
    raw = RawImage(ids=(10, 20, 30))
    raw.inode(kind, 77, body, **fields)
    return raw.open_root()[1]


BASE = Inode(
    ref=InodeRef(0),
    inode_number=77,
    kind=Kind.FIFO,
    mode=0o755,
    uid=10,
    gid=20,
    mtime_s=7,
    nlink=1,
    size_bytes=0,
    rdev=0,
    xattr_index=None,
)
CASES = {
    "directory": (
        DIR,
        struct.pack("<IIHHI", 8194, 5, 40, 12, 99),
        {"kind": Kind.DIRECTORY, "nlink": 5, "size_bytes": 40},
    ),
    "file": (FILE, struct.pack("<IIII", 96, 3, 9, 5), {"kind": Kind.FILE, "size_bytes": 5}),
    "symlink": (
        SYMLINK,
        struct.pack("<II", 2, 3) + b"abc",
        {"kind": Kind.SYMLINK, "nlink": 2, "size_bytes": 3},
    ),
    "block": (
        BLOCK,
        struct.pack("<II", 1, 0x0010_2C07),
        {"kind": Kind.BLOCK_DEVICE, "rdev": os.makedev(44, 263)},
    ),
    "char": (
        CHAR,
        struct.pack("<II", 1, 0xFFFF_FFFF),
        {"kind": Kind.CHAR_DEVICE, "rdev": os.makedev(4095, 0xFFFFF)},
    ),
    "fifo": (FIFO, struct.pack("<I", 3), {"kind": Kind.FIFO, "nlink": 3}),
    "socket": (SOCKET, struct.pack("<I", 1), {"kind": Kind.SOCKET}),
    "extended directory": (
        DIR + 7,
        struct.pack("<IIIIHHI", 5, 1 << 20, 8194, 99, 1, 12, 6),
        {"kind": Kind.DIRECTORY, "nlink": 5, "size_bytes": 1 << 20, "xattr_index": 6},
    ),
    "extended file": (
        FILE + 7,
        struct.pack("<QQQIIII", 1 << 40, 1 << 50, 4096, 4, 3, 9, NONE),
        {"kind": Kind.FILE, "nlink": 4, "size_bytes": 1 << 50},
    ),
    "extended symlink": (
        SYMLINK + 7,
        struct.pack("<II", 2, 3) + b"abc" + struct.pack("<I", 8),
        {"kind": Kind.SYMLINK, "nlink": 2, "size_bytes": 3, "xattr_index": 8},
    ),
    "extended block": (
        BLOCK + 7,
        struct.pack("<III", 1, 0x107, 0),
        {"kind": Kind.BLOCK_DEVICE, "rdev": os.makedev(1, 7), "xattr_index": 0},
    ),
    "extended char": (
        CHAR + 7,
        struct.pack("<III", 1, 0x103, NONE),
        {"kind": Kind.CHAR_DEVICE, "rdev": os.makedev(1, 3)},
    ),
    "extended fifo": (FIFO + 7, struct.pack("<II", 2, 4), {"kind": Kind.FIFO, "nlink": 2, "xattr_index": 4}),
    "extended socket": (SOCKET + 7, struct.pack("<II", 2, NONE), {"kind": Kind.SOCKET, "nlink": 2}),
}
LOCATION = {
    "parent_number": 0, "content_block": 0, "content_offset": 0, "index_block": 0, "index_offset": 0, "index_count": 0, "data_pos": 0,
    "fragment_index": None, "fragment_offset": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_type(name: str) -> None:
    kind, body, expected = CASES[name]
    assert only(kind, body)._replace(**LOCATION) == BASE._replace(**expected)


@pytest.mark.parametrize("name", CASES)
def test_each_type_straddles_blocks(name: str) -> None:
    """The same inode at each place across the border of two metadata blocks."""
    kind, body, expected = CASES[name]
    size = 16 + len(body)
    for before in range(8192 - size, 8192, 3):
        raw = RawImage(ids=(10, 20), inodes=bytes(before))
        ref = raw.inode(kind, 77, body)
        assert raw.open_root()[1]._replace(**LOCATION) == BASE._replace(**expected, ref=ref)


@pytest.mark.parametrize("name", CASES)
def test_each_type_cut_off(name: str) -> None:
    kind, body, _expected = CASES[name]
    end = len(body) if "symlink" not in name else 8  # a basic link's target is read later
    for size in range(end):
        with pytest.raises(FormatError, match="inode table"):
            only(kind, body[:size])


def test_where_content_lies() -> None:
    inode = only(*CASES["extended file"][:2])
    assert (inode.data_pos, inode.fragment_index, inode.fragment_offset) == (1 << 40, 3, 9)
    assert (inode.content_block, inode.content_offset) == (58, 0)
    assert only(FILE, struct.pack("<IIII", 96, NONE, 0, 5)).fragment_index is None
    inode = only(*CASES["extended directory"][:2])
    assert (inode.content_block, inode.content_offset, inode.parent_number, inode.index_count) == (
        8194,
        12,
        99,
        1,
    )


def test_owner_mode_and_time() -> None:
    inode = only(FIFO, struct.pack("<I", 1), mode=0xFFFF, uid=2, gid=0, mtime=0xFFFF_FFFF)
    assert (inode.mode, inode.uid, inode.gid, inode.mtime_s) == (0o7777, 30, 10, 0xFFFF_FFFF)


@pytest.mark.parametrize("fields", [{"uid": 3}, {"gid": 65535}])
def test_owners_beyond_the_table(fields: dict[str, int]) -> None:
    with pytest.raises(FormatError, match="of only 3 ids"):
        only(FIFO, struct.pack("<I", 1), **fields)


@pytest.mark.parametrize("kind", [0, 15, 65535])
def test_unknown_types(kind: int) -> None:
    with pytest.raises(FormatError, match=f"unknown type {kind}"):
        only(kind, bytes(64))


def test_number_zero() -> None:
    raw = RawImage()
    raw.inode(FIFO, 0, struct.pack("<I", 1))
    with pytest.raises(FormatError, match="number 0"):
        raw.open_root()


def test_sizes_that_linux_does_not_know() -> None:
    with pytest.raises(FormatError, match="file 0x0 of 9223372036854775808 bytes"):
        only(FILE + 7, struct.pack("<QQQIIII", 96, 1 << 63, 0, 1, NONE, 0, NONE))
    with pytest.raises(FormatError, match="link 0x0 of 4097 bytes"):
        only(SYMLINK, struct.pack("<II", 1, 4097) + bytes(5000))


@pytest.mark.parametrize("ref", [-1, 48 << 16, 1 << 48, 8192, 40])
def test_references_outside_of_the_table(ref: int) -> None:
    raw = RawImage()
    raw.directory(1, b"")
    image = raw.open()
    with pytest.raises(FormatError):
        image.inode(InodeRef(ref))


@pytest.mark.parametrize(("body", "target"), [(b"\3\0\0\0a/b", b"a/b"), (b"\1\0\0\0\xff", b"\xff")])
def test_link_target(body: bytes, target: bytes) -> None:
    raw = RawImage()
    raw.inode(SYMLINK, 1, b"\1\0\0\0" + body)
    image, link = raw.open_root()
    assert image.symlink_target(link) == target


@pytest.mark.parametrize("body", [b"\0\0\0\0", b"\3\0\0\0a\0b", b"\3\0\0\0ab"])
def test_link_without_valid_target(body: bytes) -> None:
    raw = RawImage()
    raw.inode(SYMLINK, 1, b"\1\0\0\0" + body)
    image, link = raw.open_root()
    with pytest.raises(FormatError):
        image.symlink_target(link)


def test_wrong_kinds() -> None:
    raw = RawImage()
    raw.directory(1, b"")
    image, root = raw.open_root()
    for call in (
        image.symlink_target,
        lambda inode: image.spans(inode, 0, 1),
        lambda inode: image.read_file(inode, 10),
    ):
        with pytest.raises(FormatError, match="inode 0x0 is no"):
            call(root)
