"""The superblock and the compressor's options are checked when an image is opened."""

from __future__ import annotations

import struct

import pytest

from support import rawimage
from support.rawimage import ABSENT, RawImage
from uenvd.errors import FormatError
from uenvd.squashfs import Compressor, Image


def empty(**fields: int) -> RawImage:
    raw = RawImage(superblock=fields)
    raw.directory(1, b"")
    return raw


def test_fields_of_a_small_image() -> None:
    raw = empty()
    data = raw.build()
    block = raw.open().superblock
    assert block.compressor is Compressor.GZIP
    assert (block.block_size_bytes, block.id_count, block.inode_count, block.mkfs_time_s) == (4096, 2, 1, 1)
    assert (block.fragment_table_pos, block.export_table_pos, block.xattr_table_pos) == (None, None, None)
    assert block.bytes_used == len(data)


@pytest.mark.parametrize("size", [0, 1, 4, 95])
def test_too_short_for_a_superblock(size: int) -> None:
    data = empty().build()[:size]
    with pytest.raises(FormatError, match=f"not a squashfs image: {size} bytes"):
        Image(lambda pos, count: data[pos : pos + count])


def test_not_squashfs_says_what_it_begins_with() -> None:
    with pytest.raises(FormatError, match="not a squashfs image: it begins with 7f 45 4c 46"):
        Image(lambda _pos, count: b"\x7fELF".ljust(count, b"\0"))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"major": 3, "minor": 1}, "version 3.1 is not supported"),
        ({"minor": 1}, "version 4.1"),
        ({"block_size": 2048, "block_log": 11}, "block size"),
        ({"block_size": 2 << 20, "block_log": 21}, "block size"),
        ({"block_size": 4097}, "block size"),
        ({"block_log": 13}, "block size"),
        ({"block_log": 65535}, "block size"),
        ({"compressor": 0}, "unknown compressor 0"),
        ({"compressor": 7}, "unknown compressor 7"),
        ({"compressor": rawimage.LZ4}, "lz4 without compressor options"),
        ({"id_count": 0}, "no user or group ids"),
        ({"bytes_used": 95}, "bytes used"),
        ({"bytes_used": ABSENT}, "bytes used"),
        ({"bytes_used": 1 << 40}, "truncated squashfs image: it should have 1099511627776 bytes"),
        ({"inode_table": 95}, "inode table at 95"),
        ({"inode_table": ABSENT}, "inode table"),
        ({"directory_table": 96}, "root inode"),
        ({"directory_table": ABSENT}, "directory table"),
        ({"id_table": ABSENT}, "id table"),
        ({"id_table": 100}, "id table"),
        ({"xattr_table": 200}, "xattr table"),
        ({"export_table": 96}, "export table"),
        ({"fragment_count": 1}, "1 fragments but no fragment table"),
        ({"root": 1 << 40}, "root inode"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, int], text: str) -> None:
    with pytest.raises(FormatError, match=text):
        empty(**fields).open()


def test_a_file_that_was_cut_off_is_refused_at_once() -> None:
    data = empty().build()
    with pytest.raises(FormatError, match="truncated squashfs image") as caught:
        Image(lambda pos, count: data[pos : pos + count], len(data) - 1)
    assert "again" in caught.value.hint


def test_padding_after_the_image_is_ignored() -> None:
    data = empty().build() + bytes(4096)
    image = Image(lambda pos, count: data[pos : pos + count], len(data))
    assert list(image.entries(image.inode(image.root))) == []


def with_options(compressor: int, options: bytes, header: int | None = None) -> RawImage:
    raw = empty(compressor=compressor, flags=rawimage.OPTIONS)
    raw.data = struct.pack("<H", 0x8000 | len(options) if header is None else header) + options
    return raw


@pytest.mark.parametrize(
    ("compressor", "options"),
    [
        (rawimage.GZIP, struct.pack("<IHH", 9, 8, 1)),
        (rawimage.XZ, struct.pack("<II", 8192, 1)),
        (rawimage.LZ4, struct.pack("<II", 1, 1)),
        (rawimage.ZSTD, struct.pack("<I", 22)),
    ],
)
def test_options_are_read(compressor: int, options: bytes) -> None:
    raw = with_options(compressor, options)
    raw.superblock["inode_table"] = 96 + len(raw.data)
    assert raw.open().superblock.has_compressor_options


@pytest.mark.parametrize(
    ("compressor", "options", "header", "text"),
    [
        (rawimage.GZIP, struct.pack("<IHH", 9, 16, 1), None, "gzip window of 16 bits"),
        (rawimage.GZIP, struct.pack("<IHH", 9, 7, 1), None, "gzip window of 7 bits"),
        (rawimage.XZ, struct.pack("<II", 1 << 31, 1), None, "xz dictionary"),
        (rawimage.XZ, struct.pack("<II", 4096, 1), None, "xz dictionary"),
        (rawimage.LZ4, struct.pack("<II", 2, 1), None, "lz4 format 2"),
        (rawimage.ZSTD, struct.pack("<I", 22), 0x8008, "options with header 0x8008"),
        (rawimage.ZSTD, struct.pack("<I", 22), 4, "options with header 0x4"),
    ],
)
def test_wrong_options_are_refused(compressor: int, options: bytes, header: int | None, text: str) -> None:
    with pytest.raises(FormatError, match=text):
        with_options(compressor, options, header).open()
