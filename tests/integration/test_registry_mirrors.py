"""Mirrors that are down, slow, wrong, incomplete or malicious: the pull goes on with the registry itself."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.registry import FakeRegistry, free_port, oras_manifest
from uenvd.cache import transfer as transfer_module
from uenvd.cache.pull import pull_blob
from uenvd.cache.store import Store
from uenvd.cache.transfer import Tuning
from uenvd.errors import NotFound
from uenvd.oci import mirrors as mirrors_module
from uenvd.oci import transport
from uenvd.oci.manifest import MANIFEST_TYPE, Descriptor, digest_of
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import Remote, never, no_progress, open_remote

REPOSITORY = "deploy/demo/zen3/app/1.0"
PIECE = 64 << 10
DATA = os.urandom(12 * PIECE)
LAYER = Descriptor("application/x-squashfs", digest_of(DATA), len(DATA))
MANIFEST = oras_manifest(LAYER.digest, len(DATA))


def registry() -> FakeRegistry:
    made = FakeRegistry()
    made.put_blob(DATA)
    made.put_blob(b"{}")
    made.put_manifest(REPOSITORY, "v1", MANIFEST, MANIFEST_TYPE)
    return made


@pytest.fixture
def source() -> Iterator[FakeRegistry]:
    with registry() as running:
        yield running


@pytest.fixture
def mirror() -> Iterator[FakeRegistry]:
    with registry() as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "cache")
    made.prepare()
    return made


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_BACKOFF_S", 0.02)
    monkeypatch.setattr(transfer_module, "BACKOFF_S", 0.02)


def client(source: FakeRegistry, *mirrors: str, resolve: bool = False) -> Remote:
    return open_remote(
        parse_registry(source.url),
        timeout_connect_s=1,
        timeout_read_s=0.5,
        mirrors=[parse_registry(url) for url in mirrors],
        mirrors_resolve=resolve,
    )


def pull(remote: Remote, store: Store) -> bytes:
    tuning = Tuning(connections=3, piece_bytes=PIECE)
    pull_blob(remote, REPOSITORY, LAYER, store, progress=no_progress, cancelled=never, tuning=tuning)
    remote.close()
    with os.fdopen(store.open(LAYER.digest), "rb") as file:
        return file.read()


def test_content_comes_from_the_mirror_and_tags_from_the_registry(
    source: FakeRegistry, mirror: FakeRegistry, store: Store
) -> None:
    mirror.put_manifest(REPOSITORY, "v1", oras_manifest(LAYER.digest, 7), MANIFEST_TYPE)
    remote = client(source, mirror.url)
    assert remote.resolve(REPOSITORY, "v1") == digest_of(MANIFEST)
    assert remote.tags(REPOSITORY) == ["v1"]
    assert remote.manifest(REPOSITORY, digest_of(MANIFEST)).layers[0].digest == LAYER.digest
    assert source.count("GET", f"/manifests/{digest_of(MANIFEST)}") == 0
    assert pull(remote, store) == DATA
    assert source.count("GET", "/blobs/") == 0 and mirror.count("GET", "/blobs/") == 12
    believing = client(source, mirror.url, resolve=True)
    assert believing.resolve(REPOSITORY, "v1") != digest_of(MANIFEST)
    believing.close()


@pytest.mark.parametrize(
    "how",
    [
        {"status": 500},
        {"status": 401},
        {"status": 200, "body": b"<html>sign in</html>"},
        {"reset": True},
        {"silent": True},
        {"corrupt": True},
        {"body": b"x" * 10},
        {"truncate_bytes": 1000},
        {"stall_bytes": 1000},
        {"swap_bytes": 500},
    ],
    ids=str,
)
def test_a_mirror_that_fails_or_lies_costs_time_and_nothing_else(
    source: FakeRegistry, mirror: FakeRegistry, store: Store, how: dict[str, Any]
) -> None:
    mirror.spoil("/blobs/", **how)
    assert pull(client(source, mirror.url), store) == DATA
    assert mirror.count("GET", "/blobs/") <= 14


def test_mirrors_are_asked_in_their_order(source: FakeRegistry, mirror: FakeRegistry, store: Store) -> None:
    with FakeRegistry() as empty:
        dead = f"http://127.0.0.1:{free_port()}"
        remote = client(source, dead, empty.url, mirror.url)
        assert pull(remote, store) == DATA
        assert empty.count("GET", "/blobs/") <= 3, (
            "it was asked once, or by each connection at the same moment"
        )
        assert mirror.count("GET", "/blobs/") >= 11 and source.count("GET", "/blobs/") <= 1


def test_a_mirror_that_failed_is_left_alone_for_a_while(
    source: FakeRegistry, mirror: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = digest_of(MANIFEST)
    rule = mirror.spoil("/manifests/", status=403)
    remote = client(source, mirror.url)
    for _ in range(3):
        assert remote.manifest(REPOSITORY, digest).digest == digest
    assert mirror.count("GET", "/manifests/") == 1
    rule.times = 0
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 120)
    monkeypatch.setattr(mirrors_module, "time", later)
    remote.manifest(REPOSITORY, digest)
    assert mirror.count("GET", "/manifests/") == 2 and source.count("GET", "/manifests/") == 3
    remote.close()


def test_a_silent_mirror_does_not_use_up_the_deadline(source: FakeRegistry, mirror: FakeRegistry) -> None:
    mirror.spoil("/manifests/", silent=True)
    remote = client(source, mirror.url)
    with remote.deadline(2.0):
        assert remote.manifest(REPOSITORY, digest_of(MANIFEST)).digest == digest_of(MANIFEST)
    remote.close()


def test_what_nobody_has_is_the_registrys_answer(source: FakeRegistry, mirror: FakeRegistry) -> None:
    remote = client(source, mirror.url)
    with pytest.raises(NotFound, match=source.host):
        remote.manifest(REPOSITORY, digest_of(b"nothing"))
    with pytest.raises(NotFound, match=source.host):
        remote.open_range(REPOSITORY, Descriptor("x", digest_of(b"nothing"), 7), 0, 7)
    remote.close()


def test_pushes_go_to_the_registry(source: FakeRegistry, mirror: FakeRegistry) -> None:
    remote = client(source, mirror.url)
    remote.push_bytes(REPOSITORY, b"new", "x")
    assert digest_of(b"new") in source.blobs and digest_of(b"new") not in mirror.blobs
    assert mirror.seen == []
    remote.close()
