"""One squashfs 4.0 image: inodes, directories, links, attributes, and the plan of each read of a file.

`Image` takes bytes through a callback and returns values; it does no I/O. At opening it reads the superblock and the compressor's
options; every table, inode and listing is decoded when it is asked for. Whatever the bytes of the image are, only `FormatError` is
raised (beside the callback's own exceptions), no call allocates more than a few MiB for what it returns, and the work of a call is
bounded by the size of the table that it walks.

Concurrency: `decode` may be called from many threads at once. The other methods may too, but gain nothing from it.

Vocabulary: a *pos* is absolute in the image, an *offset* lies inside a decoded block. Source: Linux Documentation/filesystems/squashfs.rst.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from uenvd.errors import FormatError, InternalError
from uenvd.squashfs.base import GenerationCache, InodeRef, ReadAt, damaged, read_exactly
from uenvd.squashfs.compression import inflater, options_size_bytes
from uenvd.squashfs.data import Block, BlockLists, Span, listed_blocks, short_list
from uenvd.squashfs.directory import Directories, DirEntry
from uenvd.squashfs.inode import (
    BASIC_FILE_BYTES,
    NO_FRAGMENT,
    Facts,
    Inode,
    Kind,
    basic_facts,
    basic_file,
    facts_of,
    inode_bytes,
    parse,
)
from uenvd.squashfs.metadata import HEADER_BYTES, STORED_UNCOMPRESSED, Cursor, MetadataStore, Region
from uenvd.squashfs.superblock import SUPERBLOCK_BYTES, Superblock
from uenvd.squashfs.tables import BlockArray, exported, fragment, load_ids
from uenvd.squashfs.xattr import XattrTable

_new_span = functools.partial(tuple.__new__, Span)
_CACHED_INODES = 8192
_CACHED_FRAGMENTS = 256
_SHORT_LIST = 64
"""Blocks of a file for which the way of `Image.spans_at` is the shorter one."""
_READ_FILE_STEP_BLOCKS = 64


class Image:
    """See the module."""

    def __init__(
        self, read: ReadAt, size_bytes: int | None = None, *, metadata_cache_bytes: int = 4 << 20
    ) -> None:
        """Parse and check the superblock.

        Args:
            read: see `ReadAt`.
            size_bytes: of the image file, where known: then one that was cut off is refused here.
            metadata_cache_bytes: bound of the decoded metadata blocks kept in memory.

        Raises: `FormatError`.
        """
        self._read = read
        self.superblock = block = Superblock.parse(read(0, SUPERBLOCK_BYTES), size_bytes)
        self.root = block.root
        inflate = inflater(block.compressor, block.block_size_bytes, self._compressor_options())
        self._inflate = inflate
        self._store = MetadataStore(read, block.bytes_used, inflate, metadata_cache_bytes)
        self._inode_region = Region("inode table", block.inode_table_pos, block.directory_table_pos)
        self._lists = BlockLists(
            self._store, self._inode_region, block.block_size_bytes, block.inode_table_pos
        )
        self._recent: tuple[int, bytes] = (-1, b"")
        self._fragments: GenerationCache[int, Block] = GenerationCache(_CACHED_FRAGMENTS)
        self._fragment_indices: GenerationCache[int, int] = GenerationCache(_CACHED_FRAGMENTS)
        self._inodes: GenerationCache[InodeRef, Inode] = GenerationCache(_CACHED_INODES)

    def inode(self, ref: InodeRef) -> Inode:
        """Return the inode. Raises `FormatError`."""
        found = self._inodes.get(ref)
        if found is None:
            if not 0 <= ref < (self._inode_region.end - self._inode_region.start) << 16:
                raise damaged(f"inode {ref:#x} lies outside of the inode table")
            found = parse(Cursor(self._store, self._inode_region, ref >> 16, ref & 0xFFFF), ref, self.ids)
            self._inodes.put(ref, found)
        return found

    def facts(self, ref: InodeRef) -> Facts:
        """Return what stat(2) tells of an inode: the same as `inode` for a fraction of its time. Raises `FormatError`."""
        data = self.inode_block(ref)
        return basic_facts(data, ref & 0xFFFF, self.ids) or facts_of(self.inode(ref))

    def entry_facts(self, entry: DirEntry) -> Facts:
        """Return `facts` of an entry. Raises `FormatError` as `child` does."""
        facts = self.facts(entry.ref)
        if facts[0] is not entry.kind or facts[1] != entry.inode_number:
            self.child(entry)
        return facts

    def inode_block(self, ref: InodeRef) -> bytes:
        """Return the decoded metadata block in which an inode begins. Raises `FormatError`."""
        where, data = self._recent
        if ref >> 16 != where:
            where = ref >> 16
            if not 0 <= where < self._inode_region.end - self._inode_region.start:
                raise damaged(f"inode {ref:#x} lies outside of the inode table")
            data, _next = self._store.block(self._inode_region, self._inode_region.start + where)
            self._recent = where, data
        return data

    def names(self, directory: Inode) -> dict[bytes, DirEntry] | None:
        """Return all entries by their names, not to be changed; None for a listing that has an index. Raises `FormatError`."""
        return self._directories.whole(directory)

    def find_entry(self, directory: Inode, name: bytes) -> DirEntry | None:
        """Return the entry with this name, or None; reads one run of blocks, not the whole directory (`directory` has the rules).

        The inode is not looked at: see `child`, `entry_facts`. Raises `FormatError`.
        """
        return self._directories.lookup(directory, name)

    def lookup(self, directory: Inode, name: bytes) -> DirEntry | None:
        """Return the entry with this name, or None: `find_entry` that refuses one which says another kind or number than its inode."""
        entry = self._directories.lookup(directory, name)
        if entry is not None:
            self.entry_facts(entry)
        return entry

    def child(self, entry: DirEntry) -> Inode:
        """Return the inode of an entry. Raises `FormatError` when it is not of the kind and number that the entry says."""
        inode = self.inode(entry.ref)
        if inode.kind is not entry.kind or inode.inode_number != entry.inode_number:
            raise damaged(
                f"entry {entry.name!r} says {entry.kind.name} {entry.inode_number}, its inode {inode.kind.name} {inode.inode_number}"
            )
        return inode

    def entries(self, directory: Inode) -> Iterator[DirEntry]:
        """Yield the entries in the order of the image (sorted by bytes), without ``.`` and ``..``; decoded as the iteration goes on.

        Raises `FormatError`, also from the iteration. The inodes are not looked at: see `child`.
        """
        return self._directories.entries(directory)

    def parent(self, directory: Inode) -> InodeRef | None:
        """Return the directory that holds this one, the root for the root; None in an image without export table.

        Raises `FormatError` when the table does not lead to a directory of the right number.
        """
        if directory.kind is not Kind.DIRECTORY:
            raise damaged(f"inode {directory.ref:#x} is no directory")
        if directory.ref == self.root:
            return self.root
        table = self._export_table
        if table is None:
            return None
        ref = exported(table, directory.parent_number)
        found = self.inode(ref)
        if found.kind is not Kind.DIRECTORY or found.inode_number != directory.parent_number:
            raise damaged(
                f"the export table says that inode {directory.parent_number} is at {ref:#x}, where there is another"
            )
        return ref

    def symlink_target(self, inode: Inode) -> bytes:
        """Return the target, 1..4096 bytes without NUL. Raises `FormatError`."""
        if inode.kind is not Kind.SYMLINK:
            raise damaged(f"inode {inode.ref:#x} is no symbolic link")
        target = Cursor(self._store, self._inode_region, inode.content_block, inode.content_offset).take(
            inode.size_bytes
        )
        if not target or b"\0" in target:
            raise damaged(f"symbolic link {inode.ref:#x} has no valid target")
        return target

    def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        """Return the extended attributes by their full names (``user.``, ``trusted.``, ``security.``). Raises `FormatError`."""
        if inode.xattr_index is None or self._xattr_table is None:
            return {}
        return self._xattr_table.read(inode.xattr_index)

    def spans(self, inode: Inode, offset_bytes: int, size_bytes: int) -> list[Span]:
        """Return the blocks that hold ``size_bytes`` of the file from ``offset_bytes`` on, in order; [] at or past its end.

        The file is `Span.cut` of each decoded block, joined. The list has ``size_bytes / block size + 2`` elements at most.
        Raises `FormatError`.
        """
        if inode.kind is not Kind.FILE:
            raise damaged(f"inode {inode.ref:#x} is no file")
        if offset_bytes < 0 or size_bytes < 0:
            raise InternalError(f"read of {size_bytes} bytes at {offset_bytes}")
        end = min(offset_bytes + size_bytes, inode.size_bytes)
        if offset_bytes >= end:
            return []
        size = self.superblock.block_size_bytes
        first, last = offset_bytes // size, (end - 1) // size
        listed = min(last + 1, listed_blocks(inode, size))
        blocks = self._lists.blocks(inode, first, listed - first) if listed > first else []
        found: list[Span] = []
        for i, block in enumerate(blocks, first):
            base = i * size
            found.append(Span(block, max(0, offset_bytes - base), min(block.decoded_bytes, end - base)))
        if last >= listed:
            base = last * size
            start = inode.fragment_offset
            if start + inode.size_bytes - base > size:
                raise damaged(f"the tail of file {inode.ref:#x} reaches beyond its fragment block")
            found.append(
                Span(self._fragment_block(inode), start + max(0, offset_bytes - base), start + end - base)
            )
        return found

    def spans_at(self, ref: InodeRef, offset_bytes: int, size_bytes: int) -> list[Span] | None:
        """Return `spans` of a small basic file, for a fraction of the time.

        None for any other inode, and wherever `spans` would raise. ``offset_bytes`` and ``size_bytes`` are not negative.
        """
        data = self.inode_block(ref)
        at = ref & 0xFFFF
        if at + BASIC_FILE_BYTES > len(data):
            return None
        found = basic_file(data, at)
        if found is None:
            return None
        data_pos, fragment_index, fragment_offset, file_bytes = found
        end = min(offset_bytes + size_bytes, file_bytes)
        if offset_bytes >= end:
            return []
        size = self.superblock.block_size_bytes
        if file_bytes < size and fragment_index != NO_FRAGMENT:
            if fragment_offset + file_bytes > size:
                return None
            tail = self._fragments.get(fragment_index) or self._fragment(fragment_index)
            return [_new_span((tail, fragment_offset + offset_bytes, fragment_offset + end))]
        first, last = offset_bytes // size, (end - 1) // size
        listed = file_bytes // size if fragment_index != NO_FRAGMENT else -(-file_bytes // size)
        if listed > _SHORT_LIST or at + BASIC_FILE_BYTES + 4 * listed > len(data):
            return None
        spans: list[Span] = []
        if first < listed:
            blocks = short_list(
                data,
                at + BASIC_FILE_BYTES,
                min(last + 1, listed),
                data_pos,
                file_bytes,
                size,
                self.superblock.inode_table_pos,
            )
            if blocks is None:
                return None
            for i in range(first, len(blocks)):
                block = blocks[i]
                base = i * size
                spans.append(Span(block, max(0, offset_bytes - base), min(block.decoded_bytes, end - base)))
        if last >= listed:
            base = last * size
            if fragment_offset + file_bytes - base > size:
                return None
            tail = self._fragment(fragment_index)
            spans.append(
                Span(tail, fragment_offset + max(0, offset_bytes - base), fragment_offset + end - base)
            )
        return spans

    def files_after(self, ref: InodeRef, count: int) -> list[InodeRef]:
        """Return the basic files, ``count`` at most, that follow a small basic file in the inode table: mostly its neighbours.

        Writers put inodes in the order in which they find files, and the data in the same order. Ends early at the end of the metadata
        block, and at whatever is no simple inode. Raises `FormatError`.
        """
        data = self.inode_block(ref)
        where = ref >> 16
        at = ref & 0xFFFF
        size = self.superblock.block_size_bytes
        found: list[InodeRef] = []
        while len(found) < count and at + BASIC_FILE_BYTES <= len(data):
            step = inode_bytes(data, at, size)
            at += step
            if step == 0 or at + BASIC_FILE_BYTES > len(data):
                break
            if basic_file(data, at) is not None:
                found.append(InodeRef(where << 16 | at))
        return found

    def fragment_after(self, block: Block) -> Block | None:
        """Return the fragment block that follows one which was seen lately; None when there is none, or the other is forgotten."""
        index = self._fragment_indices.get(block.pos_bytes)
        if index is None or index + 1 >= self.superblock.fragment_count:
            return None
        return self._fragment(index + 1)

    def decode(self, block: Block, stored: bytes) -> bytes:
        """Return the decoded block: ``block.decoded_bytes`` bytes, 1..that for a block that is not ``exact``.

        ``stored`` are the ``block.stored_bytes`` bytes at ``block.pos_bytes`` (ignored for a hole). Raises `FormatError`.
        """
        if block.stored_bytes == 0:
            return bytes(block.decoded_bytes)
        if len(stored) != block.stored_bytes:
            raise damaged(
                f"it ends inside the data block at {block.pos_bytes} ({len(stored)} of {block.stored_bytes} bytes)"
            )
        if not block.compressed:
            return stored
        decoded = self._inflate(stored, block.decoded_bytes)
        if not decoded or (block.exact and len(decoded) != block.decoded_bytes):
            raise damaged(
                f"data block at {block.pos_bytes} unpacks to {len(decoded)} bytes, not to {block.decoded_bytes}"
            )
        return decoded

    def read_file(self, inode: Inode, limit_bytes: int) -> bytes:
        """Return the content of a small file. Raises `FormatError`, also when it is larger than ``limit_bytes``."""
        if inode.size_bytes > limit_bytes:
            raise FormatError(
                f"a file of {inode.size_bytes} bytes in the squashfs image, more than {limit_bytes}"
            )
        step = _READ_FILE_STEP_BLOCKS * self.superblock.block_size_bytes
        parts: list[bytes] = []
        for offset in range(0, inode.size_bytes, step):
            for span in self.spans(inode, offset, step):
                block = span.block
                stored = self._read(block.pos_bytes, block.stored_bytes) if block.stored_bytes else b""
                parts.append(span.cut(self.decode(block, stored)))
        if not inode.size_bytes:
            self.spans(inode, 0, 0)  # an empty directory, device ... is no file either
        return b"".join(parts)

    def find(self, path: bytes) -> Inode | None:
        """Return the inode at ``path`` from the root (empty components and ``.`` do not count), or None.

        Symbolic links are not followed, ``..`` is not understood: both lead to None. Raises `FormatError`, also when a directory on
        the way contains one above it.
        """
        inode = self.inode(self.root)
        above = {inode.ref}
        for name in path.split(b"/"):
            if name in (b"", b"."):
                continue
            if inode.kind is not Kind.DIRECTORY:
                return None
            entry = self.lookup(inode, name)
            if entry is None:
                return None
            inode = self.inode(entry.ref)
            if inode.kind is Kind.DIRECTORY:
                if inode.ref in above:
                    raise damaged(f"directory {inode.ref:#x} lies inside itself")
                above.add(inode.ref)
        return inode

    def _compressor_options(self) -> bytes | None:
        """Return the options block after the superblock: a metadata block that is never compressed."""
        block = self.superblock
        size = options_size_bytes(block.compressor)
        if not block.has_compressor_options or not size:
            return None
        raw = read_exactly(self._read, SUPERBLOCK_BYTES, HEADER_BYTES + size, "compressor options")
        header = raw[0] | raw[1] << 8
        if header != STORED_UNCOMPRESSED | size:
            raise damaged(f"compressor options with header {header:#x}")
        return raw[HEADER_BYTES:]

    def _fragment_block(self, inode: Inode) -> Block:
        if inode.fragment_index is None:
            raise damaged(f"file {inode.ref:#x} has its tail in a fragment, but there are none")
        return self._fragment(inode.fragment_index)

    def _fragment(self, index: int) -> Block:
        known = self._fragments.get(index)
        if known is None:
            known = self._load_fragment(index)
            self._fragments.put(index, known)
            self._fragment_indices.put(known.pos_bytes, index)
        return known

    def _load_fragment(self, index: int) -> Block:
        table = self._fragment_table
        if table is None:
            raise damaged("a file has its tail in a fragment, but there are none")
        block = self.superblock
        found = fragment(table, index, block.block_size_bytes, block.inode_table_pos)
        if found.compressed:
            return Block(found.pos, found.stored_bytes, True, block.block_size_bytes, exact=False)
        return Block(found.pos, found.stored_bytes, False, found.stored_bytes)

    # The tables, each loaded when it is first needed.

    @functools.cached_property
    def _id_table(self) -> BlockArray:
        block = self.superblock
        return BlockArray(
            self._read, self._store, "id table", block.id_table_pos, block.id_count, 4, end=block.bytes_used
        )

    @functools.cached_property
    def ids(self) -> tuple[int, ...]:
        """User and group ids by their indices. Raises `FormatError`."""
        return load_ids(self._id_table, self._store, self.superblock.id_count)

    @functools.cached_property
    def _fragment_table(self) -> BlockArray | None:
        block = self.superblock
        if block.fragment_table_pos is None:
            return None
        end = block.id_table_pos
        return BlockArray(
            self._read,
            self._store,
            "fragment table",
            block.fragment_table_pos,
            block.fragment_count,
            16,
            end=end,
        )

    @functools.cached_property
    def _export_table(self) -> BlockArray | None:
        block = self.superblock
        if block.export_table_pos is None or not block.inode_count:
            return None
        end = block.id_table_pos
        return BlockArray(
            self._read, self._store, "export table", block.export_table_pos, block.inode_count, 8, end=end
        )

    @functools.cached_property
    def _xattr_table(self) -> XattrTable | None:
        pos = self.superblock.xattr_table_pos
        return None if pos is None else XattrTable(self._read, self._store, pos, self.superblock.bytes_used)

    @functools.cached_property
    def _directories(self) -> Directories:
        block = self.superblock
        after = self._fragment_table or self._export_table or self._id_table
        if after.region.start < block.directory_table_pos:
            raise damaged(f"{after.region.name} begins before the directory table ends")
        table = Region("directory table", block.directory_table_pos, after.region.start)
        return Directories(self._store, self._inode_region, table, self.root)
