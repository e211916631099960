"""Images that are used while this node pulls them: what is fetched first, and what becomes of wrong bytes (`uenvd.daemon.checking` verifies).

When everything is here the digest of the whole is checked as with any pull, and the file becomes the blob by a rename: who has it open just
goes on.

What comes first: what a reader waits for, here or on a node that follows; then what lies behind it, if reads go on and on, and what the trace
of an earlier run names; and when nobody has asked for `QUIET_S`, after `FILL_AFTER_S`, or once an eighth of the image is here, everything else,
from the beginning.

A lasting failure ends nothing: it is tried again, what is here is served, and each reader's wait has an end of its own (in the worker, so
also without a daemon). After a restart nothing is trusted: what the part holds is hashed again, chunk by chunk, what is waited for first.

Concurrency: `Arriving` belongs to threads: one that drives the transfer, one that verifies, those of the transfer and the one that looks after
nodes that follow; `Arriving.want` and `Arriving.stop` may be called from any. `uenvd.daemon.lazy` is the side of it that runs in trio.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from uenvd.cache.hosting import Hosting
from uenvd.cache.partial import Partial
from uenvd.cache.ranges import Ranges
from uenvd.cache.transfer import Transfer, Tuning
from uenvd.daemon.checking import Checking
from uenvd.errors import Cancelled, DigestMismatch, InternalError, InUse, UenvError
from uenvd.fuse.arrival import OwnBoard
from uenvd.oci.chunks import ChunkList
from uenvd.oci.manifest import Descriptor
from uenvd.oci.remote import Remote

log = logging.getLogger(__name__)

QUIET_S: Final = 0.75
FILL_AFTER_S: Final = 3.0
FILL_AFTER_FRACTION: Final = 8
"""Who has read an eighth of an image reads more of it."""
_TICK_S: Final = 0.1
_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 10.0


class Arriving(Checking):
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
        super().__init__(label, descriptor, chunks, board, changed)
        self._remote = remote
        self._repository = repository
        self._partial = partial
        self._tuning = tuning
        self._prepare = prepare
        self._patient = patient
        self._hosting = Hosting(partial, self.want)
        self._transfer: Transfer | None = None
        self._bad: dict[int, tuple[int, float]] = {}
        """Chunks that had wrong bytes: how often, and when they are fetched again (monotonic)."""
        self._hints: list[tuple[int, int]] = []
        self._fill = False
        self._failure: UenvError | None = None

    # -- for any thread

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
        super().stop()
        transfer = self._transfer
        if transfer is not None:
            transfer.stop()

    def open_for_reader(self) -> int:
        """See `Checking.open_for_reader`."""
        return self._partial.open_for_reader()

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
            with self._hosting:
                self._transfer_all()
            if self._failure is not None:
                raise self._failure
        finally:
            with self._state:
                self._stopped = True
                self._state.notify_all()
            checker.join(1.0)
            self._partial.keep()
            self._changed()

    def _transfer_all(self) -> None:
        """Return when the blob is in the cache, or after `stop`."""
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
        self._fetch(transfer, [0, len(self._chunks) - 1, *(self._tables or ())])
        self._fetch(transfer, wanted)
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

    def _before_showing(self) -> None:
        # In the map before they are shown: a successor of this daemon must not fetch into what is being read.
        self._partial.record()

    def _shown(self, numbers: list[int], *, awaited: bool) -> None:
        with self._state:
            for number in numbers:
                self._bad.pop(number, None)
        if awaited or not self._fill:
            self._hosting.note()

    def _read(self, first: int, size_bytes: int) -> bytes | None:
        try:
            return self._partial.read_at(first, size_bytes)
        except ValueError:
            return None  # forgotten meanwhile

    def _is_wrong(self, number: int, error: DigestMismatch) -> None:
        self._reject(number, error)

    def _demand(self, numbers: Sequence[int], ahead: tuple[int, int] | None) -> None:
        transfer = self._transfer
        if transfer is not None:
            self._fetch(transfer, numbers)
            if ahead is not None:
                transfer.hint(*ahead)

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

    def _look_at_the_clock(self) -> None:
        if self._doubted:
            self._doubted = False
            self._partial.check()
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

    # -- inside

    def _arrived(self, first: int, end: int) -> None:
        """Take note of bytes on disk (in a thread of the transfer)."""
        transfer = self._transfer
        if transfer is None:
            return
        here = [number for number in self._board.chunks_of(first, end) if transfer.has(*self._span(number))]
        self._came(here)

    def _arrived_all(self, held: Ranges) -> None:
        self._came([number for number in range(len(self._chunks)) if held.covers(*self._span(number))])

    def _fetch(self, transfer: Transfer, numbers: Sequence[int]) -> None:
        runs = Ranges(self._span(number) for number in numbers if not self._board.is_here(number))
        for first, end in runs:
            transfer.demand(first, end)
