"""Names and listings as the bytes of replies, made straight from the bytes of the image.

`Tree` says the same in values, for a multiple of the time: what is not simple (extended inodes, devices, huge directories) is left to it.

Who walks a tree lists a directory, then what is below it, in the order of the listing. When that is seen, the listings that come next are
made before they are asked for: `Packed.work`, in the time in which the kernel takes in the one before.

Layouts: `uenvd.fuse.protocol.reply`. For one thread.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections import OrderedDict, deque
from itertools import islice

from uenvd.fuse.protocol import reply as r
from uenvd.fuse.protocol.reply import BLOCK_SIZE_BYTES, FOREVER_S, NO_ENTRY
from uenvd.fuse.tree import NAME_MAX_BYTES, ROOT_INO, Tree
from uenvd.squashfs import BASIC_INODE, KINDS, DirEntry, Inode, InodeRef, Kind

_WHOLE_BYTES = 64 << 10
"""Of a listing in the image; a larger one is not packed as a whole (at least 9 bytes an entry, some 200 packed)."""
_KEPT_BYTES = 2 << 20
"""Of packed listings. The kernel asks for the end of a listing once more, then never again."""
_NAMED_DIRECTORIES = 64
_NAMED_ENTRIES = 1024
"""Entries of a directory that is kept among those."""
_AHEAD_BYTES = 8 << 10
"""Of a listing in the image that is packed before it is asked for: some 300 entries, a millisecond."""
_MAX_AHEAD = 32
_MAX_QUEUED = 256
_MAX_EXPECTED = 4096
_INO_OFFSET = 2
_MAX_SYMLINK_BYTES = 4096
_BASIC_BYTES = BASIC_INODE.size
_TYPE_BITS = (0, stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK)
"""By basic type number."""
_PLUS = tuple(struct.Struct(f"{r.DIRENT_PLUS.format}{-(-size // 8) * 8}s") for size in range(257))
"""One entry of READDIRPLUS, by the length of its name."""


class _Listing:
    """A packed listing."""

    __slots__ = ("below", "entries", "size_bytes")

    def __init__(self, entries: list[bytes], below: list[int], size_bytes: int) -> None:
        self.entries = entries
        """By the offset at which they are asked for: "." is 0."""
        self.below = below
        """Numbers of the directories in it, in its order."""
        self.size_bytes = size_bytes


class Packed:
    """The names of one image."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._image = tree.image
        self._mode_mask = tree.mode_mask
        self._where = -1
        self._block = b""
        self._names: OrderedDict[int, dict[bytes, DirEntry]] = OrderedDict()
        self._listings: OrderedDict[int, _Listing] = OrderedDict()
        self._kept_bytes = 0
        self._expected: set[int] = set()
        """Directories in listings that were asked for."""
        self._queue: deque[int] = deque(maxlen=_MAX_QUEUED)
        self._ready: set[int] = set()
        """Packed, and not asked for yet."""

    def lookup(self, node: int, name: bytes) -> bytes:
        """Return the body of the reply to LOOKUP. Raises `OSError`, `FormatError`, `Missing`."""
        names = self._names.get(node)
        if names is None:
            names = self._open(node)
            if names is None:
                found = self._tree.lookup(node, name)
                return NO_ENTRY if found is None else r.entry(found)
        entry = names.get(name)
        if entry is not None:
            return self._entry(entry)
        if len(name) > NAME_MAX_BYTES:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        return NO_ENTRY

    def _open(self, node: int) -> dict[bytes, DirEntry] | None:
        """Return the entries of a directory, and keep them; None for a large one."""
        names = self._image.names(self._tree.directory(node))
        if names is None or len(names) > _NAMED_ENTRIES:
            return None
        self._names[node] = names
        if len(self._names) > _NAMED_DIRECTORIES:
            self._names.popitem(last=False)
        return names

    def _entry(self, entry: DirEntry) -> bytes:
        """Return the body of the reply to LOOKUP of an entry."""
        _name, ref, number, kind = entry
        if ref >> 16 != self._where:
            self._load(ref >> 16)
        at = ref & 0xFFFF
        if at + _BASIC_BYTES <= len(self._block):
            basic, mode, uid, gid, mtime_s, found, a, b, c, d = BASIC_INODE.unpack_from(self._block, at)
            ids = self._image.ids
            if (
                0 < basic < 4
                and KINDS[basic - 1] is kind
                and found == number
                and uid < len(ids) > gid
                and (basic != 3 or b <= _MAX_SYMLINK_BYTES)
            ):
                nlink, size_bytes = (1, d) if basic == 2 else (b, c & 0xFFFF) if basic == 1 else (a, b)
                ino = ref + _INO_OFFSET
                # fmt: off
                packed: bytes = r.ENTRY_ATTR.pack(
                    ino, 0, FOREVER_S, FOREVER_S, 0, 0,
                    ino, size_bytes, (size_bytes + 511) >> 9, mtime_s, mtime_s, mtime_s, 0, 0, 0,
                    mode & self._mode_mask | _TYPE_BITS[basic], nlink, ids[uid], ids[gid], 0, BLOCK_SIZE_BYTES, 0)
                # fmt: on
                return packed
        return r.entry(self._tree.shown(self._tree.ino_of(ref), self._image.entry_facts(entry)))

    def _load(self, where: int) -> None:
        self._block = self._image.inode_block(InodeRef(where << 16))
        self._where = where

    # -- listings

    def listing(self, node: int, offset: int, size_bytes: int) -> bytes | None:
        """Return the body of the reply to READDIRPLUS, ``size_bytes`` at most; None for a directory that is too large to be packed.

        Raises `OSError`, `FormatError`, `Missing`.
        """
        listing = self._listings.get(node)
        if listing is None:
            directory = self._tree.directory(node)
            if directory.size_bytes > _WHOLE_BYTES:
                return None
            listing = self._pack(node, directory)
        if offset == 0:
            self._note(node, listing)
            if listing.size_bytes <= size_bytes:
                return b"".join(listing.entries)
        chosen: list[bytes] = []
        for entry in islice(listing.entries, offset, None):
            size_bytes -= len(entry)
            if size_bytes < 0:
                break
            chosen.append(entry)
        return b"".join(chosen)

    def _pack(self, node: int, directory: Inode) -> _Listing:
        image, block_size = self._image, BLOCK_SIZE_BYTES
        here = self._tree.attributes(node)
        parent = image.parent(directory) if node != ROOT_INO else None
        above = here._replace(ino=ROOT_INO if parent is None else self._tree.ino_of(parent))
        entries = [r.dirent_plus(b".", here, 1), r.dirent_plus(b"..", above, 2)]
        below: list[int] = []
        append, unpack, ids, mask = entries.append, BASIC_INODE.unpack_from, image.ids, self._mode_mask
        count = len(ids)
        block, end, last = b"", -1, -1
        next_offset = 2
        for entry in image.entries(directory):
            name, ref, number, kind = entry
            next_offset += 1
            if ref >> 16 != last:
                last = ref >> 16
                self._load(last)
                block = self._block
                end = len(block) - _BASIC_BYTES
            at = ref & 0xFFFF
            ino = ref + _INO_OFFSET
            if at <= end:
                basic, mode, uid, gid, mtime_s, found, a, b, c, d = unpack(block, at)
                if (
                    found == number
                    and uid < count
                    and gid < count
                    and 0 < basic < 4
                    and KINDS[basic - 1] is kind
                ):
                    if basic == 2:
                        nlink, size, mode = 1, d, mode & mask | stat.S_IFREG
                    elif basic == 1:
                        nlink, size, mode = b, c & 0xFFFF, mode & mask | stat.S_IFDIR
                        below.append(ino)
                    else:
                        nlink, size, mode = a, b, mode & mask | stat.S_IFLNK
                    if basic != 3 or b <= _MAX_SYMLINK_BYTES:
                        # fmt: off
                        append(_PLUS[len(name)].pack(
                            ino, 0, FOREVER_S, FOREVER_S, 0, 0,
                            ino, size, (size + 511) >> 9, mtime_s, mtime_s, mtime_s, 0, 0, 0, mode, nlink, ids[uid], ids[gid], 0, block_size, 0,
                            ino, next_offset, len(name), mode >> 12, name))
                        # fmt: on
                        continue
            if kind is Kind.DIRECTORY:
                below.append(ino)
            append(r.dirent_plus(name, self._tree.shown(ino, image.entry_facts(entry)), next_offset))
        listing = _Listing(entries, below, sum(map(len, entries)))
        self._listings[node] = listing
        self._kept_bytes += listing.size_bytes
        while self._kept_bytes > _KEPT_BYTES and len(self._listings) > 1:
            dropped, old = self._listings.popitem(last=False)
            self._ready.discard(dropped)
            self._kept_bytes -= old.size_bytes
        return listing

    # -- ahead of who walks

    def _note(self, node: int, listing: _Listing) -> None:
        """Take notice that a directory is listed from its beginning."""
        if node in self._ready:
            self._ready.remove(node)
        elif node in self._expected:
            self._ready.clear()
            self._queue.clear()
            self._queue.extend(listing.below)
        if len(self._expected) > _MAX_EXPECTED:
            self._expected.clear()
        self._expected.update(listing.below)

    @property
    def wanted(self) -> bool:
        """Whether there is a listing to pack."""
        return bool(self._queue) and len(self._ready) < _MAX_AHEAD

    def work(self) -> None:
        """Pack one listing that nobody has asked for. Raises `OSError`, `FormatError`, `Missing`."""
        node = self._queue.popleft()
        if node in self._listings:
            return
        directory = self._tree.directory(node)
        if directory.size_bytes > _AHEAD_BYTES:
            return
        listing = self._pack(node, directory)
        self._ready.add(node)
        self._queue.extendleft(reversed(listing.below))
