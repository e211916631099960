"""One supervisor, as the daemon sees it: handed its work, listened to, found again after it was killed, started anew if all of it was.

Concurrency: `Supervision.run` is one task in the daemon's nursery, the only reader of the channel; it changes `state` and `report`
synchronously and wakes who waits in `until`. Everybody may send (`Supervision.release`, `Supervision.abandon`): a datagram, no checkpoint.

When the channel ends there are three cases, and the socket in ``images/`` tells them apart. Somebody accepts: the standby took over, go on
with it. It is refused and the kernel has ended the connection: the last user is gone. It is refused otherwise: all processes were killed at
once; users wait in the kernel as long as this daemon (or systemd, for it) holds the FUSE descriptor, and a new supervisor begins with the
same descriptors and what lies in the slots.

A supervisor that *refuses* (its image cannot be served any more: `uenvd.fuse.supervisor`) needs no daemon: it is left to its users.
"""

from __future__ import annotations

import json
import logging
import math
import os
import select
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

import trio

from uenvd import handover
from uenvd.daemon.metrics import METRICS
from uenvd.daemon.rundir import ImageDirectory
from uenvd.daemon.workers import Process, WorkerPool
from uenvd.errors import NotFound, ProtocolError, UenvError, WorkerFailed
from uenvd.handover import Duty, Message, SupervisorState, WorkerReport

log = logging.getLogger(__name__)

BEGIN_DEADLINE_S: Final = 30.0
HELLO_DEADLINE_S: Final = 5.0
_TRY_AGAIN_S: Final = 0.02
_FIRST_DELAY_S: Final = 0.05
_MAX_DELAY_S: Final = 5.0
_SHORT_LIFE_S: Final = 1.0
"""All processes that served were gone that soon after their start: the next try has to wait."""

OpenImage = Callable[[], Awaitable[dict[str, int]]]
"""Returns the descriptors with which the image is served, by name; the callee owns them."""


