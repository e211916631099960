"""Directories: listings, their index, look-up.

A listing is a sequence of runs. A run: u32 count - 1 (at most 256 entries), u32 metadata block of the inodes (relative to the inode table),
u32 base inode number; then the entries: u16 offset of the inode in that block, s16 inode number - base, u16 basic type, u16 name length - 1,
name. The size stored in the inode is 3 too large; below 4 the directory is empty. Source: Linux fs/squashfs/dir.c, namei.c.

The index of an extended directory follows its inode: u32 offset in the listing where a run begins, u32 metadata block of it (relative to the
directory table), u32 length - 1 of the name of the first entry there, that name. It cuts the listing into *segments* (about 8 KiB each);
a listing without index is one segment. **A segment is the unit here**, for the listing and for a look-up alike, decoded as a whole, checked
and kept in a bounded cache. So both always agree:

- The order of names inside a segment does not matter; of two entries with one name the first wins, the other does not exist.
- A name lies in the range of its segment, ``[its index name, the next index name)``; index names ascend. Else the directory is refused.
- A segment ends exactly where the next one begins, in bytes of the listing and as a place in the directory table.

Refused with `FormatError` (the whole segment): a name that is empty, ``.``, ``..``, longer than 256 bytes or holds ``/`` or NUL; a type that
is no basic one; a run of more than 256 entries or beyond the listing; a listing beyond the table; a directory that contains the root, itself
or its own parent; a segment of more than `MAX_SEGMENT_ENTRIES` entries. Longer cycles cannot be seen here; `Image.find` refuses them on its way.
"""

from __future__ import annotations

import functools
import struct
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from uenvd.errors import FormatError
from uenvd.squashfs.base import GenerationCache, InodeRef, damaged
from uenvd.squashfs.inode import KINDS, Inode, Kind
from uenvd.squashfs.metadata import Cursor, MetadataStore, Region
from uenvd.squashfs.superblock import METADATA_BLOCK_BYTES

MAX_RUN_ENTRIES = 256
MAX_NAME_BYTES = 256
MAX_SEGMENT_ENTRIES = 65536
"""Entries of a listing that has no index. mksquashfs writes an index for each listing of 64 KiB or more."""
MAX_SEGMENT_BYTES = 4 << 20

_SIZE_EXCESS = 3
_CACHED_ENTRIES = 32768
_CACHED_INDEX_ENTRIES = 32768
_RUN = struct.Struct("<III")
_ENTRY = struct.Struct("<HhHH")
_INDEX = struct.Struct("<III")
_SMALLEST_RUN_BYTES = _RUN.size + _ENTRY.size + 1


class DirEntry(NamedTuple):
    """One name in a directory."""

    name: bytes
    ref: InodeRef
    inode_number: int
    kind: Kind


_new_entry = functools.partial(tuple.__new__, DirEntry)
_Entries = dict[bytes, DirEntry]


class _Segments(NamedTuple):
    """The segments of a listing: ``names[i]`` is the first name of segment i (b"" for the first), the rest where it begins."""

    names: list[bytes]
    starts: list[int]
    """Offset in the listing; one more than segments, the last is the size of the listing."""
    places: list[tuple[int, int]]
    """Metadata block relative to the table, offset in it."""


_ONE_NAME = [b""]


