"""Bring one blob from a remote into the store: resumed, repeated after transient failures, verified, one writer at a time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

from uenvd.cache.partial import Partial
from uenvd.cache.store import Store
from uenvd.errors import Cancelled, DigestMismatch, InUse, RegistryUnreachable
from uenvd.oci.manifest import Descriptor
from uenvd.oci.remote import Progress, Remote

ATTEMPTS: Final = 6
"""In a row without a byte gained; each byte gained starts the count again."""
_BACKOFF_S: Final = 0.5
_BACKOFF_CAP_S: Final = 15.0
_TICK_S: Final = 0.1
_REPORT_S: Final = 0.1


def pull_blob(
    remote: Remote,
    repository: str,
    descriptor: Descriptor,
    store: Store,
    *,
    progress: Progress,
    cancelled: Callable[[], bool],
) -> None:
    """Return once the blob is in the store. Does nothing if it is there.

    What an interrupted pull left is hashed again and continued. While another process pulls the same blob this one follows it,
    and takes over when that one gives up. ``progress(done_bytes, total_bytes)`` is called at most ten times a second and at
    the end; ``cancelled()`` is looked at at least every 0.3 s and leaves what came so far for a later pull.

    Raises `Cancelled`, `RegistryUnreachable` (six failures in a row, with pauses of 0.5 s..15 s), `RegistryDenied`, `NotFound`,
    `RegistryError`, `DigestMismatch` (nothing is kept), `StorageFull` (nothing is kept: the room is for others), `StorageError`.
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
                # Committed by somebody between our look and our lock.
                partial.abort()
                break
            _fill(remote, repository, partial, progress, cancelled)
    progress(descriptor.size_bytes, descriptor.size_bytes)


def _fill(
    remote: Remote, repository: str, partial: Partial, progress: Progress, cancelled: Callable[[], bool]
) -> None:
    resumed = partial.offset_bytes > 0
    partial.catch_up(cancelled)
    _check(cancelled)
    failures = 0
    while partial.offset_bytes < partial.descriptor.size_bytes:
        before = partial.offset_bytes
        try:
            _stream(remote, repository, partial, progress, cancelled)
        except RegistryUnreachable:
            failures = 1 if partial.offset_bytes > before else failures + 1
            if failures >= ATTEMPTS:
                raise
            pause_s = min(_BACKOFF_CAP_S, _BACKOFF_S * 2 ** (failures - 1))
            _sleep(pause_s * random.uniform(0.7, 1.3), cancelled)  # noqa: S311 -- spreads the nodes of a cluster, no secret
    try:
        partial.commit()
    except DigestMismatch:
        # The bytes of the interrupted pull may be what was wrong (a power failure, another disk error): once more without them.
        if not resumed:
            raise


def _stream(
    remote: Remote, repository: str, partial: Partial, progress: Progress, cancelled: Callable[[], bool]
) -> None:
    total, reported = partial.descriptor.size_bytes, 0.0
    progress(partial.offset_bytes, total)
    for piece in remote.stream_blob(repository, partial.descriptor, partial.offset_bytes, cancelled):
        partial.write(piece)
        now = time.monotonic()
        if now - reported >= _REPORT_S:
            reported = now
            progress(partial.offset_bytes, total)
        _check(cancelled)


def _follow(descriptor: Descriptor, store: Store, progress: Progress, cancelled: Callable[[], bool]) -> None:
    """Wait a moment and report how far the other writer is."""
    _sleep(_TICK_S, cancelled)
    progress(min(store.part_bytes(descriptor.digest), descriptor.size_bytes), descriptor.size_bytes)


def _sleep(seconds: float, cancelled: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        _check(cancelled)
        time.sleep(min(_TICK_S, left))
    _check(cancelled)


def _check(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise Cancelled("the pull was cancelled")
