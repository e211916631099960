"""Decompression is bounded by what is allowed, not by what the stream declares."""

from __future__ import annotations

import contextlib
import lzma
import random
import resource
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import lz4.block
import lzallright
import pytest
import zstandard

from support.images import content
from uenvd.errors import FormatError
from uenvd.squashfs import lzo
from uenvd.squashfs.compression import Inflate, inflater
from uenvd.squashfs.superblock import Compressor

BLOCK = 128 << 10


def _xz(data: bytes, dictionary: int = BLOCK) -> bytes:
    return lzma.compress(data, lzma.FORMAT_XZ, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": dictionary}])


def _lzma(data: bytes, dictionary: int = BLOCK) -> bytes:
    """What mksquashfs and squashfs-tools-ng write: an end marker, and the size set in the header all the same."""
    stored = lzma.compress(
        data, lzma.FORMAT_ALONE, filters=[{"id": lzma.FILTER_LZMA1, "dict_size": dictionary}]
    )
    return stored[:5] + struct.pack("<Q", len(data)) + stored[13:]


def _lzma_literals(data: bytes) -> bytes:
    """An LZMA stream of literals only, without end marker: what the encoder of the LZMA SDK leaves out."""
    low, width, out = 0, 0xFFFF_FFFF, bytearray()
    chances: dict[object, int] = {}

    def shift() -> None:
        nonlocal low
        out.append(low >> 24 & 0xFF)
        low = low << 8 & 0xFFFF_FFFF

    def code(context: object, bit: int) -> None:
        nonlocal low, width
        chance = chances.get(context, 1024)
        bound = (width >> 11) * chance
        if bit:
            low += bound
            width -= bound
            chances[context] = chance - (chance >> 5)
            if low >> 32:  # the carry goes into what is written already
                low &= 0xFFFF_FFFF
                out[:] = (int.from_bytes(out, "big") + 1).to_bytes(len(out), "big")
        else:
            width = bound
            chances[context] = chance + ((2048 - chance) >> 5)
        while width < 1 << 24:
            width = width << 8 & 0xFFFF_FFFF
            shift()

    out.append(0)
    for byte in data:
        code("match", 0)
        prefix = 1
        for place in range(7, -1, -1):
            bit = byte >> place & 1
            code(prefix, bit)
            prefix = prefix << 1 | bit
    for _ in range(4):
        shift()
    return struct.pack("<BIQ", 0, 8192, len(data)) + bytes(out)


DEFLATE: dict[Compressor, Callable[[bytes], bytes]] = {
    Compressor.GZIP: zlib.compress,
    Compressor.XZ: _xz,
    Compressor.LZO: lzallright.LZOCompressor().compress,
    Compressor.LZMA: _lzma,
    Compressor.LZ4: lambda data: lz4.block.compress(data, store_size=False),
    Compressor.ZSTD: zstandard.ZstdCompressor().compress,
}


def make(compressor: Compressor) -> Inflate:
    return inflater(compressor, BLOCK, struct.pack("<II", 1, 0) if compressor is Compressor.LZ4 else None)


@pytest.fixture(params=list(DEFLATE), ids=lambda compressor: compressor.name.lower())
def compressor(request: pytest.FixtureRequest) -> Compressor:
    value: Compressor = request.param
    return value


@pytest.mark.parametrize("size", [1, 2, 4096, 8192, BLOCK - 1, BLOCK])
def test_round_trip_up_to_the_limit(compressor: Compressor, size: int) -> None:
    data = content(size, 1)
    assert make(compressor)(DEFLATE[compressor](data), BLOCK) == data


def test_one_byte_over_the_limit_is_refused(compressor: Compressor) -> None:
    with pytest.raises(FormatError):
        make(compressor)(DEFLATE[compressor](bytes(8193)), 8192)


def test_every_truncation_is_refused_or_shorter(compressor: Compressor) -> None:
    data = content(5000, 2)
    stored = DEFLATE[compressor](data)
    inflate = make(compressor)
    for size in range(len(stored)):
        try:
            out = inflate(stored[:size], 8192)
        except FormatError:
            continue
        # lz4 has no end marker: cut between two sequences it is a shorter block, which its reader notices by the length.
        assert compressor is Compressor.LZ4, size
        assert data.startswith(out), size
        assert out != data, size


def test_garbage_is_refused_or_bounded(compressor: Compressor) -> None:
    inflate = make(compressor)
    for seed in range(300):
        with contextlib.suppress(FormatError):
            assert len(inflate(content(50, seed), 8192)) <= 8192


@pytest.mark.parametrize(
    "compressor", [compressor for compressor in DEFLATE if compressor is not Compressor.LZ4]
)
def test_bytes_after_the_stream_are_refused(compressor: Compressor) -> None:
    with pytest.raises(FormatError):
        make(compressor)(DEFLATE[compressor](b"x" * 100) + b"\0", 8192)


def test_a_zstd_frame_without_content_size_is_read() -> None:
    stored = zstandard.ZstdCompressor(write_content_size=False).compress(b"abc" * 1000)
    inflate = make(Compressor.ZSTD)
    assert inflate(stored, 8192) == b"abc" * 1000
    with pytest.raises(FormatError):
        inflate(stored, 2999)


def test_bombs_take_no_memory(compressor: Compressor) -> None:
    """64 MiB of zeros, offered as a block of 128 KiB."""
    bomb = DEFLATE[compressor](bytes(64 << 20))
    inflate = make(compressor)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            inflate(bomb, BLOCK)
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 16 << 10


def test_a_zstd_frame_that_declares_a_terabyte_allocates_nothing() -> None:
    # Magic; single segment, 8-byte content size; the size; one last raw block of one byte.
    frame = bytes.fromhex("28b52ffd e0") + struct.pack("<Q", 1 << 40) + bytes.fromhex("090000 61")
    assert zstandard.frame_content_size(frame) == 1 << 40
    with pytest.raises(FormatError, match="more than 8192"):
        make(Compressor.ZSTD)(frame, 8192)


def test_an_xz_dictionary_beyond_the_image_s_is_refused() -> None:
    """The decoder would allocate what the stream asks for."""
    with pytest.raises(FormatError, match="xz"):
        make(Compressor.XZ)(_xz(b"small", 64 << 20), 8192)


def test_xz_dictionary_of_the_options_is_honoured() -> None:
    stored = _xz(content(BLOCK, 3), 1 << 20)
    inflate = inflater(Compressor.XZ, 4096, struct.pack("<II", 1 << 20, 0))
    assert inflate(stored, BLOCK) == content(BLOCK, 3)


def test_lzma_without_end_marker() -> None:
    data = content(5000, 4)
    stored = _lzma_literals(data)
    inflate = make(Compressor.LZMA)
    assert inflate(stored, 8192) == data
    for wrong in (stored + b"\0", stored[:-6], stored[:12]):
        with pytest.raises(FormatError, match="lzma"):
            inflate(wrong, 8192)


@pytest.mark.parametrize("size", [0, 4999, 5001, 8192])
def test_lzma_of_another_size_than_its_header_says(size: int) -> None:
    stored = _lzma(content(5000, 5))
    with pytest.raises(FormatError, match="lzma"):
        make(Compressor.LZMA)(stored[:5] + struct.pack("<Q", size) + stored[13:], 8192)


def test_an_lzma_dictionary_of_a_gigabyte_is_refused() -> None:
    stored = _lzma(b"small")
    with pytest.raises(FormatError, match="lzma"):
        make(Compressor.LZMA)(stored[:1] + struct.pack("<I", 1 << 30) + stored[5:], 8192)


def _mixture(rng: random.Random) -> bytes:
    return b"".join(
        rng.choice(
            (
                rng.randbytes(rng.randrange(1, 300)),
                bytes(rng.randrange(1, 3000)),
                b"abc" * rng.randrange(100),
                b"q",
            )
        )
        for _ in range(rng.randrange(40))
    )


def test_the_size_of_an_lzo_stream_is_known_without_unpacking_it() -> None:
    rng = random.Random(6)
    for _ in range(400):
        data = _mixture(rng)
        stored = lzallright.LZOCompressor().compress(data)
        assert lzo.bound_bytes(stored) >= len(data)
        assert not lzo.exceeds(stored, len(data))
        assert len(data) == 0 or lzo.exceeds(stored, len(data) - 1)


def test_a_damaged_lzo_stream_never_unpacks_to_more_than_was_foreseen() -> None:
    rng = random.Random(7)
    stored = lzallright.LZOCompressor().compress(_mixture(rng) + rng.randbytes(200) + bytes(2000))
    sound = 0
    for _ in range(3000):
        damaged = bytearray(stored)
        for _ in range(rng.randrange(1, 5)):
            damaged[rng.randrange(len(damaged))] = rng.choice((0, 17, 255, rng.randrange(256)))
        try:
            size = len(lzallright.LZOCompressor.decompress(bytes(damaged)))
        except lzallright.LZOError:
            with contextlib.suppress(FormatError):
                lzo.exceeds(bytes(damaged), 1 << 20)
            continue
        sound += 1
        assert not lzo.exceeds(bytes(damaged), size)
        assert size <= lzo.bound_bytes(bytes(damaged))
    assert sound > 300


def test_many_threads_share_one_function(compressor: Compressor) -> None:
    inflate = make(compressor)
    blocks = [content(BLOCK, seed) for seed in range(16)]
    stored = [DEFLATE[compressor](block) for block in blocks]
    barrier = threading.Barrier(8)

    def work(first: int) -> bool:
        barrier.wait(10)
        order = [(first + i) % 16 for i in range(48)]
        return all(inflate(stored[i], BLOCK) == blocks[i] for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
