"""The block list of an image: a short digest of each of its squashfs blocks, by which a new version takes from an old one what both have.

It is an attachment of type ``uenv/blocks``. Nobody has to trust it: what is put together with its help has the right SHA-256 as a whole, or is
thrown away. The chunk list (`uenvd.oci.chunks`) is too coarse for this: a change of 5 % of the files touches a third of its chunks.

Encoding: a header (magic, number of blocks, size of the image), the lengths as u32 compressed with zlib, preceded by their compressed size, and
the digests, BLAKE2b of 8 bytes, all little-endian. Eight bytes suffice: among a million blocks two different ones agree once in 10^7 images,
and that costs one whole pull.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from uenvd.errors import FormatError, ManifestError, NotFound
from uenvd.oci.chunks import block_borders
from uenvd.oci.manifest import Descriptor, parse_manifest
from uenvd.oci.remote import Remote
from uenvd.squashfs import Image, ReadAt

BLOCKS_TYPE: Final = "uenv/blocks"
LEAST_BYTES: Final = 4 << 20
"""A smaller image is fetched faster than lists are compared: it has none."""
MAX_BLOCKS: Final = 1 << 22
MAX_LIST_BYTES: Final = 64 << 20
SMALL_BYTES: Final = 4 << 10
"""What both versions have is fetched all the same where it is so short and lies between things that have to be fetched."""
_HEADER: Final = struct.Struct("<8sIQI")
_MAGIC: Final = b"uenvblk1"
_DIGEST_BYTES: Final = 8
_READ_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class BlockList:
    """The blocks of an image, in order, without gaps."""

    lengths: tuple[int, ...]
    digests: bytes
    """8 bytes each."""

    @property
    def size_bytes(self) -> int:
        """Size of the image."""
        return sum(self.lengths)

    def blocks(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield (position, length, digest) of each."""
        position = 0
        for number, length in enumerate(self.lengths):
            yield position, length, self.digests[_DIGEST_BYTES * number : _DIGEST_BYTES * (number + 1)]
            position += length

    def encode(self) -> bytes:
        """Return the document; equal lists give equal bytes."""
        packed = zlib.compress(struct.pack(f"<{len(self.lengths)}I", *self.lengths), 9)
        return _HEADER.pack(_MAGIC, len(self.lengths), self.size_bytes, len(packed)) + packed + self.digests

    @classmethod
    def parse(cls, data: bytes, size_bytes: int) -> BlockList:
        """Check and convert what `encode` made, for an image of ``size_bytes``. Raises `ManifestError`."""
        try:
            magic, count, size, packed_bytes = _HEADER.unpack_from(data)
            if magic != _MAGIC or not 0 < count <= MAX_BLOCKS or size != size_bytes:
                raise ManifestError("the block list is of another kind, or of another image")
            packed = data[_HEADER.size : _HEADER.size + packed_bytes]
            raw = zlib.decompressobj().decompress(packed, 4 * count)
            lengths = struct.unpack(f"<{count}I", raw)
        except (struct.error, zlib.error, OverflowError) as error:
            raise ManifestError("the block list is malformed") from error
        digests = data[_HEADER.size + packed_bytes :]
        if len(digests) != _DIGEST_BYTES * count or 0 in lengths or sum(lengths) != size_bytes:
            raise ManifestError("the block list does not cover the image")
        return cls(lengths, digests)


class Copy(NamedTuple):
    """Bytes that a new version has in common with an old one."""

    source: int
    """Position in the old one."""
    target: int
    """Position in the new one."""
    size_bytes: int


def block_list(image: Image, read: ReadAt, size_bytes: int) -> BlockList:
    """Make the list of a file of ``size_bytes`` that `Image` was opened on: one pass over it. Raises `FormatError`, and what ``read`` raises."""
    borders = block_borders(image, size_bytes)
    if len(borders) - 1 > MAX_BLOCKS:
        raise FormatError(f"the image has {len(borders) - 1} blocks, more than {MAX_BLOCKS}")
    lengths, digests = [], bytearray()
    for begin, end in itertools.pairwise(borders):
        hasher = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for position in range(begin, end, _READ_BYTES):
            hasher.update(read(position, min(_READ_BYTES, end - position)))
        lengths.append(end - begin)
        digests += hasher.digest()
    return BlockList(tuple(lengths), bytes(digests))


def in_common(new: BlockList, old: BlockList) -> list[Copy]:
    """Return what of ``new`` can be copied from ``old``, neighbours joined, in the order of the new one."""
    known = {(digest, length): position for position, length, digest in old.blocks()}
    found: list[Copy] = []
    for position, length, digest in new.blocks():
        source = known.get((digest, length))
        if source is None:
            continue
        last = found[-1] if found else None
        if last is not None and (last.source + last.size_bytes, last.target + last.size_bytes) == (
            source,
            position,
        ):
            found[-1] = last._replace(size_bytes=last.size_bytes + length)
            continue
        found.append(Copy(source, position, length))
    return [copy for copy, alone in zip(found, _alone(found), strict=True) if not alone]


def _alone(copies: list[Copy]) -> Iterator[bool]:
    """Tell of each copy whether it is a small island."""
    ends = [0, *(copy.target + copy.size_bytes for copy in copies)]
    begins = [*(copy.target for copy in copies[1:]), -1]
    for copy, end_before, begin_after in zip(copies, ends, begins, strict=False):
        end = copy.target + copy.size_bytes
        yield copy.size_bytes < SMALL_BYTES and copy.target != end_before and begin_after != end


def fetch_blocks(
    remote: Remote, repository: str, digest: str, size_bytes: int, deadline_s: float
) -> BlockList | None:
    """Return the list attached to the image ``digest``, None without a usable one. Raises the remote's errors."""
    with remote.deadline(deadline_s):
        for referrer in remote.referrers(repository, digest, BLOCKS_TYPE):
            try:
                raw, _media_type = remote.manifest_bytes(repository, referrer.digest)
                for layer in parse_manifest(raw, referrer.digest).layers:
                    return BlockList.parse(_fetch(remote, repository, layer), size_bytes)
            except (ManifestError, NotFound):
                continue
    return None


def _fetch(remote: Remote, repository: str, layer: Descriptor) -> bytes:
    if layer.size_bytes > MAX_LIST_BYTES:
        raise ManifestError("the block list is too long")
    return remote.small_blob(repository, layer, MAX_LIST_BYTES)
