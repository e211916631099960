"""Metadata blocks, the cursor, look-up tables and the cache."""

from __future__ import annotations

import random
import struct
import threading
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.rawimage import RawImage, run, wrap
from uenvd.errors import FormatError
from uenvd.squashfs import Image
from uenvd.squashfs.base import GenerationCache
from uenvd.squashfs.compression import inflater
from uenvd.squashfs.metadata import Cursor, MetadataStore, Region
from uenvd.squashfs.superblock import Compressor


def store_of(data: bytes, cache_bytes: int = 1 << 20) -> tuple[MetadataStore, list[int]]:
    """A store on these bytes, and the list of positions that it reads."""
    reads: list[int] = []

    def read(pos: int, size: int) -> bytes:
        reads.append(pos)
        return data[pos : pos + size]

    return MetadataStore(read, len(data), inflater(Compressor.GZIP, 4096, None), cache_bytes), reads


def packed(data: bytes) -> bytes:
    stored = zlib.compress(data)
    return struct.pack("<H", len(stored)) + stored


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(1, 30_000), steps=st.lists(st.integers(0, 12_000), max_size=8), compress=st.booleans()
)
def test_a_cursor_is_a_reader_of_the_joined_blocks(size: int, steps: list[int], compress: bool) -> None:
    data = random.Random(size).randbytes(size)
    pieces = [data[at : at + 8192] for at in range(0, size, 8192)]
    stored = b"".join(map(packed, pieces)) if compress else wrap(data)
    if any(len(packed(piece)) > 8194 for piece in pieces):
        stored = wrap(data)
    store, _reads = store_of(b"x" * 7 + stored)
    region = Region("table", 7, 7 + len(stored))
    cursor = Cursor(store, region, 0, 0)
    at = 0
    for i, step in enumerate(steps):
        if at + step > size:
            with pytest.raises(FormatError, match="table"):
                cursor.take(step)
            return
        if i % 2:
            cursor.skip(step)
        else:
            assert cursor.take(step) == data[at : at + step]
        at += step
        if at < size:
            block, offset = cursor.tell()
            assert Cursor(store, region, block, offset).take(1) == data[at : at + 1]


@pytest.mark.parametrize(
    ("stored", "text"),
    [
        (b"", "outside"),
        (b"\x01", "outside"),
        (b"\x00\x00xx", "of 0 bytes"),
        (b"\x00\x80xx", "of 0 bytes"),
        (b"\x01\x20" + bytes(9000), "of 8193 bytes"),
        (b"\x04\x80abc", "ends inside"),
        (packed(b""), "empty metadata block"),
        (packed(bytes(8193)), "unpacks to more than 8192"),
        (packed(b"abc")[:-1], "ends inside"),
        (packed(b"abc").replace(b"\x78", b"\x79", 1), "gzip"),
    ],
)
def test_damaged_blocks(stored: bytes, text: str) -> None:
    store, _reads = store_of(stored)
    with pytest.raises(FormatError, match=text):
        store.block(Region("table", 0, len(stored)), 0)


def test_a_block_that_reaches_out_of_its_region_is_refused_even_from_the_cache() -> None:
    stored = wrap(b"abc") + wrap(b"def")
    store, _reads = store_of(stored)
    whole = Region("whole", 0, len(stored))
    assert store.block(whole, 5) == (b"def", 10)
    for region in (Region("part", 0, 9), Region("part", 6, 10), Region("part", 0, 5)):
        with pytest.raises(FormatError, match="outside of the part"):
            store.block(region, 5)
    for pos in (-1, 10, 11, 1 << 60):
        with pytest.raises(FormatError, match="outside of the whole"):
            store.block(whole, pos)


def test_a_cached_block_is_not_read_again_and_the_cache_is_bounded() -> None:
    stored = wrap(random.Random(1).randbytes(100 * 8192))
    store, reads = store_of(stored, cache_bytes=10 * 8192)
    region = Region("table", 0, len(stored))
    for _ in range(5):
        store.block(region, 0)
    assert reads == [0]
    for block in range(100):
        store.block(region, block * 8194)
        store.block(region, 0)
    assert len(reads) == 100
    assert store._cache.weight() <= 12 * 8500


