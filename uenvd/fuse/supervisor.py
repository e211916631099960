"""The supervisor of one image: owns the FUSE connection, and sees to it that somebody always answers.

It answers INIT and what can be said of an image that is not there yet (`uenvd.fuse.attend`), forks workers when it is, and replaces those
that end (`uenvd.fuse.workforce`). It parses no byte of the image and has no privilege. It lives outside the daemon's mount namespace and goes
on without a daemon. `uenvd.fuse.supervise` starts it, `uenvd.fuse.daemons` has its connections to daemons.

**Nobody is needed.** When the *active* supervisor and all its workers are gone its *standby* (`uenvd.fuse.standby`) is the active one: it forks
a standby of its own and workers, which begin with what lies in the slots. A standby that ends is replaced. Only if all processes of an image
are killed at the same moment there is somebody else to act: a daemon that has the descriptors, too.

All of them hold the listening socket through which daemons come. Its refusing a connection therefore means that all of them are gone.

**An image that had users and cannot be served any more** (its workers end again and again with no request in hand; a user's own file is not
what it was) is *refused*: the supervisor stays and answers EIO, to the end of the connection.

Sources: poll(2), pidfd_open(2), unix(7), fuse(4); fs/fuse/dev.c (a connection ends with the last descriptor of its device).
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from uenvd.errors import InternalError, ProtocolError, UenvError, WorkerFailed
from uenvd.fuse.arrival import Board, take_board
from uenvd.fuse.attend import Attendant
from uenvd.fuse.daemons import Daemons
from uenvd.fuse.killed import LOOK_S, release_killed
from uenvd.fuse.protocol import Negotiated, is_init, negotiate
from uenvd.fuse.protocol.reply import RESEND
from uenvd.fuse.shared import SharedBlocks
from uenvd.fuse.slots import Slot, Slots
from uenvd.fuse.source import SETTLED
from uenvd.fuse.standby import Standby
from uenvd.fuse.workforce import Worker, Workforce, parse_want, receive_report
from uenvd.handover import SLOTS_PER_WORKER, Duty, Message, SupervisorState, WorkerReport

_log = logging.getLogger("uenvd-fs")

ORPHAN_S: Final = 2.0
"""How long a connection without an image waits for a daemon: nobody else can bring the image."""
_MAX_WANTS: Final = 4096
"""Remembered for a daemon to come."""
_MAX_STARTS: Final = 4
"""So often the first worker may end before it has reported."""
_END_S: Final = 2.0
_ATTENDING: Final = ("attending", "refusing")
"""In these phases there are no workers, and the supervisor uses the slots itself."""


def slot_count(workers: int) -> int:
    """Return how many request slots a connection with so many workers has."""
    return workers * SLOTS_PER_WORKER


class Supervisor:
    """One process's view of the connection; the standby has a copy of it.

    Args:
        duty: what it serves.
        descriptors: by name, as `uenvd.handover` has them; owned.
        negotiated: what INIT agreed on, if a predecessor has answered it: then there are users.
        shared: memory for decoded blocks.
        parent: the connection to the daemon that started us; non-blocking.
        slots_lost: the slots are not the predecessor's: the kernel has to be asked for what was in hand.
        file: which file of the user's own is served (`uenvd.fuse.opening.identity_of`).
        refused: why the image cannot be served any more.

    """

    def __init__(
        self,
        duty: Duty,
        descriptors: dict[str, list[int]],
        negotiated: Negotiated | None,
        shared: SharedBlocks,
        parent: socket.socket,
        *,
        slots_lost: bool = False,
        file: tuple[int, ...] | None = None,
        refused: UenvError | None = None,
    ) -> None:
        self._duty = duty
        self._fuse_fd = descriptors["fuse"][0]
        self._slots_fd = descriptors["slots"][0]
        self._mounts = descriptors.get("mount", [])
        self._image_fd = descriptors["image"][0] if "image" in descriptors else None
        self._board: Board | None = take_board(descriptors)
        """What of the image is here, if it came before it was complete."""
        self._wants: dict[tuple[int, int], None] = {}
        """Bytes that workers wait for, in the order in which they asked."""
        listener = socket.socket(fileno=descriptors["adopt"][0]) if "adopt" in descriptors else None
        uids = (0,) if duty.uid is not None else (0, os.geteuid())
        self._daemons = Daemons(duty.label, parent, listener, uids, self._obey)
        count = slot_count(duty.workers)
        memory = mmap.mmap(self._slots_fd, Slots.size_bytes(count), mmap.MAP_SHARED)
        self._slots = Slots(memory, count)
        self._shared = shared
        self._negotiated = negotiated
        self._phase = "attending"
        self._report: WorkerReport | None = None
        self._workforce: Workforce | None = None
        self._starts = 0
        self._deaths = 0
        look_s = duty.hang_s / 3 if duty.hang_s > 0 else None
        self._standby = Standby(duty.label, look_s)
        self._standby.stale = negotiated is not None
        self._attendant = Attendant(self._fuse_fd, self._slots)
        self._next_look_s: float | None = None
        self._next_release_s: float | None = None
        """When to look for readers that were killed while they wait; None while nobody has had to wait."""
        self._over = False
        self._slots_lost = slots_lost
        self._file = file
        self._has_users = negotiated is not None
        """Or had: errors come too late for those who asked for the mount."""
        self._refused = refused

    # -- the loop

    def run(self) -> None:
        """Serve until the connection ends."""
        if self._refused is not None:
            self._give_up(self._refused)
        elif self._image_fd is None or self._negotiated is None:
            self._attendant.begin()
        self._start_if_ready()
        while not self._over:
            due_s = self._standby_due_s()
            if due_s is not None and time.monotonic() >= due_s:
                if self._standby.fork(self._become_standby):
                    self._take_over()
                else:
                    self._tell()
            self._wait()
        self._finish()

    def _wait(self) -> None:
        """Wait for the next event and deal with it."""
        poll = select.poll()
        actions: dict[int, Callable[[], None]] = {}

        def on(descriptor: int, action: Callable[[], None]) -> None:
            poll.register(descriptor, select.POLLIN)
            actions[descriptor] = action

        for descriptor, action in self._daemons.events():
            on(descriptor, action)
        if self._standby.pidfd is not None:
            on(self._standby.pidfd, self._standby.ended)
        if self._phase in _ATTENDING and self._attendant.has_room:
            on(self._fuse_fd, self._attend)
        for worker in self._workforce or ():
            on(worker.pidfd, partial(self._worker_ended, worker))
            if self._report is None or self._board is not None:
                on(worker.channel.fileno(), partial(self._worker_said, worker))
        for ready, _events in poll.poll(self._timeout_ms()):
            if self._over:
                return
            actions[ready]()
        self._look_at_the_clock()

    def _timeout_ms(self) -> int | None:
        now_s = time.monotonic()
        due_s = [when_s for when_s in self._times() if when_s is not None]
        return max(0, int((min(due_s) - now_s) * 1000) + 1) if due_s else None

    def _times(self) -> Iterator[float | None]:
        """Yield when there is something to do without an event (monotonic)."""
        if self._workforce is not None:
            yield self._workforce.next_start_s
            yield self._next_look_s
            yield self._next_release_s
        yield self._standby_due_s()
        alone_since_s = self._daemons.alone_since_s
        if alone_since_s is not None:
            if self._is_waiting_for_image():
                yield alone_since_s + ORPHAN_S
            elif self._mounts:
                yield alone_since_s + self._duty.grace_s

    def _standby_due_s(self) -> float | None:
        """Return when to fork a standby (monotonic): not before INIT is answered, whose successor would have nothing to go on with."""
        return None if self._negotiated is None else self._standby.due_s

    def _is_waiting_for_image(self) -> bool:
        return self._image_fd is None and self._phase == "attending"

    def _look_at_the_clock(self) -> None:
        now_s = time.monotonic()
        if self._workforce is not None:
            if self._workforce.start_due():
                self._tell()
            if self._next_look_s is not None and now_s >= self._next_look_s:
                self._workforce.end_hung(requests_wait=self._has_event(select.POLLIN))
                self._standby.end_if_stopped()
                self._next_look_s = now_s + self._duty.hang_s / 3
            if self._next_release_s is not None and now_s >= self._next_release_s:
                release_killed(self._slots, self._fuse_fd)
                arriving = self._board is not None and not self._board.complete
                self._next_release_s = now_s + LOOK_S if arriving else None
        alone_since_s = self._daemons.alone_since_s
        if alone_since_s is not None:
            alone_s = now_s - alone_since_s
            if self._is_waiting_for_image() and alone_s >= ORPHAN_S:
                _log.error("%s: no daemon brings the image any more", self._duty.label)
                self._over = True
            elif self._mounts and alone_s >= self._duty.grace_s:
                self._release()

    def _finish(self) -> None:
        """End what is left; workers that have not noticed yet end with this process."""
        if self._phase not in ("failed", "abandoned"):
            self._phase = "ended"
            deadline_s = time.monotonic() + _END_S
            for worker in self._workforce or ():
                left_ms = max(0.0, deadline_s - time.monotonic()) * 1000
                poll = select.poll()
                poll.register(worker.pidfd, select.POLLIN)
                poll.poll(left_ms)
        self._standby.end()
        self._tell()

    # -- other processes

    def _become_standby(self) -> None:
        """In a new standby: the children of the one that forked it are not ours."""
        for worker in self._workforce or ():
            worker.close()
        self._workforce = None
        self._daemons.forget()

    def _take_over(self) -> None:
        """Be the active one: predecessor and workers are gone."""
        _log.error("%s: the supervisor was killed; pid %d takes over", self._duty.label, os.getpid())
        self._daemons.alone_since_s = time.monotonic()
        if self._phase in _ATTENDING:
            self._attendant.begin(refusing=self._phase == "refusing")
        elif self._phase == "starting":
            self._start_if_ready()
        else:
            os.set_blocking(self._fuse_fd, True)  # the predecessor's workers may have had to hear of bytes
            self._employ().start(self._duty.workers)

    def _become_worker(self) -> None:
        """In a new worker: close what keeps the mount alive, and what is the supervisor's business."""
        self._daemons.forget()
        self._standby.become_worker()
        for descriptor in (self._slots_fd, *self._mounts):
            os.close(descriptor)

    # -- without workers

    def _attend(self) -> None:
        """Read one request and answer it, if that can be done without the image."""
        if self._phase not in _ATTENDING:
            return
        slot = self._attendant.take()
        if slot is not None:
            if self._negotiated is None and is_init(slot.buffer[: slot.length]):
                self._agree(slot)
            else:
                self._attendant.deal(slot)
        self._over = self._over or self._attendant.over

    def _agree(self, slot: Slot) -> None:
        """Answer INIT."""
        request = bytes(slot.buffer[: slot.length])
        reply, self._negotiated = negotiate(request, max_readahead_bytes=self._duty.max_readahead_bytes)
        self._attendant.reply(reply)
        slot.clear()
        self._standby.stale = True
        self._tell()
        self._start_if_ready()

    def _give_up(self, error: UenvError) -> None:
        """End the connection, or answer EIO to its end if it has users; whoever listens hears why."""
        self._report = WorkerReport(error=error)
        if self._has_users:
            _log.error("%s: it cannot be served any more, its users get EIO: %s", self._duty.label, error)
            if self._workforce is not None:
                self._workforce.end_all()
                self._workforce = None
            self._release()
            self._phase = "refusing"
            self._standby.stale = True
            self._attendant.begin(refusing=True)
        else:
            self._phase, self._over = "failed", True
        self._tell(with_report=True)

    # -- workers

    def _start_if_ready(self) -> None:
        """Start the first worker when there are both an image and an answered INIT."""
        if self._image_fd is None or self._negotiated is None:
            return
        os.set_blocking(self._fuse_fd, True)
        self._phase = "starting"
        self._employ().start(1)
        self._standby.stale = True
        self._tell()

    def _employ(self) -> Workforce:
        if self._workforce is None:
            if self._image_fd is None or self._negotiated is None:
                raise InternalError("workers before their image")
            self._workforce = Workforce(
                self._duty,
                fuse_fd=self._fuse_fd,
                image_fd=self._image_fd,
                negotiated=self._negotiated,
                slots=self._slots.some(0, len(self._slots)),
                shared=self._shared,
                in_child=self._become_worker,
                board=self._board,
            )
            if self._duty.hang_s > 0:
                self._next_look_s = time.monotonic() + self._duty.hang_s / 3
        return self._workforce

    def _resend(self) -> None:
        """Have the kernel repeat what a predecessor had in hand whose slots are lost."""
        self._slots_lost = False
        with contextlib.suppress(OSError):
            os.write(self._fuse_fd, RESEND)

    def _has_event(self, event: int) -> bool:
        """Tell whether requests wait (POLLIN) or the kernel has ended the connection (POLLERR). (Never waited for: each request would wake
        this process, too.)
        """
        poll = select.poll()
        poll.register(self._fuse_fd, event)
        return any(events & event for _fd, events in poll.poll(0))

    def _worker_said(self, worker: Worker) -> None:
        if worker.channel.fileno() < 0:
            return
        data = receive_report(worker)
        if data is None:
            return  # its end shows elsewhere
        if data == SETTLED:
            self._employ().settled(worker)
            return
        wanted = parse_want(data)
        if wanted is not None:
            if len(self._wants) < _MAX_WANTS:
                self._wants[wanted] = None
            self._daemons.send_all(_want(wanted))
            if self._next_release_s is None:
                self._next_release_s = time.monotonic() + LOOK_S
        if wanted is not None or self._report is not None:
            return
        try:
            report = WorkerReport.decode(data)
        except ProtocolError as error:
            report = WorkerReport(error=error)
        if report.error is not None:
            self._give_up(report.error)
            return
        self._report, self._phase, self._has_users = report, "serving", True
        self._employ().start(self._duty.workers)
        if self._slots_lost:
            self._resend()
        self._standby.stale = True
        self._tell(with_report=True)

    def _worker_ended(self, worker: Worker) -> None:
        if self._report is None:
            self._worker_said(worker)
        workforce = self._workforce
        if workforce is None or self._over:
            return
        status = workforce.ended(worker)
        if status == 0 or self._has_event(select.POLLERR):
            self._over = True
            return
        self._deaths += 1
        if self._report is None:
            self._starts += 1
            if self._starts >= _MAX_STARTS and not self._has_users:
                self._give_up(WorkerFailed(f"the workers for {self._duty.label} ended before they served"))
                return
        if workforce.hopeless:
            self._give_up(WorkerFailed(f"the workers for {self._duty.label} end again and again"))
            return
        workforce.start_due()
        self._tell()

    # -- an image that is still arriving

    def _takes_image(self) -> bool:
        return self._phase != "refusing" and (self._image_fd is None or self._board is not None)

    def _take_image(self, named: dict[str, list[int]]) -> None:
        """Begin with an image, or go on with another file of the same one (whose former writer is gone)."""
        former, self._image_fd = self._image_fd, named.pop("image")[0]
        self._board = take_board(named)
        if former is None:
            self._start_if_ready()
            return
        os.close(former)
        if self._workforce is not None:
            self._workforce.change_image(self._image_fd, self._board)
        self._standby.stale = True
        for wanted in list(self._wants):
            self._daemons.send_all(_want(wanted))
        self._tell()

    def _bytes_came(self) -> None:
        """Wake the workers; what they lack after that they ask for again."""
        board = self._board
        if board is not None:
            for wanted in [one for one in self._wants if board.covers(board.chunks_of(*one))]:
                del self._wants[wanted]
        if self._workforce is not None:
            self._workforce.wake()

    # -- daemons

    def _obey(self, channel: socket.socket, message: Message, named: dict[str, list[int]]) -> None:
        """Do what a daemon says; the descriptors that are taken over leave ``named``."""
        match message.op:
            case "image" if "image" in named and self._takes_image():
                self._take_image(named)
            case "have":
                self._bytes_came()
            case "mounts":
                self._release()
                self._mounts = named.pop("mount", [])
                self._tell()
            case "hello":
                self._greet(channel, adopt=bool(message.fields.get("adopt")))
            case "release":
                self._release()
                self._tell()
            case "abandon":
                self._phase, self._over = "abandoned", True
            case _:
                pass  # of a later version

    def _release(self) -> None:
        """Give up the mounts: when the last user of the image is gone, the kernel ends the connection."""
        for descriptor in self._mounts:
            os.close(descriptor)
        if self._mounts:
            self._standby.stale = True
        self._mounts = []

    def _greet(self, channel: socket.socket, *, adopt: bool) -> None:
        given: list[tuple[str, int]] = []
        if adopt:
            given = [("fuse", self._fuse_fd), ("slots", self._slots_fd)]
            if self._mounts:
                given.append(("mount", self._mounts.pop()))
                self._standby.stale = True
        message = Message(
            "state",
            {"state": self._state().to_wire(), "duty": self._duty.to_wire()},
            tuple(name for name, _descriptor in given),
        )
        self._daemons.send(channel, message, [descriptor for _name, descriptor in given])
        for name, descriptor in given:
            if name == "mount":
                os.close(descriptor)
        self._daemons.send_report(channel, self._report)
        for wanted in self._wants:
            self._daemons.send(channel, _want(wanted))

    def _state(self) -> SupervisorState:
        return SupervisorState(
            phase=self._phase,
            pid=os.getpid(),
            workers=self._workforce.pids if self._workforce is not None else (),
            standby=self._standby.pid,
            deaths=self._deaths,
            mounts=len(self._mounts),
            negotiated=self._negotiated.to_wire() if self._negotiated is not None else None,
            arriving=self._board is not None and not self._board.complete,
            slots_lost=self._slots_lost,
            file=self._file,
        )

    def _tell(self, *, with_report: bool = False) -> None:
        """Tell all daemons how it goes."""
        self._daemons.tell(self._state(), self._report if with_report else None)


def _want(wanted: tuple[int, int]) -> Message:
    first, end = wanted
    return Message("want", {"first": first, "end": end})
