"""Bytes that turn out to be wrong when all of the blob has come, and its connections have nothing left to do."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from support.fusetools import until
from support.registry import FakeRegistry
from uenvd.cache.store import Store
from uenvd.cache.transfer import Transfer, Tuning
from uenvd.oci.manifest import Descriptor, digest_of
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import open_remote


def test_they_are_fetched_again(public_dir: Path) -> None:
    data = random.Random(8).randbytes(300_000)
    descriptor = Descriptor("application/x-squashfs", digest_of(data), len(data))
    store = Store(public_dir / "cache")
    store.prepare()
    with FakeRegistry() as fake:
        fake.put_blob(data)
        remote = open_remote(parse_registry(fake.url))
        with store.begin(descriptor) as part:
            transfer = Transfer(
                remote, "deploy/demo/zen3/app/1.0", descriptor, part, tuning=Tuning(2, 64 << 10)
            )
            rejected, hashing = threading.Event(), transfer._in_order.run

            def hash_later(done: Callable[[], bool]) -> None:
                assert rejected.wait(20)
                hashing(done)

            transfer._in_order.run = hash_later  # type: ignore[method-assign]
            end_s = time.monotonic() + 20
            running = threading.Thread(
                target=transfer.run, kwargs={"cancelled": lambda: time.monotonic() > end_s}
            )
            running.start()
            until(lambda: transfer.done_bytes == len(data), "all of it is here")
            for thread in transfer._threads:
                thread.join(0.1)  # long enough for those that think that they are done
            transfer.reject(1000, 2000)
            rejected.set()
            running.join(30)
            assert transfer.done_bytes == len(data)
            part.commit()
        remote.close()
    assert (store.root / "blobs" / "sha256" / descriptor.digest[7:]).read_bytes() == data