class Supervision:
    """One supervisor, whichever of its processes is the active one.

    Args:
        duty: what it serves.
        directory: where its socket is.
        pool: where a new one is taken from.
        fuse_fd: the connection; owned by this object from now on, as is ``slots_fd``.
        slots_fd: the shared memory for requests.
        namespace_fd: the mount namespace in which it lives; stays the caller's.
        spares: makes detached mounts for it; returns none when there is no mount any more.
        open_image: opens the image anew; None where that is not possible.

    """

    def __init__(
        self,
        duty: Duty,
        *,
        directory: ImageDirectory,
        pool: WorkerPool,
        fuse_fd: int,
        slots_fd: int,
        namespace_fd: int,
        spares: Callable[[], Awaitable[list[int]]],
        open_image: OpenImage | None = None,
    ) -> None:
        self.duty = duty
        self.fuse_fd = fuse_fd
        self.slots_fd = slots_fd
        self.state: SupervisorState | None = None
        self.report: WorkerReport | None = None
        self.gone = False
        """The connection has ended, or was given up."""
        self.restarts = 0
        """How often a new supervisor had to be started."""
        self._directory = directory
        self._pool = pool
        self._namespace_fd = namespace_fd
        self._spares = spares
        self._open_image = open_image
        self.on_want: Callable[[int, int], None] = lambda _first, _end: None
        """Called with bytes ``[first, end)`` of an image that is still arriving."""
        self._channel: trio.socket.SocketType | None = None
        self._process: Process | None = None
        self._image_given = False
        self._slots_lost = False
        self._abandoned = False
        self._changed = trio.Event()

    @property
    def pid(self) -> int | None:
        """Process id of the active supervisor."""
        return self.state.pid if self.state is not None else None

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the workers."""
        return self.state.workers if self.state is not None else ()

    # -- what the owner does

    async def begin(self) -> None:
        """Start a supervisor and wait until it has answered INIT. Raises `WorkerFailed`, or why it could not begin."""
        await self._start({})
        with trio.move_on_after(BEGIN_DEADLINE_S):
            while self.state is None or self.state.negotiated is None:
                if not await self._hear():
                    raise WorkerFailed(f"the supervisor of {self.duty.label} ended before it served")
                if self.report is not None and self.report.error is not None:
                    raise self.report.error
            await trio.to_thread.run_sync(self._directory.record, self.duty, self.state)
            return
        raise WorkerFailed(
            f"the supervisor of {self.duty.label} did not begin within {BEGIN_DEADLINE_S:.0f} s"
        )

    def take_over(
        self,
        channel: trio.socket.SocketType | None,
        state: SupervisorState,
        report: WorkerReport | None,
        *,
        slots_lost: bool = False,
    ) -> None:
        """Go on with a supervisor that an earlier daemon started; without a channel: that is gone, start another."""
        self._slots_lost = slots_lost
        self._channel = channel
        self.state = state
        self.report = report
        self._image_given = True

    async def serve(self, image: Mapping[str, int] | None) -> WorkerReport:
        """Hand the image over (None: it has it), wait until it is served. Raises the worker's own error, `WorkerFailed`.

        ``image``: descriptors by name, which stay the caller's.
        """
        if image is not None:
            await self.give_image(image)
        await self.until(lambda: self.report is not None)
        assert self.report is not None
        if self.report.error is not None:
            raise self.report.error
        return self.report

    async def give_image(self, image: Mapping[str, int]) -> None:
        """Hand the image over, or another file of it in place of one that was still arriving; the descriptors stay the caller's."""
        self._image_given = True
        with suppress(OSError):  # its end is seen where it is listened to
            await self._send(Message("image", {}, tuple(image)), list(image.values()))

    def have(self) -> None:
        """Tell the supervisor that bytes of an arriving image have come; no checkpoint."""
        self._send_now(Message("have"))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition on this object's state. Raises `WorkerFailed` when the supervisor is gone for good first."""
        while not condition():
            if self.gone:
                raise WorkerFailed(f"the supervisor of {self.duty.label} ended")
            await self._changed.wait()

    def release(self) -> None:
        """Nobody new will come: let the connection end with its last user."""
        self._send_now(Message("release"))

    def abandon(self) -> None:
        """End the connection: its users get ENOTCONN."""
        self._abandoned = True
        self._send_now(Message("abandon"))

    async def give_spares(self) -> None:
        """Give the supervisor mounts for the daemons to come, in place of those that it has."""
        spares = await self._spares()
        try:
            with suppress(OSError):
                await self._send(Message("mounts", {}, ("mount",) * len(spares)), spares)
        finally:
            _close_all(spares)

    def close(self) -> None:
        """Close our descriptors; the supervisor goes on."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        for name in ("fuse_fd", "slots_fd"):
            if (descriptor := getattr(self, name)) >= 0:
                os.close(descriptor)
                setattr(self, name, -1)

    # -- the task

    async def run(self) -> None:
        """Listen until the connection has ended for good. Raises nothing."""
        delay_s, started_s = 0.0, -math.inf
        try:
            while True:
                if self._channel is not None:
                    while not self._is_refused() and await self._hear():
                        pass
                if self._abandoned or self._is_refused():
                    break
                if await self._reconnect():
                    continue
                if self._is_over() or not self._can_start_again():
                    break
                lived_s = trio.current_time() - started_s
                delay_s = (
                    0.0 if lived_s > _SHORT_LIFE_S else min(max(2 * delay_s, _FIRST_DELAY_S), _MAX_DELAY_S)
                )
                await trio.sleep(delay_s)
                started_s = trio.current_time()
                log.error("%s: all processes that served it are gone; starting others", self.duty.label)
                try:
                    await self._start_again()
                except NotFound:
                    raise
                except UenvError as error:  # too many processes, storage in trouble: its users wait
                    log.warning("%s", error)
        except UenvError as error:
            log.warning("%s: nobody serves it any more: %s", self.duty.label, error)
        except Exception:
            log.exception("%s: nobody serves it any more", self.duty.label)  # and the others go on
        finally:
            # Also when this daemon ends: then the socket stays, for the next one.
            self.gone = True
            self._wake()
            self.close()
        self._directory.forget(self.duty.name)

    def _is_over(self) -> bool:
        """Tell whether the kernel has ended the connection."""
        poll = select.poll()
        poll.register(self.fuse_fd, 0)
        return any(events & select.POLLERR for _fd, events in poll.poll(0))

    def _is_refused(self) -> bool:
        """Tell whether the supervisor answers EIO to the connection's end: nobody new may come to it, and it needs no daemon."""
        return self.state is not None and self.state.phase == "refusing"

    def _can_start_again(self) -> bool:
        if self.state is None or self.state.negotiated is None:
            return False
        if self.report is not None and self.report.error is not None:
            return False
        if self.duty.path is not None:
            return self.state.file is not None
        return not self._image_given or self._open_image is not None

    async def _reconnect(self) -> bool:
        """Find the process that took over; False when all of them are gone."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            await self._process.reap()
            self._process = None
        while True:
            try:
                channel = self._directory.connect(self.duty.name)
            except OSError:  # the backlog is full for a moment
                await trio.sleep(_TRY_AGAIN_S)
                continue
            if channel is None:
                return False
            self._channel = trio.socket.from_stdlib_socket(channel)
            with suppress(OSError), trio.move_on_after(HELLO_DEADLINE_S) as scope:
                await self._send(Message("hello"))
                # Processes that are about to die hold the socket, too: then this ends without an answer, and is tried again.
                if await self._hear():
                    await self._repeat()
                    return True
            if scope.cancelled_caught:
                log.warning("%s: its supervisor does not answer; trying again", self.duty.label)
            self._channel.close()
            self._channel = None
            await trio.sleep(_TRY_AGAIN_S)

    async def _repeat(self) -> None:
        """Say again what a successor may not have heard: which image, and by which file it arrives now."""
        if self._image_given and self.state is not None and self._open_image is not None:
            attending = self.state.phase == "attending"
            if not attending and not self.state.arriving:
                return
            try:
                image = await self._open_image()
            except UenvError as error:
                if attending:
                    raise
                log.warning("%s: its processes keep what they have: %s", self.duty.label, error)
                return
            try:
                await self._send(Message("image", {}, tuple(image)), list(image.values()))
            finally:
                _close_all(list(image.values()))

    async def _start_again(self) -> None:
        image: dict[str, int] = {}
        if self._image_given and self._open_image is not None:
            image = await self._open_image()
        try:
            self.restarts += 1
            await self._start(image)
        finally:
            _close_all(list(image.values()))

    async def _start(self, image: Mapping[str, int]) -> None:
        process = await self._pool.take()
        spares: list[int] = []
        try:
            spares = await self._spares()
            with self._directory.listen(self.duty.name) as listener:
                named = [
                    ("fuse", self.fuse_fd),
                    ("slots", self.slots_fd),
                    ("adopt", listener.fileno()),
                    ("mntns", self._namespace_fd),
                    *(("mount", spare) for spare in spares),
                    *image.items(),
                ]
                negotiated = self.state.negotiated if self.state is not None else None
                self._channel = trio.socket.from_stdlib_socket(process.channel)
                await self._send(
                    Message(
                        "begin",
                        {
                            "duty": self.duty.to_wire(),
                            "negotiated": negotiated,
                            "slots_lost": self._slots_lost,
                            "file": self.state.file if self.state is not None else None,
                        },
                        tuple(name for name, _descriptor in named),
                    ),
                    [descriptor for _name, descriptor in named],
                )
        except OSError as error:
            process.discard()
            raise WorkerFailed(f"no supervisor can be started for {self.duty.label}: {error}") from error
        finally:
            _close_all(spares)
        self._process = process

    # -- datagrams

    async def _hear(self) -> bool:
        """Take one message; False at the channel's end (whatever ends it)."""
        assert self._channel is not None
        try:
            message, descriptors = await receive(self._channel)
        except (OSError, EOFError, trio.ClosedResourceError):
            return False
        except ProtocolError as error:
            log.warning("%s: %s", self.duty.label, error)
            return False
        _close_all(descriptors)  # none was asked for
        try:
            if message.op == "state":
                before, self.state = self.state, SupervisorState.from_wire(message.fields.get("state", {}))
                if self.state.phase == "serving" and not self.state.slots_lost:
                    self._slots_lost = False
                _count(before, self.state)
            elif message.op == "report":
                self.report = parse_report(message)
            elif message.op == "want":
                self.on_want(*parse_want(message))
                return True
        except ProtocolError as error:
            log.warning("%s: %s", self.duty.label, error)
            return False
        self._wake()
        return True

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        if self._channel is None:
            raise BrokenPipeError
        with trio.move_on_after(HELLO_DEADLINE_S):
            await send(self._channel, message, descriptors)
            return
        raise TimeoutError(f"the supervisor of {self.duty.label} takes no message")

    def _send_now(self, message: Message) -> None:
        if self._channel is not None and self._channel.fileno() >= 0:
            with suppress(OSError):
                os.write(self._channel.fileno(), message.encode())


