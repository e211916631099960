"""What the supervisor answers itself, without workers: before the image is there, and after it has been given up.

Before: INIT, and what the root looks like; all else waits, in its slot. So a job step may stand in a directory whose image is still being
pulled (``srun -D /user-environment``). Who waits for more can be killed: the request that the kernel interrupts is answered with EINTR (one
that was read and is never answered makes its asker unkillable). After: EIO, so that users get an error instead of waiting, and no other bytes.

A slot is cleared after its reply is written, never before: a process killed in between would take the request with it.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

from uenvd.fuse.protocol import Opcode, root_attributes_reply
from uenvd.fuse.protocol import reply as r
from uenvd.fuse.protocol import request as q
from uenvd.fuse.slots import Slot, Slots
from uenvd.fuse.tree import ROOT_INO

_INTERRUPTED = struct.Struct("=Q")  # struct fuse_interrupt_in
_OVER = frozenset({errno.ENODEV, errno.ECONNABORTED})
_NOTHING_READ = frozenset({errno.EAGAIN, errno.EINTR, errno.ENOENT})
"""Of reading requests: there is none any more; a signal; it was interrupted before it was read."""


class Dealt(NamedTuple):
    """A request that needs its slot no longer once the reply (if one is expected) is written."""

    slot: Slot
    reply: bytes | None


def attend(slot: Slot, all_slots: Iterable[Slot]) -> list[Dealt]:
    """Return what can be said of a request before there is an image, nothing for one that has to wait; in the order in which to do it.

    ``all_slots`` are looked through for the request that an INTERRUPT is about.
    """
    header = q.Header._make(q.HEADER.unpack_from(slot.buffer))
    if header.opcode == Opcode.GETATTR and header.nodeid == ROOT_INO:
        return [Dealt(slot, root_attributes_reply(header.unique))]
    if header.opcode == Opcode.INTERRUPT:
        unique = _INTERRUPTED.unpack_from(slot.buffer, q.HEADER_BYTES)[0]
        about = [other for other in all_slots if other is not slot and other.unique == unique]
        return [*(Dealt(other, r.refusal(unique, errno.EINTR)) for other in about), Dealt(slot, None)]
    if header.opcode == Opcode.DESTROY:
        return [Dealt(slot, r.answer(header.unique, b""))]
    return [Dealt(slot, None)] if header.opcode in q.UNANSWERED else []


def refuse(slot: Slot, _all_slots: Iterable[Slot]) -> list[Dealt]:
    """Return what is said of a request when the image has been given up."""
    header = q.Header._make(q.HEADER.unpack_from(slot.buffer))
    if header.opcode in q.UNANSWERED:
        return [Dealt(slot, None)]
    if header.opcode == Opcode.DESTROY:
        return [Dealt(slot, r.answer(header.unique, b""))]
    return [Dealt(slot, r.refusal(header.unique, errno.EIO))]


class Attendant:
    """Reads requests into free slots and deals with them, for a process that has other things to wait for.

    Args:
        fuse_fd: the connection; stays the caller's. `begin` makes it non-blocking, for all who share it.
        slots: all slots of the connection; no other process uses them meanwhile.

    """

    def __init__(self, fuse_fd: int, slots: Slots) -> None:
        self._fd = fuse_fd
        self._slots = slots
        self._policy: Callable[[Slot, Iterable[Slot]], list[Dealt]] = attend
        self.over = False
        """The kernel has ended the connection."""

    def begin(self, *, refusing: bool = False) -> None:
        """Deal with what lies in the slots. Raises `OSError`."""
        self._policy = refuse if refusing else attend
        os.set_blocking(self._fd, False)
        for slot in self._slots:
            if slot.busy():
                self.deal(slot)

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return self._free() is not None

    def take(self) -> Slot | None:
        """Read one request; None if there was none to be had, or no room. Raises `OSError`."""
        slot = self._free()
        if slot is None:
            return None
        try:
            os.readv(self._fd, slot.vector)
        except OSError as error:
            self.over = self.over or error.errno in _OVER
            if error.errno not in _NOTHING_READ | _OVER:
                raise
            return None
        return slot

    def deal(self, slot: Slot) -> None:
        """Answer the request of a slot, if it need not wait. Raises `OSError`."""
        for dealt, reply in self._policy(slot, self._slots):
            if reply is not None:
                self.reply(reply)
            dealt.clear()

    def reply(self, reply: bytes) -> None:
        """Write a reply; one to a request that is answered already does no harm. Raises `OSError`."""
        try:
            os.write(self._fd, reply)
        except OSError as error:
            self.over = self.over or error.errno in _OVER
            if error.errno != errno.ENOENT and error.errno not in _OVER:
                raise

    def _free(self) -> Slot | None:
        return next((slot for slot in self._slots if not slot.busy()), None)
