"""Images that are mounted, from the first lease to the last byte.

A `Served` is one FUSE connection: it exists before the image's bytes do, so that a job gets its mount at once and waits
for the bytes later. States:

    opening -> pulling -> starting -> serving -> (gone)
                  \\__________\\____________\\-> failed

Concurrency: one task a `Served`, in the daemon's nursery, which owns the FUSE descriptor, the mount in the daemon's
namespace and the worker. `ServedImages` changes its tables and the counts of leases synchronously; between a look-up and
``leases += 1`` there is no checkpoint. A `Served` without leases is let go after ``linger_s``: the daemon detaches its own
mount, and the kernel ends the connection (and thereby the worker) when the last namespace that holds a clone is gone.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import trio

from uenvd.cache.store import Store
from uenvd.daemon.catalogue import Image
from uenvd.daemon.mounter import Mounter
from uenvd.daemon.peer import Identity
from uenvd.daemon.pulls import Pulls
from uenvd.daemon.workers import Worker, WorkerPool, begin_on
from uenvd.errors import Cancelled, InternalError, InUse, MountFailed, UenvError
from uenvd.handover import WorkerSetup
from uenvd.oci.remote import Remote
from uenvd.views import ImageMeta

log = logging.getLogger(__name__)

_POLL_S: Final = 0.2
_LET_GO_S: Final = 2.0
"""How long the kernel and the worker may take to end a connection that nobody uses."""


@dataclass(frozen=True)
class BlobSource:
    """An image of a registry: shared by all users of the node."""

    remote: Remote
    image: Image


@dataclass(frozen=True)
class FileSource:
    """A file of the user's own: opened and served as him."""

    path: str
    owner: Identity


@dataclass(eq=False)
class Served:
    """One FUSE connection and what is known of it."""

    label: str
    source: BlobSource | FileSource
    name: str = field(default_factory=lambda: secrets.token_hex(8))
    """Name of its mount in the daemon's namespace; new for each connection."""
    state: str = "opening"
    leases: int = 0
    done_bytes: int = 0
    meta: ImageMeta | None = None
    notes: tuple[str, ...] = ()
    """What the worker had to say of the image, for its users."""
    error: UenvError | None = None
    worker: Worker | None = None
    changed: trio.Event = field(default_factory=trio.Event)
    retired: bool = False
    """No further lease may be taken on it."""

    @property
    def digest(self) -> str | None:
        """Digest of the manifest; None for a file."""
        return self.source.image.found.digest if isinstance(self.source, BlobSource) else None

    @property
    def total_bytes(self) -> int:
        """Size of the image as far as it is known."""
        return self.source.image.layer.size_bytes if isinstance(self.source, BlobSource) else 0

    @property
    def mount_source(self) -> str:
        """What mountinfo shows as the source: the session's truth."""
        return f"uenvd:{self.digest or self.label}"

    def set_state(self, state: str) -> None:
        """Move on, and wake who waits for it."""
        self.state = state
        self.changed.set()
        self.changed = trio.Event()

    async def wait_for(self, ready: Callable[[Served], bool]) -> None:
        """Wait until ``ready`` holds or the image failed; raises its error then."""
        while not ready(self):
            if self.error is not None:
                raise self.error
            await self.changed.wait()


def _mounted(served: Served) -> bool:
    return served.state in ("pulling", "starting", "serving")


