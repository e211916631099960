"""The upkeep of a cache: leases renewed, room made, damage found and mended, copies made."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from uenvd.cache import blobs, leases
from uenvd.cache.directory import Directory
from uenvd.cache.gc import collect
from uenvd.cache.scrub import next_blob, scrub_blob
from uenvd.cache.store import Store
from uenvd.config import CacheConfig
from uenvd.daemon import upkeep
from uenvd.daemon.upkeep import Upkeep, open_here
from uenvd.oci.manifest import (
    CONFIG_TYPE,
    SQUASHFS_TYPE,
    Descriptor,
    Manifest,
    build_manifest,
    digest_of,
    parse_manifest,
)

DATA = b"hsqs" + bytes(range(256)) * 40
CONFIG = Descriptor(CONFIG_TYPE, digest_of(b"{}"), 2)


def manifest(layer: Descriptor) -> Manifest:
    return parse_manifest(build_manifest(layer, CONFIG, {}), None)


def fill(directory: Directory, data: bytes = DATA) -> Descriptor:
    layer = Descriptor(SQUASHFS_TYPE, digest_of(data), len(data))
    with directory.begin(layer) as partial:
        partial.write(data)
        partial.commit()
    directory.put_manifest("deploy/demo/zen3/app/1.0", manifest(layer), layer, b"{}", tag=f"v{len(data)}")
    return layer


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "local", Directory(tmp_path / "shared", node="here"))
    made.prepare()
    return made


def serving(*layers: Descriptor) -> Any:
    return [SimpleNamespace(blob=(layer.digest, layer.size_bytes)) for layer in layers]


@asynccontextmanager
async def running(store: Store, served: Any = (), repull: Any = None, **config: Any) -> AsyncIterator[None]:
    settings = CacheConfig(**({"scrub_s": 0.0} | config))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            work = Upkeep(store, settings, served, repull=repull, round_s=0.05, renew_s=0.05)
            nursery.start_soon(work.run)
            yield
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.sleep(0.01)


async def test_what_is_served_is_leased_and_given_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "JUST_TAKEN_S", 0.0)
    assert store.shared is not None
    layer = fill(store.shared)
    lease = store.shared.root / "leases/here.json"
    served = serving(layer)
    async with running(store, served):
        await until(lease.exists)
        served.clear()
        await until(lambda: not lease.exists())
        # The end of its use was its last use.
        await until((store.shared.root / "used" / layer.digest[7:]).exists)


async def test_a_quota_is_kept_while_nobody_asks(store: Store) -> None:
    assert store.local is not None
    old = fill(store.local)
    os.utime(store.local.blobs.path(old.digest), (1, 1))
    new = fill(store.local, DATA + b"x")
    store.local._quota_bytes = store.local.usage()[0] - 1
    async with running(store):
        await until(lambda: not store.has(old.digest))
    assert store.has(new.digest)


async def test_damage_is_found_and_the_image_comes_back(store: Store) -> None:
    assert store.local is not None
    good, bad = fill(store.local), fill(store.local, DATA + b"x")
    path = store.local.blobs.path(bad.digest)
    reader = store.open(bad.digest)
    path.write_bytes(DATA + b"y")
    again: list[str] = []

    local = store.local

    async def repull(digest: str) -> None:
        again.append(digest)
        await trio.to_thread.run_sync(fill, local, DATA + b"x")

    try:
        async with running(store, repull=repull, scrub_s=0.5, scrub_bytes_per_s=1 << 30):
            await until(lambda: bool(again))
            await until(lambda: store.has(bad.digest))
        assert again == [bad.digest]
        assert store.has(good.digest)
        assert os.pread(reader, 1 << 20, 0) == DATA + b"y", "who had it open has it still"
        assert len(list((store.local.root / "quarantine").iterdir())) == 1
    finally:
        os.close(reader)


async def test_what_is_served_from_the_shared_directory_is_copied_when_the_site_says_so(store: Store) -> None:
    assert store.local is not None and store.shared is not None
    layer = fill(store.shared)
    async with running(store, serving(layer), copy=True):
        await until(lambda: store.local is not None and store.local.blobs.has(layer.digest))
    assert store.local.blobs.path(layer.digest).read_bytes() == DATA


async def test_one_of_many_nodes_cleans_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.shared is not None
    rounds: list[str] = []

    def counted(directory: Directory) -> Any:
        rounds.append(directory.root.name)
        return collect(directory)

    monkeypatch.setattr(upkeep, "collect", counted)
    other = upkeep._become_janitor(Directory(store.shared.root, node="other"))
    try:
        async with running(store):
            await until(lambda: rounds.count("local") >= 3)
            assert "shared" not in rounds
            other.release()
            await until(lambda: "shared" in rounds)
    finally:
        other.release()


async def test_a_directory_that_is_away_does_not_end_the_upkeep(store: Store) -> None:
    assert store.shared is not None and store.local is not None
    layer = fill(store.local)
    store.shared.root.rename(store.shared.root.with_name("elsewhere"))
    os.utime(store.local.blobs.path(layer.digest), (1, 1))
    async with running(store, serving(layer)):
        await until(lambda: ((store.local and store.local.blobs.last_use_s(layer.digest)) or 0) > 1)


def test_open_files_of_any_process_are_seen(store: Store) -> None:
    assert store.shared is not None
    layer = fill(store.shared)
    fd = os.open(store.shared.blobs.path(layer.digest), os.O_RDONLY)
    try:
        assert open_here([layer.digest[7:], "0" * 64]) == {layer.digest[7:]}
    finally:
        os.close(fd)
    assert open_here([layer.digest[7:]]) == set()


# --- checks -------------------------------------------------------------------------------------------------------------------------


def test_the_check_that_is_longest_ago_comes_first(store: Store) -> None:
    assert store.local is not None
    one, two = fill(store.local), fill(store.local, DATA + b"x")
    assert next_blob(store.local, 86400.0) is None, "they were checked when they came"
    marks = store.local.root / "scrub"
    for number, layer in enumerate((two, one)):
        os.utime(marks / layer.digest[7:], (number, number))
    assert next_blob(store.local, 86400.0) == two.digest
    done = scrub_blob(store.local, two.digest, 1 << 30, lambda: False)
    assert done is not None and (done.digest, done.size_bytes, done.damaged) == (
        two.digest,
        len(DATA) + 1,
        False,
    )
    assert next_blob(store.local, 86400.0) == one.digest
    store.local.blobs.path(one.digest).unlink()
    assert scrub_blob(store.local, one.digest, 1 << 30, lambda: False) is None
    assert next_blob(store.local, 86400.0) is None


def test_a_check_is_slow_and_can_be_stopped(store: Store) -> None:
    assert store.local is not None
    layer = fill(store.local)
    began_s = time.monotonic()
    assert scrub_blob(store.local, layer.digest, len(DATA) * 4, lambda: False) is not None
    assert time.monotonic() - began_s >= 0.2
    assert scrub_blob(store.local, layer.digest, 1, lambda: True) is None


def test_a_blob_of_a_shared_directory_that_appears_is_found_within_a_second(store: Store) -> None:
    assert store.shared is not None
    digest = digest_of(DATA)
    assert not store.has(digest)
    other = Directory(store.shared.root, node="other")
    fill(other)
    end_s = time.monotonic() + blobs._ABSENT_S + 2
    while not store.has(digest):
        assert time.monotonic() < end_s
        time.sleep(0.02)
