"""Blobs that break off, stall, change or are refused on their way here or there: nothing wrong is kept, and the rest goes on where it was."""

import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.blobpull import REPOSITORY, Blob, Timer, left_over, new_store, retry_quickly
from support.registry import PASSWORD, USER, FakeRegistry, free_port
from uenvd.cache import transfer as transfer_module
from uenvd.cache.pull import pull_blob
from uenvd.cache.store import Store
from uenvd.errors import (
    Cancelled,
    DigestMismatch,
    RegistryError,
    RegistryUnreachable,
    UsageError,
)
from uenvd.oci.credentials import Credential
from uenvd.oci.manifest import Descriptor, digest_of
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import Remote, never, open_remote

BLOB = Blob(1_000_000)
DATA = BLOB.data
LAYER = BLOB.layer
pull, content = BLOB.pull, BLOB.content


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        BLOB.put(registry)
        yield registry


@pytest.fixture
def remote(fake: FakeRegistry) -> Iterator[Remote]:
    opened = open_remote(parse_registry(fake.url), timeout_connect_s=1, timeout_read_s=0.6)
    yield opened
    opened.close()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "cache")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    retry_quickly(monkeypatch)


# --- pulls --------------------------------------------------------------------------------------------------------------------


def test_a_transfer_that_breaks_off_is_continued(fake: FakeRegistry, remote: Remote, store: Store) -> None:
    fake.spoil("/blobs/", truncate_bytes=300_000, times=2)
    pull(remote, store)
    assert content(store) == DATA
    assert [seen.headers.get("Range") for seen in fake.seen] == [
        None,
        "bytes=300000-999999",
        "bytes=600000-999999",
    ]


def test_a_transfer_that_stalls_is_continued(fake: FakeRegistry, remote: Remote, store: Store) -> None:
    fake.spoil("/blobs/", stall_bytes=300_000, times=1)
    pull(remote, store)
    assert content(store) == DATA
    assert fake.count("GET", "/blobs/") == 2


def test_a_registry_without_ranges_is_continued_too(fake: FakeRegistry, remote: Remote, store: Store) -> None:
    fake.spoil("/blobs/", truncate_bytes=300_000, times=1)
    fake.spoil("/blobs/", ignore_range=True)
    pull(remote, store)
    assert content(store) == DATA


@pytest.mark.parametrize("how", [{"reset": True}, {"status": 503}, {"status": 429}, {"truncate_bytes": 0}])
def test_refusals_in_the_middle_of_a_pull(
    fake: FakeRegistry, remote: Remote, store: Store, how: dict[str, Any]
) -> None:
    fake.spoil("/blobs/", truncate_bytes=300_000, times=1)
    fake.spoil("/blobs/", **how, times=3)
    pull(remote, store)
    assert content(store) == DATA


def test_a_registry_that_gives_nothing_more_is_given_up_and_continued_later(
    fake: FakeRegistry, remote: Remote, store: Store
) -> None:
    fake.spoil("/blobs/", truncate_bytes=300_000, times=1)
    rule = fake.spoil("/blobs/", reset=True)
    with pytest.raises(RegistryUnreachable):
        pull(remote, store)
    assert store.part_bytes(LAYER.digest) == 300_000 and not store.has(LAYER.digest)
    rule.times = 0
    pull(remote, store)
    assert content(store) == DATA
    assert fake.seen[-1].headers["Range"] == "bytes=300000-999999"


@pytest.mark.parametrize("how", [{"corrupt": True}, {"body": b"x" * len(DATA)}])
def test_wrong_bytes_are_never_kept(
    fake: FakeRegistry, remote: Remote, store: Store, how: dict[str, Any]
) -> None:
    fake.spoil("/blobs/", **how)
    with pytest.raises(DigestMismatch):
        pull(remote, store)
    assert left_over(store) == []


@pytest.mark.parametrize("body", [DATA + b"x", DATA[:-1], b""])
def test_another_length_is_refused_at_once(
    fake: FakeRegistry, remote: Remote, store: Store, body: bytes
) -> None:
    fake.spoil("/blobs/", body=body)
    with pytest.raises(DigestMismatch):
        pull(remote, store)
    assert not store.has(LAYER.digest)


