"""What every module of the reader uses: the read callback, inode references, the error for damaged bytes, a bounded cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NewType, TypeVar

from uenvd.errors import FormatError

InodeRef = NewType("InodeRef", int)
"""Where an inode lies, 48 bits: position of its metadata block relative to the inode table << 16 | offset in the decoded block."""

ReadAt = Callable[[int, int], bytes]
"""``read(pos_bytes, size_bytes) -> bytes`` of the image; may return less at the end of the image. Its exceptions pass through."""

ABSENT = 0xFFFF_FFFF_FFFF_FFFF
"""Table position of a table that the image does not have."""

K = TypeVar("K")
V = TypeVar("V")


def damaged(what: str) -> FormatError:
    """Return the error for bytes that break the format; ``what`` names the structure and the offending value."""
    return FormatError(f"damaged squashfs image: {what}")


def read_exactly(read: ReadAt, pos_bytes: int, size_bytes: int, what: str) -> bytes:
    """Read ``size_bytes`` at ``pos_bytes``. Raises `FormatError` when the image ends before."""
    data = read(pos_bytes, size_bytes)
    if len(data) != size_bytes:
        raise damaged(
            f"it ends inside the {what} (wanted {size_bytes} bytes at {pos_bytes}, got {len(data)})"
        )
    return data


class GenerationCache(Generic[K, V]):
    """A bounded cache whose hits cost one dictionary lookup and take no lock.

    Entries live in two generations. A new entry, or an old one that is asked for, goes to the young generation; when that reaches half
    of ``limit`` (in the unit of the weights: bytes, entries) it becomes the old one and the former old one is dropped. What is used at
    least once per generation therefore stays, as in an LRU, and the sum of weights stays at most ``limit`` plus two entries.

    Concurrency: each step is one atomic dictionary operation; a race between threads costs at most a second computation of a value or
    a slightly early turn of the generations, never a wrong value.
    """

    __slots__ = ("_half", "_old", "_young", "_young_weight")

    def __init__(self, limit: int) -> None:
        self._half = max(1, limit // 2)
        self._young: dict[K, tuple[V, int]] = {}
        self._old: dict[K, tuple[V, int]] = {}
        self._young_weight = 0

    def get(self, key: K) -> V | None:
        """Return the value, or None."""
        found = self._young.get(key)
        if found is None:
            found = self._old.get(key)
            if found is None:
                return None
            self.put(key, *found)
        return found[0]

    def put(self, key: K, value: V, weight: int = 1) -> None:
        """Insert the value."""
        if self._young_weight >= self._half:
            self._old, self._young = self._young, {}
            self._young_weight = 0
        self._young[key] = (value, weight)
        self._young_weight += weight

    def weight(self) -> int:
        """Return the sum of the weights."""
        return sum(
            weight for generation in (self._young, self._old) for _value, weight in generation.values()
        )
