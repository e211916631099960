"""What registries and networks answer wrongly, or not at all: each is one clear error in bounded time, or is survived."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from support.blobpull import REPOSITORY, Blob, Timer, retry_quickly
from support.registry import FakeRegistry, free_port, oras_manifest
from uenvd.errors import (
    Cancelled,
    DigestMismatch,
    ManifestError,
    NotFound,
    RegistryDenied,
    RegistryError,
    RegistryUnreachable,
    UenvError,
)
from uenvd.oci.manifest import INDEX_TYPE, MANIFEST_TYPE, Descriptor, digest_of
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import Remote, open_remote

BLOB = Blob(1000)


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


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    retry_quickly(monkeypatch)


# --- no answer ----------------------------------------------------------------------------------------------------------------


def test_registry_down() -> None:
    remote = open_remote(parse_registry(f"http://127.0.0.1:{free_port()}"))
    with Timer() as timer, pytest.raises(RegistryUnreachable, match="connection refused"):
        remote.tags(REPOSITORY)
    assert timer.seconds < 2.2


def test_a_name_that_does_not_resolve() -> None:
    remote = open_remote(parse_registry("https://registry.invalid"))
    with Timer() as timer, remote.deadline(2.5), pytest.raises(RegistryUnreachable):
        remote.tags(REPOSITORY)
    assert timer.seconds < 3


def test_a_name_server_that_is_silent_does_not_break_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: done.wait(20) and [])
    remote = open_remote(parse_registry("https://registry.example.org"))
    try:
        with Timer() as timer, remote.deadline(0.5), pytest.raises(RegistryUnreachable, match="in time"):
            remote.tags(REPOSITORY)
    finally:
        done.set()
    assert timer.seconds < 2.2


def test_a_host_that_accepts_nothing() -> None:
    """A listening socket whose queue is full drops SYNs, as a firewall does."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        fillers = [socket.socket() for _ in range(3)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            remote = open_remote(parse_registry(f"http://127.0.0.1:{port}"))
            with Timer() as timer, remote.deadline(0.5), pytest.raises(RegistryUnreachable, match="in time"):
                remote.tags(REPOSITORY)
            assert timer.seconds < 2.2
        finally:
            for filler in fillers:
                filler.close()


@pytest.mark.parametrize(
    "how",
    [{"silent": True}, {"drip_headers_s": 0.1}, {"stall_bytes": 5}, {"bytes_per_s": 20}, {"status": 503},
     {"status": 503, "headers": {"Retry-After": "60"}}, {"status": 429, "headers": {"Retry-After": "1"}}],
    ids=["black hole", "drip", "stall", "trickle", "503", "503 later", "429"],
)  # fmt: skip
def test_a_deadline_holds_whatever_the_registry_does(fake: FakeRegistry, how: dict[str, Any]) -> None:
    fake.spoil("/v2/", **how)
    remote = open_remote(parse_registry(fake.url), timeout_read_s=30)
    with Timer() as timer, remote.deadline(0.7), pytest.raises(RegistryUnreachable) as caught:
        remote.manifest(REPOSITORY, "v1")
    assert timer.seconds < 2.2
    assert fake.host in str(caught.value)


def test_one_deadline_holds_for_several_calls(fake: FakeRegistry) -> None:
    fake.spoil("/manifests/", bytes_per_s=1000)
    remote = open_remote(parse_registry(fake.url))
    with Timer() as timer, remote.deadline(0.7), pytest.raises(RegistryUnreachable):
        for _ in range(100):
            remote.manifest(REPOSITORY, "v1")
    assert timer.seconds < 2.2


def test_the_default_deadline_of_metadata(fake: FakeRegistry) -> None:
    fake.spoil("/v2/", silent=True)
    remote = open_remote(parse_registry(fake.url), deadline_s=0.5)
    with Timer() as timer, pytest.raises(RegistryUnreachable):
        remote.tags(REPOSITORY)
    assert timer.seconds < 2.2


def test_cancellation_is_noticed_while_nothing_comes(fake: FakeRegistry) -> None:
    fake.spoil("/v2/", silent=True)
    remote = open_remote(parse_registry(fake.url))
    end = time.monotonic() + 0.3
    with Timer() as timer, remote.deadline(None, lambda: time.monotonic() > end), pytest.raises(Cancelled):
        remote.tags(REPOSITORY)
    assert timer.seconds < 2.2


def test_silence_ends_with_the_read_timeout(fake: FakeRegistry, remote: Remote) -> None:
    fake.spoil("/v2/", silent=True)
    with Timer() as timer, pytest.raises(RegistryUnreachable, match="nothing received"):
        remote.tags(REPOSITORY)
    assert timer.seconds < 2.2


