"""The daemon's side of images that are used while they are pulled (`uenvd.daemon.arriving` does the work): who has which, and what becomes of it.

One `Lazy` for an image, from the mount until the blob is in the cache or nobody uses the image any more. If another node takes the writing
over, or the cache fails, it begins again with another file, and the supervisor is given that one in place of the former; what readers have
verified stays right whatever becomes of the name of their file.

Concurrency: all of it in trio; `Arriving` has its threads and calls back through the token.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Final

import trio

from uenvd.cache.partial import Partial
from uenvd.cache.store import Store
from uenvd.cache.transfer import Tuning
from uenvd.config import PullConfig
from uenvd.daemon import disk
from uenvd.daemon.arriving import Arriving
from uenvd.daemon.metrics import METRICS, result_of
from uenvd.daemon.pulls import Pulls
from uenvd.daemon.question import Image
from uenvd.daemon.reuse import reuse_blocks
from uenvd.errors import Cancelled, DigestMismatch, InUse, UenvError
from uenvd.fuse.arrival import OwnBoard
from uenvd.oci.chunks import ChunkList
from uenvd.oci.remote import Remote
from uenvd.oci.trace import fetch_trace

log = logging.getLogger(__name__)

MAX_LAZY: Final = 64
"""Images of one daemon that arrive at once; further ones are pulled whole."""
_LOOK_S: Final = 1.0
_TRACE_DEADLINE_S: Final = 10.0

GiveImage = Callable[[dict[str, int]], Awaitable[None]]
"""Gives the supervisor another file of the image; the descriptors stay the caller's."""


