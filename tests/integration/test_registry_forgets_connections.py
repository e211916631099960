"""Connections that stay open and lead nowhere: a firewall or load balancer has forgotten them, nobody says so."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from support.registry import FakeRegistry
from uenvd.cache import transfer as transfer_module
from uenvd.cache.pull import pull_blob
from uenvd.cache.store import Store
from uenvd.cache.transfer import ATTEMPTS, Tuning
from uenvd.oci import watch as watch_module
from uenvd.oci.manifest import Descriptor, digest_of
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import Remote, never, no_progress, open_remote

REPOSITORY = "deploy/demo/zen3/app/1.0"
TIMEOUT_S = 0.2


def leave_idle(remote: Remote, descriptor: Descriptor, count: int) -> None:
    """Let ``count`` connections to the registry lie idle, ready to be used again."""
    together = threading.Barrier(count)

    def read() -> None:
        blob = remote.open_range(REPOSITORY, descriptor, 0, 100)
        together.wait(10)  # all are open at once
        assert blob.readinto(memoryview(bytearray(100))) == 100
        blob.close()

    threads = [threading.Thread(target=read) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)


def test_more_dead_connections_than_attempts_cost_one_time_out(
    public_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_module, "BACKOFF_S", 0.01)
    data = random.Random(5).randbytes(300_000)
    descriptor = Descriptor("application/x-squashfs", digest_of(data), len(data))
    store = Store(public_dir / "cache")
    store.prepare()
    with FakeRegistry() as fake:
        fake.put_blob(data)
        remote = open_remote(parse_registry(fake.url), timeout_read_s=TIMEOUT_S)
        leave_idle(remote, descriptor, ATTEMPTS + 2)
        fake.forget_connections()
        began_s = time.monotonic()
        pull_blob(
            remote,
            REPOSITORY,
            descriptor,
            store,
            progress=no_progress,
            cancelled=never,
            tuning=Tuning(connections=1),
        )
        took_s = time.monotonic() - began_s
        remote.close()
    assert (store.root / "blobs" / "sha256" / descriptor.digest[7:]).read_bytes() == data
    assert took_s < ATTEMPTS * TIMEOUT_S, "not each of them was tried"


def test_a_connection_that_lay_idle_for_long_is_not_tried_at_all(
    public_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "IDLE_S", 0.0)
    data = random.Random(6).randbytes(3_000)
    descriptor = Descriptor("application/x-squashfs", digest_of(data), len(data))
    with FakeRegistry() as fake:
        fake.put_blob(data)
        remote = open_remote(parse_registry(fake.url), timeout_read_s=TIMEOUT_S)
        leave_idle(remote, descriptor, 2)
        fake.forget_connections()
        blob = remote.open_range(REPOSITORY, descriptor, 0, 100)
        assert blob.readinto(memoryview(bytearray(100))) == 100
        blob.close()
        remote.close()
