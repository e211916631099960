"""What a squashfs file says of itself: metadata, architecture of its programs, when it was made."""

from __future__ import annotations

import os
import stat
import struct
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from uenvd.errors import FormatError, UsageError
from uenvd.oci.blocks import BlockList, block_list
from uenvd.oci.chunks import ChunkList, chunk_list
from uenvd.squashfs import Image, Inode, Kind, ReadAt
from uenvd.views import MAX_FILE_BYTES, ImageMeta, read_image_meta

MACHINES: Final = {62: "x86_64", 183: "aarch64", 21: "ppc64le", 22: "s390x", 243: "riscv64"}
"""``e_machine`` of the ELF header (System V ABI, "Machine information") -> what ``uname -m`` says."""
MAX_ENTRIES: Final = 50_000
MAX_PROBES: Final = 400
ENOUGH_PROGRAMS: Final = 16
_HEADER_BYTES: Final = 20
_PROGRAM_DIRECTORIES = frozenset({b"bin", b"sbin", b"lib", b"lib64", b"libexec"})


@dataclass(frozen=True)
class Contents:
    """The facts that go into the config blob."""

    meta: ImageMeta | None
    architecture: str | None
    """Of most of the programs looked at; None if there are none."""
    created: str
    """RFC 3339, from the superblock, so that one file always gives one manifest."""


def read_contents(path: Path) -> Contents:
    """Look into a squashfs file. Raises `UsageError` if it cannot be read, `FormatError` if it is no squashfs."""
    with _opened(path) as (image, read, _size_bytes):

        def read_file(name: bytes) -> bytes | None:
            inode = image.find(name)
            if inode is None or inode.kind is not Kind.FILE or inode.size_bytes > MAX_FILE_BYTES:
                return None
            return image.read_file(inode, MAX_FILE_BYTES)

        created = datetime.fromtimestamp(image.superblock.mkfs_time_s, UTC)
        return Contents(
            read_image_meta(read_file), _architecture(image, read), created.strftime("%Y-%m-%dT%H:%M:%SZ")
        )


def read_blocks(path: Path) -> BlockList:
    """Make the block list of a squashfs file, which reads all of it. Raises as `read_contents`."""
    with _opened(path) as (image, read, size_bytes):
        return block_list(image, read, size_bytes)


def read_chunks(path: Path) -> ChunkList:
    """Make the chunk list of a squashfs file, which reads all of it. Raises as `read_contents`."""
    with _opened(path) as (image, read, size_bytes):
        return chunk_list(image, read, size_bytes)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Image, ReadAt, int]]:
    """Yield (image, how to read it, size in bytes)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{path} is no regular file")

        def read(pos_bytes: int, size_bytes: int) -> bytes:
            return os.pread(fd, size_bytes, pos_bytes)

        yield Image(read, found.st_size), read, found.st_size
    except FormatError as error:
        raise FormatError(f"{path}: {error.message}", hint=error.hint) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


def _architecture(image: Image, read: ReadAt) -> str | None:
    found: Counter[str] = Counter()
    for probes, inode in enumerate(_likely_programs(image)):
        if probes >= MAX_PROBES or found.total() >= ENOUGH_PROGRAMS:
            break
        machine = _machine(_beginning(image, read, inode))
        if machine is not None:
            found[machine] += 1
    return found.most_common(1)[0][0] if found else None


def _likely_programs(image: Image) -> Iterator[Inode]:
    """Yield regular files of bin, lib and the like that may be ELF files; directories near the root first, bounded."""
    waiting = deque([(image.inode(image.root), False)])
    seen = {image.root}
    entries = 0
    while waiting:
        directory, likely = waiting.popleft()
        for entry in image.entries(directory):
            entries += 1
            if entries > MAX_ENTRIES:
                return
            if entry.kind is Kind.DIRECTORY and entry.ref not in seen:
                seen.add(entry.ref)
                waiting.append((image.inode(entry.ref), likely or entry.name in _PROGRAM_DIRECTORIES))
            elif entry.kind is Kind.FILE and likely:
                inode = image.inode(entry.ref)
                if inode.size_bytes >= 64 and (inode.mode & 0o111 or b".so" in entry.name):
                    yield inode


def _beginning(image: Image, read: ReadAt, inode: Inode) -> bytes:
    span = image.spans(inode, 0, _HEADER_BYTES)[0]
    stored = read(span.block.pos_bytes, span.block.stored_bytes) if span.block.stored_bytes else b""
    return span.cut(image.decode(span.block, stored))


def _machine(header: bytes) -> str | None:
    """Return the architecture of an ELF header's first 20 bytes; None if it is none."""
    if len(header) < _HEADER_BYTES or header[:4] != b"\x7fELF":
        return None
    (machine,) = struct.unpack(">H" if header[5] == 2 else "<H", header[18:20])
    return MACHINES.get(machine, f"elf-machine-{machine}")
