"""What an idle worker decodes before anybody asks: small files are read in the order in which they lie in the image, more often than not.

Within a file the kernel reads ahead by itself. What it cannot know is what follows the file. When reads go from file to file in the order
of the image, the fragment block that comes next, or the blocks of the next files, are decoded for all workers to find: one block at a time,
and only while no request waits.
"""

from __future__ import annotations

from collections import deque

from uenvd.fuse.tree import Tree
from uenvd.squashfs import Block, InodeRef, Span

_SMALL_BLOCKS = 4
"""A read of more blocks is one of a large file, and so is one that ends with a block: nothing follows it soon."""
_FILES = 8
_MAX_QUEUED = 16
_NEAR_BYTES = 2 * 8194
"""Metadata blocks of inodes that lie so near in the image follow each other."""


class Ahead:
    """The blocks that may be wanted soon. For one thread."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._queue: deque[Block] = deque(maxlen=_MAX_QUEUED)
        self._last_ref = 0
        self._end_ref = 0
        self._last_fragment = 0

    def note(self, ref: InodeRef, spans: list[Span]) -> None:
        """Take notice of a read of the inode at ``ref`` that was answered. Raises `FormatError`, `OSError`, `Missing`."""
        if not spans or len(spans) > _SMALL_BLOCKS:
            return
        block, _start, stop = spans[-1]
        if stop == self._tree.block_size_bytes and block.exact:
            return  # the file goes on
        near = 0 <= (ref >> 16) - (self._last_ref >> 16) <= _NEAR_BYTES and ref > self._last_ref
        self._last_ref = ref
        if not near:
            return
        if not block.exact:
            if block.pos_bytes > self._last_fragment:
                following = self._tree.image.fragment_after(block)
                if following is not None:
                    self._put(following)
            self._last_fragment = block.pos_bytes
        elif ref >= self._end_ref:
            for other in self._tree.image.files_after(ref, _FILES):
                self._end_ref = other
                for span in self._tree.image.spans_at(other, 0, self._tree.block_size_bytes) or ():
                    self._put(span.block)

    def _put(self, block: Block) -> None:
        if block.compressed and block not in self._queue and not self._tree.has_ready(block):
            self._queue.append(block)

    @property
    def wanted(self) -> bool:
        """Whether there is a block to decode."""
        return bool(self._queue)

    def work(self) -> None:
        """Decode one block. Raises `FormatError`, `OSError`, `Missing`."""
        self._tree.decode_ahead(self._queue.popleft())
