"""An image put together by hand, so that each field can be wrong: what mksquashfs never writes.

Tables are given as decoded bytes and stored uncompressed. All numbers are little-endian; layouts as in `uenvd.squashfs`, written down here
a second time on purpose.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from uenvd.squashfs import Image, Inode, InodeRef

ABSENT = (1 << 64) - 1
NONE = (1 << 32) - 1
DIR, FILE, SYMLINK, BLOCK, CHAR, FIFO, SOCKET = range(1, 8)
GZIP, LZMA, LZO, XZ, LZ4, ZSTD = range(1, 7)
OPTIONS = 0x400


def place(offset: int) -> tuple[int, int]:
    """Return (block relative to the table, offset in it) of a byte of a table stored by `wrap`."""
    return offset // 8192 * 8194, offset % 8192


def wrap(data: bytes) -> bytes:
    """Store bytes as uncompressed metadata blocks."""
    pieces = (data[at : at + 8192] for at in range(0, len(data), 8192))
    return b"".join(struct.pack("<H", 0x8000 | len(piece)) + piece for piece in pieces)


def run(entries: Sequence[tuple[bytes, int, int, int]], *, base: int = 1, count: int | None = None) -> bytes:
    """Return a run of a listing; entries are (name, inode reference, inode number, type). All inodes in the first one's block."""
    block = entries[0][1] >> 16
    out = struct.pack("<III", len(entries) - 1 if count is None else count, block, base)
    for name, ref, number, kind in entries:
        out += struct.pack("<HhHH", ref & 0xFFFF, number - base, kind, len(name) - 1) + name
    return out


@dataclass
class RawImage:
    """Parts of an image. Add inodes (children first), then `build`."""

    block_size: int = 4096
    data: bytes = b""
    """Stored at position 96."""
    inodes: bytes = b""
    listings: bytes = b""
    ids: Sequence[int] = (0, 1000)
    fragments: Sequence[tuple[int, int]] = ()
    """(position, size word)."""
    export: Sequence[int] | None = None
    attributes: bytes = b""
    """Decoded bytes of the xattr blocks."""
    sets: Sequence[tuple[int, int, int]] | None = None
    """Of xattrs: (reference, count, size)."""
    superblock: dict[str, int] = field(default_factory=dict)
    """Fields to override."""
    root: int | None = None
    """Reference; default: the inode that was added last."""
    _last: int = 0

    def inode(
        self,
        kind: int,
        number: int,
        body: bytes,
        *,
        mode: int = 0o755,
        uid: int = 0,
        gid: int = 1,
        mtime: int = 7,
    ) -> InodeRef:
        """Append an inode and return its reference."""
        block, offset = place(len(self.inodes))
        self.inodes += struct.pack("<HHHHII", kind, mode, uid, gid, mtime, number) + body
        self._last = block << 16 | offset
        return InodeRef(self._last)

    def file(
        self,
        number: int,
        size: int,
        words: Sequence[int] = (),
        *,
        start: int = 96,
        fragment: int = NONE,
        offset: int = 0,
    ) -> InodeRef:
        """Append a basic file; ``words`` are the sizes of its blocks."""
        return self.inode(
            FILE, number, struct.pack(f"<IIII{len(words)}I", start, fragment, offset, size, *words)
        )

    def directory(
        self, number: int, listing: bytes, *, parent: int = 99, size: int | None = None
    ) -> InodeRef:
        """Append a basic directory with its listing."""
        block, offset = place(len(self.listings))
        self.listings += listing
        stored = len(listing) + 3 if size is None else size
        return self.inode(DIR, number, struct.pack("<IIHHI", block, 2, stored, offset, parent))

    def indexed(
        self,
        number: int,
        listing: bytes,
        index: Sequence[tuple[int, int, bytes]],
        *,
        parent: int = 99,
        count: int | None = None,
    ) -> InodeRef:
        """Append an extended directory; the index has (offset in the listing, block, name)."""
        block, offset = place(len(self.listings))
        self.listings += listing
        number_of = len(index) if count is None else count
        body = struct.pack("<IIIIHHI", 2, len(listing) + 3, block, parent, number_of, offset, NONE)
        for start, at, name in index:
            body += struct.pack("<III", start, at, len(name) - 1) + name
        return self.inode(DIR + 7, number, body)

    def build(self) -> bytes:
        """Return the image."""
        out = bytearray(96)
        out += self.data
        inode_table = len(out)
        out += wrap(self.inodes)
        directory_table = len(out)
        out += wrap(self.listings)

        def table(data: bytes) -> int:
            pointers = []
            for at in range(0, len(data), 8192):
                pointers.append(len(out))
                out.extend(wrap(data[at : at + 8192]))
            pos = len(out)
            out.extend(struct.pack(f"<{len(pointers)}Q", *pointers))
            return pos

        fragment_table = export_table = xattr_table = ABSENT
        if self.fragments:
            fragment_table = table(
                b"".join(struct.pack("<QII", pos, size, 0) for pos, size in self.fragments)
            )
        if self.export is not None:
            export_table = table(struct.pack(f"<{len(self.export)}Q", *self.export))
        id_table = table(struct.pack(f"<{len(self.ids)}I", *self.ids))
        if self.sets is not None:
            start = len(out)
            out += wrap(self.attributes)
            sets_at = len(out)
            out += wrap(b"".join(struct.pack("<QII", *entry) for entry in self.sets))
            xattr_table = len(out)
            out += struct.pack("<QIIQ", start, len(self.sets), 0, sets_at)
        fields = {
            "magic": 0x73717368,
            "inode_count": len(self.export) if self.export is not None else 1,
            "mkfs_time": 1,
            "block_size": self.block_size,
            "fragment_count": len(self.fragments),
            "compressor": GZIP,
            "block_log": self.block_size.bit_length() - 1,
            "flags": 0,
            "id_count": len(self.ids),
            "major": 4,
            "minor": 0,
            "root": self._last if self.root is None else self.root,
            "bytes_used": len(out),
            "id_table": id_table,
            "xattr_table": xattr_table,
            "inode_table": inode_table,
            "directory_table": directory_table,
            "fragment_table": fragment_table,
            "export_table": export_table,
        }
        assert self.superblock.keys() <= fields.keys()
        out[:96] = struct.pack("<IIIIIHHHHHHQQQQQQQQ", *(fields | self.superblock).values())
        return bytes(out)

    def open(self) -> Image:
        """Return the reader on the built image."""
        data = self.build()
        return Image(lambda pos, size: data[pos : pos + size], len(data))

    def open_root(self) -> tuple[Image, Inode]:
        """Return the reader and the root's inode."""
        image = self.open()
        return image, image.inode(image.root)
