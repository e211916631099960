"""Registries for tests: Debian's docker-registry as a process, and a fake one in a thread that can misbehave.

`docker_registry` is the real thing (no referrers API, no paging of tags). `FakeRegistry` is a strict registry of the distribution
specification 1.1 (referrers API with filter and paging, paging of tags, ranges, Basic and scoped Bearer authentication) whose answers can be
spoilt by rules: `FakeRegistry.spoil`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from support.registryhttp import Handler, Server

USER = "alice"
PASSWORD = "s3cret-of-alice"
_HTPASSWD = "alice:$2y$05$abcdefghijklmnopqrstuu6SdaO4ukD0CMVhd6QMDsUq2nFZ4PrJS\n"
"""`PASSWORD`, by bcrypt."""


# --- the real one ---------------------------------------------------------------------------------------------------------------


@dataclass
class RealRegistry:
    """A running docker-registry."""

    url: str
    process: subprocess.Popen[bytes]
    data: Path
    """Its storage: ``docker/registry/v2/blobs/sha256/<2>/<hex>/data``."""

    def blob_file(self, digest: str) -> Path:
        """Return where it keeps a blob."""
        name = digest.removeprefix("sha256:")
        return self.data / "docker/registry/v2/blobs/sha256" / name[:2] / name / "data"


def free_port() -> int:
    """Return a port of the loopback interface that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def docker_registry(
    directory: Path, *, htpasswd: bool = False, data: Path | None = None, auth: str = ""
) -> Iterator[RealRegistry]:
    """Run docker-registry with its files in ``directory`` (its storage in ``data``, if given) on a free port of the loopback interface.

    ``auth``: the line ``auth: {...}`` of its configuration.
    """
    directory.mkdir(parents=True, exist_ok=True)
    data = data or directory / "data"
    auth = f"{auth}\n" if auth else ""
    if htpasswd:
        (directory / "htpasswd").write_text(_HTPASSWD)
        auth = f"auth: {{htpasswd: {{realm: test-realm, path: {directory}/htpasswd}}}}\n"
    for _ in range(5):
        port = free_port()
        config = directory / "config.yml"
        config.write_text(
            "version: 0.1\n"
            "log: {level: warn, accesslog: {disabled: true}}\n"
            f"storage: {{filesystem: {{rootdirectory: {data}}}, delete: {{enabled: true}},"
            " maintenance: {uploadpurging: {enabled: false}}}\n"
            f'http: {{addr: "127.0.0.1:{port}", secret: "a fixed string"}}\n{auth}'
        )
        with (directory / "registry.log").open("ab") as log:
            process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
        try:
            if _answers(port, process):
                yield RealRegistry(f"http://127.0.0.1:{port}", process, data)
                return
        finally:
            process.kill()
            process.wait(10)
    raise RuntimeError(f"docker-registry does not start: {(directory / 'registry.log').read_text()[-2000:]}")


def _answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    end = time.monotonic() + 20
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        time.sleep(0.01)
    return False


# --- the fake one ---------------------------------------------------------------------------------------------------------------


@dataclass
class Spoil:
    """How to spoil the answers to matching requests. ``times`` counts down; None is for ever."""

    path: str
    """Regular expression, searched in path and query."""
    method: str = "GET"
    times: int | None = None
    status: int | None = None
    """Answer this instead."""
    headers: dict[str, str] = field(default_factory=dict)
    """Sent with ``status``, or instead of the right ones of the same name."""
    body: bytes | None = None
    """Sent instead of the right one."""
    silent: bool = False
    """Take the request and say nothing more."""
    reset: bool = False
    """Close the connection with RST before the answer."""
    truncate_bytes: int | None = None
    """Close the connection after so many bytes of the body."""
    stall_bytes: int | None = None
    """Say nothing more after so many bytes of the body."""
    corrupt: bool = False
    """Flip a bit in the middle of the body."""
    bytes_per_s: int | None = None
    drip_headers_s: float | None = None
    """Send one byte of the status line each so many seconds."""
    ignore_range: bool = False
    shorter_bytes: int | None = None
    """Answer a range with at most so many bytes of it, and say so."""
    extra_bytes: int = 0
    """Send so many bytes more than asked for, and announce them."""
    swap_bytes: int = 0
    """Send the bytes so much further on, under the header of those asked for."""


@dataclass
class Seen:
    """A request that arrived."""

    method: str
    path: str
    headers: dict[str, str]


