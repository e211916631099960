"""Processes that serve images: started ahead of time, and handed their work.

Concurrency: one spare process is kept warm, so that a mount does not wait for an interpreter to start. One that has its image belongs to the
task that took it. They survive the daemon: none is killed at its end but the spare one.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

import trio

from uenvd import handover
from uenvd.errors import UenvError, WorkerFailed
from uenvd.handover import WorkerReport, WorkerSetup

log = logging.getLogger(__name__)

REPORT_DEADLINE_S: Final = 30.0


SUPERVISOR: Final = ("-m", "uenvd.fuse.supervise")
SESSION: Final = ("-m", "uenvd.fuse.worker", "--supervised")
"""What to start: a supervisor, or a process that serves by itself through libfuse."""


class Process:
    """One started process and our end of its channel."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        self._process = process
        self.channel = channel

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    async def reap(self) -> int:
        """Wait for the end of the process; return its exit status."""
        return await trio.to_thread.run_sync(self._process.wait, abandon_on_cancel=True)

    def kill(self) -> None:
        """End the process without waiting for that."""
        self._process.kill()

    def discard(self) -> None:
        """End a process that serves nobody (a spare one, or one whose setup failed)."""
        self.channel.close()
        self._process.kill()
        self._process.wait()


class Worker:
    """A process that serves an image by itself."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._channel = trio.socket.from_stdlib_socket(process.channel)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def begin(self, setup: WorkerSetup, descriptors: Sequence[int]) -> WorkerReport:
        """Hand the image over and wait for the report. Raises the worker's own error, or `WorkerFailed`."""
        try:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, handover.pack_descriptors(descriptors))]
            await self._channel.sendmsg([setup.encode()], rights)
            with trio.fail_after(REPORT_DEADLINE_S):
                data = await self._channel.recv(handover.MAX_REPORT_BYTES)
        except OSError as error:
            raise WorkerFailed(f"the worker for {setup.name} ended at once: {error}") from error
        except trio.TooSlowError:
            self._process.kill()
            raise WorkerFailed(
                f"the worker for {setup.name} did not report within {REPORT_DEADLINE_S:.0f} s"
            ) from None
        if not data:
            raise WorkerFailed(f"the worker for {setup.name} ended before it served")
        report = WorkerReport.decode(data)
        if report.error is not None:
            raise report.error
        return report

    async def wait(self) -> int:
        """Wait for the end of the process; return its exit status."""
        while await self._channel.recv(4096):
            pass  # a worker has nothing more to say; EOF is its end
        self._channel.close()
        return await self._process.reap()

    def discard(self) -> None:
        """End the process."""
        self._channel.close()
        self._process.discard()


def start_process(what: Sequence[str]) -> Process:
    """Start a process that waits for its work. Raises `OSError`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, *what, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Process(process, ours)


class WorkerPool:
    """Keeps one process ahead of demand. ``what``: `SUPERVISOR` or `SESSION`."""

    def __init__(self, what: Sequence[str] = SUPERVISOR) -> None:
        self._what = what
        self._spare: list[Process] = []
        self._wanted = trio.Event()

    async def run(self) -> None:
        """Start a spare process whenever there is none; end it when cancelled."""
        try:
            while True:
                if not self._spare:
                    try:
                        self._spare.append(await trio.to_thread.run_sync(start_process, self._what))
                    except OSError as error:  # too many processes: an ordinary event
                        log.warning("no process can be started ahead: %s", error)
                self._wanted = trio.Event()
                await self._wanted.wait()
        finally:
            for process in self._spare:
                process.discard()

    async def take(self) -> Process:
        """Return a process without an image. Raises `WorkerFailed`."""
        while self._spare:
            process = self._spare.pop()
            self._wanted.set()
            if process.alive:
                return process
            process.discard()
            log.warning("a spare process had ended (pid %d)", process.pid)
        self._wanted.set()
        try:
            return await trio.to_thread.run_sync(start_process, self._what)
        except OSError as error:
            raise WorkerFailed(f"no process can be started: {error}") from error


async def begin_on(
    pool: WorkerPool, setup: WorkerSetup, descriptors: Sequence[int]
) -> tuple[Worker, WorkerReport]:
    """Take a process of kind `SESSION` and hand it the image; one that fails is ended."""
    worker = Worker(await pool.take())
    try:
        return worker, await worker.begin(setup, descriptors)
    except (UenvError, trio.Cancelled):
        worker.discard()
        raise
