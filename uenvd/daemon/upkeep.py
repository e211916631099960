"""What the cache needs from time to time: leases renewed, room made, blobs checked, damaged ones pulled again.

Concurrency: one task for the leases, one for each directory, one that checks blobs, one that copies. All I/O is in threads of a limiter of
their own and is abandoned at the end: a file server that does not answer holds up neither requests nor the other directory. In a directory
that many nodes share one of them does the cleaning and checking: who holds the claim ``upkeep``.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import trio

from uenvd.cache.claim import HeartbeatClaim
from uenvd.cache.directory import Directory
from uenvd.cache.gc import collect
from uenvd.cache.leases import RENEW_S
from uenvd.cache.scrub import next_blob, scrub_blob
from uenvd.cache.store import Store
from uenvd.config import CacheConfig
from uenvd.daemon import disk
from uenvd.daemon.metrics import METRICS
from uenvd.daemon.pulls import Pulls
from uenvd.daemon.question import Image, make_image
from uenvd.daemon.resolution import Found, Repository
from uenvd.daemon.servedimages import ServedImages
from uenvd.errors import Cancelled, UenvError
from uenvd.oci.remote import Remote

log = logging.getLogger(__name__)

T = TypeVar("T")

ROUND_S: Final = 300.0
"""Between two looks at how full a directory is, and at what is to be checked."""
_THREADS: Final = 6
_DIGEST_DIRECTORY: Final = "/blobs/sha256/"


class Upkeep:
    """The upkeep of one daemon's cache.

    Args:
        store: the cache.
        config: what to do, and how often.
        served: the images that this node serves: their blobs are in use.
        repull: brings an image (digest of its blob) back that was found damaged.
        round_s: see `ROUND_S`.

    """

    def __init__(
        self,
        store: Store,
        config: CacheConfig,
        served: ServedImages,
        *,
        repull: Callable[[str], Awaitable[None]] | None = None,
        round_s: float = ROUND_S,
        renew_s: float = RENEW_S,
    ) -> None:
        self._store = store
        self._config = config
        self._served = served
        self._repull = repull
        self._round_s = round_s
        self._renew_s = renew_s
        self._limiter = trio.CapacityLimiter(_THREADS)
        self._stopped = threading.Event()
        for directory in store.writable:
            directory.on_evicted = _count_eviction

    async def run(self) -> None:
        """Go on until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._every, self._renew_s, self._renew)
                for directory in self._store.writable:
                    nursery.start_soon(self._tend, directory)
                if self._config.copy and self._store.local is not None and self._store.shared is not None:
                    nursery.start_soon(self._every, self._round_s, self._copy)
        finally:
            self._stopped.set()

    # --- leases and last use ------------------------------------------------------------------------------------------------------------

    def used(self) -> dict[str, int]:
        """Return digest -> size of the blobs that this node serves or is about to. No checkpoint."""
        return {blob[0]: blob[1] for one in self._served if (blob := one.blob) is not None}

    async def _renew(self) -> None:
        used = list(self.used())

        def renew() -> None:
            self._store.prepare_rest()
            if self._store.local is not None:
                for digest in used:
                    self._store.local.blobs.touch(digest)
            self._store.renew(used, open_here)

        await self._in_thread(renew)

    # --- room and checks ----------------------------------------------------------------------------------------------------------------

    async def _tend(self, directory: Directory) -> None:
        """Keep one directory in order, in a shared one while no other node does."""
        # Nodes that start together do not meet at the file server for ever.
        await trio.sleep(random.uniform(0.0, min(5.0, self._round_s / 4)))  # noqa: S311 -- no secret
        while True:
            try:
                claim = (
                    await self._in_thread(partial(_become_janitor, directory)) if directory.shared else None
                )
            except UenvError as error:
                log.debug("%s", error)  # another node's task, or no file system: both may change
            else:
                try:
                    await self._tend_once(directory, claim)
                finally:
                    if claim is not None:
                        with trio.CancelScope(shield=True), trio.move_on_after(1.0):
                            await trio.to_thread.run_sync(claim.release, abandon_on_cancel=True)
            await trio.sleep(self._round_s * random.uniform(0.9, 1.1))  # noqa: S311

    async def _tend_once(self, directory: Directory, claim: HeartbeatClaim | None) -> None:
        try:
            done = await self._in_thread(partial(collect, directory))
            if done.freed_bytes:
                log.info("%s: %d bytes freed", directory.root, done.freed_bytes)
            if self._config.scrub_s > 0:
                await self._scrub(directory, claim)
        except UenvError as error:
            log.warning("upkeep of %s: %s", directory.root, error)

    async def _scrub(self, directory: Directory, claim: HeartbeatClaim | None) -> None:
        """Check what is due, for as long as it takes, but make room in between."""
        until_s = trio.current_time() + self._round_s
        while trio.current_time() < until_s:
            if claim is not None:
                claim.check()
            digest = await self._in_thread(partial(next_blob, directory, self._config.scrub_s))
            if digest is None:
                return
            done = await self._in_thread(
                partial(scrub_blob, directory, digest, self._config.scrub_bytes_per_s, self._stopped.is_set)
            )
            if done is None:
                continue
            METRICS.scrubbed_bytes.inc(done.size_bytes)
            if done.damaged:
                METRICS.quarantined.inc()
                if self._repull is not None:
                    await self._repull(digest)

    # --- copies -------------------------------------------------------------------------------------------------------------------------

    async def _copy(self) -> None:
        for digest, size_bytes in self.used().items():
            with suppress(Cancelled):
                await self._in_thread(
                    partial(self._store.copy_to_local, digest, size_bytes, self._stopped.is_set)
                )

    # --- inside -------------------------------------------------------------------------------------------------------------------------

    async def _every(self, period_s: float, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except UenvError as error:
                log.warning("upkeep of the cache: %s", error)
            await trio.sleep(period_s)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work, limiter=self._limiter, abandon_on_cancel=True)


