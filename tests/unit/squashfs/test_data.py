"""The plan of a read, and what its blocks decode to."""

from __future__ import annotations

import random
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.images import COMPRESSORS, content, make_image, open_image, read_all
from support.rawimage import FILE, NONE, RawImage
from uenvd.errors import FormatError, InternalError
from uenvd.squashfs import Block, Image, Inode, Span

RAW = 1 << 24
"""Flag of a size word: stored uncompressed."""


def test_blocks_holes_and_a_short_last_block() -> None:
    packed = zlib.compress(b"a" * 4096)
    raw = RawImage(data=packed + b"b" * 4096 + b"tail!")
    raw.file(1, 3 * 4096 + 5, [len(packed), 0, RAW | 4096, RAW | 5])
    image, file = raw.open_root()
    first = Block(96, len(packed), True, 4096)
    third = Block(96 + len(packed), 4096, False, 4096)
    last = Block(third.pos_bytes + 4096, 5, False, 5)
    assert image.spans(file, 0, 1 << 40) == [
        Span(first, 0, 4096),
        Span(Block(0, 0, False, 4096), 0, 4096),
        Span(third, 0, 4096),
        Span(last, 0, 5),
    ]
    assert image.spans(file, 4095, 2) == [Span(first, 4095, 4096), Span(Block(0, 0, False, 4096), 0, 1)]
    assert image.spans(file, 3 * 4096 + 1, 2) == [Span(last, 1, 3)]
    for past in (file.size_bytes, file.size_bytes + 1, 1 << 62):
        assert image.spans(file, past, 10) == []
    assert image.spans(file, 10, 0) == []
    assert image.read_file(file, 1 << 20) == b"a" * 4096 + bytes(4096) + b"b" * 4096 + b"tail!"


def test_where_the_last_read_began_changes_no_answer() -> None:
    words = [0 if i % 97 else RAW | 4096 for i in range(1300)]
    raw = RawImage(data=b"b" * 4096 * 14)
    raw.file(1, 1300 * 4096, words)
    image, file = raw.open_root()
    order = random.Random(7)
    for _ in range(300):
        at = order.randrange(1300)
        for block in (at, at + 1, at + 3, at - 1):
            fresh, same = raw.open_root()
            wanted = max(block, 0) * 4096
            assert image.spans(file, wanted, 9000) == fresh.spans(same, wanted, 9000)


def test_a_tail_in_a_fragment() -> None:
    packed = zlib.compress(b"....tail!")
    raw = RawImage(data=b"b" * 4096 + packed, fragments=[(96 + 4096, len(packed))])
    raw.file(1, 4096 + 5, [RAW | 4096], fragment=0, offset=4)
    image, file = raw.open_root()
    shared = Block(96 + 4096, len(packed), True, 4096, exact=False)
    assert image.spans(file, 4000, 1000) == [
        Span(Block(96, 4096, False, 4096), 4000, 4096),
        Span(shared, 4, 9),
    ]
    assert image.spans(file, 4097, 2) == [Span(shared, 5, 7)]
    assert image.read_file(file, 5000)[4096:] == b"tail!"


def test_an_uncompressed_fragment_that_is_too_short() -> None:
    raw = RawImage(data=b"tail", fragments=[(96, RAW | 4)])
    raw.file(1, 5, fragment=0)
    image, file = raw.open_root()
    (span,) = image.spans(file, 0, 5)
    decoded = image.decode(span.block, b"tail")
    with pytest.raises(FormatError, match="4 bytes, not to 5"):
        span.cut(decoded)
    with pytest.raises(FormatError):
        image.read_file(file, 10)


def test_a_file_whose_size_is_whole_blocks_may_name_a_fragment() -> None:
    raw = RawImage(data=b"b" * 4096)
    raw.file(1, 4096, [RAW | 4096], fragment=77)
    image, file = raw.open_root()
    assert image.read_file(file, 4096) == b"b" * 4096


