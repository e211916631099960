"""How much an LZO1X stream unpacks to, without unpacking it: the library takes no bound, and a few bytes can stand for many.

A stream is a sequence of instructions. Their first byte tells: 64..255 a match of 3..8 bytes, 1 byte follows; 32..63 and 16..31 matches
of any length, 2 bytes follow; 0..15 a run of literals, or, after an instruction that brought literals along, a short match, 1 byte
follows. A length of zero is continued in the next bytes: each zero adds 255, the first other byte ends it. The two lowest bits of a match's
last byte but one, or of its first, are the number of literals that come along. A match 16..31 of distance zero ends the stream.

Source: Linux Documentation/staging/lzo.rst, lib/lzo/lzo1x_decompress_safe.c.
"""

from __future__ import annotations

from uenvd.squashfs.base import damaged

_MOST_FOR_A_BYTE = 73
"""No input byte gives more, zero bytes apart: 4 bytes give a match of 288 bytes. One more for literals, which stand for themselves."""
_MOST_FOR_A_ZERO = 255


def bound_bytes(data: bytes) -> int:
    """Return a size that the stream surely does not exceed. Quick and wide: up to a hundred times the real size."""
    return _MOST_FOR_A_BYTE * len(data) + _MOST_FOR_A_ZERO * data.count(0)


def exceeds(data: bytes, limit_bytes: int) -> bool:
    """Tell whether the stream unpacks to more than ``limit_bytes``, in time linear in its length and no memory.

    A stream that breaks off has the size of what is there; whether it is sound is for the decompressor to say, except for a length that is
    not ended: `FormatError`.
    """
    try:
        return _size_bytes(data, limit_bytes) > limit_bytes
    except IndexError:
        raise damaged("lzo: the stream breaks off within an instruction") from None


def _size_bytes(data: bytes, limit_bytes: int) -> int:
    """Return the size, or any number above the limit. Raises `IndexError`."""
    at = 0
    total = 0
    literals = 0  # that came with the last instruction; 4: it was a run of them
    if data and data[0] > 17:
        total = literals = data[0] - 17
        at = 1 + literals
        literals = min(literals, 4)
    end = len(data)
    while at < end and total <= limit_bytes:
        first = data[at]
        at += 1
        if first >= 64:
            length = (first >> 5) + 1
            at += 1
            literals = first & 3
        elif first >= 16:
            mask = 31 if first >= 32 else 7
            length = first & mask
            if length == 0:
                length, at = _continued(data, at, mask)
            length += 2
            low, high = data[at], data[at + 1]
            if mask == 7 and not first & 8 and low < 4 and high == 0:
                return total
            at += 2
            literals = low & 3
        elif literals == 0:
            length = first
            if length == 0:
                length, at = _continued(data, at, 15)
            length += 3
            at += length
            literals = 4
            total += length
            continue
        else:
            length = 3 if literals == 4 else 2
            at += 1
            literals = first & 3
        at += literals
        total += length + literals
    return total


def _continued(data: bytes, at: int, base: int) -> tuple[int, int]:
    """Return a length that is continued at ``at``, and where the rest begins. Raises `IndexError`."""
    start = at
    while data[at] == 0:
        at += 1
    return base + 255 * (at - start) + data[at], at + 1