class Lazy:
    """One image that arrives while it is used.

    Args:
        pulls: where it is noted that the image is here.
        store: where it goes.
        remote, image, chunks: what it is.
        settings: of pulls, with how long a reader waits.
        limiter: of the threads.

    """

    def __init__(
        self,
        pulls: Pulls,
        store: Store,
        remote: Remote,
        image: Image,
        chunks: ChunkList,
        settings: PullConfig,
        limiter: trio.CapacityLimiter,
    ) -> None:
        self.image = image
        self.digest = image.layer.digest
        self.done = False
        """Nothing is missing any more."""
        self.on_have: Callable[[], None] = lambda: None
        self.give_image: GiveImage | None = None
        self._pulls = pulls
        self._store = store
        self._remote = remote
        self._chunks = chunks
        self._settings = settings
        self._limiter = limiter
        self._stopped = False
        self._board: OwnBoard | None = None
        self._partial: Partial | None = None
        self._arriving: Arriving | None = None
        self._error: UenvError | None = None
        self._changed = trio.Event()
        self._token = trio.lowlevel.current_trio_token()

    @property
    def done_bytes(self) -> int:
        """How many bytes were verified."""
        return self._arriving.done_bytes if self._arriving is not None else 0

    @property
    def stopped(self) -> bool:
        """Nobody uses it any more."""
        return self._stopped

    async def begin(self, *, patient: bool) -> None:
        """Claim the blob. Raises `InUse` while somebody else writes it, `StorageFull`, `StorageError`."""
        layer = self.image.layer
        part = await disk.call(self._store.begin, layer, dispose=Partial.keep, deadline_s=disk.CHANGE_S)
        self._close()
        self._board = OwnBoard(self._chunks.lengths, self._settings.lazy_deadline_s)
        self._partial = part
        self._arriving = Arriving(
            str(self.image.found.label),
            self._remote,
            self.image.found.repository.path,
            layer,
            self._chunks,
            part,
            self._board,
            tuning=Tuning(self._settings.connections, self._settings.piece_bytes),
            changed=self._has_changed,
            prepare=lambda part: reuse_blocks(
                self._remote, self.image, self._store, part, lambda: self._stopped
            ),
            patient=patient,
        )

    def descriptors(self) -> dict[str, int]:
        """Return what the supervisor needs; the caller owns it. Raises `StorageError`, `InUse`."""
        if self._partial is None or self._board is None:
            raise InUse(f"another node writes {self.digest}")
        image_fd = self._partial.open_for_reader()
        try:
            return {"image": image_fd, **self._board.descriptors()}
        except BaseException:
            os.close(image_fd)
            raise

    async def until_served(self) -> None:
        """Wait until its metadata is here. Raises what the transfer met."""
        arriving = self._arriving
        assert arriving is not None
        while not arriving.tables_here:
            if self._error is not None:
                raise self._error
            await self._changed.wait()

    def want(self, first_byte: int, end_byte: int) -> None:
        """Somebody waits for these bytes; no checkpoint."""
        if self._arriving is not None and not self.done:
            self._arriving.want(first_byte, end_byte)

    def stop(self) -> None:
        """Nobody uses it any more; what has come is kept for a while. No checkpoint."""
        self._stopped = True
        if self._arriving is not None:
            self._arriving.stop()

    def reads(self) -> list[tuple[int, int]]:
        """Return the bytes of the chunks that were read so far, by the time of the first read."""
        board = self._board
        return [] if board is None else [board.span(range(one, one + 1)) for one in board.first_reads()]

    async def run(self) -> None:
        """Bring the image, to the end or until `stop`. Raises nothing."""
        began_s = trio.current_time()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._replay)
                while self._arriving is not None or await self._begin_again():
                    await self._run_once()
                    if self._stopped or self.done or self._is_hopeless():
                        break
                    log.warning("%s: %s", self.image.found.label, self._error or "its transfer ended")
                    if not await self._begin_again():
                        break
                nursery.cancel_scope.cancel()
            if self.done:
                await self._record(began_s)
        except Exception:
            log.exception("%s: its transfer failed", self.image.found.label)
        finally:
            self.stop()
            METRICS.pulls.inc(result=result_of(None if self.done else self._error or Cancelled("stopped")))

    async def _run_once(self) -> None:
        arriving = self._arriving
        assert arriving is not None
        self._error = None
        try:
            await trio.to_thread.run_sync(arriving.run, limiter=self._limiter, abandon_on_cancel=True)
        except UenvError as error:
            self._error = error
        finally:
            arriving.stop()
        self.done = arriving.complete
        self._wake()

    def _is_hopeless(self) -> bool:
        arriving = self._arriving
        if arriving is None or not arriving.tables_here:
            return True  # nobody reads it yet: who asked for it hears why
        if isinstance(self._error, DigestMismatch):
            log.error(
                "%s: what is here of it is right, the whole is not: %s", self.image.found.label, self._error
            )
            return True
        return False

    async def _begin_again(self) -> bool:
        """Take the image from wherever it comes now; False when it is complete there."""
        while not self._stopped:
            try:
                if await disk.call(self._store.has, self.digest):
                    self.done = True
                    fd = await disk.call(self._store.open, self.digest, dispose=os.close)
                    await self._give({"image": fd})
                    return False
                await self.begin(patient=True)
                await self._give(self.descriptors())
            except InUse:
                pass
            except UenvError as error:
                log.warning("%s: %s", self.image.found.label, error)
            else:
                return True
            await trio.sleep(_LOOK_S)
        return False

    async def _give(self, named: dict[str, int]) -> None:
        try:
            if self.give_image is not None:
                await self.give_image(named)
        finally:
            for descriptor in named.values():
                os.close(descriptor)

    async def _replay(self) -> None:
        """Fetch early what an earlier run read, where somebody has attached that. It is a hint: without it everything goes on."""
        found, size_bytes = self.image.found, self.image.layer.size_bytes
        work = partial(
            fetch_trace, self._remote, found.repository.path, found.digest, size_bytes, _TRACE_DEADLINE_S
        )
        try:
            ranges = await trio.to_thread.run_sync(work, limiter=self._limiter, abandon_on_cancel=True)
        except UenvError as error:
            log.info("%s: its trace cannot be had: %s", found.label, error)
            return
        if ranges and self._arriving is not None:
            log.info("%s: a trace of %d ranges is replayed", found.label, len(ranges))
            self._arriving.hint(ranges)

    async def _record(self, began_s: float) -> None:
        log.info("%s: %s is complete and verified", self.image.found.label, self.digest)
        METRICS.pulled_bytes.inc(self.image.layer.size_bytes)
        METRICS.pull_seconds.observe(trio.current_time() - began_s)
        try:
            await self._pulls.record(self.image)
            # In a directory that nodes share, a lease is taken by opening what has its name.
            os.close(await disk.call(self._store.open, self.digest, dispose=os.close))
        except UenvError as error:
            log.warning("%s: %s", self.image.found.label, error)

    def _has_changed(self) -> None:
        """Called in threads."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._wake)

    def _wake(self) -> None:
        self.on_have()
        self._changed.set()
        self._changed = trio.Event()

    def _close(self) -> None:
        if self._board is not None:
            self._board.close()


class Lazies:
    """All of them, by the digest of the blob. No checkpoints where not said."""

    def __init__(
        self, nursery: trio.Nursery, store: Store, pulls: Pulls, remote: Remote, settings: PullConfig
    ) -> None:
        self._nursery = nursery
        self._store = store
        self._pulls = pulls
        self._remote = remote
        self._settings = settings
        self._limiter = trio.CapacityLimiter(2 * MAX_LAZY)
        self._running: dict[str, Lazy] = {}

    async def begin(self, image: Image, *, patient: bool = False) -> Lazy | None:
        """Begin with an image, if it can be used while it comes; None: it has to be pulled whole. Waits for the claim, not for bytes.

        ``patient``: somebody reads it already, so that no failure ends it.
        """
        chunks = image.config.chunks if image.config is not None else None
        if not (self._settings.lazy or patient) or chunks is None or not len(chunks):
            return None
        if image.config is None or image.config.image_digest != image.layer.digest:
            log.warning("%s: its chunk list is that of another image", image.found.label)
            return None
        if image.layer.digest in self._running or len(self._running) >= MAX_LAZY:
            return None
        lazy = Lazy(self._pulls, self._store, self._remote, image, chunks, self._settings, self._limiter)
        try:
            await lazy.begin(patient=patient)
        except InUse:
            if not patient:
                return None
            # Another node has taken the writing over: it is followed.
        if image.layer.digest in self._running:
            lazy.stop()
            return None
        self._running[lazy.digest] = lazy
        self._nursery.start_soon(self._run, lazy)
        return lazy

    async def _run(self, lazy: Lazy) -> None:
        try:
            await lazy.run()
        finally:
            if self._running.get(lazy.digest) is lazy:
                del self._running[lazy.digest]

    def get(self, blob: str) -> Lazy | None:
        """Return the one of a blob that arrives now."""
        return self._running.get(blob)

    async def open(self, blob: str) -> dict[str, int]:
        """Return the descriptors with which a blob is served, here or arriving; the caller owns them. Raises `NotFound`. A checkpoint."""
        lazy = self._running.get(blob)
        if lazy is not None and not lazy.done:
            try:
                return lazy.descriptors()
            except InUse:
                pass  # it has just become a blob, or has no file at this moment
        return {"image": await disk.call(self._store.open, blob, dispose=os.close)}

    def reads(self, blob: str) -> list[tuple[int, int]]:
        """Return what was read of a blob that arrives, in order."""
        lazy = self._running.get(blob)
        return lazy.reads() if lazy is not None else []
