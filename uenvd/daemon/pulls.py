"""One pull per blob, however many wait for it.

Concurrency: `Pulls` belongs to the daemon's nursery. A pull runs in a thread; it is started with the first waiter and
cancelled with the last. The thread reports through two plain numbers and is told to stop through a flag; both are safe
under the GIL. Between looking a pull up and joining it there is no checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from uenvd.cache.pull import pull_blob
from uenvd.cache.store import Store
from uenvd.cache.transfer import Tuning
from uenvd.config import PullConfig
from uenvd.daemon import disk
from uenvd.daemon.metrics import METRICS, result_of
from uenvd.daemon.question import Image
from uenvd.daemon.reuse import reuse_blocks
from uenvd.errors import Cancelled, UenvError
from uenvd.oci.manifest import Descriptor
from uenvd.oci.remote import Remote

log = logging.getLogger(__name__)

MAX_PULL_THREADS: Final = 32
"""More than one user may have (`limits.pulls`): nobody's slow pulls hold up all others."""
MAX_PREFETCHES: Final = 2
_RATE_EVERY_S: Final = 0.5
_RATE_WEIGHT: Final = 0.3


@dataclass(eq=False)
class Pull:
    """A transfer that is under way, or just ended."""

    descriptor: Descriptor
    done_bytes: int = 0
    waiters: int = 0
    cancelled: bool = False
    error: UenvError | None = None
    ended: trio.Event = field(default_factory=trio.Event)
    rate_bytes_per_s: float = 0.0
    """Over the last seconds; 0 while it is not known."""
    _measured: tuple[float, int] | None = None

    def report(self, done_bytes: int, _total_bytes: int) -> None:
        """Take note of progress (called in the thread)."""
        self.done_bytes = done_bytes
        now_s = time.monotonic()
        if self._measured is None or done_bytes < self._measured[1]:
            self._measured = now_s, done_bytes  # what was there already did not come at any rate
            return
        seconds = now_s - self._measured[0]
        if seconds >= _RATE_EVERY_S:
            rate = (done_bytes - self._measured[1]) / seconds
            known = self.rate_bytes_per_s
            self.rate_bytes_per_s = known + _RATE_WEIGHT * (rate - known) if known else rate
            self._measured = now_s, done_bytes


class Pulls:
    """The pulls of this daemon, by digest of the blob."""

    def __init__(self, nursery: trio.Nursery, store: Store, settings: PullConfig | None = None) -> None:
        self._nursery = nursery
        self._store = store
        self._settings = settings or PullConfig()
        self._prefetches = 0
        self._running: dict[str, Pull] = {}
        self._limiter = trio.CapacityLimiter(MAX_PULL_THREADS)

    @asynccontextmanager
    async def join(
        self, remote: Remote, image: Image, *, connections: int | None = None
    ) -> AsyncIterator[Pull]:
        """Start the pull of a blob or join the one that runs; leaving the block gives it up.

        ``connections``, if it is started: at most so many instead of the configured number.

        Wait with ``await pull.ended.wait()``, then look at ``pull.error``.
        """
        descriptor = image.layer
        pull = self._running.get(descriptor.digest)
        if pull is None or pull.cancelled:
            pull = Pull(descriptor)
            previous = self._running.get(descriptor.digest)
            self._running[descriptor.digest] = pull
            tuning = Tuning(connections or self._settings.connections, self._settings.piece_bytes)
            self._nursery.start_soon(self._run, pull, previous, remote, image, tuning)
        pull.waiters += 1
        try:
            yield pull
        finally:
            pull.waiters -= 1
            if pull.waiters == 0:
                pull.cancelled = True

    def prefetch(self, remote: Remote, image: Image) -> None:
        """Begin to fetch an image of a job that was submitted, if the site wants that; no checkpoint.

        Only into a directory that the nodes of the job see, over one connection, a few images at a time: it is a favour, not a duty.
        """
        digest = image.layer.digest
        if (
            self._settings.prefetch_on_submit
            and self._store.shared is not None
            and digest not in self._running
            and self._prefetches < MAX_PREFETCHES
        ):
            self._prefetches += 1
            self._nursery.start_soon(self._prefetch, remote, image)

    async def _prefetch(self, remote: Remote, image: Image) -> None:
        try:
            if await disk.call(self._store.has, image.layer.digest):
                return
            async with self.join(remote, image, connections=1) as pull:
                await pull.ended.wait()
            if pull.error is None:
                await self.record(image)
        except UenvError as error:
            log.warning("%s was not fetched ahead: %s", image.found.label, error)
        finally:
            self._prefetches -= 1

    async def record(self, image: Image) -> None:
        """Note in the cache under which repository and tag an image is known, with its manifest and metadata."""
        found = image.found
        work = partial(
            self._store.put_manifest,
            found.repository.path,
            image.manifest,
            image.layer,
            image.raw_config,
            tag=found.tag,
        )
        await disk.call(work, deadline_s=disk.CHANGE_S)

    async def _run(
        self, pull: Pull, previous: Pull | None, remote: Remote, image: Image, tuning: Tuning
    ) -> None:
        digest, repository = pull.descriptor.digest, image.found.repository.path
        try:
            if previous is not None:
                await previous.ended.wait()
            log.info("pull of %s from %s begins (%d bytes)", digest, repository, pull.descriptor.size_bytes)
            began_s = trio.current_time()
            work = partial(
                pull_blob,
                remote,
                repository,
                pull.descriptor,
                self._store,
                progress=pull.report,
                cancelled=lambda: pull.cancelled,
                tuning=tuning,
                prepare=lambda part: reuse_blocks(remote, image, self._store, part, lambda: pull.cancelled),
            )
            try:
                await trio.to_thread.run_sync(work, limiter=self._limiter, abandon_on_cancel=True)
                log.info("pull of %s is complete and verified", digest)
                METRICS.pulled_bytes.inc(pull.descriptor.size_bytes)
                METRICS.pull_seconds.observe(trio.current_time() - began_s)
            finally:
                pull.cancelled = True  # for a thread that was abandoned because the daemon stops
        except UenvError as error:
            log.log(
                logging.INFO if isinstance(error, Cancelled) else logging.WARNING,
                "pull of %s: %s",
                digest,
                error,
            )
            pull.error = error
        except Exception as error:
            log.exception("pull of %s failed", digest)
            pull.error = UenvError(f"the pull failed unexpectedly: {error}")
        finally:
            METRICS.pulls.inc(result=result_of(pull.error))
            pull.ended.set()
            if self._running.get(digest) is pull:
                del self._running[digest]
