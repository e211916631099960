"""Images that are used while another process or node writes them into a shared directory: read from its part, verified here.

Only what readers of this node want is looked at, so a thousand nodes read of an image what they need of it, and not all of it a thousand times.
What the writer's map calls durable is read back and verified by its chunk's digest; what is not right yet (NFS: not flushed, or a page that this
client has kept) is no error and is read again a moment later. What a reader has waited for longer than `WISH_S` is wished for
(`uenvd.cache.wishes`), and the writer fetches it first.

While nobody waits the file server is asked nothing here; while somebody does, with growing pauses.

Concurrency: `Following.run` is one thread; the rest is for any. It ends by itself when its file is removed, else by `stop`; who decides that is
`uenvd.daemon.lazy`, which looks for the blob and for the claim meanwhile.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from uenvd.cache.partview import Gone, PartView
from uenvd.cache.pauses import pause_s
from uenvd.cache.wishes import MAX_RANGES, Wish
from uenvd.daemon.checking import Checking
from uenvd.errors import DigestMismatch, InternalError, InUse, StorageError, UenvError
from uenvd.fuse.arrival import OwnBoard
from uenvd.oci.chunks import ChunkList
from uenvd.oci.files import storage_error
from uenvd.oci.manifest import Descriptor

log = logging.getLogger(__name__)

LOOK_S: Final = 0.2
"""The shortest pause between two looks at the writer's map."""
LONGEST_LOOK_S: Final = 2.0
WISH_S: Final = 0.2
"""Who waits so long has his wish written down; most is brought anyway, because all nodes run the same program."""
WISH_AGAIN_S: Final = 3.0
RIGHT_SOON_S: Final = 0.1
"""After this a chunk is read again that was not right."""
CAUSE_S: Final = 2.0
"""So long somebody has to wait before it is said why."""
TROUBLE_S: Final = 1.0
"""So long nothing is asked after an error of the file system."""
_CHECK_S: Final = 1.0
_TICK_S: Final = 0.05
_MAX_AHEAD: Final = 256


