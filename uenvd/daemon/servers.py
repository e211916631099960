"""Who serves a connection: a supervisor with its workers (transport ``channel``), or one process through libfuse (``pyfuse3``).

Concurrency: a `Server` belongs to the `Served` task that made it; a supervisor's channel has a task of its own in the daemon's nursery.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final, Protocol

import trio

from uenvd.config import ServingConfig
from uenvd.daemon.adoption import Adopted, new_slots
from uenvd.daemon.lazy import Lazy
from uenvd.daemon.mounter import Mounter
from uenvd.daemon.notify import Notifier
from uenvd.daemon.rundir import ImageDirectory
from uenvd.daemon.supervision import Supervision
from uenvd.daemon.workers import SESSION, SUPERVISOR, Worker, WorkerPool, begin_on
from uenvd.errors import WorkerFailed
from uenvd.fuse.bounds import most_bytes
from uenvd.fuse.killed import LOOK_S, release_killed
from uenvd.fuse.slots import Slots
from uenvd.handover import Duty, WorkerReport, WorkerSetup

log = logging.getLogger(__name__)

DEFAULT_WORKERS: Final = 2

OpenBlob = Callable[[str], Awaitable[dict[str, int]]]
"""Opens a blob of the cache by its digest; returns the descriptors with which it is served, by name."""


class Server(Protocol):
    """Serves one connection."""

    @property
    def pid(self) -> int | None:
        """Of the process that is in charge."""

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Of the processes that answer."""

    @property
    def fuse_fd(self) -> int:
        """The connection; stays the server's."""

    async def attend(self) -> None:
        """The mount exists: do what can be done without the image. Raises errors of the tree."""

    async def serve(self, image: Mapping[str, int] | None) -> WorkerReport:
        """Serve the image (None: the duty names it); return what it says of itself. Raises errors of the tree.

        ``image``: its descriptors by name, which stay the caller's: ``image``, and those of `uenvd.fuse.arrival` when it is still arriving.
        """

    async def wait(self) -> None:
        """Wait for the end of the connection."""

    def arrives(self, lazy: Lazy) -> None:
        """The image is still arriving: connect the two. No checkpoint."""

    def release(self) -> None:
        """Nobody new will come: let the connection end with its last user."""

    def abandon(self) -> None:
        """End the connection now."""


class SessionServer:
    """One process, through libfuse. Its end is that of the connection."""

    def __init__(self, pool: WorkerPool, duty: Duty, fuse_fd: int, namespace_fd: int) -> None:
        self._pool = pool
        self._duty = duty
        self.fuse_fd = fuse_fd
        self._namespace_fd = namespace_fd
        self._worker: Worker | None = None

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self._worker.pid if self._worker is not None else None

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """It alone."""
        return (self._worker.pid,) if self._worker is not None else ()

    async def attend(self) -> None:
        """Requests wait in the kernel until there is an image."""

    async def serve(self, image: Mapping[str, int] | None) -> WorkerReport:
        """Hand all of it to a process."""
        duty = self._duty
        named = {"fuse": self.fuse_fd, "mntns": self._namespace_fd, **(image or {})}
        setup = WorkerSetup(
            tuple(named),
            path=duty.path,
            reader=duty.reader,
            uid=duty.uid,
            gid=duty.gid,
            groups=duty.groups,
            cache_bytes=duty.cache_bytes,
            name=duty.label,
        )
        self._worker, report = await begin_on(self._pool, setup, list(named.values()))
        self._close()
        return report

    async def wait(self) -> None:
        """Wait for the end of the process."""
        assert self._worker is not None
        status = await self._worker.wait()
        if status != 0:
            log.error(
                "%s: the worker (pid %d) ended with status %d", self._duty.label, self._worker.pid, status
            )

    def arrives(self, lazy: Lazy) -> None:
        """Never: this kind waits for whole images."""

    def release(self) -> None:
        """The kernel sees to it."""

    def abandon(self) -> None:
        """Close the last descriptor of the connection."""
        self._close()

    def _close(self) -> None:
        if self.fuse_fd >= 0:
            os.close(self.fuse_fd)
            self.fuse_fd = -1