class Directories:
    """Reads listings. Concurrency: as `MetadataStore`."""

    __slots__ = ("_index_cache", "_inodes", "_root", "_segment_cache", "_store", "_table")

    def __init__(self, store: MetadataStore, inodes: Region, table: Region, root: InodeRef) -> None:
        self._store = store
        self._inodes = inodes
        self._table = table
        self._root = root
        self._index_cache: GenerationCache[InodeRef, _Segments] = GenerationCache(_CACHED_INDEX_ENTRIES)
        self._segment_cache: GenerationCache[tuple[InodeRef, int], _Entries] = GenerationCache(
            _CACHED_ENTRIES
        )

    def entries(self, directory: Inode) -> Iterator[DirEntry]:
        """Yield the entries in the order of the listing, one segment decoded at a time. Raises `FormatError`."""
        segments = self._segments(directory)
        for i in range(len(segments.names)):
            yield from self._segment(directory, segments, i).values()

    def whole(self, directory: Inode) -> _Entries | None:
        """Return the entries by name when the listing is one segment, else None. Raises `FormatError`."""
        segments = self._segments(directory)
        if len(segments.names) > 1:
            return None
        return self._segment(directory, segments, 0) if segments.names else {}

    def lookup(self, directory: Inode, name: bytes) -> DirEntry | None:
        """Return the entry of this name; decodes at most one segment. Raises `FormatError`."""
        segments = self._segments(directory)
        if not segments.names:
            return None
        i = bisect_right(segments.names, name) - 1 if len(segments.names) > 1 else 0
        return self._segment(directory, segments, max(i, 0)).get(name)

    def _segments(self, directory: Inode) -> _Segments:
        if directory.kind is not Kind.DIRECTORY:
            raise damaged(f"inode {directory.ref:#x} is no directory")
        size = directory.size_bytes - _SIZE_EXCESS
        place = (directory.content_block, directory.content_offset)
        if size <= 0:
            return _Segments([], [0], [])
        if not directory.index_count:
            return _Segments(_ONE_NAME, [0, size], [place])
        cached = self._index_cache.get(directory.ref)
        if cached is None:
            cached = self._read_index(directory, size, place)
            self._index_cache.put(directory.ref, cached, directory.index_count)
        return cached

    def _read_index(self, directory: Inode, size: int, place: tuple[int, int]) -> _Segments:
        # Each segment holds at least one entry, so a count that the listing cannot have costs nothing.
        if directory.index_count > size // _SMALLEST_RUN_BYTES:
            raise damaged(
                f"directory {directory.ref:#x} of {size} bytes with an index of {directory.index_count} entries"
            )
        names, starts, places = [b""], [0], [place]
        cursor = Cursor(self._store, self._inodes, directory.index_block, directory.index_offset)
        for _ in range(directory.index_count):
            start, block, name_bytes = cursor.unpack(_INDEX)
            if name_bytes >= MAX_NAME_BYTES:
                raise damaged(f"name of {name_bytes + 1} bytes in the index of directory {directory.ref:#x}")
            name = cursor.take(name_bytes + 1)
            here = (block, (place[1] + start) % METADATA_BLOCK_BYTES)
            if start == 0 and len(starts) == 1 and here == place:
                continue  # an index may name the first run too; it says nothing that is not known
            if not starts[-1] < start < size or name <= names[-1]:
                raise damaged(f"index of directory {directory.ref:#x} does not ascend")
            names.append(name)
            starts.append(start)
            places.append(here)
        starts.append(size)
        return _Segments(names, starts, places)

    def _segment(self, directory: Inode, segments: _Segments, i: int) -> _Entries:
        key = (directory.ref, i)
        entries = self._segment_cache.get(key)
        if entries is not None:
            return entries
        size = segments.starts[i + 1] - segments.starts[i]
        if size > MAX_SEGMENT_BYTES:
            raise FormatError(
                f"a directory of the squashfs image has a listing of {size} bytes without index"
            )
        cursor = Cursor(self._store, self._table, *segments.places[i])
        entries = self._parse(cursor.take(size), directory)
        last = i + 1 == len(segments.names)
        if not last and cursor.tell() != segments.places[i + 1]:
            raise damaged(f"index of directory {directory.ref:#x} does not lead to its runs")
        if i and min(entries) < segments.names[i]:
            raise damaged(f"directory {directory.ref:#x}: a name comes before the one in the index")
        if not last and max(entries) >= segments.names[i + 1]:
            raise damaged(f"directory {directory.ref:#x}: a name comes after the next one in the index")
        self._segment_cache.put(key, entries, len(entries))
        return entries

    def _parse(self, raw: bytes, directory: Inode) -> _Entries:
        """Decode whole runs; at least one entry."""
        entries: _Entries = {}
        size = len(raw)
        inodes_bytes = self._inodes.end - self._inodes.start
        unpack_entry, entry_bytes, new_entry = _ENTRY.unpack_from, _ENTRY.size, _new_entry
        # The root has no parent in the image; writers put different numbers there.
        parent = directory.parent_number if directory.ref != self._root else 0
        at = seen = 0
        while at < size:
            if at + _RUN.size > size:
                raise damaged(f"listing of directory {directory.ref:#x} ends inside a run")
            count, block, base = _RUN.unpack_from(raw, at)
            at += _RUN.size
            seen += count + 1
            if count >= MAX_RUN_ENTRIES or seen > MAX_SEGMENT_ENTRIES:
                raise damaged(f"run of {count + 1} entries in directory {directory.ref:#x}")
            if block >= inodes_bytes:
                raise damaged(f"entries of directory {directory.ref:#x} lie outside of the inode table")
            high = block << 16
            for _ in range(count + 1):
                name_at = at + entry_bytes
                if name_at > size:
                    raise damaged(f"listing of directory {directory.ref:#x} ends inside an entry")
                offset, delta, kind, name_bytes = unpack_entry(raw, at)
                at = name_at + name_bytes + 1
                if at > size or name_bytes >= MAX_NAME_BYTES:
                    raise damaged(f"name of {name_bytes + 1} bytes in directory {directory.ref:#x}")
                name = raw[name_at:at]
                number = base + delta
                if b"/" in name or b"\0" in name or name == b"." or name == b"..":
                    raise damaged(f"forbidden name {name!r} in directory {directory.ref:#x}")
                if offset >= METADATA_BLOCK_BYTES or not 1 <= kind <= 7 or not 0 < number < 1 << 32:
                    raise damaged(
                        f"entry {name!r} of directory {directory.ref:#x}: offset {offset}, type {kind}, number {number}"
                    )
                ref = high | offset
                if kind == 1 and (
                    ref in (directory.ref, self._root) or number in (directory.inode_number, parent)
                ):
                    raise damaged(
                        f"directory {directory.ref:#x} contains itself or a directory above it, as {name!r}"
                    )
                if name not in entries:
                    entries[name] = new_entry((name, ref, number, KINDS[kind - 1]))
        return entries