async def pull_again(store: Store, pulls: Pulls, remote: Remote, layer: str) -> None:
    """Pull a blob that was found damaged, from where it came. Never raises an error of the tree: it is pulled by its next user at the latest."""

    def find() -> Image | None:
        for cached in store.images(complete_only=False):
            repository = Repository.parse(cached.repository)
            if cached.layer_digest == layer and repository is not None:
                found = Found(repository, next(iter(cached.tags), None), cached.manifest_digest)
                return make_image(found, cached.manifest, store.config(cached.manifest))
        return None

    try:
        image = await disk.call(find)
        if image is None:
            return
        async with pulls.join(remote, image) as pull:
            await pull.ended.wait()
            if pull.error is not None:
                raise pull.error
        await pulls.record(image)
    except UenvError as error:
        log.warning("%s was damaged and cannot be pulled again now: %s", layer, error)


def _become_janitor(directory: Directory) -> HeartbeatClaim:
    return HeartbeatClaim(directory.blobs.claims / "upkeep.claim", directory.user, directory.blobs.watch)


def _count_eviction(freed_bytes: int) -> None:
    METRICS.evictions.inc(cause="room")
    METRICS.evicted_bytes.inc(freed_bytes)


def open_here(names: Iterable[str]) -> set[str]:
    """Return which blobs (hex digests) some process of this node has open; all of them where that cannot be seen (blocking).

    For what a former daemon left: its workers may serve on without this daemon knowing of them.
    """
    wanted = set(names)
    found: set[str] = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            descriptors = list((process / "fd").iterdir())
        except FileNotFoundError:
            continue
        except PermissionError:
            return wanted
        except OSError:
            continue
        for descriptor in descriptors:
            with suppress(OSError):
                target = str(descriptor.readlink())
                _, middle, name = target.removesuffix(" (deleted)").rpartition(_DIGEST_DIRECTORY)
                if middle and name in wanted:
                    found.add(name)
    return found
