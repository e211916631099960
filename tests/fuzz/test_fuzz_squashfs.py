"""Images that are cut off, flipped bit by bit, or overwritten: `FormatError` or data, in bounded time and memory, never anything else."""

from __future__ import annotations

import os
import random
import struct
import time
import tracemalloc
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.images import COMPRESSORS, content, make_image, read_image
from support.rawimage import FILE, NONE, RawImage
from uenvd.errors import FormatError
from uenvd.squashfs import DirEntry, Image, Inode, InodeRef, Kind

WALK_INODES = 200
WALK_ENTRIES = 2000
READ_BYTES = 64 << 10
WALK_S = 5.0
"""What the walk of one mutated image of a few KiB may take; usual are 2 ms."""
PEAK_BYTES = 8 << 20
"""Four MiB of cache, two of attributes at worst, and what one call works on."""


def walk(data: bytes, size_bytes: int | None = None) -> int:
    """Use every method of `Image` on all that can be reached; return how many errors were met. Only `FormatError` is caught."""
    try:
        image = Image(lambda pos, size: data[pos : pos + size], size_bytes)
    except FormatError:
        return 1
    errors = 0
    seen: set[InodeRef] = {image.root}
    waiting: deque[DirEntry | None] = deque([None])
    left = WALK_ENTRIES
    while waiting and len(seen) <= WALK_INODES:
        entry = waiting.popleft()
        try:
            inode = image.inode(image.root) if entry is None else image.child(entry)
        except FormatError:
            errors += 1
            continue
        for check in (
            attributes(image, inode),
            target(image, inode),
            contents(image, inode, data),
            parents(image, inode),
        ):
            try:
                next(check, None)
            except FormatError:
                errors += 1
        if inode.kind is not Kind.DIRECTORY:
            continue
        try:
            for found in image.entries(inode):
                left -= 1
                if left <= 0:
                    break
                if found.ref not in seen:
                    seen.add(found.ref)
                    waiting.append(found)
                if left % 7 == 0:
                    image.lookup(inode, found.name)
            image.lookup(inode, b"nothing")
        except FormatError:
            errors += 1
    try:
        image.find(b"sub/deeper/file")
    except FormatError:
        errors += 1
    return errors


def attributes(image: Image, inode: Inode) -> Iterator[None]:
    for name, value in image.xattrs(inode).items():
        assert name.startswith((b"user.", b"trusted.", b"security."))
        assert len(value) <= 65536
    yield


def target(image: Image, inode: Inode) -> Iterator[None]:
    if inode.kind is Kind.SYMLINK:
        assert 0 < len(image.symlink_target(inode)) <= 4096
    yield


def parents(image: Image, inode: Inode) -> Iterator[None]:
    if inode.kind is Kind.DIRECTORY:
        image.parent(inode)
    yield


