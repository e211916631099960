"""Decoded blocks that the worker processes of one image share: what one of them has decoded, none decodes again while it is here.

The memory is a memfd, made before the workers are forked. It begins with a table of keys, the frames follow, each of the size of a block.
A block can be in one of the few frames of its set. What keeps the processes apart are POSIX record locks on the memfd, one byte for each
frame and one for each block that is being decoded: the kernel lets go of a killed process's locks, so nobody's death blocks anybody.
(Atomic operations on shared memory, which would do without system calls, Python does not have. A lock costs a microsecond, a block hundreds.)

A key is written after its bytes and removed before they are overwritten, both under the exclusive lock of the frame; readers copy under the
shared lock. A frame whose writer was killed in between has no key.

Concurrency: one thread a process (POSIX locks belong to processes).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from uenvd.squashfs import Block

_WAYS = 8
_ENTRY = struct.Struct("=QII")
"""Key: position of the block in the image (0: the frame is empty); size in bytes; time of last use, in ms modulo 2^32."""
_ENTRY_BYTES = _ENTRY.size
_BLOCK_LOCKS_OFFSET = 1 << 50
"""Where in the (64-bit) range of lockable bytes the blocks have theirs; a frame's lies at its number."""
_PATIENCE_S = 0.05
_PAUSE_S = 0.00003
_MAX_FRAMES = 1 << 16
_SHARED = fcntl.LOCK_SH | fcntl.LOCK_NB
_HELD = frozenset({errno.EAGAIN, errno.EACCES})
_NO_FRAME = (0, -1)


class SharedBlocks:
    """Memory for decoded blocks. A worker calls `attach` when it knows the block size of the image."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        """Map ``size_bytes`` of a memfd that `create` made. Raises `OSError`."""
        self.fd = fd
        self.size_bytes = size_bytes
        self._memory = memoryview(mmap.mmap(fd, size_bytes)) if size_bytes else memoryview(b"")
        self._frame_bytes = 0
        self._sets = 0
        self._data_offset = 0
        self._last = _NO_FRAME
        """The block that was found last, and its frame: files that follow each other share blocks. It may have left since."""

    @classmethod
    def create(cls, size_bytes: int) -> SharedBlocks:
        """Make ``size_bytes`` of it; none is in use before a block is put there. Raises `OSError`."""
        fd = os.memfd_create("uenvd-blocks", os.MFD_CLOEXEC)
        os.ftruncate(fd, size_bytes)
        return cls(fd, size_bytes)

    def attach(self, block_size_bytes: int) -> None:
        """Lay out frames for blocks of this size; all processes must say the same."""
        frames = min(self.size_bytes // (block_size_bytes + _ENTRY.size), _MAX_FRAMES)
        self._sets = frames // _WAYS
        self._frame_bytes = block_size_bytes
        table_bytes = self._sets * _WAYS * _ENTRY.size
        self._data_offset = -(-table_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if self._sets and self._data_offset + self._sets * _WAYS * block_size_bytes > self.size_bytes:
            self._sets -= 1  # for the rounding

    def get(self, block: Block, start: int, stop: int) -> bytes | None:
        """Return a slice of a decoded block; None when it is not here, or is shorter."""
        pos = block.pos_bytes
        known, frame = self._last
        if pos != known:
            frame = self._find(pos)
        if frame < 0:
            return None
        try:
            fcntl.lockf(self.fd, _SHARED, 1, frame)
        except OSError as error:
            if error.errno in _HELD:
                return None
            raise
        key, size, _used = _ENTRY.unpack_from(self._memory, frame * _ENTRY_BYTES)
        data = None
        if key == pos and stop <= size:
            at = self._data_offset + frame * self._frame_bytes
            data = self._memory[at + start : at + stop].tobytes()
        fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, frame)
        self._last = _NO_FRAME if data is None else (pos, frame)
        return data if data is not None or pos != known else self.get(block, start, stop)

    def has(self, block: Block) -> bool:
        """Tell whether a block was here a moment ago."""
        return self._find(block.pos_bytes) >= 0

    def put(self, block: Block, data: bytes) -> None:
        """Put a decoded block here in place of the least recently used one of its set, unless all are in use this moment."""
        if not self._sets or len(data) > self._frame_bytes or self.has(block):
            return
        first = block.pos_bytes // 64 % self._sets * _WAYS
        now = time.monotonic_ns() // 1_000_000 & 0xFFFF_FFFF
        entries = [_ENTRY.unpack_from(self._memory, (first + way) * _ENTRY.size) for way in range(_WAYS)]
        ages = [1 << 33 if not key else now - used & 0xFFFF_FFFF for key, _size, used in entries]
        for way in sorted(range(_WAYS), key=ages.__getitem__, reverse=True)[:2]:
            frame = first + way
            if self._lock(frame, fcntl.LOCK_EX):
                try:
                    _ENTRY.pack_into(self._memory, frame * _ENTRY.size, 0, 0, 0)
                    at = self._data_offset + frame * self._frame_bytes
                    self._memory[at : at + len(data)] = data
                    _ENTRY.pack_into(self._memory, frame * _ENTRY.size, block.pos_bytes, len(data), now)
                finally:
                    self._unlock(frame)
                return

    def begin_ahead(self, block: Block) -> bool:
        """Be the one who decodes a block that nobody waits for, unless somebody does already; True asks for `end_ahead`."""
        return self._lock(_BLOCK_LOCKS_OFFSET + block.pos_bytes, fcntl.LOCK_EX)

    def end_ahead(self, block: Block) -> None:
        """Let others decode it."""
        self._unlock(_BLOCK_LOCKS_OFFSET + block.pos_bytes)

    @contextmanager
    def decoding(self, block: Block) -> Iterator[None]:
        """Be the one who decodes a block; waits for whoever is (not for ever: then two do it)."""
        offset = _BLOCK_LOCKS_OFFSET + block.pos_bytes
        end_s = 0.0
        while not (held := self._lock(offset, fcntl.LOCK_EX)):
            now_s = time.monotonic()
            end_s = end_s or now_s + _PATIENCE_S
            if now_s > end_s:
                break
            time.sleep(_PAUSE_S)
        try:
            yield
        finally:
            if held:
                self._unlock(offset)

    def _find(self, key: int) -> int:
        """Return the frame of a key, -1 when it has none."""
        if not self._sets:
            return -1
        first = key // 64 % self._sets * _WAYS
        found = _SET.unpack_from(self._memory, first * _ENTRY.size)
        keys = found[::3]
        return first + keys.index(key) if key in keys else -1

    def _lock(self, offset: int, kind: int) -> bool:
        try:
            fcntl.lockf(self.fd, kind | fcntl.LOCK_NB, 1, offset)
        except OSError as error:
            if error.errno in _HELD:
                return False
            raise
        return True

    def _unlock(self, offset: int) -> None:
        fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, offset)


_SET = struct.Struct("=" + "QII" * _WAYS)
