"""The chunks of an image that is used before all of it is here: which are wanted, verified, and shown to the workers.

The chain that vouches for a byte: manifest digest -> config blob -> SHA-256 of its chunk -> the byte. A chunk's place on the board
(`uenvd.fuse.arrival`) is set after its bytes were read back from the file and had the right digest. Who brings them is another matter: this node
(`uenvd.daemon.arriving`), or another process or node that writes into the same directory (`uenvd.daemon.following`).

Concurrency: `want`, `stop` and the properties are for any thread; `_check_some` and what it calls for the one that verifies.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from uenvd.errors import DigestMismatch
from uenvd.fuse.arrival import OwnBoard
from uenvd.oci.chunks import ChunkList
from uenvd.oci.manifest import Descriptor
from uenvd.squashfs import Superblock

log = logging.getLogger(__name__)

AHEAD_BYTES: Final = 256 << 10
MOST_AHEAD_BYTES: Final = 8 << 20
NEAR_BYTES: Final = 256 << 10
"""Wanted bytes so near to each other are fetched with what is between."""
_AT_ONCE: Final = 4
"""Chunks verified before somebody who waits is looked for again."""
_SUPERBLOCK_BYTES: Final = 96
_RECENT: Final = 64


class Checking(ABC):
    """What is the same whoever brings the bytes.

    Args:
        label: for the log.
        descriptor: the blob.
        chunks: what verifies it.
        board: where is shown what may be read; stays the caller's.
        changed: called in some thread when workers should look at the board, or a state of this object has changed.

    """

    def __init__(
        self,
        label: str,
        descriptor: Descriptor,
        chunks: ChunkList,
        board: OwnBoard,
        changed: Callable[[], None],
    ) -> None:
        self._label = label
        self._descriptor = descriptor
        self._chunks = chunks
        self._board = board
        self._changed = changed
        self._state = threading.Condition()
        self._stopped = False
        self._unverified: set[int] = set()
        """Chunks whose bytes are in the file. Some are to be verified first: `_first`."""
        self._first: deque[int] = deque()
        self._wanted: dict[int, float] = {}
        """Chunks that somebody waits for, and since when (monotonic)."""
        self._verified_bytes = 0
        self._left = len(chunks)
        self._recent: deque[tuple[int, int]] = deque(maxlen=_RECENT)
        """(End of what was wanted lately, how far was read ahead behind it)."""
        self._last_want_s = 0.0
        self._tables: range | None = None
        self.tables_here = False
        """Whether all metadata of the image may be read: then it can be served."""
        self._since_s: float | None = None
        """When the metadata was here."""
        self._doubted = False
        """Somebody asked for bytes that the board shows."""
        self._told_cause = ""
        self._busy = 0
        """Chunks that are being verified at this moment."""
        self.complete = False
        """The blob is in the cache, and this object has brought it there."""

    # -- for any thread

    @property
    def done_bytes(self) -> int:
        """How many bytes are here."""
        return self._verified_bytes

    @property
    def waiting(self) -> list[tuple[int, int]]:
        """The bytes that somebody waits for, by chunks, in the order of the first question."""
        with self._state:
            return [self._span(number) for number in self._wanted]

    def want(self, first_byte: int, end_byte: int) -> None:
        """Have the chunks of these bytes before all others."""
        board = self._board
        numbers = board.chunks_of(first_byte, end_byte)
        now_s = time.monotonic()
        ahead = None
        with self._state:
            self._last_want_s = now_s
            missing = [number for number in numbers if not board.is_here(number)]
            new = [number for number in missing if number not in self._wanted]
            if new:
                self._wanted.update(dict.fromkeys(new, now_s))
                self._first.extend(number for number in new if number in self._unverified)
                ahead = self._read_ahead(new)
                self._state.notify_all()
        if new:
            self._demand(new, ahead)
        elif numbers and not missing:
            # Late, or the file of who asks cannot be read any more.
            self._doubted = True

    def stop(self) -> None:
        """Make `run` return soon."""
        with self._state:
            self._stopped = True
            self._state.notify_all()

    # -- what differs

    @abstractmethod
    def run(self) -> None:
        """Go on until the blob is here, or cannot be brought this way any more, or `stop`. Blocks; in a thread of its own."""

    @abstractmethod
    def open_for_reader(self) -> int:
        """Return a read-only descriptor of the file; the caller owns it. Raises `StorageError`, `InUse` while there is none."""

    @abstractmethod
    def hint(self, ranges: Sequence[tuple[int, int]]) -> None:
        """These bytes may be wanted soon, in this order."""

    @abstractmethod
    def _read(self, first: int, size_bytes: int) -> bytes | None:
        """Return what is in the file there; None if that cannot be had now. Raises `UenvError` for what ends all."""

    @abstractmethod
    def _is_wrong(self, number: int, error: DigestMismatch) -> None:
        """A chunk's bytes are not right."""

    @abstractmethod
    def _demand(self, numbers: Sequence[int], ahead: tuple[int, int] | None) -> None:
        """Somebody has begun to wait for chunks, and may want the bytes ``ahead`` next."""

    @abstractmethod
    def _before_showing(self) -> None:
        """Right chunks are about to be shown. Raises `UenvError`."""

    @abstractmethod
    def _shown(self, numbers: list[int], *, awaited: bool) -> None:
        """Chunks were shown, of which somebody has ``awaited`` one."""

    # -- the verifying thread

    def _check_some(self) -> bool:
        """Verify chunks that somebody waits for, or a few others; tell whether there were any."""
        with self._state:
            numbers: list[int] = []
            while self._first and len(numbers) < _AT_ONCE:
                number = self._first.popleft()
                if number in self._unverified:
                    numbers.append(number)
            if not numbers:
                numbers = list(itertools.islice(self._unverified, _AT_ONCE))
            self._unverified.difference_update(numbers)
            self._busy = len(numbers)
        try:
            self._check_these(numbers)
        finally:
            with self._state:
                self._busy = 0
                self._state.notify_all()
        return bool(numbers)

    def _check_these(self, numbers: list[int]) -> None:
        right = [number for number in numbers if self._is_right(number)]
        if right:
            self._before_showing()
            with self._state:
                awaited = self._show(right)
            self._shown(right, awaited=awaited)
            if awaited or not self.tables_here:
                self._look_at_tables()
                self._changed()

    def _show(self, numbers: list[int]) -> bool:
        awaited = False
        for number in numbers:
            self._board.set_here(number)
            self._left -= 1
            self._verified_bytes += self._chunks.lengths[number]
            awaited = self._wanted.pop(number, None) is not None or awaited
        self._state.notify_all()
        return awaited

    def _is_right(self, number: int) -> bool:
        first, end = self._span(number)
        data = self._read(first, end - first)
        if data is None:
            return False
        try:
            self._chunks.verify(number, data)
        except DigestMismatch as error:
            self._is_wrong(number, error)
            return False
        return True

    def _look_at_tables(self) -> None:
        """Find out whether the metadata is here, as soon as the superblock says where it is."""
        board = self._board
        if self.tables_here or not board.is_here(0):
            return
        if self._tables is None:
            head = self._read(0, _SUPERBLOCK_BYTES)
            if head is None:
                return
            superblock = Superblock.parse(head, self._descriptor.size_bytes)
            self._tables = board.chunks_of(superblock.inode_table_pos, self._descriptor.size_bytes)
            self.want(superblock.inode_table_pos, self._descriptor.size_bytes)
        if board.covers(self._tables):
            self._since_s = self._last_want_s = time.monotonic()
            self.tables_here = True

    def _set_cause(self, text: str) -> None:
        if text == self._told_cause:
            return
        if text:
            log.warning("%s: bytes that jobs may wait for do not come: %s", self._label, text)
        elif self._told_cause:
            log.info("%s: its bytes come again", self._label)
        self._told_cause = text
        self._board.set_cause(text)

    # -- inside

    def _span(self, number: int) -> tuple[int, int]:
        return self._board.span(range(number, number + 1))

    def _came(self, numbers: Iterable[int]) -> None:
        """Have chunks verified whose bytes are in the file."""
        with self._state:
            new = [number for number in numbers if not self._board.is_here(number)]
            self._unverified.update(new)
            self._first.extend(number for number in new if number in self._wanted or number == 0)
            if new:
                self._state.notify_all()

    def _read_ahead(self, numbers: list[int]) -> tuple[int, int] | None:
        """Return what to fetch behind the wanted chunks: the more, the longer reads go on from one chunk to the next."""
        first, end = self._board.span(range(numbers[0], numbers[-1] + 1))
        ahead = 0
        for index, (last_end, last_ahead) in enumerate(self._recent):
            if last_end <= first <= last_end + max(last_ahead, NEAR_BYTES):
                ahead = min(max(2 * last_ahead, AHEAD_BYTES), MOST_AHEAD_BYTES)
                del self._recent[index]
                break
        self._recent.append((end, ahead))
        if not ahead:
            return None
        reach = self._board.chunks_of(end, end + ahead)
        return self._board.span(reach) if reach else None
