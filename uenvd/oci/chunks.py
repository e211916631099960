"""The chunk list of an image: SHA-256 of each run of squashfs blocks, so that bytes can be verified before all of them are here. Pure.

The list is part of the config blob, which the manifest pins by its digest: manifest digest -> config digest -> chunk digests -> bytes.

Chunks begin and end where blocks of the image do, never at fixed offsets: two versions of an environment share most of their blocks, at other
offsets. For the same reason the *content* decides where a run ends: after a block whose CRC-32 is small modulo the wanted size, as in
content-defined chunking, so that one changed file changes the chunks that it is in and no others. The superblock is a chunk of its own, and
so is each MiB of the metadata tables at the end, which change with everything.

Encoding: two base64 texts, the lengths as little-endian u32 and the digests, 32 bytes each, in the order of the file. 32 random bytes do not
compress; anything more readable only costs. At most about `WANTED_CHUNKS` chunks, so that the config blob of the largest image stays small
enough to be read at every resolution of its label.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from uenvd.errors import DigestMismatch, FormatError, ManifestError
from uenvd.squashfs import Image, Inode, InodeRef, Kind, ReadAt

WANTED_CHUNKS: Final = 8192
"""A chunk has, on the average, the size of the image divided by this, but at least `SMALLEST_TARGET_BYTES`."""
SMALLEST_TARGET_BYTES: Final = 128 << 10
MAX_CHUNKS: Final = 1 << 16
MAX_CHUNK_BYTES: Final = 256 << 20
_TAIL_BYTES: Final = 1 << 20
_DIGEST_BYTES: Final = 32
_SPANS_STEP_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class ChunkList:
    """The chunks of a file, in order, without gaps."""

    lengths: tuple[int, ...]
    """Bytes of each."""
    digests: bytes
    """SHA-256 of each, 32 bytes one after the other."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def size_bytes(self) -> int:
        """Size of the file that the list describes."""
        return sum(self.lengths)

    def digest(self, number: int) -> bytes:
        """Return the SHA-256 of one chunk."""
        return self.digests[_DIGEST_BYTES * number : _DIGEST_BYTES * (number + 1)]

    def offsets(self) -> Iterator[tuple[int, int]]:
        """Yield (position, length) of each chunk."""
        position = 0
        for length in self.lengths:
            yield position, length
            position += length

    def verify(self, number: int, data: bytes) -> None:
        """Raise `DigestMismatch` unless ``data`` are the bytes of chunk ``number``."""
        if len(data) != self.lengths[number] or hashlib.sha256(data).digest() != self.digest(number):
            raise DigestMismatch(
                f"chunk {number} of the image ({self.lengths[number]} bytes) has other bytes"
            )

    def to_json(self) -> dict[str, str]:
        """Return the object that goes into the config blob."""
        lengths = struct.pack(f"<{len(self.lengths)}I", *self.lengths)
        return {
            "lengths": base64.b64encode(lengths).decode("ascii"),
            "sha256": base64.b64encode(self.digests).decode("ascii"),
        }

    @classmethod
    def from_json(cls, body: Any, size_bytes: int) -> ChunkList:  # noqa: ANN401 -- any JSON value
        """Check and convert what `to_json` made, for a file of ``size_bytes``. Raises `ManifestError`."""
        try:
            raw = base64.b64decode(body["lengths"], validate=True)
            digests = base64.b64decode(body["sha256"], validate=True)
            lengths = struct.unpack(f"<{len(raw) // 4}I", raw)
        except (TypeError, KeyError, ValueError, binascii.Error, struct.error) as error:
            raise ManifestError("the chunk list in the config blob is malformed") from error
        if len(lengths) > MAX_CHUNKS or len(digests) != _DIGEST_BYTES * len(lengths):
            raise ManifestError(
                f"the chunk list in the config blob has {len(lengths)} lengths and {len(digests)} bytes of digests"
            )
        if not all(0 < length <= MAX_CHUNK_BYTES for length in lengths) or sum(lengths) != size_bytes:
            raise ManifestError("the chunk list in the config blob does not cover the image")
        return cls(tuple(lengths), digests)