def _count(before: SupervisorState | None, now: SupervisorState) -> None:
    """Count what died and has a successor."""
    if before is None:
        return
    if now.pid != before.pid:
        METRICS.takeovers.inc(what="supervisor")
    elif now.deaths > before.deaths:
        METRICS.takeovers.inc(now.deaths - before.deaths, what="worker")


async def send(channel: trio.socket.SocketType, message: Message, descriptors: Sequence[int] = ()) -> None:
    """Send a message. Raises `OSError`."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, handover.pack_descriptors(descriptors))]
    await channel.sendmsg([message.encode()], rights if descriptors else [])


async def receive(channel: trio.socket.SocketType) -> tuple[Message, list[int]]:
    """Receive a message and its descriptors, which the caller owns. Raises `EOFError` at the end, `OSError`, `ProtocolError`."""
    data, ancillary, _flags, _address = await channel.recvmsg(
        handover.MAX_MESSAGE_BYTES, handover.DESCRIPTORS_SPACE_BYTES, socket.MSG_CMSG_CLOEXEC
    )
    descriptors = handover.take_descriptors(ancillary)
    if not data:
        raise EOFError
    try:
        message = Message.decode(data)
        if len(message.descriptors) != len(descriptors):
            raise ProtocolError("descriptors are missing from a supervisor's message")
    except ProtocolError:
        _close_all(descriptors)
        raise
    return message, descriptors


def parse_want(message: Message) -> tuple[int, int]:
    """Return the bytes ``[first, end)`` that a message asks for. Raises `ProtocolError`."""
    first, end = message.fields.get("first"), message.fields.get("end")
    if not isinstance(first, int) or not isinstance(end, int) or not 0 <= first < end < 1 << 63:
        raise ProtocolError("a supervisor wants bytes that no image has")
    return first, end


def parse_report(message: Message) -> WorkerReport:
    """Return the report in a message. Raises `ProtocolError`."""
    return WorkerReport.decode(json.dumps(message.fields.get("report")))


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