class Following(Checking):
    """One image in somebody else's part.

    Args:
        label, descriptor, chunks, board, changed: see `Checking`.
        view: of the part; this object owns it from now on.

    """

    def __init__(
        self,
        label: str,
        descriptor: Descriptor,
        chunks: ChunkList,
        board: OwnBoard,
        view: PartView,
        *,
        changed: Callable[[], None],
    ) -> None:
        super().__init__(label, descriptor, chunks, board, changed)
        self._view = view
        self._token = secrets.token_hex(8)
        self._ahead: dict[int, None] = {}
        """Chunks that may be wanted next."""
        self._wrong: dict[int, float] = {}
        """Chunks that were not right yet, and when to read them again (monotonic)."""
        self._looked_s = self._look_due_s = 0.0
        self._checked_s = self._resume_s = 0.0
        self._wish: Wish | None = None
        self._wished_s = 0.0
        self._explained = False
        """The board says that the writer has not brought what somebody waits for."""
        self._came_bytes = 0
        self.ended = False
        """The writer is ready or has given up, as far as it can be seen: time to look for the blob, and for the claim."""
        self.at_work_since_s: float | None = None
        """When the question to the file system that is under way began (monotonic)."""

    # -- for any thread

    @property
    def done_bytes(self) -> int:
        """How many bytes are here: in the writer's part, as far as it was seen."""
        return max(self._verified_bytes, self._came_bytes)

    @property
    def stopped(self) -> bool:
        """It has ended, or is about to."""
        return self._stopped

    def say(self, cause: str) -> None:
        """Tell who waits why."""
        self._set_cause(cause)

    def hint(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Nothing: its writer knows the trace, too."""

    def open_for_reader(self) -> int:
        """See `Checking.open_for_reader`."""
        if not self._view.has_file:
            raise InUse(f"{self._descriptor.digest} has no file yet")
        try:
            return self._view.open_for_reader()
        except OSError as error:
            raise storage_error(error, self._view.path, "opening") from error

    # -- the thread

    def run(self) -> None:
        """Return after `stop`. Raises `InUse` when the file was removed, `UenvError` for what cannot be gone on with."""
        size_bytes = self._descriptor.size_bytes
        self.want(0, 1)
        self.want(size_bytes - 1, size_bytes)
        try:
            while not self._stopped:
                self.at_work_since_s = time.monotonic()
                done = self._step()
                self.at_work_since_s = None
                if not done:
                    with self._state:
                        if not self._stopped:
                            self._state.wait(_TICK_S if self._wanted else _CHECK_S)
        except Gone as error:
            raise InUse(f"{self._label}: {error}") from None
        except UenvError:
            raise
        except Exception as error:
            log.exception("%s: following its writer failed", self._label)
            raise InternalError(
                f"following the writer of {self._label} failed unexpectedly: {error}"
            ) from error
        finally:
            with self._state:
                self._stopped = True
            if self._wish is not None:
                self._view.wishes.withdraw(self._token)
            self._view.close()
            self._changed()

    def _step(self) -> bool:
        """Do what there is to do; tell whether there was something to verify. Raises `Gone`."""
        if time.monotonic() < self._resume_s:
            return False
        try:
            self._look_around()
            return self._check_some()
        except OSError as error:
            self._set_cause(storage_error(error, self._view.path, "reading").message)
            self._resume_s = time.monotonic() + TROUBLE_S
            return False

    def _look_around(self) -> None:
        now_s = time.monotonic()
        with self._state:
            since_s = min(self._wanted.values(), default=None)
            newest_s = max(self._wanted.values(), default=now_s)
            doubted = self._doubted and now_s - self._checked_s >= _CHECK_S
        if doubted:
            self._doubted, self._checked_s = False, now_s
            self._view.check()
        if since_s is None and self._view.has_file:
            self._say_nothing()
            self._came(self._ready(now_s))
            return
        waited_s = 0.0 if since_s is None else now_s - since_s
        if now_s >= self._look_due_s:
            if self._view.look():
                self._came_bytes = self._view.durable.total_bytes
            self._looked_s = time.monotonic()
            self._look_due_s = self._looked_s + pause_s(now_s - newest_s, LOOK_S, LONGEST_LOOK_S)
            before, self.ended = self.ended, self._view.ended
            if self.ended and not before:
                self._changed()
        self._came(self._ready(now_s))
        if since_s is not None and waited_s >= WISH_S:
            self._say(now_s)
        if waited_s >= CAUSE_S and not self._told_cause and not self._explained:
            self._explained = True
            writer = self._view.writer()
            name = f" ({writer})" if writer else ""
            self._board.set_cause(f"another node{name} pulls it and has not brought it yet")

    def _ready(self, now_s: float) -> list[int]:
        """Return the chunks to verify that are here."""
        durable = self._view.durable
        with self._state:
            for number in [number for number in self._ahead if self._board.is_here(number)]:
                del self._ahead[number]
            return [
                number
                for number in (*self._wanted, *self._ahead)
                if number not in self._unverified
                and self._wrong.get(number, 0.0) <= now_s
                and durable.covers(*self._span(number))
            ]

    # -- wishes

    def _say(self, now_s: float) -> None:
        """Write down what somebody has waited for, and what he may want next, unless it is written down already."""
        durable = self._view.durable
        with self._state:
            numbers = [number for number, since_s in self._wanted.items() if now_s - since_s >= WISH_S]
            numbers += [number for number in self._ahead if not durable.covers(*self._span(number))]
        ranges = tuple(self._runs(numbers))[:MAX_RANGES]
        known = self._wish
        if known is not None and known.ranges == ranges and now_s - self._wished_s < WISH_AGAIN_S:
            return
        if now_s - self._wished_s < LOOK_S:
            return
        self._wished_s = now_s
        wish = Wish(1 if known is None else known.number + 1, ranges)
        try:
            if self._view.wishes.put(self._token, wish):
                self._wish = wish
        except StorageError as error:
            log.debug("%s: %s", self._label, error)

    def _say_nothing(self) -> None:
        if self._wish is not None:
            self._view.wishes.withdraw(self._token)
            self._wish = None
        self._nothing_wrong()

    def _nothing_wrong(self) -> None:
        if self._explained:
            self._explained = False
            self._board.set_cause(self._told_cause)
        self._set_cause("")

    def _runs(self, numbers: Iterable[int]) -> list[tuple[int, int]]:
        """Return the bytes of chunks, in the order of the first question; neighbours together."""
        runs: list[tuple[int, int]] = []
        for number in numbers:
            first, end = self._span(number)
            if runs and runs[-1][1] == first:
                runs[-1] = runs[-1][0], end
            else:
                runs.append((first, end))
        return runs

    # -- verifying

    def _read(self, first: int, size_bytes: int) -> bytes | None:
        return self._view.read(first, size_bytes)

    def _is_wrong(self, number: int, error: DigestMismatch) -> None:
        # Written by somebody whose bytes are not flushed yet, or wrong and about to be discarded by him.
        self._wrong[number] = time.monotonic() + RIGHT_SOON_S
        self._view.again()
        self._doubted = True  # it may also be another file than the map is of

    def _demand(self, numbers: Sequence[int], ahead: tuple[int, int] | None) -> None:
        self._look_due_s = min(self._look_due_s, self._looked_s + LOOK_S)
        if ahead is not None:
            with self._state:
                more = self._board.chunks_of(*ahead)
                self._ahead.update(dict.fromkeys(more[: _MAX_AHEAD - len(self._ahead)]))

    def _before_showing(self) -> None:
        """Nobody writes there any more (`uenvd.cache.partmap`)."""

    def _shown(self, numbers: list[int], *, awaited: bool) -> None:
        for number in numbers:
            self._wrong.pop(number, None)
        self._nothing_wrong()
