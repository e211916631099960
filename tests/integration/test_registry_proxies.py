"""Proxies and TLS between us and the registry: the same deadlines, and certificates are checked."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.blobpull import REPOSITORY, Blob, Timer, new_store, retry_quickly
from support.registry import FakeRegistry, make_certificate
from uenvd.errors import (
    RegistryUnreachable,
    UenvError,
)
from uenvd.oci.manifest import MANIFEST_TYPE
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import open_remote

BLOB = Blob(1_000_000)


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        BLOB.put(registry)
        yield registry


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    retry_quickly(monkeypatch)


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


def test_tls(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path)
    store = new_store(tmp_path / "cache")
    with FakeRegistry(tls=certificate) as fake:
        BLOB.put(fake)
        trusting = open_remote(parse_registry(fake.url), ca_file=certificate[0], timeout_read_s=1)
        fake.spoil("/blobs/", truncate_bytes=300_000, times=1)
        fake.spoil("/blobs/", stall_bytes=300_000, times=1)
        BLOB.pull(trusting, store)
        assert BLOB.content(store) == BLOB.data
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
