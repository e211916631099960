"""What an earlier daemon left behind, alive or not: found through the sockets of its supervisors, and systemd's descriptor store.

A supervisor of another version is left alone: it serves its users to their end, and new ones get a connection of their own.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import trio

from uenvd.daemon.rundir import ImageDirectory
from uenvd.daemon.supervision import HELLO_DEADLINE_S, parse_report, receive, send
from uenvd.errors import ProtocolError
from uenvd.fuse.protocol import Negotiated
from uenvd.fuse.slots import Slots
from uenvd.handover import SLOTS_PER_WORKER, Duty, Message, SupervisorState, WorkerReport

log = logging.getLogger(__name__)

_TRY_AGAIN_S: Final = 0.02
_DEVICE: Final = os.makedev(10, 229)
"""``/dev/fuse`` (Linux Documentation/admin-guide/devices.txt). Its name depends on the mount namespace, which may be gone."""


@dataclass
class Adopted:
    """One connection; whoever takes it owns the descriptors."""

    duty: Duty
    state: SupervisorState
    report: WorkerReport | None
    fuse_fd: int
    slots_fd: int
    mount_fd: int | None = None
    """A detached mount of it; None when it has none to give any more: nobody new can come."""
    slots_lost: bool = False
    """Whether ``slots_fd`` is new, and the kernel has to be asked for what was in hand."""
    channel: trio.socket.SocketType | None = None
    """To the supervisor; None when all its processes are gone."""

    def close(self) -> None:
        """Close the descriptors."""
        for descriptor in (self.fuse_fd, self.slots_fd, self.mount_fd):
            if descriptor is not None:
                os.close(descriptor)
        if self.channel is not None:
            self.channel.close()


async def find(
    directory: ImageDirectory, stored: Mapping[str, Mapping[str, int]], *, resend: bool
) -> list[Adopted]:
    """Return the connections that can be gone on with. Never fails because of one of them.

    Args:
        directory: where the supervisors' sockets are.
        stored: descriptors from systemd's store, by supervisor and name (``fuse``, ``slots``); owned, and closed if they are not needed.
        resend: whether the kernel may be asked for requests whose slots are lost.

    """
    found: list[Adopted] = []
    names = sorted({*await trio.to_thread.run_sync(directory.names), *stored})

    async def look(name: str) -> None:
        mine = dict(stored.get(name, {}))
        try:
            with trio.move_on_after(HELLO_DEADLINE_S) as scope:
                adopted = await _adopt(directory, name, mine, resend=resend)
                if adopted is not None:
                    found.append(adopted)
            if scope.cancelled_caught:
                log.warning("the supervisor %s does not answer; it is left alone", name)
        except (OSError, EOFError, ProtocolError) as error:
            log.warning("the supervisor %s is left alone: %s", name, error or "it hung up")
        finally:
            for descriptor in mine.values():
                os.close(descriptor)

    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(look, name)
    return sorted(found, key=lambda one: one.duty.name)


async def _adopt(
    directory: ImageDirectory, name: str, stored: dict[str, int], *, resend: bool
) -> Adopted | None:
    while True:
        try:
            connected = directory.connect(name)
            if connected is not None:
                return await _ask(connected, name)
            break
        except (OSError, EOFError):
            # The backlog is full for a moment, or who accepted has died since: somebody takes over, or nobody listens any more.
            await trio.sleep(_TRY_AGAIN_S)
    adopted = _from_store(directory, name, stored, resend=resend)
    if adopted is None:
        directory.forget(name)
    return adopted


async def _ask(connected: socket.socket, name: str) -> Adopted:
    """Take over from a supervisor that listens. Raises `OSError`, `EOFError` when it ends meanwhile, `ProtocolError`."""
    channel = trio.socket.from_stdlib_socket(connected)
    descriptors: list[int] = []
    try:
        await send(channel, Message("hello", {"adopt": True}))
        while True:
            message, descriptors = await receive(channel)
            if message.op == "state" and "duty" in message.fields:
                break
            _close_all(descriptors)
            if message.op == "refused":
                raise ProtocolError(f"it refuses: {message.fields.get('why')}")
        duty = Duty.from_wire(message.fields["duty"])
        state = SupervisorState.from_wire(message.fields.get("state", {}))
        named = dict(zip(message.descriptors, descriptors, strict=True))
        if duty.name != name or not {"fuse", "slots"} <= named.keys() or len(named) != len(descriptors):
            raise ProtocolError("its answer makes no sense")
        device = os.fstat(named["fuse"])
        if not stat.S_ISCHR(device.st_mode) or device.st_rdev != _DEVICE:
            raise ProtocolError("its connection is none")
        if state.phase not in ("starting", "serving"):
            raise ProtocolError(f"it is {state.phase}")
        report = None
        while report is None:
            later, none = await receive(channel)
            _close_all(none)
            if later.op == "report":
                report = parse_report(later)
        if report.error is not None:
            raise ProtocolError(f"it could not serve: {report.error}")
    except BaseException:
        _close_all(descriptors)
        channel.close()
        raise
    return Adopted(duty, state, report, named["fuse"], named["slots"], named.get("mount"), channel=channel)


def _from_store(
    directory: ImageDirectory, name: str, stored: dict[str, int], *, resend: bool
) -> Adopted | None:
    """Return a connection of which only its descriptors are left."""
    recorded = directory.recorded(name)
    if recorded is None or "fuse" not in stored:
        return None
    duty, state = recorded
    if (duty.blob is None and state.file is None) or state.negotiated is None:
        return None
    lost = "slots" not in stored
    if lost and not (resend and Negotiated.from_wire(state.negotiated).resend):
        return None
    slots_fd = new_slots(duty) if lost else stored.pop("slots")
    return Adopted(duty, state, None, stored.pop("fuse"), slots_fd, slots_lost=lost)


def new_slots(duty: Duty) -> int:
    """Return shared memory for the requests of a connection; the caller owns the descriptor. Raises `OSError`."""
    return Slots.new_memory(duty.workers * SLOTS_PER_WORKER)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        with suppress(OSError):
            os.close(descriptor)
