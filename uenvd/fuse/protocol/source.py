"""Where the bytes of an image come from, and what is said when they are not there yet."""

from __future__ import annotations

from typing import Protocol


class Missing(Exception):
    """Bytes of the image that have not arrived: ``[first_byte, end_byte)``."""

    def __init__(self, first_byte: int, end_byte: int) -> None:
        super().__init__(f"bytes {first_byte}..{end_byte} have not arrived")
        self.first_byte = first_byte
        self.end_byte = end_byte


class Source(Protocol):
    """The bytes of one image. Positions are relative to its superblock."""

    def read(self, pos_bytes: int, size_bytes: int) -> bytes:
        """Return the bytes; fewer at the end of the image only. Raises `Missing`, `OSError` (its errno goes to the reader)."""

    def size_bytes(self) -> int:
        """Return the size of the image file from the superblock on. Raises `OSError`."""

    def want(self, first_byte: int, end_byte: int) -> None:
        """Ask for missing bytes, without waiting; asking twice does no harm."""

    def woken(self) -> None:
        """Take notice of what made the wake descriptor readable, so that it is no longer, without waiting."""

    def will_need(self, pos_bytes: int, size_bytes: int) -> None:
        """Bytes that will be read soon: a hint, without waiting."""

    def done_with(self, pos_bytes: int, size_bytes: int) -> None:
        """Bytes that lie decoded in a better place now: a hint, without waiting."""