@pytest.mark.parametrize(
    ("size", "words", "start", "text"),
    [
        (4096, [4097], 96, "4097 bytes stored"),
        (4096, [RAW | 4095], 96, "4095 bytes stored for 4096"),
        (4095, [RAW | 4096], 96, "4096 bytes stored for 4095"),
        (4096, [RAW], 96, "0 bytes stored"),
        (4096, [1 << 25 | 100], 96, "bytes stored"),
        (4096, [RAW | 4096], 97, "outside of the data"),
        (4096, [RAW | 4096], 95, "outside of the data"),
        (4096, [RAW | 4096], 0, "outside of the data"),
        (4096, [4096], 0xFFFF_FFFF, "outside of the data"),
        (8192, [4096, RAW | 4096], 96, "outside of the data"),
        (8192, [4096], 96, "inode table"),
        (0xFFFF_F000, [], 96, "cannot fit"),
    ],
)
def test_damaged_block_lists(size: int, words: list[int], start: int, text: str) -> None:
    raw = RawImage(data=b"b" * 4096)
    raw.file(1, size, words, start=start)
    image, file = raw.open_root()
    with pytest.raises(FormatError, match=text):
        image.spans(file, 0, size)


@pytest.mark.parametrize(
    ("fragments", "index", "offset", "text"),
    [
        ([], 0, 0, "there are none"),
        ([(96, RAW | 100)], 1, 0, "no entry 1, only 1"),
        ([(96, RAW | 100)], 0, 4092, "beyond its fragment block"),
        ([(96, RAW | 100)], 0, 0xFFFF_FFFF, "beyond its fragment block"),
        ([(96, RAW)], 0, 0, "fragment block 0 of 0 bytes"),
        ([(96, RAW | 4097)], 0, 0, "of 4097 bytes"),
        ([(96, 1 << 31 | 1)], 0, 0, "bytes"),
        ([(95, 100)], 0, 0, "outside of the data"),
        ([(97, 100)], 0, 0, "outside of the data"),
        ([((1 << 64) - 1, 100)], 0, 0, "outside of the data"),
    ],
)
def test_damaged_fragments(fragments: list[tuple[int, int]], index: int, offset: int, text: str) -> None:
    raw = RawImage(data=b"b" * 100, fragments=fragments)
    raw.file(1, 5, fragment=index, offset=offset)
    image, file = raw.open_root()
    with pytest.raises(FormatError, match=text):
        image.spans(file, 0, 5)


class TestDecode:
    """Exactly the bytes that the plan says, or an error."""

    @pytest.fixture
    def image(self) -> Image:
        raw = RawImage()
        raw.file(1, 0)
        return raw.open()

    def test_a_hole(self, image: Image) -> None:
        assert image.decode(Block(0, 0, False, 4096), b"ignored") == bytes(4096)

    @pytest.mark.parametrize("size", [4095, 4097, 1])
    def test_another_length_than_planned(self, image: Image, size: int) -> None:
        packed = zlib.compress(b"a" * size)
        with pytest.raises(FormatError):
            image.decode(Block(96, len(packed), True, 4096), packed)

    def test_a_fragment_may_be_shorter_but_not_empty(self, image: Image) -> None:
        packed = zlib.compress(b"abc")
        assert image.decode(Block(96, len(packed), True, 4096, exact=False), packed) == b"abc"
        packed = zlib.compress(b"")
        with pytest.raises(FormatError):
            image.decode(Block(96, len(packed), True, 4096, exact=False), packed)

    @pytest.mark.parametrize("compressed", [True, False])
    def test_stored_bytes_are_missing(self, image: Image, compressed: bool) -> None:
        with pytest.raises(FormatError, match="ends inside the data block"):
            image.decode(Block(96, 4096, compressed, 4096), b"a" * 4095)


def test_wrong_arguments_are_our_fault() -> None:
    raw = RawImage()
    raw.file(1, 0)
    image, file = raw.open_root()
    for offset, size in ((-1, 1), (0, -1)):
        with pytest.raises(InternalError):
            image.spans(file, offset, size)


