"""One blob, pulled by our client into a cache: what tests of the transfer share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.registry import FakeRegistry, oras_manifest
from uenvd.cache import transfer as transfer_module
from uenvd.cache.pull import pull_blob
from uenvd.cache.store import Store
from uenvd.cache.transfer import Tuning
from uenvd.oci import transport
from uenvd.oci.manifest import MANIFEST_TYPE, Descriptor, digest_of
from uenvd.oci.remote import Remote, never, no_progress

REPOSITORY = "deploy/demo/zen3/app/1.0"


class Blob:
    """Random bytes and their description; ``tuning`` of the pulls, if not the standard one."""

    def __init__(self, size_bytes: int, tuning: Tuning | None = None) -> None:
        self.data = os.urandom(size_bytes)
        self.layer = Descriptor("application/x-squashfs", digest_of(self.data), size_bytes)
        self._tuning = tuning

    def pull(self, remote: Remote, store: Store, cancelled: Callable[[], bool] = never) -> None:
        """Pull it."""
        pull_blob(
            remote,
            REPOSITORY,
            self.layer,
            store,
            progress=no_progress,
            cancelled=cancelled,
            tuning=self._tuning,
        )

    def put(self, fake: FakeRegistry) -> None:
        """Put it into a registry, as the only layer of the image v1."""
        fake.put_blob(self.data)
        fake.put_blob(b"{}")
        raw = oras_manifest(self.layer.digest, len(self.data))
        fake.put_manifest(REPOSITORY, "v1", raw, MANIFEST_TYPE)

    def content(self, store: Store) -> bytes:
        """Return what the cache has of it."""
        with os.fdopen(store.open(self.layer.digest), "rb") as file:
            return file.read()


def new_store(directory: Path) -> Store:
    """Make a cache."""
    made = Store(directory)
    made.prepare()
    return made


def left_over(store: Store) -> list[str]:
    """Return the names of the files of a cache, of whole and of unfinished blobs."""
    return [
        path.name for directory in ("partial", "blobs/sha256") for path in (store.root / directory).iterdir()
    ]


def retry_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client wait no longer than a moment before it tries again."""
    monkeypatch.setattr(transport, "_BACKOFF_S", 0.02)
    monkeypatch.setattr(transfer_module, "BACKOFF_S", 0.02)


class Timer:
    """Measures, so that "in bounded time" is a number."""

    seconds: float

    def __enter__(self) -> Timer:
        self._begin_s = time.monotonic()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.seconds = time.monotonic() - self._begin_s