class ChannelServer:
    """A supervisor with its workers."""

    def __init__(
        self,
        nursery: trio.Nursery,
        supervision: Supervision,
        *,
        prepared: Callable[[], Awaitable[None]],
        notifier: Notifier,
        on_release: Callable[[], None],
    ) -> None:
        self._nursery = nursery
        self._supervision = supervision
        self._prepared = prepared
        self._notifier = notifier
        self._on_release = on_release

    @property
    def pid(self) -> int | None:
        """Of the active supervisor."""
        return self._supervision.pid

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Of the workers."""
        return self._supervision.worker_pids

    @property
    def fuse_fd(self) -> int:
        """The connection."""
        return self._supervision.fuse_fd

    async def attend(self) -> None:
        """Start the supervisor, which answers INIT and what it can."""
        supervision = self._supervision
        await supervision.begin()
        self._nursery.start_soon(supervision.run)
        await self._prepared()
        self._notifier.store(
            supervision.duty.name, {"fuse": supervision.fuse_fd, "slots": supervision.slots_fd}
        )

    async def adopted(self) -> None:
        """Go on with one that is there already: give it mounts for the next daemon."""
        self._nursery.start_soon(self._supervision.run)
        await self._supervision.give_spares()
        await self._prepared()

    async def serve(self, image: Mapping[str, int] | None) -> WorkerReport:
        """Have it start the workers."""
        return await self._supervision.serve(image)

    def arrives(self, lazy: Lazy) -> None:
        """The image is still arriving: pass on what is wanted and what has come. No checkpoint."""
        self._supervision.on_want = lazy.want
        lazy.connect(self._supervision.have, self._supervision.give_image)
        memory = mmap.mmap(self._supervision.slots_fd, 0, prot=mmap.PROT_READ)
        slots = Slots(memory, len(memory) // Slots.size_bytes(1))
        self._nursery.start_soon(self._release_killed, lazy, slots)

    async def _release_killed(self, lazy: Lazy, slots: Slots) -> None:
        """Do what the supervisor does, too, but cannot where processes of others are hidden from it."""
        supervision = self._supervision
        while not (lazy.done or lazy.stopped or supervision.gone or supervision.fuse_fd < 0):
            release_killed(slots, supervision.fuse_fd)
            await trio.sleep(LOOK_S)

    async def give_image(self, image: Mapping[str, int]) -> None:
        """Serve from another file of the image, in place of one that was still arriving."""
        await self._supervision.give_image(image)

    @property
    def arriving(self) -> bool:
        """Whether its processes know of no complete file of the image."""
        state = self._supervision.state
        return state is not None and state.arriving

    async def wait(self) -> None:
        """Wait for the end of the connection, whoever serves it meanwhile."""
        with suppress(WorkerFailed):
            await self._supervision.until(lambda: False)
        self._notifier.forget(self._supervision.duty.name)

    def release(self) -> None:
        """Have it drop the mounts that it holds."""
        self._on_release()
        self._supervision.release()

    def abandon(self) -> None:
        """End it, and let go of its connection."""
        self._supervision.abandon()
        self._supervision.close()
        self._notifier.forget(self._supervision.duty.name)


class Servers:
    """Makes the servers of this daemon, of the kind that the configuration wants."""

    def __init__(
        self,
        nursery: trio.Nursery,
        config: ServingConfig,
        *,
        directory: ImageDirectory,
        mounter: Mounter,
        notifier: Notifier,
        open_blob: OpenBlob,
    ) -> None:
        self._nursery = nursery
        self._config = config
        self._directory = directory
        self._mounter = mounter
        self._notifier = notifier
        self._open_blob = open_blob
        self._pool = WorkerPool(SESSION if config.transport == "pyfuse3" else SUPERVISOR)
        nursery.start_soon(self._pool.run)

    @property
    def workers(self) -> int:
        """How many workers an image has."""
        return self._config.workers or min(DEFAULT_WORKERS, len(os.sched_getaffinity(0)))

    def most_bytes(self, cache_bytes: int) -> int:
        """Return the most memory that the processes of one image can have; ``cache_bytes``: for its decoded blocks."""
        return most_bytes(self.workers, cache_bytes, threads=self._config.transport == "pyfuse3")

    def duty(self, duty: Duty) -> Duty:
        """Return a duty with what the configuration says of all of them."""
        config = self._config
        return replace(
            duty,
            workers=self.workers,
            nice=config.nice,
            affinity=config.affinity,
            hang_s=config.hang_s,
            grace_s=config.grace_s,
            max_readahead_bytes=config.readahead_bytes,
        )

    def new(self, duty: Duty, fuse_fd: int) -> Server:
        """Return a server for a connection whose mount has been made; it owns ``fuse_fd``."""
        if self._config.transport == "pyfuse3":
            return SessionServer(self._pool, duty, fuse_fd, self._mounter.serving_namespace_fd)
        return self._channel_server(duty, fuse_fd, new_slots(duty))[0]

    @property
    def can_serve_arriving(self) -> bool:
        """Whether an image can be served before it is complete."""
        return self._config.transport != "pyfuse3"

    async def adopt(self, adopted: Adopted, *, attached: bool) -> ChannelServer:
        """Return the server that an earlier daemon made; with ``attached`` its mount is in our namespace."""
        server, supervision = self._channel_server(
            adopted.duty, adopted.fuse_fd, adopted.slots_fd, attached=attached
        )
        supervision.take_over(adopted.channel, adopted.state, adopted.report, slots_lost=adopted.slots_lost)
        await server.adopted()
        return server

    def _channel_server(
        self, duty: Duty, fuse_fd: int, slots_fd: int, *, attached: bool = True
    ) -> tuple[ChannelServer, Supervision]:
        released = not attached

        def release() -> None:
            nonlocal released
            released = True

        async def spares() -> list[int]:
            return [] if released else await self._mounter.spares(duty.name)

        async def prepared() -> None:
            if not released:
                await self._mounter.set_readahead(duty.name, self._config.readahead_bytes)

        supervision = Supervision(
            duty,
            directory=self._directory,
            pool=self._pool,
            fuse_fd=fuse_fd,
            slots_fd=slots_fd,
            namespace_fd=self._mounter.serving_namespace_fd,
            spares=spares,
            open_image=None if duty.blob is None else partial(self._open_blob, duty.blob),
        )
        server = ChannelServer(
            self._nursery, supervision, prepared=prepared, notifier=self._notifier, on_release=release
        )
        return server, supervision