def test_a_file_of_more_blocks_than_can_be_walked_is_refused() -> None:
    raw = RawImage()
    raw.inode(FILE + 7, 1, struct.pack("<QQQIIII", 96, (1 << 39) + 1, 0, 1, NONE, 0, NONE))
    image, file = raw.open_root()
    with pytest.raises(FormatError, match="more than 134217728 blocks"):
        image.spans(file, 0, 1)


def test_read_file_has_a_limit() -> None:
    raw = RawImage()
    raw.inode(FILE + 7, 1, struct.pack("<QQQIIII", 96, 1 << 62, 0, 1, NONE, 0, NONE))
    image, file = raw.open_root()
    with pytest.raises(FormatError, match="more than 1000"):
        image.read_file(file, 1000)


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Image, Inode, bytes, bytes]:
    """A file of 10,000 blocks of 4 KiB, most of them holes: image, inode, the image's bytes, the file's bytes."""
    directory = tmp_path_factory.mktemp("long")
    tree = directory / "tree"
    tree.mkdir()
    rng = random.Random(7)
    path = tree / "file"
    with path.open("xb") as file:
        file.truncate(10_000 * 4096 + 123)
        for i in range(600):
            file.seek(rng.randrange(10_000) * 4096 + rng.randrange(4096))
            file.write(content(rng.randrange(1, 9000), i))
    out = make_image(tree, directory / "image", block_size=4096)
    image = open_image(out)
    inode = image.find(b"file")
    assert inode is not None
    return image, inode, out.read_bytes(), path.read_bytes()


def test_any_order_of_reads_of_a_long_file(long_file: tuple[Image, Inode, bytes, bytes]) -> None:
    image, inode, data, expected = long_file
    assert inode.size_bytes == len(expected)

    @settings(max_examples=150, deadline=None)
    @given(
        offset=st.integers(0, inode.size_bytes + 10), size=st.one_of(st.integers(0, 20_000), st.just(1 << 20))
    )
    def check(offset: int, size: int) -> None:
        assert read_all(image, inode, data, offset, size) == expected[offset : offset + size]

    check()
    assert read_all(image, inode, data) == expected


def test_the_plan_is_the_same_with_and_without_memory(long_file: tuple[Image, Inode, bytes, bytes]) -> None:
    image, inode, data, _expected = long_file
    for block in (9999, 512, 511, 1024, 5000, 5119, 5120, 1, 10_000):
        fresh = Image(lambda pos, size: data[pos : pos + size], len(data))
        assert fresh.spans(inode, block * 4096, 8192) == image.spans(inode, block * 4096, 8192)


def test_sizes_with_unknown_flags_before_the_block_are_refused() -> None:
    raw = RawImage()
    raw.file(1, 2000 * 4096, [0] * 100 + [1 << 30] + [0] * 1899)
    image, file = raw.open_root()
    assert len(image.spans(file, 0, 4096)) == 1
    for block in (101, 1500):
        with pytest.raises(FormatError, match="unknown flags"):
            image.spans(file, block * 4096, 4096)


def test_sums_beyond_the_data_are_refused() -> None:
    raw = RawImage()
    raw.file(1, 2000 * 4096, [RAW | 4096] * 2000)
    image, file = raw.open_root()
    with pytest.raises(FormatError, match="beyond the data"):
        image.spans(file, 1500 * 4096, 4096)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_many_threads_decode_at_once(tmp_path: Path, compressor: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    expected = content(2 << 20, 1)
    (tree / "file").write_bytes(expected)
    out = make_image(tree, tmp_path / "image", compressor=compressor, block_size=65536)
    image, data = open_image(out), out.read_bytes()
    barrier = threading.Barrier(6)

    def work(_number: int) -> bool:
        barrier.wait(10)
        found = image.find(b"file")
        assert found is not None
        return all(read_all(image, found, data) == expected for _ in range(3))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
