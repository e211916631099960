"""The chunk list: it covers the file, follows its blocks, and finds every wrong byte."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from support.publishing import make_squashfs
from uenvd.errors import DigestMismatch, ManifestError
from uenvd.oci.chunks import ChunkList, chunk_list, verify_file
from uenvd.oci.manifest import MAX_CONFIG_BYTES, ImageConfig, parse_config
from uenvd.squashfs import Image


def listed(path: Path) -> tuple[ChunkList, bytes]:
    data = path.read_bytes()

    def read(pos: int, size: int) -> bytes:
        return data[pos : pos + size]

    return chunk_list(Image(read, len(data)), read, len(data)), data


def reader(data: bytes) -> Any:
    return lambda pos, size: data[pos : pos + size]


@pytest.fixture(scope="module")
def files() -> dict[str, bytes | str]:
    source = random.Random(7)
    return {f"d{n % 20}/f{n}": source.randbytes(source.randrange(1, 60_000)) for n in range(200)}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes | str]) -> Path:
    return make_squashfs(tmp_path_factory.mktemp("image") / "a.squashfs", files, options=("-no-fragments",))


def test_it_covers_the_file_and_verifies_it(image: Path) -> None:
    chunks, data = listed(image)
    assert chunks.size_bytes == len(data) == sum(length for _position, length in chunks.offsets())
    assert 10 < len(chunks) < 200
    assert chunks.lengths[0] < 200, "the superblock is a chunk of its own"
    verify_file(chunks, reader(data))
    assert listed(image)[0] == chunks


def test_every_wrong_byte_is_found_in_its_chunk(image: Path) -> None:
    chunks, data = listed(image)
    for position in (0, 100, len(data) // 2, len(data) - 1):
        wrong = bytearray(data)
        wrong[position] ^= 1
        number = next(
            n for n, (start, length) in enumerate(chunks.offsets()) if start <= position < start + length
        )
        for n, (start, length) in enumerate(chunks.offsets()):
            if n == number:
                with pytest.raises(DigestMismatch, match=f"chunk {number} "):
                    chunks.verify(n, bytes(wrong[start : start + length]))
            else:
                chunks.verify(n, bytes(wrong[start : start + length]))
    with pytest.raises(DigestMismatch):
        verify_file(chunks, reader(data[:-1]))


def test_a_changed_file_changes_few_chunks(
    tmp_path: Path, image: Path, files: dict[str, bytes | str]
) -> None:
    before, _ = listed(image)
    changed = dict(files) | {"d3/f3": b"longer than it was, and elsewhere" * 3000}
    after, data = listed(make_squashfs(tmp_path / "b.squashfs", changed, options=("-no-fragments",)))
    known = {before.digest(n) for n in range(len(before))}
    same = sum(length for n, length in enumerate(after.lengths) if after.digest(n) in known)
    assert same > 0.8 * len(data)


@pytest.mark.parametrize("options", [(), ("-b", "4096"), ("-noI", "-noD", "-noF")])
def test_images_of_other_shapes(tmp_path: Path, options: tuple[str, ...]) -> None:
    files: dict[str, bytes | str] = {
        "empty": b"",
        "hole": bytes(3 << 20),
        "big": os.urandom(2 << 20),
        "a/b/c": b"x",
    }
    path = make_squashfs(tmp_path / "a.squashfs", files, options=options)
    chunks, data = listed(path)
    verify_file(chunks, reader(data))


def test_it_travels_in_the_config_blob(image: Path) -> None:
    chunks, data = listed(image)
    config = ImageConfig(None, "x86_64", None, "sha256:" + "1" * 64, len(data), chunks)
    assert parse_config(config.encode()) == config
    assert config.encode() == config.encode()


def test_the_largest_list_fits_into_the_config_blob() -> None:
    """A 10 GB image: twice as many chunks as are wanted, which content-defined cuts do not reach."""
    count = 2 * 8192
    chunks = ChunkList((1 << 20,) * count, os.urandom(32 * count))
    assert (
        len(ImageConfig(None, None, None, "sha256:" + "1" * 64, count << 20, chunks).encode())
        < 0.9 * MAX_CONFIG_BYTES
    )


@pytest.mark.parametrize(
    "change",
    [
        {"lengths": "AAAA"},
        {"lengths": "####"},
        {"lengths": 7},
        {"sha256": ""},
        {"lengths": "AAAAAA=="},
        {"lengths": "AQAAAAEAAAA="},
    ],
)
def test_malformed_lists_are_refused(change: dict[str, Any]) -> None:
    good = ChunkList((3,), bytes(32)).to_json()
    assert ChunkList.from_json(good, 3).size_bytes == 3
    with pytest.raises(ManifestError, match="chunk list"):
        ChunkList.from_json(good | change, 3)
    with pytest.raises(ManifestError, match="chunk list"):
        ChunkList.from_json(good, 4)
    with pytest.raises(ManifestError, match="chunk list"):
        ChunkList.from_json([], 3)
