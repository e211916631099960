"""What the disk is asked about at every request, remembered for a moment: on the way to a mount nothing waits for a thread or a file.

Concurrency: the tables are changed synchronously; what is asked runs in a thread (`uenvd.daemon.disk`).
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Final

import trio

from uenvd.cache.store import Store
from uenvd.daemon import disk
from uenvd.daemon.question import Image
from uenvd.errors import StorageError

log = logging.getLogger(__name__)

NOTED_S: Final = 60.0
"""An image that was noted on disk is taken to be there for so long; the cache may have forgotten it meanwhile."""
PRESENT_S: Final = 60.0
"""A blob that was there is taken to be there for so long, where that is no more than advice."""
_NOTE_S: Final = 2.0
"""What a request may lose on the favour."""
_MAX_ENTRIES: Final = 512


class Recent:
    """Digests, each for some seconds, the oldest forgotten first."""

    def __init__(self, kept_s: float) -> None:
        self._kept_s = kept_s
        self._since: dict[str, float] = {}

    def __contains__(self, digest: str) -> bool:
        return self._since.get(digest, float("-inf")) > trio.current_time() - self._kept_s

    def add(self, digest: str) -> None:
        """Begin the time of a digest anew."""
        self._since.pop(digest, None)
        self._since[digest] = trio.current_time()
        if len(self._since) > _MAX_ENTRIES:
            del self._since[next(iter(self._since))]

    def clear(self) -> None:
        """Forget all."""
        self._since.clear()


class Noted:
    """Keeps the manifests of resolved images on disk: after a restart their labels resolve also without the registry."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._recent = Recent(NOTED_S)

    async def note(self, image: Image) -> None:
        """Note an image if that was not done just now: a favour, its failure is no error."""
        digest = image.found.digest
        if digest in self._recent:
            return
        with suppress(StorageError):
            await disk.call(self._put, image, deadline_s=_NOTE_S)
            self._recent.add(digest)

    def _put(self, image: Image) -> None:
        found = image.found
        if self._store.image(found.digest) is None:
            try:
                self._store.put_manifest(
                    found.repository.path, image.manifest, image.layer, image.raw_config, tag=found.tag
                )
            except StorageError as error:
                log.warning("%s", error)


class Presence:
    """Tells whether a blob is in the cache, for the user's information: what was there a moment ago is not looked for again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._recent = Recent(PRESENT_S)

    async def has(self, digest: str) -> bool:
        """Tell whether it is here, or was within `PRESENT_S`. Raises `StorageError`."""
        if digest in self._recent:
            return True
        here = await disk.call(self._store.has, digest)
        if here:
            self._recent.add(digest)
        return here

    def forget(self) -> None:
        """Something was evicted: look again."""
        self._recent.clear()
