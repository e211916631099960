"""All images that are mounted. One task a `Served`, in the daemon's nursery, which owns the mount in the daemon's namespace and the `Server`,
which owns the FUSE descriptor.

Concurrency: `ServedImages` changes its tables and the counts of leases synchronously; between a look-up and
``leases += 1`` there is no checkpoint. A `Served` without leases is let go after ``linger_s``: the daemon detaches its own
mount, and the kernel ends the connection (and thereby its processes) when the last namespace that holds a clone is gone.

What an earlier daemon served is adopted: a `Served` in state ``serving`` without leases (its users' leases ended with that daemon).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

import trio

from uenvd.cache.store import Store
from uenvd.daemon import disk
from uenvd.daemon.adoption import Adopted
from uenvd.daemon.clones import Clones
from uenvd.daemon.lazies import Lazies
from uenvd.daemon.lazy import Lazy
from uenvd.daemon.metrics import METRICS
from uenvd.daemon.mounter import Mounter
from uenvd.daemon.peer import Identity
from uenvd.daemon.pulls import Pulls
from uenvd.daemon.question import make_image
from uenvd.daemon.resolution import Found, Repository
from uenvd.daemon.served import AdoptedSource, BlobSource, FileSource, Served
from uenvd.daemon.servers import ChannelServer, Server, Servers
from uenvd.errors import Cancelled, InternalError, InUse, MountFailed, UenvError
from uenvd.handover import Duty

log = logging.getLogger(__name__)

_POLL_S: Final = 0.2
_LET_GO_S: Final = 2.0
"""How long the kernel and the worker may take to end a connection that nobody uses."""
_ROOT: Final = Identity(0, 0, ())


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
        lazies: Lazies,
        mounter: Mounter,
        servers: Servers,
        worker_identity: Identity,
        worker_cache_bytes: int,
        linger_s: float,
    ) -> None:
        self._nursery = nursery
        self._store = store
        self._pulls = pulls
        self._lazies = lazies
        self._mounter = mounter
        self._clones = Clones(nursery, mounter)
        self._servers = servers
        self._worker_identity = worker_identity
        self._worker_cache_bytes = worker_cache_bytes
        self._linger_s = linger_s
        self._by_digest: dict[str, Served] = {}
        self._all: set[Served] = set()

    @property
    def image_memory_bytes(self) -> int:
        """The most memory that the processes of one image can have."""
        return self._servers.most_bytes(self._worker_cache_bytes)

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
        elif isinstance(served.source, AdoptedSource):
            served.source = source  # the same image, and now we know more of it
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
                hint=f"job steps and sessions that have it mounted: {served.leases}; it can be removed when they have ended",
            )
        await self._let_go(served)
        with trio.move_on_after(_LET_GO_S):
            while served.state not in ("gone", "failed"):
                await served.changed.wait()

    def is_ready(self, digest: str | None) -> bool:
        """Tell whether an image of the registry is served, so that a lease on it would be ready at once."""
        served = self._by_digest.get(digest) if digest is not None else None
        return served is not None and served.state == "serving" and not served.retired

    def clone_nowait(self, served: Served) -> int | None:
        """Return a spare clone if there is one; no checkpoint."""
        return self._clones.take_nowait(served.name)

    async def clone(self, served: Served) -> int:
        """Return a descriptor of a detached mount of the image, its flags locked; the caller owns it."""
        await served.wait_for(_mounted)
        try:
            return await self._clones.take(served.name)
        except MountFailed:
            if not served.retired and served.error is None:
                raise
            # The image failed meanwhile and its mount is gone: that error is the news.
            await served.wait_for(lambda served: served.state == "gone")
            raise

    def _retire(self, served: Served) -> None:
        served.retired = True
        self._clones.drop(served.name)
        if served.digest is not None and self._by_digest.get(served.digest) is served:
            del self._by_digest[served.digest]

    async def adopt(self, adopted: Adopted) -> None:
        """Go on with what an earlier daemon served."""
        duty = adopted.duty
        served = Served(
            duty.label,
            AdoptedSource(
                duty.digest,
                duty.blob,
                duty.size_bytes,
                duty.repository,
                None if duty.reader is None else Identity(*duty.reader),
            ),
            name=duty.name,
        )
        attached = False
        if adopted.mount_fd is not None:
            try:
                await self._mounter.attach(served.name, adopted.mount_fd)
                attached = True
            except MountFailed as error:
                log.warning("%s: its users are served, others get a new connection: %s", served.label, error)
            adopted.mount_fd = None
        if adopted.report is not None:
            served.meta, served.notes = adopted.report.meta, adopted.report.notes
        served.lazy = await self._resume(adopted)
        served.worker = server = await self._servers.adopt(adopted, attached=attached)
        if served.lazy is not None:
            server.arrives(served.lazy)
        if server.arriving and duty.blob is not None and (served.lazy is None or served.lazy.done):
            await self._give_image(server, served.label, duty.blob)
        served.set_state("serving")
        self._all.add(served)
        if attached and served.digest is not None and served.digest not in self._by_digest:
            self._by_digest[served.digest] = served
            self._clones.open(served.name)
        else:
            await self._let_go(served)
        log.info("%s is served by pid %s, since before this daemon", served.label, served.worker.pid)
        METRICS.takeovers.inc(what="daemon")
        self._nursery.start_soon(self._run_adopted, served, served.worker)

    async def _resume(self, adopted: Adopted) -> Lazy | None:
        """Go on with the pull of an image that is read already."""
        duty = adopted.duty
        try:
            if duty.blob is None or duty.digest is None or await disk.call(self._store.has, duty.blob):
                return None
            repository = Repository.parse(duty.repository or "")
            cached = await disk.call(self._store.image, duty.digest)
            if cached is None or repository is None:
                log.warning("%s: it is served, but the cache knows nothing of it", duty.label)
                return None
            config = await disk.call(self._store.config, cached.manifest)
            found = Found(repository, next(iter(cached.tags), None), duty.digest)
            return await self._lazies.begin(make_image(found, cached.manifest, config), patient=True)
        except UenvError as error:
            log.warning("%s: what it lacks cannot be fetched: %s", duty.label, error)
            return None

    async def _give_image(self, server: ChannelServer, label: str, blob: str) -> None:
        try:
            image = await self._lazies.open(blob)
        except UenvError as error:
            log.warning("%s: its processes keep what they have: %s", label, error)
            return
        try:
            await server.give_image(image)
        finally:
            _close_all(image)

    def prepare_stop(self) -> None:
        """This daemon is about to end: images that nobody uses need not wait for the next one. No checkpoint."""
        for served in self._all:
            if served.leases == 0 and served.worker is not None:
                served.worker.release()

    async def _run(self, served: Served) -> None:
        try:
            await self._serve(served)
        except UenvError as error:
            if not isinstance(error, Cancelled):
                log.warning("%s: %s", served.label, error)
                METRICS.image_failures.inc(code=error.code)
            served.error = error
        except Exception:
            log.exception("%s: serving failed", served.label)
            METRICS.image_failures.inc(code=InternalError.code)
            served.error = InternalError(f"{served.label} cannot be served because of an unexpected fault")
        finally:
            self._end(served)

    async def _run_adopted(self, served: Served, server: Server) -> None:
        try:
            await self._watch(served, server)
        except Exception:
            log.exception("%s: watching it failed", served.label)
        finally:
            self._end(served)

    def _end(self, served: Served) -> None:
        self._retire(served)
        self._all.discard(served)
        served.set_state("failed" if served.error else "gone")

    async def _serve(self, served: Served) -> None:
        server = self._servers.new(self._duty(served), await self._mounter.open_fuse())
        try:
            await self._mounter.add(served.name, server.fuse_fd, served.mount_source, self._owner(served))
            served.set_state("pulling")
            await self._unless_abandoned(served, self._bring_up, server)
        except BaseException:
            if served.lazy is not None:
                served.lazy.stop()
            server.abandon()
            await self._mounter.remove(served.name)
            raise
        await self._watch(served, server)

    def _owner(self, served: Served) -> Identity:
        """Return whose mount it is: clients believe those of root's and of their own only (`uenvd.ctl.session.parse_mountinfo`)."""
        return served.source.owner if isinstance(served.source, FileSource) else _ROOT

    def _duty(self, served: Served) -> Duty:
        source, identity = served.source, self._worker_identity
        owner = source.owner if isinstance(source, FileSource) else None
        blob = served.blob
        return self._servers.duty(
            Duty(
                name=served.name,
                label=served.label,
                source=served.mount_source,
                uid=identity.uid,
                gid=identity.gid,
                groups=identity.groups,
                digest=served.digest,
                repository=source.image.found.repository.path if isinstance(source, BlobSource) else None,
                blob=None if blob is None else blob[0],
                size_bytes=served.total_bytes,
                path=source.path if isinstance(source, FileSource) else None,
                reader=None if owner is None else (owner.uid, owner.gid, owner.groups),
                cache_bytes=self._worker_cache_bytes,
            )
        )

    async def _unless_abandoned(
        self, served: Served, step: Callable[[Served, Server], Awaitable[None]], server: Server
    ) -> None:
        """Run a step, but give up as soon as nobody holds a lease any more."""
        failures: list[UenvError] = []

        async def run_step() -> None:
            try:
                await step(served, server)
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

    async def _bring_up(self, served: Served, server: Server) -> None:
        source = served.source
        await server.attend()
        if isinstance(source, BlobSource):
            if not await disk.call(self._store.has, source.image.layer.digest):
                if self._servers.can_serve_arriving:
                    served.lazy = await self._lazies.begin(source.image)
                if served.lazy is None:
                    await self._pull(served, source)
            await self._pulls.record(source.image)
            if served.lazy is not None:
                server.arrives(served.lazy)
                await served.lazy.until_served()
            image = await self._lazies.open(source.image.layer.digest)
            try:
                served.set_state("starting")
                report = await server.serve(image)
            finally:
                _close_all(image)  # the lock on the open file stays with the server
        else:
            served.set_state("starting")
            report = await server.serve(None)
        served.worker, served.meta, served.notes = server, report.meta, report.notes
        log.info("%s is served by pid %s", served.label, server.pid)
        if served.digest is not None and not served.retired:
            self._clones.open(served.name)
        served.set_state("serving")

    async def _pull(self, served: Served, source: BlobSource) -> None:
        async with self._pulls.join(source.remote, source.image) as pull:
            while not pull.ended.is_set():
                served.done_bytes, served.rate_bytes_per_s = pull.done_bytes, pull.rate_bytes_per_s
                with trio.move_on_after(_POLL_S):
                    await pull.ended.wait()
            served.done_bytes = pull.done_bytes
            if pull.error is not None:
                raise pull.error

    async def _watch(self, served: Served, server: Server) -> None:
        """Wait for the connection's end; let go of the mount when nobody has used it for a while."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._let_go_when_idle, served)
            await server.wait()
            nursery.cancel_scope.cancel()
        if served.lazy is not None:
            served.lazy.stop()
        used = served.leases
        self._retire(served)
        with trio.CancelScope(shield=True):
            await self._mounter.remove(served.name)
        METRICS.worker_ends.inc(how="unexpected" if used > 0 else "idle")
        if used > 0:
            log.error("%s: its connection ended while it was in use", served.label)

    async def _let_go_when_idle(self, served: Served) -> None:
        # Nobody else can come for a user's own file, so there is nothing to linger for.
        linger_s = self._linger_s if served.digest is not None else 0.0
        while True:
            while served.leases > 0:
                await served.changed.wait()
            came_and_went = served.changed
            with trio.move_on_after(linger_s) as waiting:
                await came_and_went.wait()
            if waiting.cancelled_caught and served.leases == 0:
                break
        log.info("%s: no lease for %.0f s, letting go", served.label, linger_s)
        await self._let_go(served)

    async def _let_go(self, served: Served) -> None:
        """Let the connection end with its last user; nobody new comes to it."""
        self._retire(served)
        await self._mounter.remove(served.name)
        if served.worker is not None:
            served.worker.release()


def _close_all(named: dict[str, int]) -> None:
    for descriptor in named.values():
        os.close(descriptor)