def verify_file(chunks: ChunkList, read: ReadAt) -> None:
    """Check every chunk of a file. Raises `DigestMismatch`, and what ``read`` raises."""
    for number, (position, length) in enumerate(chunks.offsets()):
        chunks.verify(number, read(position, length))


def chunk_list(image: Image, read: ReadAt, size_bytes: int) -> ChunkList:
    """Make the list of a file of ``size_bytes`` that `Image` was opened on.

    Reads the whole file once, in order, at most `MAX_CHUNK_BYTES` at a time. Raises `FormatError`, and what ``read`` raises.
    """
    target = _target_bytes(size_bytes)
    lengths: list[int] = []
    digests = bytearray()
    for length, digest in _runs(
        block_borders(image, size_bytes), image.superblock.inode_table_pos, read, target
    ):
        lengths.append(length)
        digests += digest
    if len(lengths) > MAX_CHUNKS:
        raise FormatError(f"the image falls into {len(lengths)} chunks, more than {MAX_CHUNKS}")
    return ChunkList(tuple(lengths), bytes(digests))


def _target_bytes(size_bytes: int) -> int:
    """Return a power of two, so that versions of nearly the same size are cut alike."""
    target = SMALLEST_TARGET_BYTES
    while target * WANTED_CHUNKS < size_bytes:
        target *= 2
    return target


def block_borders(image: Image, size_bytes: int) -> list[int]:
    """Return where blocks begin or end, and the file: sorted, each once, from 0 to its size. Raises `FormatError`."""
    data_end = image.superblock.inode_table_pos
    found = {0, min(data_end, size_bytes), size_bytes}
    found.update(range(data_end, size_bytes, _TAIL_BYTES))
    for inode in _files(image):
        for offset in range(0, inode.size_bytes, _SPANS_STEP_BYTES):
            for span in image.spans(inode, offset, _SPANS_STEP_BYTES):
                if span.block.stored_bytes:
                    found.add(span.block.pos_bytes)
                    found.add(span.block.pos_bytes + span.block.stored_bytes)
    return sorted(border for border in found if border <= size_bytes)


def _files(image: Image) -> Iterator[Inode]:
    """Yield every regular file, each once."""
    waiting: list[InodeRef] = [image.root]
    seen = {image.root}
    while waiting:
        for entry in image.entries(image.inode(waiting.pop())):
            if entry.ref in seen:
                continue
            if entry.kind is Kind.DIRECTORY:
                seen.add(entry.ref)
                waiting.append(entry.ref)
            elif entry.kind is Kind.FILE:
                seen.add(entry.ref)
                yield image.inode(entry.ref)


def _runs(borders: list[int], data_end: int, read: ReadAt, target: int) -> Iterator[tuple[int, bytes]]:
    """Yield (length, SHA-256) of each chunk."""
    mask = target - 1
    hasher, length = hashlib.sha256(), 0
    for begin, end in itertools.pairwise(borders):
        if end - begin > MAX_CHUNK_BYTES:
            raise FormatError(f"the image has {end - begin} bytes at {begin} that belong to no file")
        data = read(begin, end - begin)
        if len(data) != end - begin:
            raise FormatError(f"the image ends inside the block at {begin}")
        hasher.update(data)
        length += len(data)
        if (
            begin == 0
            or end >= data_end
            or length >= 4 * target
            or (length >= target // 4 and _cut_after(data, mask))
        ):
            yield length, hasher.digest()
            hasher, length = hashlib.sha256(), 0


def _cut_after(block: bytes, mask: int) -> bool:
    """Tell by a block's content whether a run ends with it: with a probability that is its share of the wanted size."""
    return zlib.crc32(block) & mask < len(block)
