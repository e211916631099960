"""Images that are used while they are pulled: which chunks are wanted, fetched, verified, and shown to the workers.

The chain that vouches for a byte: manifest digest -> config blob -> SHA-256 of its chunk -> the byte. A chunk's place on the board
(`uenvd.fuse.arrival`) is set after its bytes were read back from the file and had the right digest. When everything is here the digest of the
whole is checked as with any pull, and the file becomes the blob by a rename: who has it open just goes on.

What comes first: what a reader waits for; then what lies behind it, if reads go on and on, and what the trace of an earlier run names; and
when nobody has asked for `QUIET_S`, after `FILL_AFTER_S`, or once an eighth of the image is here, everything else, from the beginning.

A lasting failure ends nothing: it is tried again, what is here is served, and each reader's wait has an end of its own (in the worker, so
also without a daemon). After a restart nothing is trusted: what the part holds is hashed again, chunk by chunk, what is waited for first.

Concurrency: `Arriving` belongs to threads: one that drives the transfer, one that verifies, and those of the transfer; `Arriving.want` and
`Arriving.stop` may be called from any. `uenvd.daemon.lazy` is the side of it that runs in trio.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from uenvd.cache.partial import Partial
from uenvd.cache.ranges import Ranges
from uenvd.cache.transfer import Transfer, Tuning
from uenvd.errors import Cancelled, DigestMismatch, InternalError, InUse, UenvError
from uenvd.fuse.arrival import OwnBoard
from uenvd.oci.chunks import ChunkList
from uenvd.oci.manifest import Descriptor
from uenvd.oci.remote import Remote
from uenvd.squashfs import Superblock

log = logging.getLogger(__name__)

QUIET_S: Final = 0.75
FILL_AFTER_S: Final = 3.0
FILL_AFTER_FRACTION: Final = 8
"""Who has read an eighth of an image reads more of it."""
AHEAD_BYTES: Final = 256 << 10
MOST_AHEAD_BYTES: Final = 8 << 20
NEAR_BYTES: Final = 256 << 10
"""Wanted bytes so near to each other are fetched with what is between."""
_AT_ONCE: Final = 4
"""Chunks verified before somebody who waits is looked for again."""
_TICK_S: Final = 0.1
_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 10.0
_SUPERBLOCK_BYTES: Final = 96
_RECENT: Final = 64


class Arriving:
    """One image on its way into a `Partial`, which this object owns from now on.

    Args:
        label: for the log.
        remote, repository, descriptor: where its bytes are.
        chunks: what verifies them.
        partial: where they go.
        board: where is shown what has come; stays the caller's.
        tuning: of the transfer.
        changed: called in some thread when workers should look at the board, or a state of this object has changed.
        prepare: called first in the thread of `run`: may write into the part what is known of the blob otherwise.
        patient: keep trying before the tables are here, too (for users who are there already).

    """

    def __init__(
        self,
        label: str,
        remote: Remote,
        repository: str,
        descriptor: Descriptor,
        chunks: ChunkList,
        partial: Partial,
        board: OwnBoard,
        *,
        tuning: Tuning,
        changed: Callable[[], None],
        prepare: Callable[[Partial], object] | None = None,
        patient: bool = False,
    ) -> None:
        self._label = label
        self._remote = remote
        self._repository = repository
        self._descriptor = descriptor
        self._chunks = chunks
        self._partial = partial
        self._board = board
        self._tuning = tuning
        self._changed = changed
        self._prepare = prepare
        self._patient = patient
        self._state = threading.Condition()
        self._stopped = False
        self._transfer: Transfer | None = None
        self._unverified: set[int] = set()
        """Chunks whose bytes are in the file, unless they are to be verified first: `_first`."""
        self._first: deque[int] = deque()
        self._bad: dict[int, tuple[int, float]] = {}
        """Chunks that had wrong bytes: how often, and when they are fetched again (monotonic)."""
        self._wanted: dict[int, None] = {}
        self._hints: list[tuple[int, int]] = []
        self._verified_bytes = 0
        self._left = len(chunks)
        self._recent: deque[tuple[int, int]] = deque(maxlen=_RECENT)
        """(End of what was wanted lately, how far was read ahead behind it)."""
        self._last_want_s = 0.0
        self._tables: range | None = None
        self.tables_here = False
        """Whether all metadata of the image may be read: then it can be served."""
        self._since_s: float | None = None
        self._fill = False
        self._told_cause = ""
        self._busy = 0
        """Chunks that are being verified at this moment."""
        self._failure: UenvError | None = None
        self.complete = False

    # -- for any thread

    @property
    def done_bytes(self) -> int:
        """How many bytes were verified."""
        return self._verified_bytes

    def want(self, first_byte: int, end_byte: int) -> None:
        """Fetch the chunks of these bytes before all others."""
        board = self._board
        numbers = board.chunks_of(first_byte, end_byte)
        with self._state:
            self._last_want_s = time.monotonic()
            transfer = self._transfer
            new = [number for number in numbers if not board.is_here(number) and number not in self._wanted]
            if not new:
                return
            self._wanted.update(dict.fromkeys(new))
            self._first.extend(number for number in new if number in self._unverified)
            ahead = self._read_ahead(new)
            self._state.notify_all()
        if transfer is not None:
            self._demand(transfer, new)
            if ahead is not None:
                transfer.hint(*ahead)

    def hint(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch these bytes early, in this order."""
        with self._state:
            self._hints = [one for one in ranges if one[0] < one[1]]
            transfer = self._transfer
        if transfer is not None:
            for first, end in ranges:
                transfer.hint(first, end)

    def stop(self) -> None:
        """Make `run` return soon; what has come stays for a later pull."""
        with self._state:
            self._stopped = True
            self._state.notify_all()
            transfer = self._transfer
        if transfer is not None:
            transfer.stop()

    # -- the driving thread

    def run(self) -> None:
        """Return when the blob is in the cache (`complete`), or after `stop`.

        Raises `InUse` when another writer has taken over, `DigestMismatch` when all chunks are right and the whole is not, and, unless
        ``patient``, whatever goes wrong before the tables are here.
        """
        checker = threading.Thread(
            target=self._check, name=f"verify {self._descriptor.digest[7:19]}", daemon=True
        )
        checker.start()
        try:
            if self._prepare is not None:
                self._prepare(self._partial)
            self._arrived_all(self._partial.held)
            pause_s = _PAUSE_S
            while not self._stopped:
                before = self._partial.held_bytes
                try:
                    self._transfer_once()
                except Cancelled:
                    continue
                except InUse:
                    raise
                except UenvError as error:
                    if not self.tables_here and not self._patient:
                        raise
                    self._set_cause(error.message)
                else:
                    if self._finish():
                        return
                if self._partial.held_bytes > before:
                    pause_s = _PAUSE_S
                self._sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if self._failure is not None:
                raise self._failure
        finally:
            with self._state:
                self._stopped = True
                self._state.notify_all()
            checker.join(1.0)
            self._partial.keep()
            self._changed()

    def _transfer_once(self) -> None:
        transfer = Transfer(
            self._remote,
            self._repository,
            self._descriptor,
            self._partial,
            tuning=self._tuning,
            arrived=self._arrived,
            fill=False,
        )
        with self._state:
            if self._stopped:
                return
            self._transfer = transfer
            wanted, hints, fill = list(self._wanted), self._hints, self._fill
        # The tables are at the end of every image, as far as the last chunk: both ends at once save a round trip.
        self._demand(transfer, [0, len(self._chunks) - 1, *(self._tables or ())])
        self._demand(transfer, wanted)
        for first, end in hints:
            transfer.hint(first, end)
        if fill:
            transfer.start_filling()
        try:
            transfer.run()
        finally:
            with self._state:
                self._transfer = None

    def _finish(self) -> bool:
        """Commit if everything is here and right; else forget what is wrong. Raises as `Partial.commit`."""
        with self._state:
            while not self._stopped and (self._unverified or self._busy):
                self._state.wait(_TICK_S)
            if self._stopped:
                return False
            bad = list(self._bad)
            left = self._left
        if left:
            for number in bad:
                first, end = self._span(number)
                self._partial.discard(first, end)
            return False
        self._partial.commit()
        self.complete = True
        self._board.set_complete()
        return True

    def _sleep(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        with self._state:
            while not self._stopped and (left_s := end_s - time.monotonic()) > 0:
                self._state.wait(left_s)

    # -- the verifying thread

    def _check(self) -> None:
        try:
            while not self._stopped:
                done = self._check_some()
                self._look_at_the_clock()
                if not done:
                    with self._state:
                        if not self._stopped and not self._unverified and not self._first:
                            self._state.wait(_TICK_S)
        except UenvError as error:
            self._fail(error)
        except Exception as error:
            log.exception("%s: verifying failed", self._label)
            self._fail(InternalError(f"verifying {self._label} failed unexpectedly: {error}"))

    def _fail(self, error: UenvError) -> None:
        with self._state:
            if not self._stopped:
                self._failure = error
        self.stop()

    def _check_some(self) -> bool:
        """Verify one chunk that somebody waits for, or a few others; tell whether there was one."""
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
            # In the map before they are shown: a successor of this daemon must not fetch into what is being read.
            self._partial.record()
            with self._state:
                awaited = self._show(right)
            if awaited or not self.tables_here:
                self._look_at_tables()
                self._changed()

    def _show(self, numbers: list[int]) -> bool:
        awaited = False
        for number in numbers:
            self._board.set_here(number)
            self._left -= 1
            self._verified_bytes += self._chunks.lengths[number]
            self._bad.pop(number, None)
            if number in self._wanted:
                del self._wanted[number]
                awaited = True
        self._state.notify_all()
        return awaited

    def _is_right(self, number: int) -> bool:
        first, end = self._span(number)
        try:
            data = self._partial.read_at(first, end - first)
        except ValueError:
            return False  # forgotten meanwhile
        try:
            self._chunks.verify(number, data)
        except DigestMismatch as error:
            self._reject(number, error)
            return False
        return True

    def _reject(self, number: int, error: DigestMismatch) -> None:
        with self._state:
            times = self._bad.get(number, (0, 0.0))[0] + 1
            pause_s = 0.0 if times == 1 else min(_PAUSE_S * 2**times, _LONGEST_PAUSE_S)
            self._bad[number] = times, time.monotonic() + pause_s
            transfer = self._transfer
        if times <= 2:
            log.warning("%s: %s; it is fetched again", self._label, error)
        if transfer is not None:
            transfer.distrust_mirrors()
        self._remote = self._remote.without_mirrors()
        if times > 1:
            self._set_cause(error.message)

    def _look_at_tables(self) -> None:
        """Find out whether the metadata is here, as soon as the superblock says where it is."""
        board = self._board
        if self.tables_here or not board.is_here(0):
            return
        if self._tables is None:
            superblock = Superblock.parse(
                self._partial.read_at(0, _SUPERBLOCK_BYTES), self._descriptor.size_bytes
            )
            self._tables = board.chunks_of(superblock.inode_table_pos, self._descriptor.size_bytes)
            self.want(superblock.inode_table_pos, self._descriptor.size_bytes)
        if board.covers(self._tables):
            self._since_s = self._last_want_s = time.monotonic()
            self.tables_here = True

    def _look_at_the_clock(self) -> None:
        now_s = time.monotonic()
        again: list[int] = []
        with self._state:
            transfer = self._transfer
            if transfer is not None:
                for number, (times, due_s) in self._bad.items():
                    if now_s >= due_s:
                        self._bad[number] = times, now_s + _LONGEST_PAUSE_S
                        again.append(number)
            start = (
                transfer is not None
                and not self._fill
                and self._since_s is not None
                and (
                    now_s - self._last_want_s > QUIET_S
                    or now_s - self._since_s > FILL_AFTER_S
                    or self._verified_bytes * FILL_AFTER_FRACTION > self._descriptor.size_bytes
                )
            )
            self._fill = self._fill or start
        if transfer is None:
            return
        for number in again:
            transfer.reject(*self._span(number))
            transfer.demand(*self._span(number))
        if start:
            transfer.start_filling()
        if transfer.trouble or not self._bad:
            self._set_cause(transfer.trouble)

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

    def _arrived(self, first: int, end: int) -> None:
        """Take note of bytes on disk (in a thread of the transfer)."""
        transfer = self._transfer
        if transfer is None:
            return
        here = [number for number in self._board.chunks_of(first, end) if transfer.has(*self._span(number))]
        self._came(here)

    def _arrived_all(self, held: Ranges) -> None:
        self._came([number for number in range(len(self._chunks)) if held.covers(*self._span(number))])

    def _came(self, numbers: Sequence[int]) -> None:
        with self._state:
            new = [number for number in numbers if not self._board.is_here(number)]
            self._unverified.update(new)
            self._first.extend(number for number in new if number in self._wanted or number == 0)
            if new:
                self._state.notify_all()

    def _demand(self, transfer: Transfer, numbers: Sequence[int]) -> None:
        runs = Ranges(self._span(number) for number in numbers if not self._board.is_here(number))
        for first, end in runs:
            transfer.demand(first, end)

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
