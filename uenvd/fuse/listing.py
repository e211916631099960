"""Directory listings that a reader fetches in many small pieces, in bounded memory and without starting over for each piece.

A directory of ordinary size is kept as a whole. Of a huge one only the place is kept where a reader stopped: the reader that comes with
exactly this offset goes on there, any other at the next place before it, or at the front.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice

from uenvd.squashfs import DirEntry, Image, Inode

_WHOLE_LISTING_BYTES = 256 << 10  # on disk; at least 9 bytes an entry, so at most 29,000 entries
_WHOLE_TOTAL_BYTES = 1 << 20  # of all listings kept: some 16 MB in memory at worst
_CURSORS = 64

Numbered = Iterator[tuple[int, DirEntry]]


class _Cursor:
    """Entries still to come of a huge directory, and the index of the next."""

    __slots__ = ("_entries", "_pending", "index")

    def __init__(self, entries: Iterator[DirEntry], index: int) -> None:
        self._entries = entries
        self.index = index
        self._pending: DirEntry | None = None

    def numbered(self) -> Numbered:
        """Yield (index, entry); an entry counts as taken only when the next one is asked for."""
        first = () if self._pending is None else (self._pending,)
        for entry in chain(first, self._entries):
            self._pending = entry
            yield self.index, entry
            self._pending = None
            self.index += 1

    def skip_to(self, index: int) -> None:
        """Go on to the entry of this index, or to the end."""
        for at, _entry in self.numbered():
            if at == index:
                return


class Listings:
    """The listings of one image. For one thread at a time."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._whole: OrderedDict[int, tuple[tuple[DirEntry, ...], int]] = OrderedDict()
        self._whole_bytes = 0
        self._cursors: OrderedDict[tuple[int, int], _Cursor] = OrderedDict()

    @contextmanager
    def open(self, ino: int, directory: Inode, start: int) -> Iterator[Numbered]:
        """Give the entries of a directory with their index, from index ``start`` on. Raises `FormatError` while iterating."""
        if directory.size_bytes <= _WHOLE_LISTING_BYTES:
            yield (
                (start + i, entry)
                for i, entry in enumerate(islice(self._listing(ino, directory), start, None))
            )
            return
        cursor = self._cursor(ino, directory, start)
        intact = True
        try:
            yield cursor.numbered()
        except Exception:
            intact = False  # an iterator that raised looks like one at its end
            raise
        finally:
            if intact:
                self._cursors[ino, cursor.index] = cursor
                if len(self._cursors) > _CURSORS:
                    self._cursors.popitem(last=False)

    def _cursor(self, ino: int, directory: Inode, start: int) -> _Cursor:
        """Return a cursor at ``start``: a kept one that is there, or the last one before.

        Workers take turns at one reader, so each of them finds its own cursor behind by what the others have answered.
        """
        places = [index for number, index in self._cursors if number == ino and index <= start]
        if not places:
            return _Cursor(islice(self._image.entries(directory), start, None), start)
        cursor = self._cursors.pop((ino, max(places)))
        cursor.skip_to(start)
        return cursor

    def _listing(self, ino: int, directory: Inode) -> tuple[DirEntry, ...]:
        known = self._whole.get(ino)
        if known is not None:
            self._whole.move_to_end(ino)
            return known[0]
        listing = tuple(self._image.entries(directory))
        self._whole[ino] = listing, directory.size_bytes
        self._whole_bytes += directory.size_bytes
        while self._whole_bytes > _WHOLE_TOTAL_BYTES and len(self._whole) > 1:
            _ino, (_listing, size_bytes) = self._whole.popitem(last=False)
            self._whole_bytes -= size_bytes
        return listing