def test_the_cache_keeps_what_is_used_and_stays_small() -> None:
    cache: GenerationCache[int, int] = GenerationCache(100)
    cache.put(-1, 1)
    for i in range(1000):
        cache.put(i, i)
        assert cache.get(-1) == 1
        assert cache.weight() <= 102
    assert cache.get(999) == 999
    assert cache.get(5) is None


def test_the_cache_stays_small_with_entries_larger_than_itself() -> None:
    cache: GenerationCache[int, int] = GenerationCache(100)
    rng = random.Random(3)
    for i in range(3000):
        cache.put(i, i, rng.choice((1, 5, 300)))
        for back in range(1, 6):
            cache.get(i - back)
        assert cache.weight() <= 100 + 2 * 300


def test_the_cache_survives_threads() -> None:
    cache: GenerationCache[int, int] = GenerationCache(50)
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(5000):
            key = rng.randrange(100)
            value = cache.get(key)
            if value is None:
                cache.put(key, key * 2)
            elif value != key * 2:
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong


class TestTables:
    """The id and export tables, by the inodes that need them."""

    def build(self, **fields: int) -> tuple[bytearray, RawImage]:
        raw = RawImage(ids=range(5000), export=[0], superblock=fields)
        raw.directory(1, b"", parent=1)
        return bytearray(raw.build()), raw

    def open(self, data: bytes) -> Image:
        return Image(lambda pos, size: bytes(data[pos : pos + size]), len(data))

    def test_ids_of_several_blocks(self) -> None:
        raw = RawImage(ids=range(65535))
        ref = raw.directory(1, b"")
        raw.inodes = raw.inodes[:4] + struct.pack("<HH", 65534, 2048) + raw.inodes[8:]
        image = raw.open()
        assert (image.inode(ref).uid, image.inode(ref).gid) == (65534, 2048)

    def test_more_ids_than_there_are(self) -> None:
        data, _raw = self.build(id_count=6000)
        image = self.open(data)
        with pytest.raises(FormatError, match="id table"):
            image.inode(image.root)

    def test_more_ids_than_the_array_has_room_for(self) -> None:
        data, _raw = self.build(id_count=65535)
        image = self.open(data)
        with pytest.raises(FormatError, match="goes beyond"):
            image.inode(image.root)

    @pytest.mark.parametrize("value", [0, 95, 1 << 40, (1 << 64) - 1])
    def test_pointers_that_lead_elsewhere(self, value: int) -> None:
        data, _raw = self.build()
        for at in (-8, -16, -24):
            copy = bytearray(data)
            copy[at : at + 8 or None] = struct.pack("<Q", value)
            image = self.open(copy)
            with pytest.raises(FormatError, match="id table: metadata block at"):
                image.inode(image.root)

    def test_parents(self) -> None:
        raw = RawImage()
        sub = raw.directory(2, b"", parent=1)
        root = raw.directory(1, run([(b"sub", sub, 2, 1)]))
        image = raw.open()
        assert image.parent(image.inode(sub)) is None
        raw.export = [root, sub]
        image = raw.open()
        assert image.parent(image.inode(sub)) == root
        assert image.parent(image.inode(root)) == root
        raw.export = [sub, root]
        image = raw.open()
        with pytest.raises(FormatError, match="where there is another"):
            image.parent(image.inode(sub))

    @pytest.mark.parametrize("parent", [0, 3, 0xFFFF_FFFF])
    def test_parents_beyond_the_table(self, parent: int) -> None:
        raw = RawImage(export=[0, 0])
        sub = raw.directory(2, b"", parent=parent)
        raw.directory(1, b"")
        image = raw.open()
        with pytest.raises(FormatError, match="export table has no entry"):
            image.parent(image.inode(sub))

    def test_a_count_of_four_billion_allocates_nothing(self) -> None:
        data, _raw = self.build(inode_count=0xFFFF_FFFF)
        image = self.open(data)
        with pytest.raises(FormatError, match="too large"):
            image.entries(image.inode(image.root))