def test_damage_in_what_an_earlier_pull_left_costs_one_more_pull(
    fake: FakeRegistry, remote: Remote, store: Store
) -> None:
    part = store.root / "partial" / f"{LAYER.digest.removeprefix('sha256:')}.part"
    part.write_bytes(bytes(400_000))
    pull(remote, store)
    assert content(store) == DATA
    part.write_bytes(bytes(2_000_000))
    (store.root / "blobs/sha256" / LAYER.digest.removeprefix("sha256:")).unlink()
    pull(remote, store)
    assert content(store) == DATA


@pytest.mark.parametrize("content_range", ["bytes 0-999999/999", "bytes 500000-999999/1000000", "x", ""])
def test_another_part_than_the_one_asked_for(
    fake: FakeRegistry, remote: Remote, store: Store, content_range: str
) -> None:
    fake.spoil("/blobs/", truncate_bytes=300_000, times=1)
    fake.spoil("/blobs/", headers={"Content-Range": content_range})
    with pytest.raises(RegistryError):
        pull(remote, store)
    assert not store.has(LAYER.digest)


def test_a_416_is_not_read(fake: FakeRegistry, remote: Remote, store: Store) -> None:
    fake.spoil("/blobs/", truncate_bytes=300_000, times=1)
    fake.spoil("/blobs/", status=416, headers={"Content-Length": "1000000"}, body=b"short")
    with Timer() as timer, pytest.raises(RegistryError):
        pull(remote, store)
    assert timer.seconds < 2.2


@pytest.mark.parametrize(
    "how",
    [{"bytes_per_s": 100_000}, {"stall_bytes": 1000}, {"silent": True}],
    ids=["slow", "stalled", "silent"],
)
def test_a_pull_is_cancelled_promptly(fake: FakeRegistry, store: Store, how: dict[str, Any]) -> None:
    fake.spoil("/blobs/", **how)
    remote = open_remote(parse_registry(fake.url), timeout_read_s=30)
    end = time.monotonic() + 0.4
    with Timer() as timer, pytest.raises(Cancelled):
        pull(remote, store, lambda: time.monotonic() > end)
    assert timer.seconds < 2.2
    assert store.part_bytes(LAYER.digest) < len(DATA)


def test_a_slow_link_reports_progress(fake: FakeRegistry, remote: Remote, store: Store) -> None:
    fake.spoil("/blobs/", bytes_per_s=1_000_000)
    reports: list[tuple[float, int]] = []
    pull_blob(
        remote,
        REPOSITORY,
        LAYER,
        store,
        progress=lambda done, _total: reports.append((time.monotonic(), done)),
        cancelled=never,
    )
    assert reports[-1][1] == len(DATA)
    assert len({done for _, done in reports}) > 4
    assert max(later[0] - sooner[0] for sooner, later in itertools.pairwise(reports)) < 1.5


def test_a_blob_at_another_host_gets_no_credentials(fake: FakeRegistry, store: Store) -> None:
    with FakeRegistry(auth="basic") as front:
        front.spoil(
            "/blobs/",
            status=307,
            headers={"Location": f"{fake.url}/v2/{REPOSITORY}/blobs/{LAYER.digest}?sig=secret"},
        )
        fake.spoil("/blobs/", truncate_bytes=1000, times=1)
        remote = open_remote(parse_registry(front.url), credential=Credential(USER, PASSWORD))
        remote.tags(REPOSITORY)
        pull(remote, store)
        assert content(store) == DATA
        assert any("Authorization" in seen.headers for seen in front.seen)
        assert not any("Authorization" in seen.headers for seen in fake.seen)
        assert front.count("GET", "/blobs/") == 2, (
            "signed addresses expire: each part is asked for at the registry"
        )


@pytest.mark.parametrize("status", [401, 403])
def test_storage_that_refuses_an_expired_address_is_asked_anew(
    fake: FakeRegistry, store: Store, status: int
) -> None:
    with FakeRegistry(auth="basic") as front:
        front.spoil(
            "/blobs/", status=307, headers={"Location": f"{fake.url}/v2/{REPOSITORY}/blobs/{LAYER.digest}"}
        )
        challenge = {"WWW-Authenticate": f'Bearer realm="{fake.url}/token",service="s"'}
        fake.spoil("/blobs/", truncate_bytes=1000, times=1)
        fake.spoil("/blobs/", status=status, headers=challenge, times=1)
        remote = open_remote(parse_registry(front.url), credential=Credential(USER, PASSWORD))
        remote.tags(REPOSITORY)
        pull(remote, store)
        assert content(store) == DATA
        assert fake.count("GET", "/token") == 0, "credentials go to no place that a redirection names"
        assert not any("Authorization" in seen.headers for seen in fake.seen)


