"""Extended attributes: inline, out of line, and hostile ones."""

from __future__ import annotations

import struct

import pytest

from support.rawimage import FIFO, RawImage
from uenvd.errors import FormatError
from uenvd.squashfs import Image, Inode

USER, TRUSTED, SECURITY, REFERENCE = 0, 1, 2, 0x100


def entry(kind: int, name: bytes, value: bytes) -> bytes:
    return struct.pack("<HH", kind, len(name)) + name + struct.pack("<I", len(value)) + value


def with_set(attributes: bytes, count: int, *, ref: int = 0, index: int = 0) -> tuple[Image, Inode]:
    raw = RawImage(attributes=attributes, sets=[(ref, count, 0)])
    raw.inode(FIFO + 7, 1, struct.pack("<II", 1, index))
    return raw.open_root()


def read(attributes: bytes, count: int, *, ref: int = 0, index: int = 0) -> dict[bytes, bytes]:
    image, inode = with_set(attributes, count, ref=ref, index=index)
    return image.xattrs(inode)


def test_the_three_prefixes() -> None:
    data = entry(USER, b"a", b"1") + entry(TRUSTED, b"b", b"") + entry(SECURITY, b"c", b"\0\xff")
    assert read(data, 3) == {b"user.a": b"1", b"trusted.b": b"", b"security.c": b"\0\xff"}
    assert read(data, 0) == {}


def test_a_value_out_of_line() -> None:
    value = struct.pack("<I", 5) + b"value"
    reference = struct.pack("<Q", 0)
    data = value + entry(USER | REFERENCE, b"a", reference) + entry(USER, b"b", b"2")
    assert read(data, 2, ref=len(value)) == {b"user.a": b"value", b"user.b": b"2"}


def test_values_straddle_blocks() -> None:
    data = entry(USER, b"a", b"1" * 8180) + entry(USER, b"b", b"2" * 20_000)
    assert read(data, 2) == {b"user.a": b"1" * 8180, b"user.b": b"2" * 20_000}


def test_unknown_prefixes_are_left_out() -> None:
    assert read(entry(3, b"a", b"1") + entry(USER, b"b", b"2"), 2) == {b"user.b": b"2"}


def test_of_equal_names_the_first_wins() -> None:
    assert read(entry(USER, b"a", b"1") + entry(USER, b"a", b"2"), 2) == {b"user.a": b"1"}


def test_an_image_without_the_table_has_none() -> None:
    raw = RawImage()
    raw.inode(FIFO + 7, 1, struct.pack("<II", 1, 5))
    image, inode = raw.open_root()
    assert inode.xattr_index == 5
    assert image.xattrs(inode) == {}


def test_an_inode_without_index_has_none() -> None:
    raw = RawImage(attributes=b"", sets=[(0, 1, 0)])
    raw.inode(FIFO, 1, struct.pack("<I", 1))
    image, inode = raw.open_root()
    assert image.xattrs(inode) == {}


@pytest.mark.parametrize(
    ("attributes", "count", "ref", "text"),
    [
        (entry(USER, b"a", b"1"), 2, 0, "xattrs"),
        (entry(USER, b"a", b"1")[:-1], 1, 0, "xattrs"),
        (entry(USER, b"", b"1"), 1, 0, "name of 0 bytes"),
        (entry(USER, b"a" * 256, b"1"), 1, 0, "name of 256 bytes"),
        (entry(USER, b"a\0", b"1"), 1, 0, "NUL"),
        (b"\0\0\1\0a" + struct.pack("<I", 65537) + bytes(65537), 1, 0, "value of 65537 bytes"),
        (b"\0\0\1\0a" + struct.pack("<I", 0xFFFF_FFFF), 1, 0, "value of 4294967295 bytes"),
        (entry(USER | REFERENCE, b"a", b"1234567"), 1, 0, "reference of an xattr value"),
        (entry(USER | REFERENCE, b"a", struct.pack("<Q", 1 << 50)), 1, 0, "outside of the xattrs"),
        (entry(USER | REFERENCE, b"a", struct.pack("<Q", 8000)), 1, 0, "offset 8000"),
        (entry(USER, b"a", b"1"), 1, 0xFFFF_FFFF_FFFF_FFFF, "outside of the xattrs"),
        (entry(USER, b"a", b"1"), 1, 9000, "offset 9000"),
        (entry(USER, b"a", b"1"), 4097, 0, "4097 extended attributes"),
    ],
)
def test_damage(attributes: bytes, count: int, ref: int, text: str) -> None:
    with pytest.raises(FormatError, match=text):
        read(attributes, count, ref=ref)


def test_an_index_beyond_the_sets() -> None:
    with pytest.raises(FormatError, match="no entry 1, only 1"):
        read(entry(USER, b"a", b"1"), 1, index=1)


def test_one_large_value_named_a_thousand_times_is_refused() -> None:
    value = struct.pack("<I", 65536) + bytes(65536)
    block, offset = divmod(len(value), 8192)
    names = b"".join(entry(USER | REFERENCE, b"%d" % i, struct.pack("<Q", 0)) for i in range(1000))
    with pytest.raises(FormatError, match="more than 4194304 bytes"):
        read(value + names, 1000, ref=block * 8194 << 16 | offset)


def test_an_empty_table() -> None:
    raw = RawImage(attributes=b"x", sets=[(0, 0, 0)])
    raw.inode(FIFO + 7, 1, struct.pack("<II", 1, 0))
    data = bytearray(raw.build())
    header = len(data) - 24
    data[header + 8 : header + 12] = bytes(4)
    image = Image(lambda pos, size: bytes(data[pos : pos + size]), len(data))
    with pytest.raises(FormatError, match="empty table"):
        image.xattrs(image.inode(image.root))


@pytest.mark.parametrize("start", [0, 95, 1 << 40, (1 << 64) - 1])
def test_attributes_at_an_impossible_place(start: int) -> None:
    raw = RawImage(attributes=entry(USER, b"a", b"1"), sets=[(0, 1, 0)])
    raw.inode(FIFO + 7, 1, struct.pack("<II", 1, 0))
    data = bytearray(raw.build())
    data[-24:-16] = struct.pack("<Q", start)
    image = Image(lambda pos, size: bytes(data[pos : pos + size]), len(data))
    with pytest.raises(FormatError, match="xattrs at"):
        image.xattrs(image.inode(image.root))
