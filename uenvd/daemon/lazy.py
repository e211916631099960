"""The daemon's side of images that are used before all of them is here: who has which, and what becomes of it.

One `Lazy` for an image, from the mount until the blob is in the cache or nobody uses the image any more. It comes in one of two ways: this node
pulls it (`uenvd.daemon.arriving`), or another one does, into a directory that both see, and this node follows (`uenvd.daemon.following`). Either
may become the other at any time: a writer that dies is succeeded by one who followed it, and who lost the right to write follows. Then the
supervisor is given another file in place of the former, as soon as that one's metadata is verified; what readers have verified stays right
whatever becomes of the name of their file.

Concurrency: all of it in trio; `Arriving` and `Following` have their threads and call back through the token.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Final

import trio

from uenvd.cache.partial import Partial
from uenvd.cache.partview import PartView
from uenvd.cache.store import Store
from uenvd.cache.transfer import Tuning
from uenvd.config import PullConfig
from uenvd.daemon import disk
from uenvd.daemon.arriving import Arriving
from uenvd.daemon.following import Following
from uenvd.daemon.metrics import METRICS, result_of
from uenvd.daemon.pulls import Pulls
from uenvd.daemon.question import Image
from uenvd.daemon.reuse import reuse_blocks
from uenvd.errors import Cancelled, DigestMismatch, FormatError, InUse, StorageFull, UenvError
from uenvd.fuse.arrival import OwnBoard
from uenvd.oci.chunks import ChunkList
from uenvd.oci.manifest import Descriptor
from uenvd.oci.remote import Remote
from uenvd.oci.trace import fetch_trace

log = logging.getLogger(__name__)

HUNG_S: Final = 10.0
"""Who waits for a file system that has not answered for so long is told."""
_LOOK_S: Final = 1.0
_TROUBLE_S: Final = 10.0
"""So long a shared directory may be in trouble before its images are brought another way: many nodes at the registry are worse."""
_END_S: Final = 1.0
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
        self._have: Callable[[], None] = lambda: None
        self._give_image: GiveImage | None = None
        self._pulls = pulls
        self._store = store
        self._remote = remote
        self._chunks = chunks
        self._settings = settings
        self._limiter = limiter
        self._stopped = False
        self._board: OwnBoard | None = None
        self._coming: Arriving | Following | None = None
        self._taken: Partial | None = None
        """A claim that became free while its writer was followed."""
        self._error: UenvError | None = None
        self._over = False
        self._replayed = False
        self._is_read = False
        """Somebody reads it, so that no failure ends it."""
        self._owes = False
        """The supervisor has to be given the present file."""
        self._changed = trio.Event()
        self._token = trio.lowlevel.current_trio_token()

    @property
    def done_bytes(self) -> int:
        """How many bytes are here."""
        if self.done:
            return self.image.layer.size_bytes
        return self._coming.done_bytes if self._coming is not None else 0

    @property
    def stopped(self) -> bool:
        """Nobody uses it any more."""
        return self._stopped

    async def begin(self, *, patient: bool) -> None:
        """Claim the blob, or follow who has. Raises `InUse` when neither can be had now, `StorageFull`, `StorageError`.

        ``patient``: somebody reads it already, so that no failure ends it, and he has to be given another file.
        """
        self._is_read = self._is_read or patient
        part, self._taken = self._taken, None
        try:
            if part is None:
                part = await self._claim(self._store.begin)
        except InUse:
            await self._follow()
        else:
            self._lead(part, patient=patient)
        self._owes = patient

    async def _claim(self, begin: Callable[[Descriptor], Partial]) -> Partial:
        """Raises `InUse` also when the blob is there: committed by somebody between the last look and the claim."""

        def claim() -> Partial:
            part = begin(self.image.layer)
            try:
                there = self._store.has(self.digest)
            except BaseException:
                part.keep()
                raise
            if there:
                part.abort()
                raise InUse(f"{self.digest} has just become complete")
            return part

        return await disk.call(claim, dispose=Partial.keep, deadline_s=disk.CHANGE_S)

    def connect(self, have: Callable[[], None], give_image: GiveImage) -> None:
        """Here is who serves it: ``have`` is called when bytes have come, no checkpoint; ``give_image`` when it has another file."""
        self._have, self._give_image = have, give_image
        self._wake()

    def _lead(self, part: Partial, *, patient: bool) -> None:
        layer = self.image.layer
        self._bring(
            Arriving(
                str(self.image.found.label),
                self._remote,
                self.image.found.repository.path,
                layer,
                self._chunks,
                part,
                self._new_board(),
                tuning=Tuning(self._settings.connections, self._settings.piece_bytes),
                changed=self._has_changed,
                prepare=lambda part: reuse_blocks(
                    self._remote, self.image, self._store, part, lambda: self._stopped
                ),
                patient=patient,
            )
        )

    async def _follow(self) -> None:
        """Raises `InUse` when there is nobody to be followed, `StorageError`."""
        view = await disk.call(self._store.follow, self.image.layer, dispose=_close_view)
        if view is None:
            raise InUse(f"somebody writes {self.digest} where he cannot be followed")
        label = str(self.image.found.label)
        log.info("%s: another process or node pulls it; what has come is used", label)
        self._bring(
            Following(
                label, self.image.layer, self._chunks, self._new_board(), view, changed=self._has_changed
            )
        )

    def _new_board(self) -> OwnBoard:
        if self._board is not None:
            self._board.close()
        self._board = OwnBoard(self._chunks.lengths, self._settings.lazy_deadline_s)
        return self._board

    def _bring(self, coming: Arriving | Following) -> None:
        former, self._coming = self._coming, coming
        if self._stopped:
            coming.stop()
        for first, end in former.waiting if former is not None else ():
            coming.want(first, end)

    async def descriptors(self) -> dict[str, int]:
        """Return what the supervisor needs; the caller owns it. Raises `StorageError`, `InUse` while there is no file."""
        coming, board = self._coming, self._board
        if coming is None or board is None:
            raise InUse(f"another node writes {self.digest}")
        # A lease is taken by opening: it may take as long as the file system wants.
        image_fd = await disk.call(coming.open_for_reader, dispose=os.close)
        try:
            if board is not self._board:
                raise InUse(f"{self.digest} has another file now")
            return {"image": image_fd, **board.descriptors()}
        except BaseException:
            os.close(image_fd)
            raise

    async def until_served(self) -> None:
        """Wait until its metadata is here. Raises why it will not come."""
        while not (self.done or (self._coming is not None and self._coming.tables_here)):
            if self._over:
                raise self._error or Cancelled(f"nobody brings {self.digest} any more")
            await self._changed.wait()

    def want(self, first_byte: int, end_byte: int) -> None:
        """Somebody waits for these bytes; no checkpoint."""
        if self._coming is not None and not self.done:
            self._coming.want(first_byte, end_byte)

    def stop(self) -> None:
        """Nobody uses it any more; what has come is kept for a while. No checkpoint."""
        self._stopped = True
        if self._coming is not None:
            self._coming.stop()

    def reads(self) -> list[tuple[int, int]]:
        """Return the bytes of the chunks that were read so far, by the time of the first read."""
        board = self._board
        return [] if board is None else [board.span(range(one, one + 1)) for one in board.first_reads()]

    async def run(self) -> None:
        """Bring the image, to the end or until `stop`. Raises nothing."""
        began_s = trio.current_time()
        try:
            async with trio.open_nursery() as nursery:
                while self._coming is not None or await self._begin_again():
                    if isinstance(self._coming, Arriving) and not self._replayed:
                        self._replayed = True
                        nursery.start_soon(self._replay)
                    await self._run_once()
                    if self._stopped or self.done or self._is_hopeless():
                        break
                    if self._error is not None:
                        log.warning("%s: %s", self.image.found.label, self._error)
                    if not await self._begin_again():
                        break
                nursery.cancel_scope.cancel()
            if self.done:
                await self._record(began_s)
                if self._owes:
                    await self._give_blob()
        except Exception:
            log.exception("%s: its transfer failed", self.image.found.label)
        finally:
            self._over = True
            self.stop()
            self._wake()
            if self._taken is not None:
                threading.Thread(target=self._taken.keep, name="give a claim back", daemon=True).start()
            METRICS.pulls.inc(result=result_of(None if self.done else self._error or Cancelled("stopped")))

    async def _run_once(self) -> None:
        coming = self._coming
        assert coming is not None
        self._error = None
        async with trio.open_nursery() as nursery:
            if self._owes:
                nursery.start_soon(self._give_when_it_can_be_served, coming)
            if isinstance(coming, Following):
                nursery.start_soon(self._watch, coming, nursery.cancel_scope)
            try:
                await trio.to_thread.run_sync(coming.run, limiter=self._limiter, abandon_on_cancel=True)
            except UenvError as error:
                self._error = error
            finally:
                coming.stop()
            nursery.cancel_scope.cancel()
        self.done = coming.complete
        self._wake()

    async def _watch(self, following: Following, scope: trio.CancelScope) -> None:
        """Look for the end of what is followed: the blob is published, or the right to write it is free. Ends ``following``, then ``scope``."""
        trouble_s: float | None = None
        seen = False
        while not following.stopped:
            with trio.move_on_after(_LOOK_S):
                while following.ended == seen and not following.stopped:
                    await self._changed.wait()
            news, seen = following.ended and not seen, following.ended
            if news:
                self._store.look_anew(self.digest)
            try:
                if await disk.call(self._store.has, self.digest):
                    break
                self._taken = await self._claim(self._store.take_over)
                log.info("%s: nobody pulls it any more; this node goes on", self.image.found.label)
                break
            except InUse:
                trouble_s = None
            except UenvError as error:
                trouble_s = trio.current_time() if trouble_s is None else trouble_s
                log.log(logging.DEBUG, "%s: %s", self.image.found.label, error)
                if isinstance(error, StorageFull) or trio.current_time() - trouble_s > _TROUBLE_S:
                    self._error = error
                    break
            since_s = following.at_work_since_s
            if since_s is not None and time.monotonic() - since_s > HUNG_S:
                following.say("the file system of the cache does not answer")
        following.stop()
        await trio.sleep(_END_S)
        scope.cancel()  # it hangs in a file system

    def _is_hopeless(self) -> bool:
        coming = self._coming
        if isinstance(self._error, DigestMismatch):
            log.error(
                "%s: what is here of it is right, the whole is not: %s", self.image.found.label, self._error
            )
            return True
        if isinstance(self._error, InUse) or isinstance(coming, Following):
            return isinstance(self._error, FormatError)
        # Nobody reads it yet: who asked for it hears why.
        return not self._is_read and (coming is None or not coming.tables_here)

    async def _begin_again(self) -> bool:
        """Take the image from wherever it comes now; False when it is complete there, or nobody will bring it."""
        if self._coming is not None and self._coming.tables_here:
            self._is_read = True
        while not self._stopped:
            try:
                if self._taken is None and await disk.call(self._store.has, self.digest):
                    if self._is_read:
                        await self._give_blob()
                    self.done = True
                    return False
                await self.begin(patient=self._is_read)
            except InUse:
                pass
            except UenvError as error:
                self._error = error
                if not self._is_read:
                    return False
                log.warning("%s: %s", self.image.found.label, error)
            else:
                return True
            await trio.sleep(_LOOK_S)
        return False

    async def _give_when_it_can_be_served(self, coming: Arriving | Following) -> None:
        """Give the supervisor the file that the image arrives in now. Not before: workers that cannot look at the image end."""
        while not (coming.tables_here and self._give_image is not None):
            await self._changed.wait()
        try:
            named = await self.descriptors()
        except UenvError as error:
            log.warning("%s: its processes keep what they have: %s", self.image.found.label, error)
            return
        await self._give(named)

    async def _give_blob(self) -> None:
        """Give the supervisor the blob, which is as good as any that is in the cache. Raises `UenvError`."""
        await self._give({"image": await disk.call(self._store.open, self.digest, dispose=os.close)})

    async def _give(self, named: dict[str, int]) -> None:
        try:
            if self._give_image is not None:
                await self._give_image(named)
                self._owes = False
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
        if ranges and self._coming is not None:
            log.info("%s: a trace of %d ranges is replayed", found.label, len(ranges))
            self._coming.hint(ranges)

    async def _record(self, began_s: float) -> None:
        log.info("%s: %s is complete and verified", self.image.found.label, self.digest)
        if self._coming is not None and self._coming.complete:
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
        self._have()
        self._changed.set()
        self._changed = trio.Event()


def _close_view(view: PartView | None) -> None:
    if view is not None:
        view.close()
