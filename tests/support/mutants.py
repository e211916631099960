"""Mutated images: small images of every kind, reproducible damage, and whether a mount shows of a damaged image what the reader makes of it.

The oracle is `uenvd.squashfs.Image` in this process, without transport, caches and workers: where it gives bytes the mount has to give the
same bytes, where it refuses the mount has to refuse. For bytes under a compressor's checksum there is a stricter one: the original.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from support.images import COMPRESSORS, content, make_image
from uenvd.errors import FormatError
from uenvd.squashfs import DirEntry, Image, Inode, InodeRef, Kind, Span

MAX_INODES = 150
MAX_ENTRIES = 1000
PIECE_BYTES = 64 << 10
PAGE_BYTES = 4096
_MAX_FILE_BYTES = (1 << 63) - 1
_MAX_XATTR_LIST_BYTES = 64 << 10

VARIANTS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "plain": ("zstd", 4096, ("-noI", "-noId", "-noX", "-noD", "-noF")),
    "plain-metadata": ("gzip", 4096, ("-noI", "-noId", "-noX")),
    "no-fragments": ("zstd", 8192, ("-no-fragments",)),
    "large-blocks": ("gzip", 128 << 10, ()),
    **{compressor: (compressor, 4096, ()) for compressor in COMPRESSORS},
}
"""Name -> compressor, block size, more options of mksquashfs."""
CHECKSUMMED = ("gzip", "xz")
"""Variants whose compressed blocks carry a checksum."""

_NASTY = [
    *(struct.pack("<I", value) for value in (0, 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 0x0100_0000, 8192)),
    *(struct.pack("<Q", value) for value in (1 << 63, (1 << 64) - 1, 96, 1 << 32)),
    *(struct.pack("<H", value) for value in (0, 0xFFFF, 0x8000, 0x7FFF, 8, 255, 256)),
]


def make_tree(directory: Path) -> Path:
    """Some of everything, in little."""
    deeper = directory / "sub" / "deeper"
    deeper.mkdir(parents=True)
    (directory / "blocks").write_bytes(content(30_000, 1))
    (directory / "words").write_bytes(b"a few words, again and again; " * 3000)
    (deeper / "file").write_bytes(b"in a fragment")
    (directory / "link").symlink_to("sub/deeper/file")
    (directory / "hard").hardlink_to(deeper / "file")
    with (directory / "sparse").open("xb") as file:
        file.truncate(40_000)
        file.seek(9000)
        file.write(b"data")
    (directory / "empty").touch()
    os.mkfifo(directory / "fifo")
    names = directory / "names"
    names.mkdir()
    for i in range(60):
        (names / f"{i:03}-{'x' * 150}").write_bytes(b"%d" % i * i)
    for name in ("blocks", "sub"):
        os.setxattr(directory / name, "user.long", b"value " * 40)
        os.setxattr(directory / name, "user.short", b"value")
    return directory


def make_originals(directory: Path) -> dict[str, bytes]:
    """Return the image of each variant."""
    tree = make_tree(directory / "tree")
    found = {}
    for name, (compressor, block_size, options) in VARIANTS.items():
        out = make_image(
            tree,
            directory / name,
            compressor=compressor,
            block_size=block_size,
            extra=[*options, "-nopad", "-all-root"],
        )
        found[name] = out.read_bytes()
    return found


def open_bytes(data: bytes) -> Image:
    """Return the reader on an image in memory. Raises `FormatError`."""
    return Image(lambda pos, size: data[pos : pos + size], len(data))


def mutant(original: bytes, seed: str) -> bytes:
    """Return the image with a few places damaged: more often in the superblock and the tables, which are most of the format."""
    rng = random.Random(seed)
    tables = open_bytes(original).superblock.inode_table_pos
    data = bytearray(original)
    low, high = rng.choice(((0, 96), (tables, len(data)), (tables, len(data)), (96, len(data))))
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        at = rng.randrange(low, high)
        choice = rng.randrange(4)
        if choice == 0:
            data[at] ^= 1 << rng.randrange(8)
            continue
        if choice == 1:
            piece = rng.choice(_NASTY)
        elif choice == 2:
            piece = rng.randbytes(rng.randrange(1, 9))
        else:
            start = rng.randrange(len(original))
            piece = original[start : start + rng.randrange(1, 40)]
        data[at : at + len(piece)] = piece
    del data[len(original) :]
    if rng.random() < 0.04:
        del data[rng.randrange(len(data)) :]
    return bytes(data)


def checksummed_places(data: bytes) -> list[range]:
    """Return where the bytes of compressed blocks lie: data, fragments, and metadata without their headers."""
    image = open_bytes(data)
    block = image.superblock
    places: set[tuple[int, int]] = set()
    waiting = [image.inode(image.root)]
    while waiting:
        inode = waiting.pop()
        if inode.kind is Kind.DIRECTORY:
            waiting += [image.child(entry) for entry in image.entries(inode)]
        elif inode.kind is Kind.FILE:
            spans = image.spans(inode, 0, inode.size_bytes)
            places |= {
                (span.block.pos_bytes, span.block.stored_bytes) for span in spans if span.block.compressed
            }
    # The inode and directory tables are metadata blocks one after the other; what lies behind has other things in between.
    at = block.inode_table_pos
    end = block.fragment_table_pos or block.export_table_pos or block.id_table_pos
    while at < min(end, len(data) - 2):
        (header,) = struct.unpack_from("<H", data, at)
        if at + 2 + (header & 0x7FFF) > end - 2:
            break
        if not header & 0x8000:
            places.add((at + 2, header))
        at += 2 + (header & 0x7FFF)
    return [range(start, start + size) for start, size in sorted(places) if size]


def mutant_under_checksum(original: bytes, places: Sequence[range], seed: str) -> bytes:
    """Return the image with one to three bytes changed that a checksum covers."""
    rng = random.Random(seed)
    data = bytearray(original)
    for _ in range(rng.randrange(1, 4)):
        data[rng.choice(rng.choice(places))] ^= rng.randrange(1, 256)
    return bytes(data)


@dataclass
class Outcome:
    """What a walk of a mount met."""

    errors: int = 0
    inodes: int = 0
    wrong: list[str] = field(default_factory=list)
    """What must not be: one line each."""


@dataclass
class _Found:
    """A path of the mount, and what the reader says it can be (duplicate names leave a choice)."""

    path: bytes
    depth: int
    candidates: list[Inode]
    unreadable: bool
    """At least one candidate that the reader refuses."""
    above: frozenset[InodeRef]


class Comparison:
    """Walks a mount and the reader side by side, within bounds: damage can make a tree endless."""

    def __init__(self, root: Path, data: bytes) -> None:
        self._root = os.fsencode(root)
        self._data = data
        self._image = open_bytes(data)
        self._outcome = Outcome()

    def run(self) -> Outcome:
        """Compare everything reachable."""
        image = self._image
        waiting = deque([_Found(b"", 0, [image.inode(image.root)], False, frozenset({image.root}))])
        directories: set[InodeRef] = set()
        while waiting and self._outcome.inodes < MAX_INODES:
            found = waiting.popleft()
            self._outcome.inodes += 1
            inode = self._status(found, directories)
            if inode is None:
                continue
            path = self._root + found.path
            if inode.kind in (Kind.FILE, Kind.DIRECTORY):
                self._attributes(path, inode)
            if inode.kind is Kind.FILE:
                self._content(path, inode)
            elif inode.kind is Kind.SYMLINK:
                self._target(path, inode)
            elif inode.kind is Kind.DIRECTORY and inode.ref not in directories:
                directories.add(inode.ref)
                waiting.extend(self._listing(found, inode))
        return self._outcome

    def _wrong(self, path: bytes, what: str) -> None:
        self._outcome.wrong.append(f"{path!r}: {what}")

    def _status(self, found: _Found, directories: set[InodeRef]) -> Inode | None:
        """Return the candidate that the mount shows."""
        try:
            status = os.lstat(self._root + found.path)
        except OSError as error:
            self._outcome.errors += 1
            excused = (
                found.unreadable
                or any(one.size_bytes > _MAX_FILE_BYTES for one in found.candidates)
                # The kernel wants one place for a directory.
                or any(one.ref in found.above or one.ref in directories for one in found.candidates)
            )
            if not excused:
                self._wrong(found.path, f"lstat: {error}, and the reader sees {found.candidates}")
            return None
        shown = _facts_of(status)
        for inode in found.candidates:
            if _facts(inode) == shown:
                return inode
        self._wrong(found.path, f"lstat shows {shown}, the reader sees {[*map(_facts, found.candidates)]}")
        return None

    def _listing(self, found: _Found, directory: Inode) -> list[_Found]:
        path = self._root + found.path
        expected: list[DirEntry] = []
        refused: FormatError | None = None
        try:
            for entry in islice(self._image.entries(directory), MAX_ENTRIES):
                expected.append(entry)
        except FormatError as error:
            refused = error
        names: list[bytes] = []
        try:
            with os.scandir(path) as entries:
                names.extend(entry.name for entry in islice(entries, MAX_ENTRIES))
        except OSError as error:
            self._outcome.errors += 1
            # A listing brings the attributes of what it lists, and the number of the directory above.
            if refused is None and self._has_parent(directory) and all(map(self._readable, expected)):
                self._wrong(found.path, f"listing: {error}, and the reader lists it")
        else:
            if refused is not None and len(expected) < MAX_ENTRIES:
                self._wrong(found.path, f"listed, and the reader refuses: {refused}")
        if names != [entry.name for entry in expected][: len(names)]:
            self._wrong(found.path, f"lists {names[:5]}..., the reader {[e.name for e in expected[:5]]}...")
        by_name: dict[bytes, list[DirEntry]] = {}
        for entry in expected:
            by_name.setdefault(entry.name, []).append(entry)
        below = []
        for name, entries_of_name in list(by_name.items())[:80] if found.depth < 8 else ():
            candidates, unreadable = [], refused is not None
            for entry in entries_of_name:
                try:
                    candidates.append(self._image.child(entry))
                except FormatError:
                    unreadable = True
            try:
                self._image.lookup(directory, name)
            except FormatError:
                unreadable = True
            above = found.above | {directory.ref}
            below.append(_Found(found.path + b"/" + name, found.depth + 1, candidates, unreadable, above))
        return below

    def _has_parent(self, directory: Inode) -> bool:
        try:
            self._image.parent(directory)
        except FormatError:
            return False
        return True

    def _readable(self, entry: DirEntry) -> bool:
        try:
            self._image.child(entry)
        except FormatError:
            return False
        return True

    def _target(self, path: bytes, inode: Inode) -> None:
        expected = None
        with suppress(FormatError):
            expected = self._image.symlink_target(inode)
        try:
            got = os.readlink(path)
        except OSError as error:
            self._outcome.errors += 1
            if expected is not None:
                self._wrong(path, f"readlink: {error}, the reader has {expected!r}")
            return
        if got != expected:
            self._wrong(path, f"readlink gives {got!r}, the reader {expected!r}")

    def _attributes(self, path: bytes, inode: Inode) -> None:
        expected: dict[bytes, bytes] | None = None
        with suppress(FormatError):
            expected = self._image.xattrs(inode)
        try:
            names = os.listxattr(path, follow_symlinks=False)
            got = {os.fsencode(name): os.getxattr(path, name, follow_symlinks=False) for name in names}
        except OSError as error:
            self._outcome.errors += 1
            too_long = sum(len(name) + 1 for name in expected or ()) > _MAX_XATTR_LIST_BYTES
            if error.errno == errno.ENOTSUP:
                if expected:
                    self._wrong(path, f"no xattrs, the reader has {expected}")
            elif expected is not None and not too_long:
                self._wrong(path, f"xattrs: {error}, the reader has {expected}")
            return
        if expected is None:
            self._wrong(path, f"xattrs {names}, and the reader refuses")
        elif got != expected:
            self._wrong(path, f"xattrs {got}, the reader has {expected}")

    def _content(self, path: bytes, inode: Inode) -> None:
        size = inode.size_bytes
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            self._outcome.errors += 1
            self._wrong(path, f"open: {error}")
            return
        try:
            for offset in sorted({0, size // 2, max(0, size - PIECE_BYTES)}):
                if offset < min(size, _MAX_FILE_BYTES):
                    self._piece(path, descriptor, inode, offset)
        finally:
            os.close(descriptor)

    def _piece(self, path: bytes, descriptor: int, inode: Inode, offset: int) -> None:
        wanted = min(PIECE_BYTES, inode.size_bytes - offset)
        got = b""
        failed: OSError | None = None
        while len(got) < wanted:
            try:
                piece = os.pread(descriptor, wanted - len(got), offset + len(got))
            except OSError as error:
                failed = error
                break
            if not piece:
                self._wrong(path, f"{len(got)} bytes at {offset}, {wanted} promised by the size")
                return
            got += piece
        if failed is None:
            expected = self._expected(inode, offset, wanted)
            if expected is None:
                self._wrong(path, f"read at {offset}, and the reader refuses")
            elif got != expected:
                self._wrong(path, f"wrong bytes at {offset}")
            return
        self._outcome.errors += 1
        # The kernel fails a whole page.
        place = (offset + len(got)) // PAGE_BYTES * PAGE_BYTES
        if self._expected(inode, place, PAGE_BYTES) is not None:
            self._wrong(path, f"read at {offset + len(got)}: {failed}, and the reader has it")
        if got and self._expected(inode, offset, len(got)) != got:
            self._wrong(path, f"wrong bytes at {offset}, before an error")

    def _expected(self, inode: Inode, offset: int, size_bytes: int) -> bytes | None:
        """Return the bytes as the reader decodes them, None where it refuses."""
        try:
            spans = self._image.spans(inode, offset, size_bytes)
            return b"".join(self._decoded(span) for span in spans)
        except FormatError:
            return None

    def _decoded(self, span: Span) -> bytes:
        block = span.block
        stored = self._data[block.pos_bytes : block.pos_bytes + block.stored_bytes]
        return span.cut(self._image.decode(block, stored))


_TYPES = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFDIR: Kind.DIRECTORY,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFBLK: Kind.BLOCK_DEVICE,
    stat.S_IFCHR: Kind.CHAR_DEVICE,
    stat.S_IFIFO: Kind.FIFO,
    stat.S_IFSOCK: Kind.SOCKET,
}
_NO_ID = 0xFFFF_FFFF
_Facts = tuple[Kind, int, int, int, int, int]


def _facts(inode: Inode) -> _Facts:
    sized = inode.kind in (Kind.FILE, Kind.SYMLINK)
    # The kernel has no id -1: it shows the overflow id.
    uid, gid = (65534 if number == _NO_ID else number for number in (inode.uid, inode.gid))
    return inode.kind, inode.mode, uid, gid, inode.size_bytes if sized else 0, inode.mtime_s


def _facts_of(status: os.stat_result) -> _Facts:
    kind = _TYPES[stat.S_IFMT(status.st_mode)]
    sized = kind in (Kind.FILE, Kind.SYMLINK)
    mode = stat.S_IMODE(status.st_mode)
    return kind, mode, status.st_uid, status.st_gid, status.st_size if sized else 0, int(status.st_mtime)
