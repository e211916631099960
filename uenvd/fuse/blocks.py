"""Decoded blocks of one image: a bounded cache that decodes each block once, however many threads ask for it at the same moment."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable

from uenvd.squashfs import Block


class _Flight:
    """A block that one thread decodes and others wait for."""

    __slots__ = ("data", "done", "error")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.data: bytes | None = None
        self.error: Exception | None = None


class BlockCache:
    """Least recently used blocks, at most ``limit_bytes`` of them (the blocks in the hands of readers not counted). Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._blocks: OrderedDict[Block, bytes] = OrderedDict()
        self._flights: dict[Block, _Flight] = {}
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """Bytes held now."""
        return self._used_bytes

    def get(self, block: Block) -> bytes | None:
        """Return a block that is there, without waiting for anything."""
        with self._lock:
            data = self._blocks.get(block)
            if data is not None:
                self._blocks.move_to_end(block)
            return data

    def load(self, block: Block, decode: Callable[[Block], bytes], *, keep: Callable[[bytes], bool]) -> bytes:
        """Return a block, from the cache or through ``decode``, which runs in one thread at a time for a block.

        ``keep`` says of the decoded bytes whether they are worth remembering. Raises what ``decode`` raised, in all threads that waited.
        """
        with self._lock:
            data = self._blocks.get(block)
            if data is not None:
                self._blocks.move_to_end(block)
                return data
            flight = self._flights.get(block)
            mine = flight is None
            if flight is None:
                flight = self._flights[block] = _Flight()
        if not mine:
            flight.done.wait()
            if flight.data is None:
                raise _again(flight.error)
            return flight.data
        try:
            data = flight.data = decode(block)
        except Exception as error:
            flight.error = error
            raise
        finally:
            with self._lock:
                del self._flights[block]
                if flight.data is not None and keep(flight.data):
                    self._insert(block, flight.data)
            flight.done.set()
        return data

    def put(self, block: Block, data: bytes) -> None:
        """Remember a block."""
        with self._lock:
            self._insert(block, data)

    def _insert(self, block: Block, data: bytes) -> None:
        if len(data) > self._limit_bytes or block in self._blocks:
            return
        self._blocks[block] = data
        self._used_bytes += len(data)
        while self._used_bytes > self._limit_bytes:
            _old, dropped = self._blocks.popitem(last=False)
            self._used_bytes -= len(dropped)


def _again(error: Exception | None) -> Exception:
    """Return a fresh copy of an error of another thread (one instance raised in many threads would mix their tracebacks)."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or os.strerror(error.errno or 5))
    if error is None:
        return RuntimeError("the decoding thread was interrupted")
    return type(error)(*error.args)
