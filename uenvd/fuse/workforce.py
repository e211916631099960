"""The workers of one image: started, watched, replaced. They are children of the supervisor and end with it.

A worker's end is seen through its pidfd. What it had in hand lies in its slots; its successor gets the same slots and answers that first.
A worker hangs when one request has kept it busy for too long, or when requests have waited for that long and nobody has begun one, while no
thread of it waits for storage (a parallel file system may take minutes to recover: killing a worker would not make it faster); or when
somebody has stopped it.

Sources: pidfd_open(2), prctl(2) PR_SET_PDEATHSIG, proc_pid_stat(5).
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from uenvd import handover
from uenvd.errors import InternalError, StorageError, UenvError
from uenvd.fuse.arrival import Board
from uenvd.fuse.channel import Channel
from uenvd.fuse.faults import Faults
from uenvd.fuse.opening import open_tree, read_meta
from uenvd.fuse.protocol import Negotiated
from uenvd.fuse.seccomp import Policy, restrict
from uenvd.fuse.shared import SharedBlocks
from uenvd.fuse.slots import Slot
from uenvd.fuse.source import SETTLED, WANT, WOKEN, ArrivingSource
from uenvd.fuse.tree import Tree
from uenvd.handover import SLOTS_PER_WORKER, Duty, WorkerReport

_log = logging.getLogger("uenvd-fs")

SHARED_FRACTION: Final = 0.5
"""Of the memory for decoded blocks: what all workers share. The rest is divided among them."""
_PR_SET_PDEATHSIG: Final = 1
_SHORT_LIFE_S: Final = 1.0
_MAX_DELAY_S: Final = 1.0
_HOPELESS_ENDS: Final = 8
_HOPELESS_S: Final = 10.0
_MIN_CACHE_BYTES: Final = 1 << 20


@dataclass(eq=False)
class Worker:
    """One worker process."""

    index: int
    pid: int
    pidfd: int
    channel: socket.socket
    born_s: float
    arriving: bool
    """It serves an image that is not complete: the descriptor of the connection has to be non-blocking."""

    def close(self) -> None:
        """Close our descriptors of it."""
        os.close(self.pidfd)
        self.channel.close()


class Workforce:
    """All workers of one connection.

    Args:
        duty: how many, and how they run.
        fuse_fd: the connection; INIT is answered.
        image_fd: the image.
        negotiated: what INIT agreed on.
        slots: ``duty.workers * SLOTS_PER_WORKER`` of them.
        shared: memory for decoded blocks.
        in_child: called first in a new worker: it closes what is the supervisor's alone.
        board: what of the image is here, when it is still arriving.

    """

    def __init__(
        self,
        duty: Duty,
        *,
        fuse_fd: int,
        image_fd: int,
        negotiated: Negotiated,
        slots: Sequence[Slot],
        shared: SharedBlocks,
        in_child: Callable[[], None],
        board: Board | None = None,
    ) -> None:
        self._duty = duty
        self._fuse_fd = fuse_fd
        self._image_fd = image_fd
        self._negotiated = negotiated
        self._slots = slots
        self._shared = shared
        self._in_child = in_child
        self._board = board
        self._replaced: set[int] = set()
        """Pids that were ended because there is another image file."""
        self._workers: dict[int, Worker] = {}
        self._short_lives = 0
        self._own_ends = 0
        """Short lives in a row that nobody had ended with SIGKILL, and in which no request was begun."""
        self._own_ends_since_s = 0.0
        self._unserved_since_ns: int | None = None
        """Since when requests have waited of which nobody has begun one; None: none waited when that was looked at last."""
        self._due: dict[int, float] = {}
        """Workers to be started, and when (monotonic)."""

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the workers that run now, by index."""
        return tuple(self._workers[index].pid for index in sorted(self._workers))

    def start(self, count: int) -> None:
        """See to it that the first ``count`` workers run."""
        for index in range(count):
            if index not in self._workers:
                self._due.setdefault(index, 0.0)
        self.start_due()

    @property
    def hopeless(self) -> bool:
        """Whether workers have been ending of themselves, soon after their start, again and again for a long time, and none did any good.

        A request that ends its workers is refused (`uenvd.fuse.channel.MAX_ATTEMPTS`), however many there are of that kind. This is for what
        ends workers before they begin a request: without it readers would wait for ever.
        """
        now_s = time.monotonic()
        return (
            self._own_ends >= _HOPELESS_ENDS
            and now_s - self._own_ends_since_s >= _HOPELESS_S
            and not any(now_s - worker.born_s >= _SHORT_LIFE_S for worker in self)
        )

    @property
    def next_start_s(self) -> float | None:
        """When the next worker is to be started (monotonic); None when all run."""
        return min(self._due.values(), default=None)

    def change_image(self, image_fd: int, board: Board | None) -> None:
        """Serve from another file with the same bytes: successors of all workers do, and answer first what these have in hand."""
        self._image_fd, self._board = image_fd, board
        for worker in self:
            self._replaced.add(worker.pid)
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)

    def wake(self) -> None:
        """Tell the workers that bytes of the image have come, or will not."""
        for worker in self:
            with suppress(OSError):  # one whose channel is full has been told
                worker.channel.send(WOKEN, socket.MSG_DONTWAIT)

    def settled(self, worker: Worker) -> None:
        """Take note that a worker says so (`uenvd.fuse.source.SETTLED`): when none has to hear of bytes any more, all sleep in read(2)."""
        worker.arriving = False
        self._sleep_if_all_may()

    def _sleep_if_all_may(self) -> None:
        here = self._board is None or self._board.complete
        if here and not any(one.arriving for one in self):
            os.set_blocking(self._fuse_fd, True)

    def end_all(self) -> None:
        """Kill all workers and wait until they are gone: nobody uses the slots then."""
        self._due.clear()
        for worker in list(self):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
            os.waitid(os.P_PIDFD, worker.pidfd, os.WEXITED)
            del self._workers[worker.index]
            worker.close()

    def start_due(self) -> bool:
        """Start the workers whose time has come; tell whether there was one."""
        now_s = time.monotonic()
        due = [index for index, due_s in self._due.items() if due_s <= now_s]
        for index in due:
            del self._due[index]
            self._start(index)
        return bool(due)

    def ended(self, worker: Worker) -> int:
        """Take note that a worker's pidfd has become readable; return its status (below 0: minus the signal). 0 ends the connection.

        Any other status has a successor started: at once, or after a while if workers end soon after their start again and again.
        """
        result = os.waitid(os.P_PIDFD, worker.pidfd, os.WEXITED)
        status = 0
        if result is not None:
            status = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
        del self._workers[worker.index]
        worker.close()
        if status == 0:
            return 0
        if worker.arriving:
            self._sleep_if_all_may()
        now_s = time.monotonic()
        if worker.pid in self._replaced:
            self._replaced.discard(worker.pid)
            self._due[worker.index] = now_s
            return status
        self._short_lives = self._short_lives + 1 if now_s - worker.born_s < _SHORT_LIFE_S else 0
        own_end = self._short_lives and status != -signal.SIGKILL
        if not own_end or self._begun_ns() > self._own_ends_since_s * 1e9:
            self._own_ends = 0
        if own_end and self._begun_ns(worker.index) < worker.born_s * 1e9:
            if self._own_ends == 0:
                self._own_ends_since_s = now_s
            self._own_ends += 1
        delay_s = 0.0 if self._short_lives < 3 else min(0.01 * 2**self._short_lives, _MAX_DELAY_S)
        self._due[worker.index] = now_s + delay_s
        _log.warning(
            "%s: worker %d (pid %d) ended: %s", self._duty.label, worker.index, worker.pid, _end(status)
        )
        return status

    def end_hung(self, *, requests_wait: bool) -> None:
        """Kill workers that hang; their end shows like any other. ``requests_wait``: whether the kernel has some at this moment."""
        now_ns = time.monotonic_ns()
        unserved = self._are_unserved(now_ns, requests_wait)
        for worker in self:
            state = thread_states(worker.pid)
            late = self._is_late(worker, now_ns) or (unserved and self._should_serve(worker, now_ns))
            if "T" in state or (late and "D" not in state):
                _log.error("%s: worker %d (pid %d) hangs", self._duty.label, worker.index, worker.pid)
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)

    def _is_late(self, worker: Worker, now_ns: int) -> bool:
        limit_ns = self._duty.hang_s * 1e9
        return any(
            slot.busy() and not slot.parked and slot.started_ns and now_ns - slot.started_ns > limit_ns
            for slot in self._slots_of(worker.index)
        )

    def _are_unserved(self, now_ns: int, requests_wait: bool) -> bool:
        """Tell whether requests have waited all the time that one may take, and nobody has begun any."""
        since_ns = self._unserved_since_ns
        if not requests_wait:
            self._unserved_since_ns = None
        elif since_ns is None or self._begun_ns() > since_ns:
            self._unserved_since_ns = now_ns
        else:
            return now_ns - since_ns > self._duty.hang_s * 1e9
        return False

    def _should_serve(self, worker: Worker, now_ns: int) -> bool:
        """Tell whether a worker has room for a request, and had the time to take one."""
        has_room = any(not slot.busy() for slot in self._slots_of(worker.index))
        return has_room and now_ns - worker.born_s * 1e9 > self._duty.hang_s * 1e9

    def _begun_ns(self, index: int | None = None) -> int:
        """Return when a request was begun last, by any worker or by that one (and its predecessors)."""
        return max(
            (slot.begun_ns for slot in (self._slots if index is None else self._slots_of(index))), default=0
        )

    def _slots_of(self, index: int) -> Sequence[Slot]:
        return self._slots[index * SLOTS_PER_WORKER : (index + 1) * SLOTS_PER_WORKER]

    def _start(self, index: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent, born_s = os.getpid(), time.monotonic()
        board = self._board if self._board is not None and not self._board.complete else None
        try:
            pid = os.fork()
        except OSError as error:
            ours.close()
            theirs.close()
            _log.error("%s: no worker can be started: %s", self._duty.label, error.strerror)
            self._due[index] = time.monotonic() + _MAX_DELAY_S
            return
        if pid == 0:
            status = 1
            try:
                ours.close()
                _end_with(parent)
                for worker in self:
                    worker.close()
                self._in_child()
                self._serve(index, theirs, board)
                status = 0
            except BaseException:  # noqa: BLE001 - the boundary: nothing of the supervisor may run in a worker
                _log.exception("%s: a worker ends", self._duty.label)
            finally:
                os._exit(status)
        theirs.close()
        self._workers[index] = Worker(index, pid, os.pidfd_open(pid), ours, born_s, board is not None)

    def _serve(self, index: int, channel: socket.socket, board: Board | None) -> None:
        """Be a worker: look at the image, report, serve to the end of the connection."""
        duty = self._duty
        _place(duty)
        restrict(Policy.WORKER)
        source = None if board is None else ArrivingSource(self._image_fd, board, channel)
        try:
            tree, report = self._look(source)
        except UenvError as error:
            _say(channel, WorkerReport(error=error).encode())
            os._exit(1)
        _say(channel, report.encode())
        faults = Faults(duty.label)
        if source is None:
            Channel(self._fuse_fd, tree, self._negotiated, self._slots_of(index), faults).serve()
        else:
            Channel(
                self._fuse_fd,
                tree,
                self._negotiated,
                self._slots_of(index),
                faults,
                source_wake_fd=channel.fileno(),
                give_up=source.give_up,
                complete=lambda: source.complete,
                settled=lambda: _say(channel, SETTLED),
            ).serve()

    def _look(self, source: ArrivingSource | None) -> tuple[Tree, WorkerReport]:
        """Look at the image. Raises errors of the tree. Of one that is still arriving the metadata is known already (`uenvd.daemon.lazy`)."""
        duty = self._duty
        own_bytes = int(duty.cache_bytes * (1 - SHARED_FRACTION)) // duty.workers
        notes: list[str] = []
        try:
            tree = open_tree(
                self._image_fd,
                duty.label,
                mask_privileged=duty.mask_privileged,
                cache_bytes=max(own_bytes, _MIN_CACHE_BYTES),
                shared=self._shared,
                source=source,
            )
            if source is not None:
                return tree, WorkerReport()
            return tree, WorkerReport(meta=read_meta(tree, notes), notes=tuple(notes))
        except OSError as error:
            raise StorageError(f"cannot read the image: {error.strerror}") from error
        except UenvError:
            raise
        except Exception as error:
            _log.exception("%s: the worker cannot start", duty.label)
            raise InternalError(f"the worker cannot start: {type(error).__name__}: {error}") from error


def _end_with(parent: int) -> None:
    """End the calling process when its parent does, also if that was a moment ago."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _say(channel: socket.socket, data: bytes) -> None:
    """Tell the supervisor; one that is gone takes this process with it."""
    with suppress(OSError):
        channel.send(data)


def _place(duty: Duty) -> None:
    """Go where a worker is to run. A processor that is not there is no reason not to serve."""
    try:
        if duty.affinity:
            os.sched_setaffinity(0, duty.affinity)
        if duty.nice:
            os.setpriority(os.PRIO_PROCESS, 0, duty.nice)
    except OSError as error:
        _log.warning("%s: worker.affinity or worker.nice cannot be had: %s", duty.label, error.strerror)


def thread_states(pid: int) -> str:
    """Return the states of all threads of a process, as proc_pid_stat(5) has them; empty when that cannot be known."""
    states = ""
    with suppress(OSError, IndexError):
        for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - names, not paths
            states += Path(f"/proc/{pid}/task/{task}/stat").read_text().rpartition(")")[2].split()[0]
    return states


def parse_want(data: bytes) -> tuple[int, int] | None:
    """Return the bytes ``[first, end)`` that a worker wants; None if it says something else."""
    if len(data) != WANT.size or data[:1] != b"W":
        return None
    _kind, first, end = WANT.unpack(data)
    return first, end


def receive_report(worker: Worker) -> bytes | None:
    """Return what a worker says when its channel is readable, None when it has ended. Only that it is a report is checked."""
    with suppress(OSError):
        data = worker.channel.recv(handover.MAX_REPORT_BYTES)
        return data or None
    return None


def _end(status: int) -> str:
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
