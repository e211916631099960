"""The transfer of one blob: ranges over several connections, hashed in order while they arrive.

Concurrency: `Transfer.run` blocks in the caller's thread and starts daemon threads: workers (a connection each), one that hashes behind the
first gap, one that makes durable. All state is under one lock, which nobody holds across I/O. A thread that hangs in a system call when the
transfer is over (a connection that is being made, a stuck disk) cannot write any more: `Partial` refuses it.

What bounds a transfer: a connection attempt, the head of an answer, silence, the rate over a window, each piece as a whole (at
`Tuning.min_rate_bytes_per_s`), and the failures of a piece in a row. Each piece is repeated alone, from the byte it got to.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from uenvd.cache.inorder import BUFFER_BYTES, Hand, InOrder
from uenvd.cache.manners import step_back
from uenvd.cache.pace import Pace
from uenvd.cache.partial import Partial
from uenvd.cache.schedule import Schedule, Task
from uenvd.errors import (
    Cancelled,
    InternalError,
    InUse,
    RegistryDenied,
    RegistryUnreachable,
    StorageError,
    UenvError,
)
from uenvd.oci.manifest import Descriptor
from uenvd.oci.remote import BlobRange, Progress, Remote, never, no_progress

log = logging.getLogger(__name__)

NUDGE_BYTES: Final = 1 << 20
"""So much is read back for the hash at once, while more comes."""
RECORD_BYTES: Final = 4 << 20
"""After `kill -9` at most so much of each piece is fetched again."""
RECORD_S: Final = 0.25
FLUSH_BYTES: Final = 64 << 20
FLUSH_S: Final = 5.0
REPORT_S: Final = 0.1
ATTEMPTS: Final = 6
"""Failures of one piece in a row; each `GAIN_BYTES` gained start the count again."""
DENIALS: Final = 3
GAIN_BYTES: Final = 16 << 10
BACKOFF_S: Final = 0.5
BACKOFF_CAP_S: Final = 15.0
RETRY_AFTER_CAP_S: Final = 60.0
RATE_WINDOW_S: Final = 20.0
PIECE_GRACE_S: Final = 120.0
URGENT_CONNECTIONS: Final = 2
YIELD_S: Final = 5.0
"""How long the background lets demanded bytes go first before it takes its turn."""
SMALL_UNIT_BYTES: Final = 512 << 10
"""So much is received at a time where somebody waits for bytes before the whole is there."""
_TICK_S: Final = 0.1
_LOOK_S: Final = 0.05
"""How late a cancellation may be noticed."""
_END_S: Final = 0.15
"""How long the end waits for threads; they cannot write any more."""
STUCK_S: Final = 120.0
"""How long the file system may take for one operation."""


@dataclass(frozen=True)
class Tuning:
    """How a blob is fetched."""

    connections: int = 4
    piece_bytes: int = 36 << 20
    min_rate_bytes_per_s: int = 16 << 10
    """A connection that is slower for `RATE_WINDOW_S` is given up, and a piece that is slower as a whole fails the transfer."""


Arrived = Callable[[int, int], None]
"""Called with (first byte, end byte) of what is on disk now, in the thread of a worker: it must be quick."""


class Transfer:
    """Moves one blob into a `Partial`, which stays the caller's: he commits, keeps or aborts it after `run`.

    ``fill`` false: only what is demanded is fetched, until `start_filling`. Ranges are reported to ``arrived`` unverified; a caller that
    uses them before the end checks them himself (and calls `reject` for wrong ones). The whole is hashed here.
    """

    def __init__(
        self,
        remote: Remote,
        repository: str,
        descriptor: Descriptor,
        partial: Partial,
        *,
        tuning: Tuning | None = None,
        arrived: Arrived | None = None,
        fill: bool = True,
    ) -> None:
        self.resumed_bytes = partial.held_bytes
        """How many bytes were there before."""
        self.trouble = ""
        """Why bytes do not come at the moment; empty while they do."""
        self.used_mirror = False
        """Whether bytes came from a mirror, which nobody vouches for but the digest."""
        self._remote = remote
        self._repository = repository
        self._descriptor = descriptor
        self._partial = partial
        self._tuning = tuning or Tuning()
        self._arrived = arrived
        self._unit_bytes = BUFFER_BYTES if arrived is None else SMALL_UNIT_BYTES
        self._state = threading.Condition()
        """For the workers. The hash and the caller have signals of their own, so that a megabyte more does not wake everybody."""
        self._in_order = InOrder(partial, self._stopped)
        self._ended = threading.Event()
        self._schedule = Schedule(
            descriptor.size_bytes,
            partial.held,
            piece_bytes=self._tuning.piece_bytes,
            connections=self._tuning.connections,
            fill=fill,
        )
        self._over = False
        self._error: UenvError | None = None
        self._hashed = False
        self._answered = False
        """The first answer has come: until then one connection asks, because it may bring the whole blob."""
        self._streaming = False
        self._asking = 0
        self._pace = Pace(self._tuning.connections)
        self._quiet_until = 0.0
        self._threads: list[threading.Thread] = []
        self._started_urgent = False

    # -- for the caller

    @property
    def done_bytes(self) -> int:
        """How many bytes are on disk."""
        return self._schedule.held.total_bytes

    def run(self, *, progress: Progress = no_progress, cancelled: Callable[[], bool] = never) -> None:
        """Return when every byte is on disk and hashed. ``progress`` is called at most ten times a second.

        Raises `Cancelled` (also after `stop`) within 0.3 s, `RegistryUnreachable`, `RegistryDenied`, `NotFound`, `RegistryError`,
        `DigestMismatch` (a size is wrong), `StorageFull`, `StorageError`, `InUse` (the claim on the blob was lost).
        """
        self._start(self._hash, "hash")
        self._start(self._flush, "flush")
        for _ in range(self._tuning.connections):
            self._start(self._work, "fetch")
        total = self._descriptor.size_bytes
        try:
            reported_s = time.monotonic()
            while not self._ended.wait(_LOOK_S):
                if cancelled():
                    break
                if (now_s := time.monotonic()) - reported_s >= REPORT_S:
                    reported_s = now_s
                    progress(self.done_bytes, total)
                if self._partial.stuck_s > STUCK_S:
                    self._fail(
                        StorageError(
                            f"{self._partial.path}: the file system has not answered for {STUCK_S:g} s",
                            hint="see whether the server of the cache's file system is up",
                        )
                    )
        finally:
            self.stop()
            end = time.monotonic() + _END_S
            for thread in self._threads:
                thread.join(max(0.0, end - time.monotonic()))
        if self._error is not None:
            raise self._error
        if not self._hashed:
            raise Cancelled("the pull was cancelled")
        progress(total, total)

    def demand(self, first_byte: int, end_byte: int) -> None:
        """Fetch these bytes before all others. Returns at once; any thread may call it."""
        with self._state:
            self._schedule.demand(first_byte, end_byte)
            start = not self._started_urgent and not self._over
            self._started_urgent = True
            self._state.notify_all()
        if start:
            for _ in range(URGENT_CONNECTIONS):
                self._start(self._work_urgent, "demand")

    def hint(self, first_byte: int, end_byte: int) -> None:
        """Fetch these bytes after what is demanded, before all others, also while the rest is not fetched yet."""
        with self._state:
            self._schedule.hint(first_byte, end_byte)
            self._state.notify_all()

    def distrust_mirrors(self) -> None:
        """Ask the place itself from now on: a mirror had wrong bytes."""
        self._remote = self._remote.without_mirrors()

    def has(self, first_byte: int, end_byte: int) -> bool:
        """Tell whether these bytes are on disk."""
        with self._state:
            return self._schedule.held.covers(first_byte, end_byte)

    def start_filling(self) -> None:
        """Fetch everything from now on."""
        with self._state:
            self._schedule.fill = True
            self._state.notify_all()

    def reject(self, first_byte: int, end_byte: int) -> None:
        """Fetch bytes again that turned out to be wrong."""
        self._partial.discard(first_byte, end_byte)
        with self._state:
            self._schedule.discard(first_byte, end_byte)
            self._state.notify_all()

    def stop(self) -> None:
        """Make `run` raise `Cancelled`; any thread may call it."""
        with self._state:
            self._end()

    def _end(self) -> None:
        """Tell all threads that it is over. Call with the lock."""
        self._over = True
        self._state.notify_all()
        self._in_order.nudge()
        self._ended.set()

    # -- threads

    def _start(self, work: Callable[[], None], name: str) -> None:
        thread = threading.Thread(
            target=self._guarded, args=(work,), name=f"{name} {self._descriptor.digest[7:19]}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Cancelled:
            pass
        except UenvError as error:
            self._fail(error)
        except Exception as error:
            log.exception("the transfer of %s failed", self._descriptor.digest)
            self._fail(InternalError(f"the transfer failed unexpectedly: {error}"))

    def _fail(self, error: UenvError) -> None:
        with self._state:
            # What threads meet because the transfer is over is no news.
            if self._error is None and not (self._over and isinstance(error, InUse)):
                self._error = error
            self._end()

    def _stopped(self) -> bool:
        return self._over

    def _hash(self) -> None:
        # What steps back waits its turn, and bytes that wait for their hash too long have to be read back.
        self._in_order.run(self._is_hashed)

    def _is_hashed(self) -> bool:
        if self._partial.hashed_bytes < self._descriptor.size_bytes:
            return False
        with self._state:
            if self._schedule.complete:
                self._hashed = not self._over
                self._end()
        return self._over

    def _flush(self) -> None:
        step_back()
        last = time.monotonic()
        while not self._ended.wait(_TICK_S):
            waiting = self._partial.undurable_bytes
            if waiting >= FLUSH_BYTES or (waiting and time.monotonic() - last > FLUSH_S):
                self._partial.sync()
                last = time.monotonic()

    def _work(self) -> None:
        step_back()
        self._serve(urgent_only=False)

    def _work_urgent(self) -> None:
        self._serve(urgent_only=True)

    def _serve(self, *, urgent_only: bool) -> None:
        hand = Hand(self._in_order)
        while (task := self._next(urgent_only)) is not None:
            try:
                self._fetch(task, hand)
            finally:
                with self._state:
                    self._asking -= not urgent_only
                    self._schedule.give_back(task)
                    self._state.notify_all()

    def _next(self, urgent_only: bool) -> Task | None:
        with self._state:
            # Also when all is here: as long as it is not hashed, some of it may turn out to be wrong.
            while not self._over:
                # Who fetches what is demanded is never held up by connections that give way to it.
                may = urgent_only or self._asking < (self._pace.allowed if self._answered else 1)
                if may and not self._streaming:
                    task = self._schedule.take(urgent_only=urgent_only, alone=self._pace.alone)
                    if task is not None:
                        self._asking += not urgent_only
                        return task
                self._state.wait(_TICK_S)
        return None

    # -- one piece

    def _fetch(self, task: Task, hand: Hand) -> None:
        """Bring a piece, with as many attempts as it takes. Raises the last failure."""
        failures = 0
        give_up = time.monotonic() + PIECE_GRACE_S + (task.end - task.at) / self._tuning.min_rate_bytes_per_s
        while not self._over and task.at < task.end:
            before = self.done_bytes if self._streaming else task.at
            try:
                self._wait_quiet()
                self._attempt(task, hand)
                self._went_well()
            except (RegistryUnreachable, RegistryDenied) as error:
                self.trouble = error.message
                gained = task.at - before
                failures = 1 if gained >= GAIN_BYTES else failures + 1
                # Who was served before may be refused by a token that is withdrawn at this moment; not twice.
                most = (
                    ATTEMPTS if isinstance(error, RegistryUnreachable) else DENIALS if self._answered else 1
                )
                if failures >= most or time.monotonic() > give_up:
                    raise
                self._pause(error, failures)

    def _attempt(self, task: Task, hand: Hand) -> None:
        blob = self._remote.open_range(self._repository, self._descriptor, task.at, task.end, self._stopped)
        try:
            if blob.ignores_range:
                self._take_whole(blob, task, hand)
                return
            with self._state:
                self._answered = True
                self._state.notify_all()
            self._receive(blob, task, hand)
        finally:
            blob.close()

    def _receive(self, blob: BlobRange, task: Task, hand: Hand) -> None:
        """Write what a connection brings, until the end of the piece, which may come closer meanwhile."""
        self.used_mirror = self.used_mirror or not blob.trusted
        at, end = blob.first_byte, blob.end_byte
        rate = _Rate(self._tuning.min_rate_bytes_per_s)
        with self._recording() as note:
            while at < min(end, task.end) and not self._over:
                if not task.urgent and at >= task.hurry_until:
                    self._give_way(task, rate)
                # Each look at the clock of a thread is a system call under the interpreter's lock.
                idle_s = None if self._pace.decided else _idle_s()
                unit_bytes = SMALL_UNIT_BYTES if self._pace.is_timing_one else self._unit_bytes
                count = blob.readinto(hand.buffer[: min(end - at, unit_bytes)])
                rate.gained(count)
                if idle_s is not None:
                    self._note_pace(count, _idle_s() - idle_s)
                skip = max(0, task.at - at)
                at += count
                useful = min(at, task.end) - task.at
                if useful > 0:
                    self._write(task.at, hand, skip, skip + useful)
                    task.at += useful
                note(count)

    def _take_whole(self, blob: BlobRange, task: Task, hand: Hand) -> None:
        """Take the blob as one stream from a place that ignores ranges. One connection does that, the others wait."""
        with self._state:
            if self._streaming:
                self._state.wait(_TICK_S)
                return
            self._streaming = self._answered = True
            self._state.notify_all()
        self.used_mirror = self.used_mirror or not blob.trusted
        at, rate = blob.first_byte, _Rate(self._tuning.min_rate_bytes_per_s)
        try:
            with self._recording() as note:
                while at < blob.end_byte and not self._over and not self._schedule.complete:
                    count = blob.readinto(hand.buffer)
                    rate.gained(count)
                    with self._state:
                        gaps = list(self._schedule.held.gaps(at, at + count))
                    for first, end in gaps:
                        self._write(first, hand, first - at, end - at, whole=len(gaps) == 1)
                    at += count
                    note(count)
        finally:
            with self._state:
                self._streaming = False
                task.at = min(task.end, self._schedule.held.run_from(task.at))
                self._state.notify_all()

    def _write(self, first: int, hand: Hand, start: int, end: int, *, whole: bool = True) -> None:
        """Write a part of a buffer, tell about it, and have it hashed; ``whole``: the rest of the buffer is not needed any more."""
        mark = self._partial.write_at(first, hand.buffer[start:end])
        with self._state:
            self._schedule.written(first, first + end - start)
            frontier = self._schedule.held.run_from(0)
            complete = self._schedule.complete
            if complete:
                self._state.notify_all()
        if self._arrived is not None:
            self._arrived(first, first + end - start)
        taken = whole and hand.passes_on(first, start, end, mark, frontier)
        if complete or (not taken and frontier - self._partial.hashed_bytes >= NUDGE_BYTES):
            self._in_order.nudge()

    @contextmanager
    def _recording(self) -> Iterator[Callable[[int], None]]:
        """Put what arrives into the map of the partial now and then, and at the end whatever it is."""
        since, last = 0, time.monotonic()

        def note(count: int) -> None:
            nonlocal since, last
            since += count
            if since >= RECORD_BYTES or time.monotonic() - last > RECORD_S:
                self._partial.record()
                since, last = 0, time.monotonic()

        try:
            yield note
        finally:
            self._partial.record()

    # -- manners

    def _wait_quiet(self) -> None:
        with self._state:
            while not self._over and (left := self._quiet_until - time.monotonic()) > 0:
                self._state.wait(min(left, _TICK_S))
            if self._over:
                raise Cancelled("the pull was cancelled")

    def _pause(self, error: RegistryUnreachable | RegistryDenied, failures: int) -> None:
        pause_s = min(BACKOFF_CAP_S, BACKOFF_S * 2 ** (failures - 1)) * random.uniform(0.7, 1.3)  # noqa: S311 -- spreads the nodes of a cluster, no secret
        with self._state:
            if isinstance(error, RegistryUnreachable) and error.retry_after_s is not None:
                # All connections hold back, and come back as fewer.
                pause_s = max(pause_s, min(error.retry_after_s, RETRY_AFTER_CAP_S))
                self._quiet_until = max(self._quiet_until, time.monotonic() + pause_s)
                self._pace.refused()
            end = time.monotonic() + pause_s
            while not self._over and (left := end - time.monotonic()) > 0:
                self._state.wait(min(left, _TICK_S))

    def _went_well(self) -> None:
        self.trouble = ""
        with self._state:
            self._pace.served()

    def _note_pace(self, count: int, waited_s: float) -> None:
        with self._state:
            before = self._pace.allowed
            self._pace.gained(count, time.monotonic(), waited_s, self._asking)
            if self._pace.allowed > before:
                self._schedule.cut_to_pieces()
                self._state.notify_all()

    def _give_way(self, task: Task, rate: _Rate) -> None:
        """Leave the line to what was demanded, but not for ever, nor where this connection brings it or has nothing to bring any more."""
        if not self._started_urgent:
            return
        with self._state:
            end = time.monotonic() + YIELD_S
            while (
                not self._over
                and task.hurry_until <= task.at < task.end
                and self._schedule.urgent
                and (left := end - time.monotonic()) > 0
            ):
                self._state.wait(min(left, _TICK_S))
        rate.restart()


def _idle_s() -> float:
    """Return a clock of the time in which this thread does nothing."""
    return time.monotonic() - time.thread_time()


class _Rate:
    """Watches that a connection is not slower than it may be."""

    def __init__(self, least_bytes_per_s: int) -> None:
        self._least = least_bytes_per_s
        self.restart()

    def restart(self) -> None:
        self._since = time.monotonic()
        self._bytes = 0

    def gained(self, count: int) -> None:
        """Note bytes. Raises `RegistryUnreachable` after a window with too few."""
        self._bytes += count
        seconds = time.monotonic() - self._since
        if seconds >= RATE_WINDOW_S:
            if self._bytes < self._least * seconds:
                raise RegistryUnreachable(
                    f"the transfer is too slow: {self._bytes / seconds:.0f} bytes/s over {seconds:.0f} s"
                )
            self.restart()
