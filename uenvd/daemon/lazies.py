"""All images that are used before they are complete (`uenvd.daemon.lazy`), by the digest of the blob.

Concurrency: all of it in trio, one task an image in the daemon's nursery; between a look-up and an entry there is no checkpoint.
"""

from __future__ import annotations

import logging
import os
from typing import Final

import trio

from uenvd.cache.store import Store
from uenvd.config import PullConfig
from uenvd.daemon import disk
from uenvd.daemon.lazy import Lazy
from uenvd.daemon.pulls import Pulls
from uenvd.daemon.question import Image
from uenvd.errors import InUse, NotFound
from uenvd.oci.remote import Remote

log = logging.getLogger(__name__)

MAX_LAZY: Final = 64
"""Images of one daemon that arrive at once; further ones are pulled whole."""


class Lazies:
    """No checkpoints where not said."""

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
        for again in (False, True):
            try:
                await lazy.begin(patient=patient)
                break
            except InUse:
                # Somebody writes it who cannot be followed, or did just now.
                if again and not patient:
                    return None
        if image.layer.digest in self._running:
            lazy.stop()
            self._nursery.start_soon(lazy.run)  # gives back what it has taken
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
        """Return the descriptors with which a blob is served, here or arriving; the caller owns them. Raises `NotFound`, `InUse`. A checkpoint."""
        lazy = self._running.get(blob)
        if lazy is not None and not lazy.done:
            try:
                return await lazy.descriptors()
            except InUse as error:
                try:
                    return {"image": await disk.call(self._store.open, blob, dispose=os.close)}
                except NotFound:
                    raise error from None  # it has no file at this moment
        return {"image": await disk.call(self._store.open, blob, dispose=os.close)}

    def reads(self, blob: str) -> list[tuple[int, int]]:
        """Return what was read of a blob that arrives, in order."""
        lazy = self._running.get(blob)
        return lazy.reads() if lazy is not None else []