# --- wrong answers to questions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_transient_refusals_are_repeated(fake: FakeRegistry, remote: Remote, status: int) -> None:
    fake.spoil("/manifests/", status=status, times=2)
    assert remote.manifest(REPOSITORY, "v1").digest
    assert fake.count("GET", "/manifests/") == 3


def test_retry_after_is_obeyed(fake: FakeRegistry, remote: Remote) -> None:
    fake.spoil("/manifests/", status=503, headers={"Retry-After": "1"}, times=1)
    with Timer() as timer:
        assert remote.manifest(REPOSITORY, "v1").digest
    assert 1 <= timer.seconds < 4


def test_a_registry_that_stays_ill_is_given_up(fake: FakeRegistry, remote: Remote) -> None:
    fake.spoil(
        "/manifests/",
        status=503,
        body=b'{"errors":[{"code":"X","message":"down for\\u001b[31m maintenance"}]}',
    )
    with pytest.raises(RegistryUnreachable, match="maintenance") as caught:
        remote.manifest(REPOSITORY, "v1")
    assert fake.count("GET", "/manifests/") == 4
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "error"), [(400, RegistryError), (403, RegistryDenied), (404, NotFound), (418, RegistryError)]
)
def test_other_refusals_are_not_repeated(
    fake: FakeRegistry, remote: Remote, status: int, error: type[UenvError]
) -> None:
    fake.spoil("/manifests/", status=status)
    with pytest.raises(error):
        remote.manifest(REPOSITORY, "v1")
    assert fake.count("GET", "/manifests/") == 1


def test_broken_connections_are_repeated(fake: FakeRegistry, remote: Remote) -> None:
    fake.spoil("/manifests/", reset=True, times=1)
    fake.spoil("/manifests/", truncate_bytes=10, times=1)
    assert remote.manifest(REPOSITORY, "v1").digest
    assert fake.count("GET", "/manifests/") == 3


def test_a_manifest_with_wrong_bytes(fake: FakeRegistry, remote: Remote) -> None:
    fake.spoil("/manifests/", corrupt=True)
    with pytest.raises(DigestMismatch):
        remote.manifest(REPOSITORY, fake.tags[REPOSITORY]["v1"])
    with pytest.raises(DigestMismatch):
        remote.manifest(REPOSITORY, "v1")


def test_a_small_blob_with_wrong_bytes_or_size(fake: FakeRegistry, remote: Remote) -> None:
    digest = fake.put_blob(b"config")
    assert remote.small_blob(REPOSITORY, Descriptor("x", digest, 6), 100) == b"config"
    with pytest.raises(DigestMismatch):
        remote.small_blob(REPOSITORY, Descriptor("x", digest, 5), 100)
    with pytest.raises(RegistryError, match="allowed"):
        remote.small_blob(REPOSITORY, Descriptor("x", digest, 101), 100)
    fake.blobs[digest] = bytes(10_000_000)
    with pytest.raises(RegistryError, match="allowed"):
        remote.small_blob(REPOSITORY, Descriptor("x", digest, 6), 100)
    fake.blobs[digest] = b"xonfig"
    with pytest.raises(DigestMismatch):
        remote.small_blob(REPOSITORY, Descriptor("x", digest, 6), 100)


@pytest.mark.parametrize("body", [b"<html>log in</html>", b"[]", b'{"tags":5}', b'{"tags":[1]}', b"\xff"])
def test_what_is_no_list_of_tags(fake: FakeRegistry, remote: Remote, body: bytes) -> None:
    fake.spoil("/tags/", status=200, body=body)
    with pytest.raises(RegistryError):
        remote.tags(REPOSITORY)


def test_a_server_that_is_no_registry(fake: FakeRegistry, remote: Remote) -> None:
    fake.spoil("/", status=404, body=b"<html>not found</html>")
    with pytest.raises(RegistryError, match="no OCI registry") as caught:
        remote.tags(REPOSITORY)
    assert "address" in caught.value.hint


def test_a_registry_without_a_list_of_repositories(fake: FakeRegistry, remote: Remote) -> None:
    for status in (401, 403, 404, 405):
        fake.spoil("/_catalog", status=status, times=1)
        with pytest.raises(UenvError) as caught:
            remote.repositories("")
        assert "in full" in caught.value.hint


