"""The supervisor of one image: owns the FUSE connection, and sees to it that somebody always answers.

It answers INIT and what can be said of an image that is not there yet, forks workers when it is, and replaces those that end. It parses no
byte of the image and has no privilege. It lives outside the daemon's mount namespace and goes on without a daemon. `uenvd.fuse.supervise`
starts it, `uenvd.fuse.daemons` has its connections to daemons.

**Nobody is needed.** Beside the *active* supervisor a *standby*, forked from it, waits on a pipe of which the active one and its workers have
the other end, and nobody else. Workers end with the active supervisor (PR_SET_PDEATHSIG); so a hang-up of the pipe means that it and all its
workers are gone, and that nothing of them will touch the slots any more. Then the standby is the active one: it forks a standby of its own
and workers, which begin with what lies in the slots. For a moment there may be two standbys, a new one in place of one that knows too little:
the new one takes over, the other ends. A standby that ends is replaced. Only if all processes of an image are killed at the
same moment there is somebody else to act: a daemon that has the descriptors, too.

All of them hold the listening socket through which daemons come. Its refusing a connection therefore means that all of them are gone.

Sources: poll(2), pidfd_open(2), unix(7), fuse(4); fs/fuse/dev.c (a connection ends with the last descriptor of its device).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, NamedTuple

from uenvd.errors import InternalError, ProtocolError, WorkerFailed
from uenvd.fuse.arrival import Board, take_board
from uenvd.fuse.attend import attend
from uenvd.fuse.daemons import Daemons
from uenvd.fuse.protocol import Negotiated, is_init, negotiate
from uenvd.fuse.protocol.reply import RESEND
from uenvd.fuse.shared import SharedBlocks
from uenvd.fuse.slots import Slot, Slots
from uenvd.fuse.workforce import Worker, Workforce, parse_want, receive_report, thread_states
from uenvd.handover import SLOTS_PER_WORKER, Duty, Message, SupervisorState, WorkerReport

_log = logging.getLogger("uenvd-fs")

ORPHAN_S: Final = 2.0
"""How long a connection without an image waits for a daemon: nobody else can bring the image."""
_MAX_WANTS: Final = 4096
"""Remembered for a daemon to come."""
_MAX_STARTS: Final = 4
"""So often the first worker may end before it has reported."""
_END_S: Final = 2.0
_RETRY_S: Final = 0.1
_NOTHING_READ: Final = frozenset({errno.EAGAIN, errno.EINTR, errno.ENOENT})
"""Of reading requests: there is none any more; a signal; it was interrupted before it was read."""
_NUMBER: Final = struct.Struct("=Q")
_OVER: Final = frozenset({errno.ENODEV, errno.ECONNABORTED})


def slot_count(workers: int) -> int:
    """Return how many request slots a connection with so many workers has."""
    return workers * SLOTS_PER_WORKER


class _Child(NamedTuple):
    pid: int
    pidfd: int
    born_s: float


class Supervisor:
    """One process's view of the connection; the standby has a copy of it."""

    def __init__(
        self,
        duty: Duty,
        descriptors: dict[str, list[int]],
        negotiated: Negotiated | None,
        shared: SharedBlocks,
        parent: socket.socket,
        *,
        slots_lost: bool = False,
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
        self._life_r, self._life_w = os.pipe2(os.O_CLOEXEC)
        self._standby: _Child | None = None
        self._newest = mmap.mmap(-1, _NUMBER.size)
        """The number of the standby forked last, which all of them see; written before that one closes the life pipe."""
        self._number = 0
        """In a standby: its own; in the active one: that of its standby."""
        self._standby_stale = negotiated is not None
        self._next_standby_s = 0.0
        self._next_look_s: float | None = None
        self._over = False
        self._slots_lost = slots_lost

    # -- the loop

    def run(self) -> None:
        """Serve until the connection ends."""
        os.set_blocking(self._fuse_fd, False)
        self._start_if_ready()
        while not self._over:
            if self._standby_due() and self._fork_standby():
                self._take_over()
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
        if self._standby is not None:
            on(self._standby.pidfd, self._standby_ended)
        if self._phase == "attending" and self._free_slot() is not None:
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
        if self._standby_stale and self._negotiated is not None:
            yield self._next_standby_s
        alone_since_s = self._daemons.alone_since_s
        if alone_since_s is not None:
            if self._image_fd is None:
                yield alone_since_s + ORPHAN_S
            elif self._mounts:
                yield alone_since_s + self._duty.grace_s

    def _look_at_the_clock(self) -> None:
        now_s = time.monotonic()
        if self._workforce is not None:
            if self._workforce.start_due():
                self._tell()
            if self._next_look_s is not None and now_s >= self._next_look_s:
                self._workforce.end_hung()
                if self._standby is not None:
                    self._end_if_stopped(self._standby.pid, self._standby.pidfd)
                self._next_look_s = now_s + self._duty.hang_s / 3
        alone_since_s = self._daemons.alone_since_s
        if alone_since_s is not None:
            alone_s = now_s - alone_since_s
            if self._image_fd is None and alone_s >= ORPHAN_S:
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
        if self._standby is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._standby.pidfd, signal.SIGKILL)
        self._tell()

    # -- the standby

    def _standby_due(self) -> bool:
        return (
            self._negotiated is not None and self._standby_stale and time.monotonic() >= self._next_standby_s
        )

    def _fork_standby(self) -> bool:
        """Fork a standby that knows what this process knows now, in place of the one there is. True in the standby, when its turn has come."""
        active, active_pidfd = os.getpid(), -1
        try:
            active_pidfd = os.pidfd_open(active)
            pid = os.fork()
        except OSError as error:
            if active_pidfd >= 0:
                os.close(active_pidfd)
            _log.warning("%s: no standby can be started: %s", self._duty.label, error.strerror)
            self._next_standby_s = time.monotonic() + _RETRY_S
            return False
        if pid == 0:
            self._forget_children()
            self._daemons.forget()
            self._number += 1
            _NUMBER.pack_into(self._newest, 0, self._number)
            os.close(self._life_w)
            self._stand_by(active, active_pidfd)
            os.close(active_pidfd)
            return True
        os.close(active_pidfd)
        self._number += 1
        former = self._standby
        self._standby = _Child(pid, os.pidfd_open(pid), time.monotonic())
        self._standby_stale = False
        if former is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(former.pidfd, signal.SIGKILL)
            os.waitid(os.P_PIDFD, former.pidfd, os.WEXITED)
            os.close(former.pidfd)
        self._tell()
        return False

    def _stand_by(self, active: int, active_pidfd: int) -> None:
        """Wait for the end of the active one and all its workers; one that somebody has stopped is ended."""
        poll = select.poll()
        poll.register(self._life_r, 0)
        while not poll.poll(self._duty.hang_s * 1000 / 3 if self._duty.hang_s > 0 else None):
            self._end_if_stopped(active, active_pidfd)
        if _NUMBER.unpack_from(self._newest)[0] != self._number:
            os._exit(0)  # the one that was about to replace this one knows more

    def _end_if_stopped(self, pid: int, pidfd: int) -> None:
        if "T" in thread_states(pid):
            _log.error("%s: pid %d is stopped; it is replaced", self._duty.label, pid)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def _standby_ended(self) -> None:
        standby = self._standby
        assert standby is not None
        os.waitid(os.P_PIDFD, standby.pidfd, os.WEXITED)
        os.close(standby.pidfd)
        self._standby = None
        self._standby_stale = True
        now_s = time.monotonic()
        self._next_standby_s = now_s + (_RETRY_S if now_s - standby.born_s < 1.0 else 0.0)

    def _take_over(self) -> None:
        """Be the active one: predecessor and workers are gone."""
        _log.error("%s: the supervisor was killed; pid %d takes over", self._duty.label, os.getpid())
        os.close(self._life_r)
        self._life_r, self._life_w = os.pipe2(os.O_CLOEXEC)
        self._standby_stale, self._next_standby_s = True, 0.0
        self._daemons.alone_since_s = time.monotonic()
        if self._phase == "attending":
            for slot in self._slots:
                if slot.busy():
                    self._send_replies(attend(slot, self._slots))
        elif self._phase == "starting":
            self._start_if_ready()
        else:
            self._employ().start(self._duty.workers)

    def _forget_children(self) -> None:
        """In a new process: the children of the one that forked it are not ours."""
        for worker in self._workforce or ():
            worker.close()
        self._workforce = None
        if self._standby is not None:
            os.close(self._standby.pidfd)
            self._standby = None

    def _become_worker(self) -> None:
        """In a new worker: close what keeps the mount alive, and what is the supervisor's business."""
        self._daemons.forget()
        if self._standby is not None:
            os.close(self._standby.pidfd)
        self._newest.close()
        for descriptor in (self._life_r, self._slots_fd, *self._mounts):
            os.close(descriptor)

    # -- before the image is there

    def _free_slot(self) -> Slot | None:
        return next((slot for slot in self._slots if not slot.busy()), None)

    def _attend(self) -> None:
        """Read one request and answer it, if that can be done without the image."""
        slot = self._free_slot()
        if slot is None or self._phase != "attending":
            return
        try:
            length = os.readv(self._fuse_fd, slot.vector)
        except OSError as error:
            if error.errno in _OVER:
                self._over = True
            elif error.errno not in _NOTHING_READ:
                raise
            return
        if self._negotiated is None and is_init(slot.buffer[:length]):
            reply, self._negotiated = negotiate(
                bytes(slot.buffer[:length]), max_readahead_bytes=self._duty.max_readahead_bytes
            )
            slot.clear()
            self._send_replies([reply])
            self._standby_stale = True
            self._tell()
            self._start_if_ready()
        else:
            self._send_replies(attend(slot, self._slots))

    def _send_replies(self, replies: list[bytes]) -> None:
        for reply in replies:
            try:
                os.write(self._fuse_fd, reply)
            except OSError as error:
                if error.errno in _OVER:
                    self._over = True
                elif error.errno != errno.ENOENT:  # ENOENT: answered already
                    raise

    # -- workers

    def _start_if_ready(self) -> None:
        """Start the first worker when there are both an image and an answered INIT."""
        if self._image_fd is None or self._negotiated is None:
            return
        os.set_blocking(self._fuse_fd, True)
        self._phase = "starting"
        self._employ().start(1)
        self._standby_stale = True
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

    def _is_connection_over(self) -> bool:
        """Tell whether the kernel has ended the connection. (Never waited for: each request would wake this process, too.)"""
        poll = select.poll()
        poll.register(self._fuse_fd, 0)
        return any(events & select.POLLERR for _fd, events in poll.poll(0))

    def _worker_said(self, worker: Worker) -> None:
        if worker.channel.fileno() < 0:
            return
        data = receive_report(worker)
        if data is None:
            return  # its end shows elsewhere
        wanted = parse_want(data)
        if wanted is not None:
            if len(self._wants) < _MAX_WANTS:
                self._wants[wanted] = None
            self._daemons.send_all(_want(wanted))
        if wanted is not None or self._report is not None:
            return
        try:
            self._report = WorkerReport.decode(data)
        except ProtocolError as error:
            self._report = WorkerReport(error=error)
        if self._report.error is not None:
            self._phase = "failed"
            self._over = True
        else:
            self._phase = "serving"
            self._employ().start(self._duty.workers)
            if self._slots_lost:
                self._resend()
            self._standby_stale = True
        self._tell(with_report=True)

    def _worker_ended(self, worker: Worker) -> None:
        if self._report is None:
            self._worker_said(worker)
            if self._over:
                return
        workforce = self._employ()
        status = workforce.ended(worker)
        if status == 0 or self._is_connection_over():
            self._over = True
            return
        self._deaths += 1
        if self._report is None:
            self._starts += 1
            if self._starts >= _MAX_STARTS:
                self._report = WorkerReport(
                    error=WorkerFailed(f"the workers for {self._duty.label} ended before they served")
                )
                self._phase, self._over = "failed", True
                self._tell(with_report=True)
                return
        if workforce.hopeless:
            _log.error(
                "%s: its workers end again and again, for no request; it is given up", self._duty.label
            )
            self._report = WorkerReport(
                error=WorkerFailed(f"the workers for {self._duty.label} end again and again")
            )
            self._phase, self._over = "failed", True
            self._tell(with_report=True)
            return
        workforce.start_due()
        self._tell()

    # -- an image that is still arriving

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
        self._standby_stale = True
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
            case "image" if "image" in named and (self._image_fd is None or self._board is not None):
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
            self._standby_stale = True
        self._mounts = []

    def _greet(self, channel: socket.socket, *, adopt: bool) -> None:
        given: list[tuple[str, int]] = []
        if adopt:
            given = [("fuse", self._fuse_fd), ("slots", self._slots_fd)]
            if self._mounts:
                given.append(("mount", self._mounts.pop()))
                self._standby_stale = True
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
            standby=self._standby.pid if self._standby is not None else None,
            deaths=self._deaths,
            mounts=len(self._mounts),
            negotiated=self._negotiated.to_wire() if self._negotiated is not None else None,
            arriving=self._board is not None and not self._board.complete,
        )

    def _tell(self, *, with_report: bool = False) -> None:
        """Tell all daemons how it goes."""
        self._daemons.tell(self._state(), self._report if with_report else None)


def _want(wanted: tuple[int, int]) -> Message:
    first, end = wanted
    return Message("want", {"first": first, "end": end})
