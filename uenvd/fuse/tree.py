"""An image as the kernel wants to see it, independent of the transport: inode numbers, attributes, listings, pieces of files.

The number of an inode is computed from its reference in the image and back, so a server holds no state about what the kernel knows:
any server of the image can answer any request about it. The root is 1, as FUSE demands.

Errors: `OSError` (its errno is meant for the reader) and, for damaged images, `FormatError` (EIO); `uenvd.fuse.faults` maps them.
Metadata functions are for one thread at a time and read the image file where it is not cached; `Tree.part` is for any thread.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Callable, Generator
from typing import NamedTuple

from uenvd.errors import FormatError
from uenvd.fuse.blocks import BlockCache
from uenvd.fuse.listing import Listings
from uenvd.fuse.protocol.reply import Attributes
from uenvd.fuse.protocol.source import Source
from uenvd.fuse.shared import SharedBlocks
from uenvd.fuse.source import FileSource
from uenvd.squashfs import Block, Facts, Image, Inode, InodeRef, Kind, Span

ROOT_INO = 1
_INO_OFFSET = 2  # references begin at 0, inode numbers other than the root's at 2
NAME_MAX_BYTES = 255
INLINE_BYTES = 8192
"""A stored block up to this size is decoded where it is asked for: a thread costs more than the work."""
_ZEROS = bytes(1 << 20)
_UNPRIVILEGED = ~(stat.S_ISUID | stat.S_ISGID)
_FORGOTTEN_BYTES = 16 << 10
"""Of a stored block that a read used whole: the kernel need not keep it beside the decoded one. A smaller one shares its pages with others."""
_new_attributes = functools.partial(tuple.__new__, Attributes)

_TYPE_BITS = {
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.FILE: stat.S_IFREG,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.BLOCK_DEVICE: stat.S_IFBLK,
    Kind.CHAR_DEVICE: stat.S_IFCHR,
    Kind.FIFO: stat.S_IFIFO,
    Kind.SOCKET: stat.S_IFSOCK,
}

Part = bytes | memoryview


class Listed(NamedTuple):
    """One entry of a listing; ``next_offset`` continues behind it and stays valid for good."""

    name: bytes
    attributes: Attributes
    next_offset: int


_new_listed = functools.partial(tuple.__new__, Listed)


class Tree:
    """The tree of one image file.

    Args:
        image_fd: the image, open for reading; stays the caller's.
        mask_privileged: show no device numbers, setuid or setgid bits and no ``security.*`` attributes (file capabilities).
        cache_bytes: bound of the decoded blocks kept.
        offset_bytes: where in the file the image begins.
        source: where its bytes come from when the file is not complete yet.
        shared: decoded blocks that all workers of the image share.

    Raises:
        FormatError: not a squashfs image that can be served.
        OSError: it cannot be read.

    """

    def __init__(
        self,
        image_fd: int,
        *,
        mask_privileged: bool = True,
        cache_bytes: int = 64 << 20,
        offset_bytes: int = 0,
        source: Source | None = None,
        shared: SharedBlocks | None = None,
    ) -> None:
        self._fd = image_fd
        self._offset_bytes = offset_bytes
        self._mask_privileged = mask_privileged
        self.source: Source = FileSource(image_fd, offset_bytes) if source is None else source
        self.before_work: Callable[[], None] = _nothing
        """Called before the image file is read from where it may have to be waited for."""
        self.before_decoding: Callable[[], None] = _nothing
        """Called before a block of data is decoded."""
        self.shared = shared
        self._recent: tuple[Block | None, bytes] = (None, b"")
        """The shared block that was decoded here last: the next files often lie in it, too."""
        self._stored = bytearray()
        """Room for the stored bytes of a block, kept: new memory is zeroed first."""
        self._whole_file = source is None
        self.image = Image(self._read_soon, self.source.size_bytes())
        self.block_size_bytes = self.image.superblock.block_size_bytes
        self.blocks = BlockCache(cache_bytes)
        if shared is not None:
            shared.attach(self.block_size_bytes)
        self._listings = Listings(self.image)
        self.mode_mask = 0o7777 & (_UNPRIVILEGED if mask_privileged else -1)
        """The permission bits that are shown."""

    def _read_at(self, pos_bytes: int, size_bytes: int) -> bytes:
        self.before_work()
        return self.source.read(pos_bytes, size_bytes)

    def _read_soon(self, pos_bytes: int, size_bytes: int) -> bytes:
        """Read what often lies in the page cache."""
        if self._whole_file:
            data = self._read_now(pos_bytes, size_bytes)
            if data is not None:
                return data
        return self._read_at(pos_bytes, size_bytes)

    # -- metadata: one thread at a time

    def ino_of(self, ref: InodeRef) -> int:
        """Return the inode number of a reference."""
        return ROOT_INO if ref == self.image.root else ref + _INO_OFFSET

    def inode(self, ino: int) -> Inode:
        """Return the inode of a number that this class has given out."""
        return self.image.inode(self.ref_of(ino))

    def ref_of(self, ino: int) -> InodeRef:
        """Return the reference for an inode number. Raises `OSError` (ESTALE) for numbers that are none."""
        if ino <= ROOT_INO:
            if ino == ROOT_INO:
                return self.image.root
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return InodeRef(ino - _INO_OFFSET)

    def attributes(self, ino: int) -> Attributes:
        """Return the attributes of an inode."""
        return self.shown(ino, self.image.facts(self.ref_of(ino)))

    def shown(self, ino: int, facts: Facts) -> Attributes:
        """Return what is shown of the facts of an inode."""
        kind, _number, mode, nlink, uid, gid, rdev, size_bytes, mtime_s = facts
        if self._mask_privileged:
            mode &= _UNPRIVILEGED
            rdev = 0
        return _new_attributes(
            (
                ino,
                mode | _TYPE_BITS[kind],
                nlink,
                uid,
                gid,
                rdev,
                size_bytes,
                mtime_s,
                (size_bytes + 511) >> 9,
            )
        )

    def lookup(self, parent_ino: int, name: bytes) -> Attributes | None:
        """Return the attributes of an entry of a directory, None when it has no such entry."""
        if len(name) > NAME_MAX_BYTES:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        entry = self.image.find_entry(self.directory(parent_ino), name)
        return None if entry is None else self.shown(self.ino_of(entry.ref), self.image.entry_facts(entry))

    def listing(self, ino: int, offset: int) -> Generator[Listed, None, None]:
        """Yield the entries of a directory from an offset on: 0, or the ``next_offset`` of an entry. The first two are "." and ".."."""
        directory = self.directory(ino)
        if offset == 0:
            yield Listed(b".", self.attributes(ino), 1)
        if offset <= 1:
            parent = self.image.parent(directory) if ino != ROOT_INO else None
            number = ROOT_INO if parent is None else self.ino_of(parent)
            yield Listed(b"..", self.attributes(ino)._replace(ino=number), 2)
        shown, entry_facts = (
            self.shown,
            self.image.entry_facts,
        )  # a directory that holds the root is refused: none is number 1
        with self._listings.open(ino, directory, max(offset - 2, 0)) as entries:
            for index, entry in entries:
                attributes = shown(entry.ref + _INO_OFFSET, entry_facts(entry))
                yield _new_listed((entry.name, attributes, index + 3))

    def directory(self, ino: int) -> Inode:
        """Return the inode of a directory."""
        inode = self.inode(ino)
        if inode.kind is not Kind.DIRECTORY:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return inode

    def readlink(self, ino: int) -> bytes:
        """Return the target of a symbolic link."""
        inode = self.inode(ino)
        if inode.kind is not Kind.SYMLINK:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self.image.symlink_target(inode)

    @property
    def has_xattrs(self) -> bool:
        """Whether any inode of the image may have extended attributes."""
        return self.image.superblock.xattr_table_pos is not None

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        """Return the extended attributes of an inode by their full names."""
        attributes = self.image.xattrs(self.inode(ino))
        if self._mask_privileged:
            return {name: value for name, value in attributes.items() if not name.startswith(b"security.")}
        return attributes

    def plan(self, ino: int, offset_bytes: int, size_bytes: int) -> list[Span]:
        """Return which parts of which blocks make up a piece of a file; short or empty at its end."""
        spans = self.image.spans_at(self.ref_of(ino), offset_bytes, size_bytes)
        if spans is not None:
            return spans
        inode = self.inode(ino)
        if inode.kind is not Kind.FILE:
            raise OSError(
                errno.EISDIR if inode.kind is Kind.DIRECTORY else errno.EINVAL, "not a regular file"
            )
        return self.image.spans(inode, offset_bytes, size_bytes)

    # -- content

    def peek(self, span: Span, inline_bytes: int = INLINE_BYTES) -> Part | None:
        """Return the bytes of a span if that takes no waiting: known, a hole, or work on bytes in the page cache.

        A stored block of up to ``inline_bytes`` is decoded for it.
        """
        block = span.block
        if block.stored_bytes == 0:
            return self._hole(span)
        data = self.blocks.get(block)
        if data is None:
            if _stored_as_is(span):
                return self._read_now(block.pos_bytes + span.start, span.stop - span.start)
            if block.stored_bytes > inline_bytes:
                return None
            stored = self._read_now(block.pos_bytes, block.stored_bytes)
            if stored is None:
                return None
            data = self.image.decode(block, stored)
            if _worth_keeping(span, data):
                self.blocks.put(block, data)
        return _cut(data, span)

    def part(self, span: Span) -> Part:
        """Return the bytes of a span; reads and decodes, so call it from a thread."""
        block = span.block
        if block.stored_bytes == 0:
            return self._hole(span)
        if _stored_as_is(span):
            data = self._read_soon(block.pos_bytes + span.start, span.stop - span.start)
            if len(data) != span.stop - span.start:
                raise FormatError("the image ends within a data block")
            return data
        return _cut(self.blocks.load(block, self._decode, keep=lambda data: _worth_keeping(span, data)), span)

    def shared_part(self, span: Span) -> Part:
        """Return the bytes of a span as `part` does, through the blocks that all workers share. For one thread."""
        block, start, stop = span
        shared = self.shared
        if shared is None or not block.compressed:
            return self.part(span)
        if block == self._recent[0]:
            return _cut(self._recent[1], span)
        data = shared.get(block, start, stop)
        if data is not None:
            return data
        with shared.decoding(block):
            data = shared.get(block, start, stop)
            if data is not None:
                return data
            data = self._decode(block)
            if _worth_keeping(span, data):
                shared.put(block, data)
                self._recent = block, data
            elif block.stored_bytes >= _FORGOTTEN_BYTES:
                self.source.done_with(block.pos_bytes, block.stored_bytes)
        return _cut(data, span)

    def has_ready(self, block: Block) -> bool:
        """Tell whether a block lies decoded for all workers to find."""
        return self.shared is not None and self.shared.has(block)

    def decode_ahead(self, block: Block) -> None:
        """Decode a block for whoever will want it."""
        shared = self.shared
        if shared is None or not block.compressed or shared.has(block) or not shared.begin_ahead(block):
            return
        try:
            shared.put(block, self._decode(block))
        finally:
            shared.end_ahead(block)

    def _decode(self, block: Block) -> bytes:
        stored = self._read_soon(block.pos_bytes, block.stored_bytes)
        if len(stored) != block.stored_bytes:
            raise FormatError("the image ends within a data block")
        self.before_decoding()
        return self.image.decode(block, stored)

    def _hole(self, span: Span) -> Part:
        size = span.stop - span.start
        return memoryview(_ZEROS)[:size] if size <= len(_ZEROS) else bytes(size)

    def _read_now(self, pos_bytes: int, size_bytes: int) -> bytes | None:
        """Read from the page cache; None when the bytes are not all there, or the file system cannot tell."""
        single = self.shared is not None
        if single and size_bytes > len(self._stored):
            self._stored = bytearray(size_bytes)
        buffer = memoryview(self._stored)[:size_bytes] if single else memoryview(bytearray(size_bytes))
        try:
            got = os.preadv(self._fd, [buffer], self._offset_bytes + pos_bytes, os.RWF_NOWAIT)
        except OSError:
            return None
        return bytes(buffer) if got == size_bytes else None

    def prefetch_metadata(self) -> None:
        """Ask the kernel to read the metadata tables, which lie at the end of the image; does not wait for it."""
        start = self.image.superblock.inode_table_pos
        length = self.image.superblock.bytes_used - start
        if length > 0:
            os.posix_fadvise(
                self._fd, self._offset_bytes + start, min(length, 64 << 20), os.POSIX_FADV_WILLNEED
            )

    def read(self, ino: int, offset_bytes: int, size_bytes: int) -> bytes:
        """Return a piece of a file, decoding in the calling thread."""
        return b"".join(self.part(span) for span in self.plan(ino, offset_bytes, size_bytes))


def _nothing() -> None:
    """What is done before work, by default."""


def _stored_as_is(span: Span) -> bool:
    """Tell whether the bytes of a span lie in the image as they are; a block of a wrong size is left to the decoder to refuse."""
    block = span.block
    if block.compressed or span.stop > block.stored_bytes:
        return False
    return block.stored_bytes == block.decoded_bytes or (
        not block.exact and block.stored_bytes < block.decoded_bytes
    )


def _worth_keeping(span: Span, data: bytes) -> bool:
    """A block that one read consumed whole lies in the page cache of the mount from then on."""
    return span.start > 0 or span.stop < len(data)


def _cut(data: bytes, span: Span) -> Part:
    if span.stop > len(data):
        raise FormatError("a data block is shorter than the file needs it")
    return data if span.start == 0 and span.stop == len(data) else memoryview(data)[span.start : span.stop]
