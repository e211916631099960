"""The supervisor of one image: owns the FUSE connection, and sees to it that somebody always answers.

``python -m uenvd.fuse.supervisor N`` waits on the socket N for its `Duty` (`uenvd.handover` is the contract), confines itself, answers INIT
and what can be said of an image that is not there yet, forks workers when it is, and replaces those that end. It parses no byte of the
image and has no privilege. It lives outside the daemon's mount namespace and goes on without a daemon.

**Nobody is needed.** Beside the *active* supervisor a *standby*, forked from it, waits on a pipe of which the active one and its workers have
the other end, and nobody else. Workers end with the active supervisor (PR_SET_PDEATHSIG); so EOF on the pipe means that it and all its
workers are gone, and that nothing of them will touch the slots any more. Then the standby is the active one: it forks a standby of its own
and workers, which begin with what lies in the slots. A standby that ends is replaced. Only if all processes of an image are killed at the
same moment there is somebody else to act: a daemon that has the descriptors, too.

All of them hold the listening socket through which daemons come. Its refusing a connection therefore means that all of them are gone.

Sources: poll(2), pidfd_open(2), unix(7), fuse(4); fs/fuse/dev.c (a connection ends with the last descriptor of its device).
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import json
import logging
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

from uenvd import mounts
from uenvd.errors import InternalError, ProtocolError, StorageError, UenvError, WorkerFailed
from uenvd.fuse.attend import attend
from uenvd.fuse.confine import acting_as, confine
from uenvd.fuse.opening import DECOMPRESSORS, open_image
from uenvd.fuse.protocol import Negotiated, is_init, negotiate
from uenvd.fuse.protocol.reply import RESEND
from uenvd.fuse.seccomp import Policy
from uenvd.fuse.shared import SharedBlocks
from uenvd.fuse.slots import Slot, Slots
from uenvd.fuse.workforce import (
    SHARED_FRACTION,
    Worker,
    Workforce,
    receive_report,
)
from uenvd.handover import (
    SLOTS_PER_WORKER,
    Duty,
    Message,
    SupervisorState,
    WorkerReport,
    receive_message,
    send_message,
)

_log = logging.getLogger("uenvd-fs")

ORPHAN_S: Final = 2.0
"""How long a connection without an image waits for a daemon: nobody else can bring the image."""
_MAX_CONNECTIONS: Final = 8
_MAX_STARTS: Final = 4
"""So often the first worker may end before it has reported."""
_END_S: Final = 2.0
_RETRY_S: Final = 0.1
_NOTHING_READ: Final = frozenset({errno.EAGAIN, errno.EINTR, errno.ENOENT})
"""Of reading requests: there is none any more; a signal; it was interrupted before it was read."""
_OVER: Final = frozenset({errno.ENODEV, errno.ECONNABORTED})
_UCRED: Final = struct.Struct("iii")


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
        self._listener = socket.socket(fileno=descriptors["adopt"][0]) if "adopt" in descriptors else None
        if self._listener is not None:
            self._listener.setblocking(False)
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
        self._connections: dict[int, socket.socket] = {parent.fileno(): parent}
        self._alone_since_s: float | None = None
        self._life_r, self._life_w = os.pipe2(os.O_CLOEXEC)
        self._standby: _Child | None = None
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

        for channel in self._connections.values():
            on(channel.fileno(), partial(self._hear, channel))
        if self._listener is not None and len(self._connections) < _MAX_CONNECTIONS:
            on(self._listener.fileno(), self._accept)
        if self._standby is not None:
            on(self._standby.pidfd, self._standby_ended)
        if self._phase == "attending" and self._free_slot() is not None:
            on(self._fuse_fd, self._attend)
        for worker in self._workforce or ():
            on(worker.pidfd, partial(self._worker_ended, worker))
            if self._report is None:
                on(worker.channel.fileno(), partial(self._worker_said, worker))
        for descriptor, _events in poll.poll(self._timeout_ms()):
            if self._over:
                return
            actions[descriptor]()
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
        if self._alone_since_s is not None:
            if self._image_fd is None:
                yield self._alone_since_s + ORPHAN_S
            elif self._mounts:
                yield self._alone_since_s + self._duty.grace_s

    def _look_at_the_clock(self) -> None:
        now_s = time.monotonic()
        if self._workforce is not None:
            if self._workforce.start_due():
                self._tell()
            if self._next_look_s is not None and now_s >= self._next_look_s:
                self._workforce.end_hung()
                self._next_look_s = now_s + self._duty.hang_s / 3
        if self._alone_since_s is not None:
            alone_s = now_s - self._alone_since_s
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
        try:
            pid = os.fork()
        except OSError as error:
            _log.warning("%s: no standby can be started: %s", self._duty.label, error.strerror)
            self._next_standby_s = time.monotonic() + _RETRY_S
            return False
        if pid == 0:
            self._forget_children()
            self._forget_connections()
            os.close(self._life_w)
            os.read(self._life_r, 1)
            return True
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
        self._alone_since_s = time.monotonic()
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

    def _forget_connections(self) -> None:
        for channel in self._connections.values():
            channel.close()
        self._connections.clear()

    def _become_worker(self) -> None:
        """In a new worker: close what keeps the mount alive, and what is the supervisor's business."""
        self._forget_connections()
        if self._standby is not None:
            os.close(self._standby.pidfd)
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
        if self._report is not None or worker.channel.fileno() < 0:
            return
        data = receive_report(worker)
        if data is None:
            return  # its end shows elsewhere
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
        workforce.start_due()
        self._tell()

    # -- daemons

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            channel, _address = self._listener.accept()
        except OSError:
            return
        _pid, uid, _gid = _UCRED.unpack(
            channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        )
        if uid not in (0, os.geteuid()):
            channel.close()
            return
        channel.setblocking(False)
        self._connections[channel.fileno()] = channel
        self._alone_since_s = None

    def _hear(self, channel: socket.socket) -> None:
        """Take one message from a daemon."""
        if channel.fileno() < 0:
            return
        try:
            received = receive_message(channel)
        except BlockingIOError:
            return
        except (OSError, ProtocolError) as error:
            if isinstance(error, ProtocolError):
                _log.warning("%s: %s", self._duty.label, error)
            received = None
        if received is None:
            self._hang_up(channel)
            return
        message, descriptors = received
        self._obey(channel, message, group(message, descriptors))

    def _obey(self, channel: socket.socket, message: Message, named: dict[str, list[int]]) -> None:
        match message.op:
            case "image" if self._image_fd is None and "image" in named:
                self._image_fd = named.pop("image")[0]
                self._start_if_ready()
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
        for descriptor in (one for those in named.values() for one in those):
            os.close(descriptor)

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
        self._send(channel, message, [descriptor for _name, descriptor in given])
        for name, descriptor in given:
            if name == "mount":
                os.close(descriptor)
        self._send_report(channel)

    def _state(self) -> SupervisorState:
        return SupervisorState(
            phase=self._phase,
            pid=os.getpid(),
            workers=self._workforce.pids if self._workforce is not None else (),
            standby=self._standby.pid if self._standby is not None else None,
            deaths=self._deaths,
            mounts=len(self._mounts),
            negotiated=self._negotiated.to_wire() if self._negotiated is not None else None,
        )

    def _tell(self, *, with_report: bool = False) -> None:
        """Tell all daemons how it goes."""
        message = Message("state", {"state": self._state().to_wire()})
        for channel in list(self._connections.values()):
            if with_report:
                self._send_report(channel)
            self._send(channel, message)

    def _send_report(self, channel: socket.socket) -> None:
        if self._report is not None:
            self._send(channel, Message("report", {"report": json.loads(self._report.encode())}))

    def _send(self, channel: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send without waiting: a daemon that does not listen loses its connection, and hears all of it when it comes back."""
        if channel.fileno() < 0:
            return
        try:
            send_message(channel, message, descriptors)
        except OSError:
            self._hang_up(channel)

    def _hang_up(self, channel: socket.socket) -> None:
        del self._connections[channel.fileno()]
        channel.close()
        if not self._connections:
            self._alone_since_s = time.monotonic()


def group(message: Message, descriptors: Sequence[int]) -> dict[str, list[int]]:
    """Return the descriptors of a message by name."""
    named: dict[str, list[int]] = {}
    for name, descriptor in zip(message.descriptors, descriptors, strict=True):
        named.setdefault(name, []).append(descriptor)
    return named


def _begin(channel: socket.socket) -> Supervisor | None:
    """Wait for the duty and confine this process; None when there is nothing to do. Raises errors of the tree."""
    received = receive_message(channel)
    if received is None:
        return None
    message, descriptors = received
    named = group(message, descriptors)
    if message.op != "begin" or not {"fuse", "slots"} <= named.keys():
        raise ProtocolError("a supervisor begins with its duty, the fuse descriptor and the slots")
    duty = Duty.from_wire(message.fields.get("duty", {}))
    agreed = message.fields.get("negotiated")
    negotiated = None if agreed is None else Negotiated.from_wire(agreed)
    namespace = named.pop("mntns", [None])[0]
    if duty.path is not None:
        if namespace is not None:
            mounts.setns(namespace, mounts.CLONE_NEWNS)
            namespace = None
        with contextlib.ExitStack() as stack:
            if duty.reader is not None:
                stack.enter_context(acting_as(*duty.reader))
            named["image"] = [open_image(duty.path)]
    shared = SharedBlocks.create(max(int(duty.cache_bytes * SHARED_FRACTION), mmap.PAGESIZE))
    kept = {one for those in named.values() for one in those}
    confine(
        mount_namespace_fd=namespace,
        uid=duty.uid,
        gid=duty.gid,
        groups=duty.groups,
        keep=frozenset({channel.fileno(), shared.fd, *kept}),
        cache_bytes=duty.cache_bytes,
        policy=Policy.SUPERVISOR,
    )
    channel.setblocking(False)
    lost = bool(message.fields.get("slots_lost"))
    return Supervisor(duty, named, negotiated, shared, channel, slots_lost=lost)


def supervise(channel: socket.socket) -> int:
    """Be a supervisor; return the exit status."""
    for module in DECOMPRESSORS:
        with contextlib.suppress(ImportError):  # images that need it say so; the others do not
            importlib.import_module(module)
    gc.collect()
    gc.freeze()
    try:
        try:
            supervisor = _begin(channel)
        except UenvError:
            raise
        except OSError as error:
            raise StorageError(f"the supervisor cannot start: {error.strerror}") from error
        except Exception as error:
            _log.exception("the supervisor cannot start")
            raise InternalError(f"the supervisor cannot start: {type(error).__name__}: {error}") from error
    except UenvError as error:
        report = Message("report", {"report": json.loads(WorkerReport(error=error).encode())})
        with contextlib.suppress(OSError):
            send_message(channel, report)
        return 1
    if supervisor is not None:
        supervisor.run()
    return 0


def main(argv: list[str]) -> int:
    """``argv``: program, number of the socket."""
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    with socket.socket(fileno=int(argv[1])) as channel:
        return supervise(channel)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
