"""One pull per blob, however many wait for it.

Concurrency: `Pulls` belongs to the daemon's nursery. A pull runs in a thread; it is started with the first waiter and
cancelled with the last. The thread reports through two plain numbers and is told to stop through a flag; both are safe
under the GIL. Between looking a pull up and joining it there is no checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from uenvd.cache.pull import pull_blob
from uenvd.cache.store import Store
from uenvd.daemon.catalogue import Image
from uenvd.errors import Cancelled, UenvError
from uenvd.oci.manifest import Descriptor
from uenvd.oci.remote import Remote

log = logging.getLogger(__name__)

MAX_PULL_THREADS: Final = 32
"""More than one user may have (`limits.pulls`): nobody's slow pulls hold up all others."""


@dataclass(eq=False)
class Pull:
    """A transfer that is under way, or just ended."""

    descriptor: Descriptor
    done_bytes: int = 0
    waiters: int = 0
    cancelled: bool = False
    error: UenvError | None = None
    ended: trio.Event = field(default_factory=trio.Event)

    def report(self, done_bytes: int, _total_bytes: int) -> None:
        """Take note of progress (called in the thread)."""
        self.done_bytes = done_bytes


class Pulls:
    """The pulls of this daemon, by digest of the blob."""

    def __init__(self, nursery: trio.Nursery, store: Store) -> None:
        self._nursery = nursery
        self._store = store
        self._running: dict[str, Pull] = {}
        self._limiter = trio.CapacityLimiter(MAX_PULL_THREADS)

    @asynccontextmanager
    async def join(self, remote: Remote, image: Image) -> AsyncIterator[Pull]:
        """Start the pull of a blob or join the one that runs; leaving the block gives it up.

        Wait with ``await pull.ended.wait()``, then look at ``pull.error``.
        """
        descriptor = image.layer
        pull = self._running.get(descriptor.digest)
        if pull is None or pull.cancelled:
            pull = Pull(descriptor)
            previous = self._running.get(descriptor.digest)
            self._running[descriptor.digest] = pull
            self._nursery.start_soon(self._run, pull, previous, remote, image.found.repository.path)
        pull.waiters += 1
        try:
            yield pull
        finally:
            pull.waiters -= 1
            if pull.waiters == 0:
                pull.cancelled = True

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
        await trio.to_thread.run_sync(work)

    async def _run(self, pull: Pull, previous: Pull | None, remote: Remote, repository: str) -> None:
        digest = pull.descriptor.digest
        try:
            if previous is not None:
                await previous.ended.wait()
            log.info("pull of %s from %s begins (%d bytes)", digest, repository, pull.descriptor.size_bytes)
            work = partial(
                pull_blob,
                remote,
                repository,
                pull.descriptor,
                self._store,
                progress=pull.report,
                cancelled=lambda: pull.cancelled,
            )
            try:
                await trio.to_thread.run_sync(work, limiter=self._limiter, abandon_on_cancel=True)
                log.info("pull of %s is complete and verified", digest)
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
            pull.ended.set()
            if self._running.get(digest) is pull:
                del self._running[digest]
