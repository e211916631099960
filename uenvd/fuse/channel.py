"""The FUSE kernel protocol on ``/dev/fuse`` itself: the loop of one worker.

A request is read straight into a slot of shared memory, answered, and the slot is cleared: a successor of a killed worker finds there what
its predecessor had in hand (`uenvd.fuse.slots`), and a reply to a request that was answered already does no harm (ENOENT). Any number of
workers share one descriptor; no worker knows anything that another one needs.

What a process that starts workers does:

1. ``reply, negotiated = negotiate(os.read(fuse_fd, ...))``, write the reply.
2. Before the first fork: memory for `Slots`, and ``cache = SharedBlocks.create(bytes)`` for the decoded blocks that the workers share.
3. In each worker: ``Channel(fuse_fd, Tree(image_fd, ..., shared=cache), negotiated, slots.some(first, count), faults).serve()``.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable, Sequence

from uenvd.fuse.ahead import Ahead
from uenvd.fuse.answers import Answers, Parts
from uenvd.fuse.faults import Faults
from uenvd.fuse.packed import Packed
from uenvd.fuse.placement import Placement
from uenvd.fuse.protocol import Missing, Negotiated
from uenvd.fuse.protocol import reply as r
from uenvd.fuse.slots import Slot
from uenvd.fuse.tree import Tree
from uenvd.fuse.turn import Turn

MAX_ATTEMPTS = 3
"""A request that was begun so often, and never answered, kills its workers: it gets EIO."""

_END = frozenset({errno.ENODEV, errno.ECONNABORTED})
_AGAIN = frozenset({errno.EINTR, errno.EAGAIN, errno.ENOENT})
"""Of reading: a signal; nothing there; the request was interrupted before it was read."""
_ANSWERED = errno.ENOENT
"""Of writing: the request is answered already."""
_PATIENCE_TICK_MS = 250
"""How late, at most, a parked request is found to have waited too long."""

GiveUp = Callable[[Missing, float], OSError | None]
"""Says what a reader gets who has waited so many seconds for these bytes; None: he goes on waiting."""


class Channel:
    """One worker's loop.

    Args:
        fuse_fd: ``/dev/fuse`` of a connection whose INIT is answered; stays the caller's.
        tree: the image.
        negotiated: what INIT agreed on.
        slots: this worker's own; all but one can hold requests that wait for bytes of the image.
        faults: where faults are noted.
        source_wake_fd: of an image that is still arriving: readable when bytes have arrived, or will not. The descriptor ``fuse_fd`` is made
            non-blocking then, for all who share it.
        give_up: ends the wait of a request; None: it waits for ever.
        complete: of an image that is still arriving: tells that it is complete; from then on it is like any other.
        settled: called then. Only when all who share the descriptor are so far it may be made blocking again: who has requests parked and
            sleeps in read(2) hears of nothing.

    """

    def __init__(
        self,
        fuse_fd: int,
        tree: Tree,
        negotiated: Negotiated,
        slots: Sequence[Slot],
        faults: Faults,
        *,
        source_wake_fd: int | None = None,
        give_up: GiveUp | None = None,
        complete: Callable[[], bool] | None = None,
        settled: Callable[[], None] | None = None,
    ) -> None:
        self._fd = fuse_fd
        self._tree = tree
        self._negotiated = negotiated
        self._slots = slots
        self._faults = faults
        self._answers = Answers(tree, faults)
        self._ahead = Ahead(tree)
        shared = tree.shared
        # With requests parked a worker must not sleep where the image cannot wake it.
        self._turn = Turn(None if shared is None or source_wake_fd is not None else shared.fd, fuse_fd)
        tree.before_work = self._give_turn
        tree.before_decoding = self._before_decoding
        self._parked: list[Slot] = []
        self._free: list[Slot] = []
        self._wake_fd = source_wake_fd
        self._give_up = give_up
        self._complete = complete
        self._settled = settled
        self._placement = Placement(wanted=source_wake_fd is None)
        if source_wake_fd is not None:
            os.set_blocking(fuse_fd, False)

    def serve(self) -> None:
        """Answer what a predecessor left in the slots, then what comes, until the connection ends. Raises `OSError` for what it cannot mean."""
        for slot in self._slots:
            if slot.busy():
                self._work(slot)
            else:
                self._free.append(slot)
        answers = self._answers
        answered_ns = 0
        while True:
            if not self._free or self._parked:
                self._wait()
                if not self._free:
                    continue
            if not self._turn.mine:
                self._turn.take()
                answered_ns = 0
            slot = self._free[-1]
            try:
                length = os.readv(self._fd, slot.vector)
            except OSError as error:
                if error.errno in _END:
                    return
                if error.errno not in _AGAIN:
                    raise
                if error.errno == errno.EAGAIN:
                    self._wait()
                continue
            if length:
                begun_ns = self._answer_first(slot, length)
                answered_ns, before_ns = time.monotonic_ns(), answered_ns
                placement = self._placement
                if placement.possible:
                    if not answers.one_asks:
                        placement.leave()
                    elif before_ns:
                        placement.note(answers.asker, begun_ns - before_ns)
                if answers.last_read is not None:
                    self._look_ahead()

    def _answer_first(self, slot: Slot, length: int) -> int:
        """Answer a request that was read just now into the last free slot: `_work` for what happens all the time. Return when that was begun."""
        begun_ns = slot.begin_first()
        try:
            parts = self._answers.answer(slot.buffer, length)
        except Missing as missing:
            self._free.pop()
            self._hold(slot, missing)
            return begun_ns
        if parts is not None:
            self._reply(slot, parts)
        slot.clear_first()
        return begun_ns

    def _work(self, slot: Slot) -> None:
        """Answer the request of a slot that is not free; it is afterwards, or parked."""
        try:
            if slot.begin() > MAX_ATTEMPTS:
                self._faults.note(OSError(errno.EIO, f"request {slot.unique} ended {MAX_ATTEMPTS} workers"))
                parts: Parts | None = [r.refusal(slot.unique, errno.EIO)]
            else:
                parts = self._answers.answer(slot.buffer, slot.length)
        except Missing as missing:
            self._hold(slot, missing)
            return
        if parts is not None:
            self._reply(slot, parts)
        slot.clear()
        self._free.append(slot)

    def _give_turn(self) -> None:
        """Let another worker read requests."""
        self._turn.give()

    def _before_decoding(self) -> None:
        """Let another worker read requests, if any can come before the block is decoded: a hand-over costs half as much as a block."""
        if not self._answers.one_asks or self._turn.requested():
            self._turn.give()

    def _hold(self, slot: Slot, missing: Missing) -> None:
        """Let a request wait, if it may."""
        slot.park()
        given_up = self._given_up(slot, missing)
        if given_up is None:
            self._parked.append(slot)
            self._tree.source.want(missing.first_byte, missing.end_byte)
            return
        self._reply(slot, [r.refusal(slot.unique, self._faults.note(given_up))])
        slot.clear()
        self._free.append(slot)

    def _given_up(self, slot: Slot, missing: Missing) -> OSError | None:
        waited_s = (time.monotonic_ns() - slot.waiting_ns) / 1e9
        return None if self._give_up is None else self._give_up(missing, waited_s)

    def _look_ahead(self) -> None:
        """Use the time until the next request comes."""
        read, self._answers.last_read = self._answers.last_read, None
        if read is None or not self._free:
            return
        if self._placement.beside:  # the asker would have to wait for the processor
            return
        try:
            node, spans = read
            ahead: Ahead | Packed = self._answers.packed
            if spans:
                ahead = self._ahead
                ahead.note(self._tree.ref_of(node), spans)
            while ahead.wanted and not self._turn.requested():
                ahead.work()
        except Missing:
            return
        except Exception as error:  # noqa: BLE001 - nobody asked for it: who does will be told
            self._faults.note(error)

    def _reply(self, slot: Slot, parts: Parts) -> None:
        try:
            os.writev(self._fd, parts)
        except OSError as error:
            if error.errno == _ANSWERED or error.errno in _END:
                return
            self._faults.note(error)
            refused = r.refusal(
                slot.unique, errno.EIO
            )  # the kernel does not like it: the asker must not wait
            try:
                os.write(self._fd, refused)
            except OSError as again:
                if again.errno != _ANSWERED and again.errno not in _END:
                    raise

    def _wait(self) -> None:
        """Wait for a request (if there is room for one) or for the image; try the parked requests again when it says so."""
        poll = select.poll()
        if self._free:
            poll.register(self._fd, select.POLLIN)
        if self._wake_fd is not None:
            poll.register(self._wake_fd, select.POLLIN)
        patience_ms = _PATIENCE_TICK_MS if self._parked and self._give_up is not None else None
        ready = [descriptor for descriptor, _events in poll.poll(patience_ms)]
        woken = self._wake_fd in ready
        if woken:
            self._tree.source.woken()
        if woken or not ready:
            parked, self._parked = self._parked, []
            for slot in parked:
                self._retry(slot)
        if woken and self._complete is not None and self._complete() and not self._parked:
            self._settle()

    def _settle(self) -> None:
        """Nothing is missing any more: take turns with the other workers, and sleep in read(2)."""
        self._wake_fd = self._complete = self._give_up = None
        self._answers.last_read = None
        shared = self._tree.shared
        self._turn = Turn(None if shared is None else shared.fd, self._fd)
        self._placement = Placement()
        if self._settled is not None:
            self._settled()

    def _retry(self, slot: Slot) -> None:
        """Begin a parked request anew; it was no worker's end, so that is its first attempt again."""
        slot.rewind()
        self._work(slot)