def contents(image: Image, inode: Inode, data: bytes) -> Iterator[None]:
    """Read the beginning, the middle and the end."""
    if inode.kind is not Kind.FILE:
        return
    for offset in {0, inode.size_bytes // 2, max(0, inode.size_bytes - READ_BYTES)}:
        spans = image.spans(inode, offset, READ_BYTES)
        wanted = min(READ_BYTES, inode.size_bytes - offset)
        assert sum(span.stop - span.start for span in spans) == wanted
        for span in spans:
            block = span.block
            assert 0 <= span.start < span.stop <= image.superblock.block_size_bytes
            stored = data[block.pos_bytes : block.pos_bytes + block.stored_bytes]
            assert len(span.cut(image.decode(block, stored))) == span.stop - span.start
    yield


def check(data: bytes, what: object, size_bytes: int | None = None) -> int:
    """`walk` with its deadline; an escaped exception says which mutation it was."""
    start_s = time.monotonic()
    try:
        errors = walk(data, size_bytes)
    except Exception as error:
        error.add_note(f"mutation: {what}")
        raise
    assert time.monotonic() - start_s < WALK_S, what
    return errors


def make_tree(directory: Path) -> Path:
    """A tree with everything, of which the image has about one KiB."""
    deeper = directory / "sub" / "deeper"
    deeper.mkdir(parents=True)
    (directory / "blocks").write_bytes(b"ab" * 5000)
    (deeper / "file").write_bytes(b"in a fragment")
    (directory / "link").symlink_to("sub/deeper/file")
    (directory / "hard").hardlink_to(deeper / "file")
    with (directory / "sparse").open("xb") as file:
        file.truncate(20_000)
        file.seek(9000)
        file.write(b"data")
    (directory / "empty").touch()
    os.mkfifo(directory / "fifo")
    for name in ("blocks", "sub"):
        os.setxattr(directory / name, "user.long", b"value " * 40)
        os.setxattr(directory / name, "user.short", b"value")
    return directory


VARIANTS = {
    "plain": ("zstd", ["-noI", "-noId", "-noX", "-noD", "-noF"]),
    "plain-metadata": ("gzip", ["-noI", "-noId", "-noX"]),
    **{compressor: (compressor, []) for compressor in COMPRESSORS},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """By variant, small images without padding."""
    directory = tmp_path_factory.mktemp("fuzz")
    tree = make_tree(directory / "tree")
    found = {}
    for name, (compressor, extra) in VARIANTS.items():
        out = make_image(
            tree,
            directory / name,
            compressor=compressor,
            block_size=4096,
            extra=[*extra, "-nopad", "-all-root"],
        )
        assert len(read_image(out)) == 10
        found[name] = out.read_bytes()
        assert check(found[name], "none", len(found[name])) == 0
    return found


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An image with a directory index; nothing is compressed but its data."""
    directory = tmp_path_factory.mktemp("indexed")
    tree = directory / "tree"
    tree.mkdir()
    for i in range(320):
        (tree / f"{i:03}-{'x' * 210}").touch()
    out = make_image(tree, directory / "image", extra=["-noI", "-nopad", "-all-root", "-all-time", "1"])
    data = out.read_bytes()
    image = Image(lambda pos, size: data[pos : pos + size], len(data))
    assert image.inode(image.root).index_count > 5
    return data


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_truncation_is_an_error(images: dict[str, bytes], variant: str) -> None:
    data = images[variant]
    for size in range(len(data)):
        assert check(data[:size], f"cut at {size}"), size
        with pytest.raises(FormatError):
            Image(lambda pos, count, end=size: data[:end][pos : pos + count], size)  # type: ignore[misc]


@pytest.mark.parametrize("variant", ["plain", "zstd"])
def test_every_bit_flip(images: dict[str, bytes], variant: str) -> None:
    """Every bit of the superblock and the tables; where files' data is stored as it is, one bit of each byte."""
    data = images[variant]
    tables = Image(lambda pos, size: data[pos : pos + size]).superblock.inode_table_pos
    for at in range(len(data)):
        for bit in range(8) if at < 96 or at >= tables or variant != "plain" else (at % 8,):
            mutated = bytearray(data)
            mutated[at] ^= 1 << bit
            check(bytes(mutated), f"bit {bit} of byte {at}", len(data))


NASTY = [
    struct.pack("<I", value)
    for value in (0, 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 0x0100_0000, 8192, 0x8000)
]
NASTY += [struct.pack("<Q", value) for value in (1 << 63, (1 << 64) - 1, 96, 1 << 32)]
NASTY += [struct.pack("<H", value) for value in (0, 0xFFFF, 0x8000, 0x7FFF, 8, 255, 256)]


def mutations(data: bytes, seed: int, count: int) -> Iterator[tuple[int, bytes]]:
    """Yield images with one to six places overwritten: by boundary values, by random bytes, by other pieces of the same image."""
    rng = random.Random(seed)
    for number in range(count):
        mutated = bytearray(data)
        for _ in range(rng.randrange(1, 7)):
            at = rng.randrange(len(mutated))
            choice = rng.randrange(3)
            if choice == 0:
                piece = rng.choice(NASTY)
            elif choice == 1:
                piece = rng.randbytes(rng.randrange(1, 9))
            else:
                start = rng.randrange(len(data))
                piece = data[start : start + rng.randrange(1, 40)]
            mutated[at : at + len(piece)] = piece
        yield number, bytes(mutated[: len(data)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_damage(images: dict[str, bytes], variant: str) -> None:
    for number, mutated in mutations(images[variant], seed=20, count=1200):
        check(mutated, f"number {number}", len(mutated))


def test_random_damage_takes_bounded_memory(images: dict[str, bytes]) -> None:
    tracemalloc.start()
    try:
        for number, mutated in mutations(images["plain"], seed=21, count=250):
            tracemalloc.reset_peak()
            check(mutated, f"number {number}", len(mutated))
            assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES, number
    finally:
        tracemalloc.stop()


def test_damage_of_a_directory_index(indexed: bytes) -> None:
    """Of listing and look-up one may fail, but they never contradict each other."""
    superblock = Image(lambda pos, size: indexed[pos : pos + size]).superblock
    rng = random.Random(22)
    for number in range(250):
        mutated = bytearray(indexed)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(superblock.inode_table_pos, superblock.id_table_pos)
            piece = rng.choice(NASTY) if rng.random() < 0.5 else bytes([rng.randrange(256)])
            mutated[at : at + len(piece)] = piece
        data = bytes(mutated)
        image = Image(lambda pos, size, data=data: data[pos : pos + size])  # type: ignore[misc]
        try:
            root = image.inode(image.root)
            listed = {entry.name: entry for entry in image.entries(root)}
        except FormatError:
            continue
        for name in (*listed, b"", b"150", b"zzz"):
            try:
                found = image.lookup(root, name)
            except FormatError:
                continue
            assert found == listed.get(name), (number, name)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    check(data, data, len(data))
    check(b"hsqs" + data, data)


@settings(max_examples=300, deadline=None)
@given(
    counts=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    positions=st.lists(st.one_of(st.integers(0, 3000), st.integers(0, 2**64 - 1)), min_size=8, max_size=8),
    compressor=st.integers(1, 6),
    block_log=st.integers(12, 20),
)
def test_any_superblock(
    counts: tuple[int, int], positions: list[int], compressor: int, block_log: int
) -> None:
    """Plausible fields before bytes that are not."""
    inodes, fragments = counts
    header = struct.pack(
        "<IIIIIHHHHHH8Q",
        0x73717368,
        inodes,
        0,
        1 << block_log,
        fragments,
        compressor,
        block_log,
        0x400,
        5,
        4,
        0,
        *positions,
    )
    check(header + content(3000, block_log), positions)


@pytest.mark.parametrize("size", [(1 << 63) - 1, 1 << 39, 1 << 30])
def test_a_file_that_claims_more_than_there_is_takes_no_memory(size: int) -> None:
    """Holes, whose block list ends after 262,144 of them."""
    raw = RawImage()
    raw.inode(FILE + 7, 1, struct.pack("<QQQIIII", 96, size, 0, 1, NONE, 0, NONE))
    raw.inodes += bytes(1 << 20)
    image, file = raw.open_root()
    there = size == 1 << 30
    tracemalloc.start()
    try:
        for offset in (0, 1 << 20, (1 << 30) - READ_BYTES, 1 << 40, size - READ_BYTES):
            try:
                spans = image.spans(file, offset, READ_BYTES)
            except FormatError:
                assert not there
            else:
                assert len(spans) == (READ_BYTES // 4096 if offset < size else 0)
        assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
    finally:
        tracemalloc.stop()