class ServedImages:
    """All connections of this daemon."""

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        store: Store,
        pulls: Pulls,
        mounter: Mounter,
        workers: WorkerPool,
        worker_identity: Identity,
        worker_cache_bytes: int,
        linger_s: float,
    ) -> None:
        self._nursery = nursery
        self._store = store
        self._pulls = pulls
        self._mounter = mounter
        self._workers = workers
        self._worker_identity = worker_identity
        self._worker_cache_bytes = worker_cache_bytes
        self._linger_s = linger_s
        self._by_digest: dict[str, Served] = {}
        self._all: set[Served] = set()

    def __iter__(self) -> Iterator[Served]:
        return iter(sorted(self._all, key=lambda served: served.label))

    def acquire(self, label: str, source: BlobSource | FileSource) -> Served:
        """Take a lease on the image's connection, making it if there is none; no checkpoint. Pair with `release`."""
        served = self._by_digest.get(source.image.found.digest) if isinstance(source, BlobSource) else None
        if served is None or served.retired:
            served = Served(label, source)
            self._all.add(served)
            if served.digest is not None:
                self._by_digest[served.digest] = served
            self._nursery.start_soon(self._run, served)
        served.leases += 1
        return served

    def release(self, served: Served) -> None:
        """Give a lease back; no checkpoint."""
        served.leases -= 1
        if served.leases == 0:
            served.changed.set()
            served.changed = trio.Event()

    async def let_go(self, digest: str) -> None:
        """Give an idle image up before its time. Raises `InUse` while somebody has a lease on it or a mount of it."""
        served = self._by_digest.get(digest)
        if served is None:
            return
        if served.leases > 0:
            raise InUse(
                f"{served.label} is in use on this node",
                hint=f"{served.leases} jobs or sessions have it mounted",
            )
        self._retire(served)
        await self._mounter.remove(served.name)
        with trio.move_on_after(_LET_GO_S):
            while served.state not in ("gone", "failed"):
                await served.changed.wait()

    async def clone(self, served: Served) -> int:
        """Return a descriptor of a detached mount of the image, its flags locked; the caller owns it."""
        await served.wait_for(_mounted)
        try:
            return await self._mounter.clone(served.name)
        except MountFailed:
            if not served.retired and served.error is None:
                raise
            # The image failed meanwhile and its mount is gone: that error is the news.
            await served.wait_for(lambda served: served.state == "gone")
            raise

    def _retire(self, served: Served) -> None:
        served.retired = True
        if served.digest is not None and self._by_digest.get(served.digest) is served:
            del self._by_digest[served.digest]

    async def _run(self, served: Served) -> None:
        try:
            await self._serve(served)
        except UenvError as error:
            if not isinstance(error, Cancelled):
                log.warning("%s: %s", served.label, error)
            served.error = error
        except Exception:
            log.exception("%s: serving failed", served.label)
            served.error = InternalError(f"{served.label} cannot be served because of an unexpected fault")
        finally:
            self._retire(served)
            self._all.discard(served)
            served.set_state("failed" if served.error else "gone")

    async def _serve(self, served: Served) -> None:
        fuse_fd = await self._mounter.open_fuse()
        try:
            await self._mounter.add(served.name, fuse_fd, served.mount_source, self._owner(served))
            served.set_state("pulling")
            await self._unless_abandoned(served, self._bring_up, fuse_fd)
        except BaseException:
            await self._mounter.remove(served.name)
            raise
        finally:
            os.close(fuse_fd)  # the worker has its own; without one, this ends the connection
        await self._watch(served)

    def _owner(self, served: Served) -> Identity:
        return served.source.owner if isinstance(served.source, FileSource) else self._worker_identity

    async def _unless_abandoned(
        self, served: Served, step: Callable[[Served, int], object], fuse_fd: int
    ) -> None:
        """Run a step, but give up as soon as nobody holds a lease any more."""
        failures: list[UenvError] = []

        async def run_step() -> None:
            try:
                await step(served, fuse_fd)  # type: ignore[misc]
            except UenvError as error:
                failures.append(error)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_step)
            while served.leases > 0:
                await served.changed.wait()
            self._retire(served)
            failures.append(Cancelled(f"nobody waits for {served.label} any more"))
            nursery.cancel_scope.cancel()
        if failures:
            raise failures[0]

    async def _bring_up(self, served: Served, fuse_fd: int) -> None:
        source = served.source
        if isinstance(source, FileSource):
            served.set_state("starting")
            owner, identity = source.owner, self._worker_identity
            setup = WorkerSetup(
                ("fuse", "mntns"),
                path=source.path,
                reader=(owner.uid, owner.gid, owner.groups),
                uid=identity.uid,
                gid=identity.gid,
                groups=identity.groups,
                cache_bytes=self._worker_cache_bytes,
                name=served.label,
            )
            descriptors = [fuse_fd, self._mounter.serving_namespace_fd]
            await self._start_worker(served, setup, descriptors)
            return
        if not await trio.to_thread.run_sync(self._store.has, source.image.layer.digest):
            await self._pull(served, source)
        await self._pulls.record(source.image)
        image_fd = await trio.to_thread.run_sync(self._store.open, source.image.layer.digest)
        try:
            served.set_state("starting")
            identity = self._worker_identity
            setup = WorkerSetup(
                ("fuse", "image", "mntns"),
                uid=identity.uid,
                gid=identity.gid,
                groups=identity.groups,
                cache_bytes=self._worker_cache_bytes,
                name=served.label,
            )
            await self._start_worker(served, setup, [fuse_fd, image_fd, self._mounter.serving_namespace_fd])
        finally:
            os.close(image_fd)  # the lock on the open file stays with the worker

    async def _pull(self, served: Served, source: BlobSource) -> None:
        async with self._pulls.join(source.remote, source.image) as pull:
            while not pull.ended.is_set():
                served.done_bytes = pull.done_bytes
                with trio.move_on_after(_POLL_S):
                    await pull.ended.wait()
            served.done_bytes = pull.done_bytes
            if pull.error is not None:
                raise pull.error

    async def _start_worker(self, served: Served, setup: WorkerSetup, descriptors: list[int]) -> None:
        worker, report = await begin_on(self._workers, setup, descriptors)
        served.worker = worker
        served.meta = report.meta
        served.notes = report.notes
        log.info("%s is served by pid %d", served.label, worker.pid)
        served.set_state("serving")

    async def _watch(self, served: Served) -> None:
        """Wait for the worker's end; let go of the mount when nobody has used it for a while."""
        worker = served.worker
        if worker is None:
            raise InternalError(f"{served.label} has no worker")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._let_go_when_idle, served)
            status = await worker.wait()
            nursery.cancel_scope.cancel()
        self._retire(served)
        with trio.CancelScope(shield=True):
            await self._mounter.remove(served.name)
        if served.leases > 0 or status != 0:
            log.error("%s: the worker (pid %d) ended with status %d", served.label, worker.pid, status)

    async def _let_go_when_idle(self, served: Served) -> None:
        # Nobody else can come for a user's own file, so there is nothing to linger for.
        linger_s = self._linger_s if isinstance(served.source, BlobSource) else 0.0
        while True:
            while served.leases > 0:
                await served.changed.wait()
            came_and_went = served.changed
            with trio.move_on_after(linger_s) as waiting:
                await came_and_went.wait()
            if waiting.cancelled_caught and served.leases == 0:
                break
        self._retire(served)
        log.info("%s: no lease for %.0f s, letting go", served.label, linger_s)
        await self._mounter.remove(served.name)