def test_lists_over_many_pages(fake: FakeRegistry, remote: Remote) -> None:
    fake.page = 3
    for number in range(10):
        fake.put_manifest(REPOSITORY, f"t{number}", b"x", MANIFEST_TYPE)
        fake.put_manifest(f"other/r{number}", "t", b"x", MANIFEST_TYPE)
    assert remote.tags(REPOSITORY) == [*(f"t{number}" for number in range(10)), "v1"]
    assert len(remote.repositories("other/")) == 10


@pytest.mark.parametrize(
    "link", ['<{url}/v2/{repository}/tags/list>; rel="next"', '<http://127.0.0.1:1/v2/x>; rel="next"']
)
def test_pages_that_lead_astray(fake: FakeRegistry, remote: Remote, link: str) -> None:
    fake.spoil("/tags/", headers={"Link": link.format(url=fake.url, repository=REPOSITORY)})
    with pytest.raises(RegistryError, match="does not end"):
        remote.tags(REPOSITORY)


def test_endless_bodies_are_not_read_into_memory(fake: FakeRegistry, remote: Remote) -> None:
    fake.spoil("/manifests/", body=bytes(20_000_000))
    with pytest.raises(RegistryError, match="allowed"):
        remote.manifest(REPOSITORY, "v1")
    fake.spoils.clear()
    fake.spoil("/manifests/", status=404, body=bytes(20_000_000))
    with pytest.raises(NotFound):
        remote.manifest(REPOSITORY, "v1")


def test_redirections(fake: FakeRegistry, remote: Remote) -> None:
    fake.spoil("/manifests/v2$", status=307, headers={"Location": f"/v2/{REPOSITORY}/manifests/v1"})
    assert remote.manifest(REPOSITORY, "v2").digest == fake.tags[REPOSITORY]["v1"]
    fake.spoil("/manifests/v3$", status=307, headers={"Location": f"/v2/{REPOSITORY}/manifests/v3"})
    with pytest.raises(RegistryError, match="redirections"):
        remote.manifest(REPOSITORY, "v3")
    for target in ("file:///etc/passwd", "http://", "ftp://x/y", "http://[", "http://a b/"):
        fake.spoils.clear()
        fake.spoil("/manifests/", status=307, headers={"Location": target})
        with pytest.raises(UenvError):
            remote.manifest(REPOSITORY, "v1")


def test_an_index_where_a_manifest_was_expected(fake: FakeRegistry, remote: Remote) -> None:
    fake.put_manifest(REPOSITORY, "many", b'{"schemaVersion":2,"manifests":[]}', INDEX_TYPE)
    with pytest.raises(ManifestError, match="index"):
        remote.manifest(REPOSITORY, "many")
    fake.put_manifest(REPOSITORY, "broken", b"{" * 100, MANIFEST_TYPE)
    with pytest.raises(ManifestError, match="no JSON"):
        remote.manifest(REPOSITORY, "broken")


# --- referrers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", [True, False])
def test_referrers_by_the_interface_and_by_the_tag(api: bool) -> None:
    with FakeRegistry(referrers_api=api, page=2) as fake:
        fake.put_blob(b"{}")
        image = oras_manifest(fake.put_blob(b"x"), 1)
        subject = fake.put_manifest(REPOSITORY, "v1", image, MANIFEST_TYPE)
        entries = []
        for number, kind in enumerate(["uenv/meta", "uenv/reframe", "uenv/meta", "uenv/meta", "uenv/meta"]):
            body = json.loads(image) | {"artifactType": kind, "annotations": {"n": str(number)}}
            body["subject"] = {"mediaType": MANIFEST_TYPE, "digest": subject, "size": len(image)}
            raw = json.dumps(body).encode()
            digest = fake.put_manifest(REPOSITORY, digest_of(raw), raw, MANIFEST_TYPE)
            entries.append(
                {"mediaType": MANIFEST_TYPE, "digest": digest, "size": len(raw), "artifactType": ""}
            )
        index = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
        fake.put_manifest(REPOSITORY, subject.replace(":", "-"), index, INDEX_TYPE)
        remote = open_remote(parse_registry(fake.url))
        assert len(remote.referrers(REPOSITORY, subject, None)) == 5
        assert [entry.artifact_type for entry in remote.referrers(REPOSITORY, subject, "uenv/meta")] == [
            "uenv/meta"
        ] * 4
        assert remote.referrers(REPOSITORY, digest_of(b"other"), None) == []
        fake.spoil(
            "/referrers/", status=200, headers={"Content-Type": "application/json"}, body=b'{"manifests":[]}'
        )
        assert len(remote.referrers(REPOSITORY, subject, None)) == 5, "no OCI content type: not the interface"
        remote.close()
