"""Processes that serve images (`uenvd-fs --supervised`): started ahead, handed their work, watched.

Concurrency: one spare worker is kept warm, so that a mount does not wait for an interpreter to start. A worker that
has its image belongs to the task that took it. Workers survive the daemon: they are never killed at its end.
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


class Worker:
    """One started process and our end of its channel."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        self._process = process
        self._channel = trio.socket.from_stdlib_socket(channel)
        self._handed_over = False

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    async def begin(self, setup: WorkerSetup, descriptors: Sequence[int]) -> WorkerReport:
        """Hand the image over and wait for the report. Raises the worker's own error, or `WorkerFailed`."""
        self._handed_over = True
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
        return await trio.to_thread.run_sync(self._process.wait, abandon_on_cancel=True)

    def discard(self) -> None:
        """End a worker that serves nobody (a spare one, or one whose setup failed)."""
        self._channel.close()
        self._process.kill()
        self._process.wait()


def start_worker() -> Worker:
    """Start a process that waits for its setup."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "uenvd.fuse.worker", "--supervised", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Worker(process, ours)


class WorkerPool:
    """Keeps one worker ahead of demand."""

    def __init__(self) -> None:
        self._spare: list[Worker] = []
        self._wanted = trio.Event()

    async def run(self) -> None:
        """Start a spare worker whenever there is none; end it when cancelled."""
        try:
            while True:
                if not self._spare:
                    self._spare.append(await trio.to_thread.run_sync(start_worker))
                self._wanted = trio.Event()
                await self._wanted.wait()
        finally:
            for worker in self._spare:
                worker.discard()

    async def take(self) -> Worker:
        """Return a worker without an image. Raises `WorkerFailed`."""
        while self._spare:
            worker = self._spare.pop()
            self._wanted.set()
            if worker.alive:
                return worker
            log.warning("a spare worker had ended (pid %d)", worker.pid)
        self._wanted.set()
        try:
            return await trio.to_thread.run_sync(start_worker)
        except OSError as error:
            raise WorkerFailed(f"no worker can be started: {error}") from error


async def begin_on(
    pool: WorkerPool, setup: WorkerSetup, descriptors: Sequence[int]
) -> tuple[Worker, WorkerReport]:
    """Take a worker and hand it the image; a worker that fails is ended."""
    worker = await pool.take()
    try:
        return worker, await worker.begin(setup, descriptors)
    except UenvError:
        worker.discard()
        raise
    except trio.Cancelled:
        worker.discard()
        raise
