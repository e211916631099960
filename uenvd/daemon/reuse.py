"""A new version of an image takes from an older one in the cache what both have (`uenvd.oci.blocks`); only the rest is fetched.

All of it is a favour: without lists, without an older version, in any trouble the whole image is fetched. What is put together has to have the
right digest like any pull. Blocking; runs in the thread of the pull.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Final

from uenvd.cache.partial import Partial
from uenvd.cache.records import CachedImage
from uenvd.cache.store import Store
from uenvd.daemon.question import Image
from uenvd.daemon.resolution import Repository
from uenvd.errors import NotFound, UenvError
from uenvd.oci.blocks import LEAST_BYTES, BlockList, Copy, fetch_blocks, in_common
from uenvd.oci.manifest import squashfs_layer
from uenvd.oci.remote import Remote, never

log = logging.getLogger(__name__)

MAX_CANDIDATES: Final = 2
"""Versions whose lists are looked at."""
DEADLINE_S: Final = 10.0
"""For each list."""
_COPY_BYTES: Final = 4 << 20


def reuse_blocks(
    remote: Remote, image: Image, store: Store, part: Partial, cancelled: Callable[[], bool] = never
) -> int:
    """Copy into ``part`` what an older version has of it; return how many bytes. Raises only errors of the file that is written."""
    size_bytes, found = image.layer.size_bytes, image.found
    if size_bytes < LEAST_BYTES or part.held_bytes > 0:
        return 0
    try:
        candidates = list(_candidates(store, image))[:MAX_CANDIDATES]
        if not candidates:
            return 0
        new = fetch_blocks(remote, found.repository.path, found.digest, size_bytes, DEADLINE_S)
        best = None if new is None else _best(remote, new, candidates)
    except UenvError as error:
        log.info("%s: nothing of older versions is used: %s", found.label, error)
        return 0
    if best is None:
        return 0
    older, copies = best
    try:
        fd = store.open(older.layer_digest)
    except UenvError:
        return 0
    try:
        copied = _copy(fd, part, copies, cancelled)
    finally:
        os.close(fd)
    log.info(
        "%s: %d of %d bytes are those of %s", found.label, copied, size_bytes, older.manifest_digest[:19]
    )
    return copied


def _candidates(store: Store, image: Image) -> Iterator[CachedImage]:
    """Yield the images of the same name for the same system and processor, those of the same version first."""
    mine = image.found.repository
    cached = [
        (repository.path != mine.path, one)
        for one in store.images()
        if (repository := Repository.parse(one.repository)) is not None
        and one.manifest_digest != image.found.digest
        and one.layer_digest != image.layer.digest
        and (repository.label.name, repository.label.system, repository.label.uarch)
        == (mine.label.name, mine.label.system, mine.label.uarch)
    ]
    yield from (one for _other, one in sorted(cached, key=lambda pair: pair[0]))


def _best(
    remote: Remote, new: BlockList, candidates: list[CachedImage]
) -> tuple[CachedImage, list[Copy]] | None:
    best: tuple[int, CachedImage, list[Copy]] | None = None
    for older in candidates:
        try:
            size_bytes = squashfs_layer(older.manifest).size_bytes
            old = fetch_blocks(remote, older.repository, older.manifest_digest, size_bytes, DEADLINE_S)
        except NotFound:
            continue
        copies = [] if old is None else in_common(new, old)
        gained = sum(copy.size_bytes for copy in copies)
        if gained and (best is None or gained > best[0]):
            best = gained, older, copies
    return None if best is None else best[1:]


def _copy(fd: int, part: Partial, copies: list[Copy], cancelled: Callable[[], bool]) -> int:
    copied = 0
    for copy in copies:
        for offset in range(0, copy.size_bytes, _COPY_BYTES):
            if cancelled():
                return copied
            try:
                data = os.pread(fd, min(_COPY_BYTES, copy.size_bytes - offset), copy.source + offset)
            except OSError as error:
                log.warning("an older version in the cache cannot be read: %s", error.strerror)
                return copied
            part.write_at(copy.target + offset, data)
            copied += len(data)
    part.record()
    return copied