def test_signatures_of_addresses_are_not_shown(fake: FakeRegistry, remote: Remote, store: Store) -> None:
    fake.spoil("/blobs/", status=307, headers={"Location": f"http://127.0.0.1:{free_port()}/x?sig=topsecret"})
    with pytest.raises(RegistryUnreachable) as caught:
        pull(remote, store)
    shown = str(caught.value) + str(caught.value.__cause__ or "")
    assert "topsecret" not in shown


def test_a_cancelled_pull_ends_within_a_moment_whatever_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A silent registry, and a disk that takes its time: neither holds the caller up."""
    data = os.urandom(4 << 20)
    layer = Descriptor("application/x-squashfs", digest_of(data), len(data))
    go_on = threading.Event()
    fdatasync = os.fdatasync

    def slow(fd: int) -> None:
        go_on.wait(20)
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", slow)
    monkeypatch.setattr(transfer_module, "FLUSH_BYTES", 1)
    store = Store(tmp_path / "cancelled")
    store.prepare()
    cancelled = threading.Event()
    began_s: list[float] = []

    def progress(done_bytes: int, _total_bytes: int) -> None:
        if done_bytes and not began_s:
            began_s.append(time.monotonic())
            cancelled.set()

    with FakeRegistry() as fake:
        fake.put_blob(data)
        fake.spoil("/blobs/", stall_bytes=1 << 20)
        remote = open_remote(parse_registry(fake.url))
        try:
            with pytest.raises(Cancelled):
                pull_blob(remote, REPOSITORY, layer, store, progress=progress, cancelled=cancelled.is_set)
            took_s = time.monotonic() - began_s[0]
        finally:
            go_on.set()
            remote.close()
    assert took_s < 2.0, "it waited for what hangs"
    print(f"cancelled after {took_s:.3f} s")


# --- uploads ------------------------------------------------------------------------------------------------------------------


def test_an_upload_is_repeated(fake: FakeRegistry, remote: Remote, tmp_path: Path) -> None:
    data = os.urandom(600_000)
    (tmp_path / "file").write_bytes(data)
    fake.spoil("/uploads/", method="PUT", status=503, times=1)
    fake.spoil("/uploads/", method="POST", reset=True, times=1)
    remote.push_blob(REPOSITORY, tmp_path / "file", Descriptor("x", digest_of(data), len(data)))
    assert fake.blobs[digest_of(data)] == data
    assert fake.count("PUT", "/uploads/") == 2


def test_an_upload_that_continues_elsewhere_takes_no_credentials_there(
    fake: FakeRegistry, tmp_path: Path
) -> None:
    with FakeRegistry(auth="basic") as front:
        front.upload_host = fake.url
        remote = open_remote(parse_registry(front.url), credential=Credential(USER, PASSWORD))
        remote.push_bytes(REPOSITORY, b"config", "x")
        assert fake.blobs[digest_of(b"config")] == b"config"
        assert not any("Authorization" in seen.headers for seen in fake.seen)


def test_a_registry_that_limits_uploads(fake: FakeRegistry, remote: Remote) -> None:
    fake.spoil("/uploads/", method="PUT", status=413)
    with pytest.raises(RegistryError) as caught:
        remote.push_bytes(REPOSITORY, b"x", "x")
    assert "limit" in caught.value.hint


def test_a_file_that_shrinks_during_the_upload(fake: FakeRegistry, remote: Remote, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2_000_000))

    def shrink(done_bytes: int, _total_bytes: int) -> None:
        if done_bytes < 1_000_000:
            path.write_bytes(b"")

    with pytest.raises(UsageError, match="shorter"):
        remote.push_blob(REPOSITORY, path, Descriptor("x", digest_of(bytes(2_000_000)), 2_000_000), shrink)
    with pytest.raises(UsageError, match="No such file"):
        remote.push_blob(REPOSITORY, tmp_path / "none", Descriptor("x", digest_of(b""), 0))
