"""From a request of the kernel to the parts of its reply: everything about serving an image but the descriptor.

The image never changes and the numbers of its inodes are computed, so an answer depends on the request and the image alone. OPEN, OPENDIR,
FLUSH, ACCESS and, for an image without extended attributes, the xattr requests are answered with ENOSYS: the kernel does not ask again.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from itertools import chain

from uenvd.fuse.faults import Faults
from uenvd.fuse.packed import Packed
from uenvd.fuse.protocol import Missing, Opcode
from uenvd.fuse.protocol import reply as r
from uenvd.fuse.protocol import request as q
from uenvd.fuse.tree import NAME_MAX_BYTES, Tree
from uenvd.squashfs import Span

Buffer = bytes | memoryview
Parts = list[Buffer]

_IN_A_ROW = 32
MAX_PARTS = 1000
"""writev(2) takes 1024."""
_ASKED = struct.Struct("=4xIQQ8xI")
"""Of `q.HEADER`: opcode, unique, nodeid, pid."""


class Answers:
    """Answers requests about one image. For one thread.

    Args:
        tree: the image.
        faults: where faults are noted.

    """

    def __init__(self, tree: Tree, faults: Faults) -> None:
        self.tree = tree
        self.packed = Packed(tree)
        self._faults = faults
        self.last_read: tuple[int, list[Span]] | None = None
        """Inode number and spans of the last READ, for whoever wants to read ahead; he puts None here. No spans: there are listings to pack."""
        self.asker = self._in_a_row = 0
        """The thread that has asked last, as the kernel numbers it."""
        self._handlers: dict[int, Callable[[q.Buffer, int, int], Parts]] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.READLINK: self._readlink,
            Opcode.READ: self._read,
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.STATFS: self._statfs,
            Opcode.RELEASE: self._nothing,
            Opcode.RELEASEDIR: self._nothing,
            Opcode.DESTROY: self._nothing,
        }
        if tree.has_xattrs:
            self._handlers[Opcode.GETXATTR] = self._getxattr
            self._handlers[Opcode.LISTXATTR] = self._listxattr

    @property
    def one_asks(self) -> bool:
        """Whether one thread has asked all of late: while it waits it asks nothing else."""
        return self._in_a_row >= _IN_A_ROW

    def answer(self, request: q.Buffer, length: int) -> Parts | None:
        """Return the parts of the reply to write in one go; None where none is expected.

        Raises `Missing`: bytes of the image have not arrived, ask again later. Whatever else goes wrong is the reply.
        """
        if length < q.HEADER_BYTES:
            return None
        opcode, unique, node, pid = _ASKED.unpack_from(request)
        if pid == self.asker and pid:  # 0 is everybody in some other container
            self._in_a_row += 1
        else:
            self.asker, self._in_a_row = pid, 0
        handler = self._handlers.get(opcode)
        if handler is None:
            return None if opcode in q.UNANSWERED else [r.refusal(unique, errno.ENOSYS)]
        try:
            parts = handler(request, length, node)
        except Missing:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary: whatever a request meets is its own fault
            return [r.refusal(unique, self._faults.note(error))]
        if len(parts) == 1:
            return [r.OUT.pack(r.OUT_BYTES + len(parts[0]), 0, unique), parts[0]]
        if len(parts) > MAX_PARTS:
            parts = [b"".join(parts)]
        return [r.OUT.pack(r.OUT_BYTES + sum(map(len, parts)), 0, unique), *parts]

    def _nothing(self, _request: q.Buffer, _length: int, _node: int) -> Parts:
        return []

    def _lookup(self, request: q.Buffer, length: int, node: int) -> Parts:
        return [self.packed.lookup(node, q.name(request, length))]

    def _getattr(self, _request: q.Buffer, _length: int, node: int) -> Parts:
        return [r.ATTR_PREFIX, r.attr(self.tree.attributes(node))]

    def _readlink(self, _request: q.Buffer, _length: int, node: int) -> Parts:
        return [self.tree.readlink(node)]

    def _statfs(self, _request: q.Buffer, _length: int, _node: int) -> Parts:
        superblock = self.tree.image.superblock
        size = superblock.block_size_bytes
        return [r.statfs(-(-superblock.bytes_used // size), size, superblock.inode_count, NAME_MAX_BYTES)]

    def _read(self, request: q.Buffer, length: int, node: int) -> Parts:
        offset, size = q.read_range(request, length)
        spans = self.tree.plan(node, offset, size)
        self.last_read = node, spans
        return [self.tree.shared_part(span) for span in spans]

    def _readdir(self, request: q.Buffer, length: int, node: int) -> Parts:
        offset, size = q.read_range(request, length)
        parts: Parts = []
        for listed in self.tree.listing(node, offset):
            one = r.dirent(listed.name, listed.attributes.ino, listed.next_offset, listed.attributes.mode)
            size -= len(one)
            if size < 0:
                break
            parts.append(one)
        return [b"".join(parts)]

    def _readdirplus(self, request: q.Buffer, length: int, node: int) -> Parts:
        offset, size = q.read_range(request, length)
        packed = self.packed.listing(node, offset, size)
        if packed is not None:
            if self.packed.wanted:
                self.last_read = node, []
            return [packed]
        parts: Parts = []
        for name, attributes, next_offset in self.tree.listing(node, offset):
            one = r.dirent_plus(name, attributes, next_offset)
            size -= len(one)
            if size < 0:
                break
            parts.append(one)
        return [b"".join(parts)]

    def _getxattr(self, request: q.Buffer, length: int, node: int) -> Parts:
        value = self.tree.xattrs(node).get(q.name(request, length, q.NAME_OFFSET_XATTR))
        if value is None:
            raise OSError(errno.ENODATA, "no such attribute")
        return _sized(value, q.xattr_size(request, length))

    def _listxattr(self, request: q.Buffer, length: int, node: int) -> Parts:
        names = b"".join(chain.from_iterable((name, b"\0") for name in self.tree.xattrs(node)))
        return _sized(names, q.xattr_size(request, length))


def _sized(value: bytes, room_bytes: int) -> Parts:
    """Return a value that the asker has room for, or its size where he has none."""
    if not room_bytes:
        return [r.xattr_size(len(value))]
    if len(value) > room_bytes:
        raise OSError(errno.ERANGE, "the attribute is larger")
    return [value]