class FakeRegistry:
    """The registry and its server thread; a context manager. State may be read and changed by the test at any time."""

    def __init__(
        self,
        *,
        auth: str = "none",
        referrers_api: bool = True,
        page: int = 1000,
        tls: tuple[Path, Path] | None = None,
        address: str = "127.0.0.1",
    ) -> None:
        """``auth``: none, basic, bearer. ``page``: longest list in one answer. ``tls``: (certificate, key)."""
        self.auth = auth
        self.referrers_api = referrers_api
        self.deletes: Literal["", "digests", "tags"] = "tags"
        """Whether it deletes nothing, manifests by their digests only, or tags, too."""
        self.tag_takes_manifest = False
        """Deleting a tag deletes what it names."""
        self.page = page
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, dict[str, tuple[str, bytes]]] = {}
        """repository -> digest -> (media type, bytes)"""
        self.tags: dict[str, dict[str, str]] = {}
        self.seen: list[Seen] = []
        self.spoils: list[Spoil] = []
        self.unspoilt = Spoil("")
        self.basic = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        """The header of the only one who is let in."""
        self.token_lifetime_s = 300
        self.tokens: dict[str, tuple[str, float]] = {}
        self.identity_token: str | None = None
        self.upload_host = ""
        """Scheme and host that uploads are sent to; empty for this one."""
        self.sent_bytes = 0
        """Of all answers, also of those that nobody took to their end."""
        self.written_bytes = 0
        """What went into connections."""
        """Of all bodies so far, as announced; roughly, when several threads send."""
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._server = Server((address, 0), Handler)
        self._server.registry = self
        scheme = "http"
        if tls is not None:
            scheme = "https"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.host = f"{address}:{self._server.server_address[1]}"
        self.url = f"{scheme}://{self.host}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="fake registry", daemon=True
        )

    def __enter__(self) -> FakeRegistry:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.close_connections()
        self._server.server_close()
        self._thread.join(5)

    def hang_up(self) -> None:
        """Break all connections, in the middle of whatever they carry."""
        self._server.close_connections()

    def forget_connections(self) -> None:
        """Answer nothing any more on the connections that are open now, as behind a firewall that has lost its state."""
        self._server.forget_connections()

    def spoil(self, path: str, **how: Any) -> Spoil:
        """Add a rule; the first that matches a request counts."""
        rule = Spoil(path, **how)
        self.spoils.append(rule)
        return rule

    def take_spoil(self, method: str, path: str) -> Spoil | None:
        """Return the rule for a request and count it down."""
        with self._lock:
            for rule in self.spoils:
                if rule.times != 0 and rule.method == method and re.search(rule.path, path):
                    if rule.times is not None:
                        rule.times -= 1
                    return rule
        return None

    def count(self, method: str, path: str) -> int:
        """Return how many requests with this method came whose path matches."""
        return sum(1 for seen in self.seen if seen.method == method and re.search(path, seen.path))

    def note(self, method: str, path: str, headers: dict[str, str]) -> None:
        """Remember a request that arrived."""
        self.seen.append(Seen(method, path, headers))

    def put_blob(self, data: bytes) -> str:
        """Store a blob; return its digest."""
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    def put_manifest(self, repository: str, reference: str, raw: bytes, media_type: str) -> str:
        """Store a manifest under its digest, and under a tag if ``reference`` is one; return the digest."""
        digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        self.manifests.setdefault(repository, {})[digest] = (media_type, raw)
        if not reference.startswith("sha256:"):
            self.tags.setdefault(repository, {})[reference] = digest
        return digest

    def give_token(self, scope: str) -> str:
        """Make a bearer token for a scope."""
        token = f"token-{len(self.tokens)}-" + hashlib.sha256(scope.encode()).hexdigest()[:8]
        self.tokens[token] = (scope, time.monotonic() + self.token_lifetime_s)
        return token


# --- helpers --------------------------------------------------------------------------------------------------------------------


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """Make a self-signed certificate for 127.0.0.1 by openssl; return (certificate, key)."""
    certificate, key = directory / "tls.crt", directory / "tls.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", key, "-out", certificate, "-subj", "/CN=test registry", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return certificate, key


def oras_manifest(registry_digest: str, size_bytes: int, title: str = "store.squashfs") -> bytes:
    """Return what ``oras push --artifact-type application/x-squashfs REPO:TAG store.squashfs`` (oras 1.1, 1.2) writes."""
    empty = {
        "mediaType": "application/vnd.oci.empty.v1+json",
        "digest": "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        "size": 2,
        "data": "e30=",
    }
    layer = {
        "mediaType": "application/vnd.oci.image.layer.v1.tar",
        "digest": registry_digest,
        "size": size_bytes,
        "annotations": {"org.opencontainers.image.title": title},
    }
    body = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": "application/x-squashfs",
        "config": empty,
        "layers": [layer],
        "annotations": {"org.opencontainers.image.created": "2024-11-05T10:11:12Z"},
    }
    return json.dumps(body, separators=(",", ":")).encode()
