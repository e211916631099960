"""What registries, proxies and networks do wrong: each is one clear error in bounded time, or is survived."""

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.registry import PASSWORD, USER, FakeRegistry, free_port, make_certificate, oras_manifest
from uenvd.cache import transfer as transfer_module
from uenvd.cache.pull import pull_blob
from uenvd.cache.store import Store
from uenvd.errors import (
    Cancelled,
    DigestMismatch,
    ManifestError,
    NotFound,
    RegistryDenied,
    RegistryError,
    RegistryUnreachable,
    UenvError,
    UsageError,
)
from uenvd.oci import transport
from uenvd.oci.credentials import Credential
from uenvd.oci.manifest import INDEX_TYPE, MANIFEST_TYPE, Descriptor, digest_of
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import Remote, never, no_progress, open_remote

REPOSITORY = "deploy/demo/zen3/app/1.0"
DATA = os.urandom(1_000_000)
LAYER = Descriptor("application/x-squashfs", digest_of(DATA), len(DATA))


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        registry.put_blob(DATA)
        registry.put_blob(b"{}")
        registry.put_manifest(REPOSITORY, "v1", oras_manifest(LAYER.digest, len(DATA)), MANIFEST_TYPE)
        yield registry


@pytest.fixture
def remote(fake: FakeRegistry) -> Iterator[Remote]:
    opened = open_remote(parse_registry(fake.url), timeout_connect_s=1, timeout_read_s=0.6)
    yield opened
    opened.close()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "cache")
    made.prepare()
    return made


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_BACKOFF_S", 0.02)
    monkeypatch.setattr(transfer_module, "BACKOFF_S", 0.02)


def pull(remote: Remote, store: Store, cancelled: Callable[[], bool] = never) -> None:
    pull_blob(remote, REPOSITORY, LAYER, store, progress=no_progress, cancelled=cancelled)


def content(store: Store) -> bytes:
    with os.fdopen(store.open(LAYER.digest), "rb") as file:
        return file.read()


def left_over(store: Store) -> list[str]:
    return [
        path.name for directory in ("partial", "blobs/sha256") for path in (store.root / directory).iterdir()
    ]


class Timer:
    """Measures, so that "in bounded time" is a number."""

    def __enter__(self) -> "Timer":
        self.begin = time.monotonic()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.seconds = time.monotonic() - self.begin


# --- no answer ------------------------------------------------------------------------------------------------------------------


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


# --- wrong answers to questions -------------------------------------------------------------------------------------------------


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


# --- blobs ----------------------------------------------------------------------------------------------------------------------


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


# --- uploads --------------------------------------------------------------------------------------------------------------------


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


# --- proxies --------------------------------------------------------------------------------------------------------------------


def test_a_proxy_for_plain_http(fake: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake takes absolute addresses too, as a proxy gets them."""
    monkeypatch.setenv("http_proxy", fake.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert open_remote(parse_registry("http://registry.invalid")).tags(REPOSITORY) == ["v1"]
    assert fake.seen[-1].path.startswith("http://registry.invalid/v2/")
    fake.spoil("/tags/", silent=True)
    remote = open_remote(parse_registry("http://registry.invalid"))
    with Timer() as timer, remote.deadline(0.5), pytest.raises(RegistryUnreachable):
        remote.tags(REPOSITORY)
    assert timer.seconds < 2.2


def test_a_proxy_for_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = make_certificate(tmp_path)
    with FakeRegistry(tls=certificate) as fake, Tunnel() as tunnel:
        fake.put_manifest(REPOSITORY, "v1", b"x", MANIFEST_TYPE)
        monkeypatch.setenv("https_proxy", tunnel.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        remote = open_remote(parse_registry(fake.url), ca_file=certificate[0])
        assert remote.tags(REPOSITORY) == ["v1"]
        (asked,) = tunnel.asked
        assert asked.startswith(f"CONNECT {fake.host} HTTP/")
        fake.spoil("/tags/", silent=True)
        with Timer() as timer, remote.deadline(0.5), pytest.raises(RegistryUnreachable):
            remote.tags(REPOSITORY)
        assert timer.seconds < 2.2
        remote.close()


class Tunnel:
    """A proxy that understands CONNECT, for one connection at a time."""

    def __enter__(self) -> "Tunnel":
        self.asked: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = [self._listener]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._thread.join(5)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                request = b""
                while b"\r\n\r\n" not in request:
                    request += client.recv(4096)
                self.asked.append(request.partition(b"\r\n")[0].decode())
                host, _, port = self.asked[-1].split(" ")[1].partition(":")
                server = socket.create_connection((host, int(port)))
                self._open += [client, server]
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


# --- referrers ------------------------------------------------------------------------------------------------------------------


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


# --- TLS ------------------------------------------------------------------------------------------------------------------------


def test_tls(tmp_path: Path, store: Store) -> None:
    certificate = make_certificate(tmp_path)
    with FakeRegistry(tls=certificate) as fake:
        fake.put_blob(DATA)
        trusting = open_remote(parse_registry(fake.url), ca_file=certificate[0], timeout_read_s=1)
        fake.spoil("/blobs/", truncate_bytes=300_000, times=1)
        fake.spoil("/blobs/", stall_bytes=300_000, times=1)
        pull(trusting, store)
        assert content(store) == DATA
        with pytest.raises(RegistryUnreachable, match="certificate verify failed") as caught:
            open_remote(parse_registry(fake.url)).tags(REPOSITORY)
        assert "certificate" in caught.value.hint
        with pytest.raises(UenvError):
            open_remote(parse_registry(fake.url.replace("https", "http")), timeout_read_s=1).tags(REPOSITORY)
        fake.spoils.clear()
        fake.spoil("/v2/", silent=True)
        with Timer() as timer, trusting.deadline(0.5), pytest.raises(RegistryUnreachable):
            trusting.tags(REPOSITORY)
        assert timer.seconds < 2.2
    with FakeRegistry() as plain, pytest.raises(RegistryUnreachable, match="TLS"):
        open_remote(parse_registry(plain.url.replace("http", "https")), ca_file=certificate[0]).tags(
            REPOSITORY
        )


def test_an_index_where_a_manifest_was_expected(fake: FakeRegistry, remote: Remote) -> None:
    fake.put_manifest(REPOSITORY, "many", b'{"schemaVersion":2,"manifests":[]}', INDEX_TYPE)
    with pytest.raises(ManifestError, match="index"):
        remote.manifest(REPOSITORY, "many")
    fake.put_manifest(REPOSITORY, "broken", b"{" * 100, MANIFEST_TYPE)
    with pytest.raises(ManifestError, match="no JSON"):
        remote.manifest(REPOSITORY, "broken")


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
