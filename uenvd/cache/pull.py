"""Bring one blob from a remote into the store: one writer at a time, the others follow; resumed, verified."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from uenvd.cache.hosting import Hosting
from uenvd.cache.partial import Partial
from uenvd.cache.store import Store
from uenvd.cache.transfer import Transfer, Tuning
from uenvd.errors import Cancelled, DigestMismatch, InUse
from uenvd.oci.manifest import Descriptor
from uenvd.oci.remote import Progress, Remote

log = logging.getLogger(__name__)

_TICK_S: Final = 0.1


def pull_blob(
    remote: Remote,
    repository: str,
    descriptor: Descriptor,
    store: Store,
    *,
    progress: Progress,
    cancelled: Callable[[], bool],
    tuning: Tuning | None = None,
    prepare: Callable[[Partial], object] | None = None,
) -> None:
    """Return once the blob is in the store. Does nothing if it is there.

    What an interrupted pull left is hashed again and continued. While another process pulls the same blob this one follows it,
    and takes over when that one gives up. ``progress(done_bytes, total_bytes)`` is called at most ten times a second and at
    the end; ``cancelled()`` is looked at at least every 0.1 s and leaves what came so far for a later pull.

    ``prepare`` may write into the part what is known of the blob otherwise, right or wrong; it is called once.

    Raises what `Transfer.run` does, and `DigestMismatch` (nothing is kept). Bytes that an earlier pull left, or a mirror had, and that
    turn out to be wrong, are fetched once more from the registry itself.
    """
    while not store.has(descriptor.digest):
        _check(cancelled)
        try:
            partial = store.begin(descriptor)
        except InUse:
            _follow(descriptor, store, progress, cancelled)
            continue
        with partial:
            if store.has(descriptor.digest):
                # Committed by somebody between our look and our claim.
                partial.abort()
                break
            if prepare is not None:
                prepare(partial)
                prepare = None
            transfer = Transfer(remote, repository, descriptor, partial, tuning=tuning)
            try:
                with Hosting(partial, transfer.demand):
                    transfer.run(progress=progress, cancelled=cancelled)
                partial.commit()
            except InUse as error:
                log.warning("%s: %s", descriptor.digest, error)
            except DigestMismatch as error:
                doubtful = transfer.resumed_bytes > 0 or transfer.used_mirror
                partial.abort()
                if not doubtful:
                    raise
                log.warning("%s; once more, from the registry itself", error)
                remote = remote.without_mirrors()
    progress(descriptor.size_bytes, descriptor.size_bytes)


def _follow(descriptor: Descriptor, store: Store, progress: Progress, cancelled: Callable[[], bool]) -> None:
    """Wait a moment and report how far the other writer is."""
    end = time.monotonic() + _TICK_S
    while (left := end - time.monotonic()) > 0:
        time.sleep(left)
    _check(cancelled)
    progress(min(store.part_bytes(descriptor.digest), descriptor.size_bytes), descriptor.size_bytes)


def _check(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise Cancelled("the pull was cancelled")
