"""How `support.registry.FakeRegistry` is spoken to: the distribution specification over HTTP, its answers spoilt where a rule says so."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import struct
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qs, quote, urlsplit

if TYPE_CHECKING:
    from support.registry import FakeRegistry, Spoil


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    registry: FakeRegistry

    def __init__(self, *args: Any) -> None:
        self._open: set[socket.socket] = set()
        self.forgotten: set[socket.socket] = set()
        super().__init__(*args)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        self.forgotten.discard(request)
        super().shutdown_request(request)

    def forget_connections(self) -> None:
        """See `FakeRegistry.forget_connections`."""
        self.forgotten |= self._open

    def close_connections(self) -> None:
        """Wake the threads that wait for a peer."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, _request: Any, _address: Any) -> None:
        """Say nothing: peers that go away are what is tested."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server
    spoil: Spoil | None = None

    def log_message(self, *_args: object) -> None:
        pass

    @property
    def registry(self) -> FakeRegistry:
        return self.server.registry

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def _serve(self) -> None:
        registry = self.registry
        if self.connection in self.server.forgotten:
            registry.stopping.wait()
            self.close_connection = True
            return
        registry.note(self.command, self.path, dict(self.headers.items()))
        self.spoil = registry.take_spoil(self.command, self.path)
        parts = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        body = self._body()
        if self.spoil is not None and self._spoilt():
            return
        if parts.path == "/token":
            self._token(query, body)
        elif not parts.path.startswith("/v2/"):
            self._refuse(404, "NOT_FOUND")
        elif self._allowed(parts.path):
            self._route(parts.path.removeprefix("/v2/"), query, body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _spoilt(self) -> bool:
        """Apply the parts of a rule that replace the answer; tell whether that was all."""
        spoil = cast("Spoil", self.spoil)
        if spoil.silent:
            self.registry.stopping.wait()
            self.close_connection = True
            return True
        if spoil.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return True
        if spoil.drip_headers_s is not None:
            for char in b"HTTP/1.1 200 OK and much more text":
                self.wfile.write(bytes([char]))
                self.wfile.flush()
                if self.registry.stopping.wait(spoil.drip_headers_s):
                    break
            self.close_connection = True
            return True
        if spoil.status is not None:
            self._answer(spoil.status, spoil.body or b"", {})
            return True
        return False

    # -- authentication

    def _allowed(self, path: str) -> bool:
        registry = self.registry
        given = self.headers.get("Authorization", "")
        if registry.auth == "basic":
            expected = self.registry.basic
            if given == expected:
                return True
            self._refuse(401, "UNAUTHORIZED", {"WWW-Authenticate": 'Basic realm="test-realm"'})
            return False
        if registry.auth == "bearer":
            needed = self._needed_scope(path)
            scope, expires = registry.tokens.get(given.removeprefix("Bearer "), ("", 0.0))
            if (
                given.startswith("Bearer ")
                and time.monotonic() < expires
                and (not needed or needed in _expanded(scope))
            ):
                return True
            challenge = f'Bearer realm="{registry.url}/token",service="test-registry"'
            if needed:
                wanted = needed if not needed.endswith(":push") else needed.removesuffix("push") + "pull,push"
                challenge += f',scope="{wanted}"'
            self._refuse(401, "UNAUTHORIZED", {"WWW-Authenticate": challenge})
            return False
        return True

    def _needed_scope(self, path: str) -> str:
        if path == "/v2/_catalog":
            return "registry:catalog:*"
        match = re.match(r"/v2/(.+)/(?:tags|manifests|blobs|referrers)/", path)
        action = "pull" if self.command in {"GET", "HEAD"} else "push"
        return f"repository:{match.group(1)}:{action}" if match else ""

    def _token(self, query: dict[str, str], body: bytes) -> None:
        """Answer as a token server: anybody may pull from ``public/``, alice may do everything."""
        registry = self.registry
        scopes = query.get("scope", "")
        basic = self.registry.basic
        known = self.headers.get("Authorization") == basic
        if self.command == "POST":
            form = {key: values[-1] for key, values in parse_qs(body.decode()).items()}
            scopes = form.get("scope", "")
            known = (
                form.get("grant_type") == "refresh_token"
                and form.get("refresh_token") == registry.identity_token
            )
        public = scopes.startswith("repository:public/") and scopes.endswith(":pull")
        if not known and (not public or self.headers.get("Authorization")):
            self._refuse(401, "UNAUTHORIZED")
            return
        answer = {"token": registry.give_token(scopes), "expires_in": registry.token_lifetime_s}
        self._json(200, answer)

    # -- the interface

    def _route(self, path: str, query: dict[str, str], body: bytes) -> None:
        registry = self.registry
        if path == "":
            self._json(200, {})
        elif path == "_catalog":
            names = sorted(set(registry.manifests) | set(registry.tags))
            self._list("repositories", names, query, {})
        elif match := re.fullmatch(r"(.+)/tags/list", path):
            if match[1] not in registry.manifests:
                self._refuse(404, "NAME_UNKNOWN")
            else:
                self._list("tags", sorted(registry.tags.get(match[1], {})), query, {"name": match[1]})
        elif match := re.fullmatch(r"(.+)/manifests/([^/]+)", path):
            self._manifest(match[1], match[2], body)
        elif match := re.fullmatch(r"(.+)/referrers/(sha256:[0-9a-f]{64})", path):
            self._referrers(match[1], match[2], query)
        elif match := re.fullmatch(r"(.+)/blobs/uploads/([^/]*)", path):
            self._upload(match[1], query, body)
        elif match := re.fullmatch(r"(.+)/blobs/(sha256:[0-9a-f]{64})", path):
            self._blob(match[2])
        else:
            self._refuse(404, "NOT_FOUND")

    def _list(self, key: str, names: list[str], query: dict[str, str], extra: dict[str, Any]) -> None:
        size = min(int(query.get("n", self.registry.page)), self.registry.page)
        rest = [name for name in names if name > query.get("last", "")]
        headers = {}
        if len(rest) > size:
            path = urlsplit(self.path).path
            headers["Link"] = f'<{path}?n={size}&last={quote(rest[size - 1])}>; rel="next"'
        self._json(200, extra | {key: rest[:size]}, headers)

    def _manifest(self, repository: str, reference: str, body: bytes) -> None:
        registry = self.registry
        if self.command == "PUT":
            headers = {}
            parsed = json.loads(body)
            blobs = [*parsed.get("layers", ()), *([parsed["config"]] if "config" in parsed else ())]
            if any(blob["digest"] not in registry.blobs for blob in blobs):
                self._refuse(400, "MANIFEST_BLOB_UNKNOWN")
                return
            digest = registry.put_manifest(repository, reference, body, self.headers["Content-Type"])
            if "subject" in parsed and registry.referrers_api:
                headers["OCI-Subject"] = parsed["subject"]["digest"]
            self._answer(201, b"", headers | {"Docker-Content-Digest": digest, "Location": self.path})
            return
        if self.command == "DELETE":
            self._delete(repository, reference)
            return
        digest = registry.tags.get(repository, {}).get(reference, reference)
        media_type, raw = registry.manifests.get(repository, {}).get(digest, ("", b""))
        if not raw:
            self._refuse(404, "MANIFEST_UNKNOWN")
        else:
            self._answer(200, raw, {"Content-Type": media_type, "Docker-Content-Digest": digest})

    def _delete(self, repository: str, reference: str) -> None:
        """Delete a tag or a manifest with its tags, as far as `FakeRegistry.deletes` says."""
        registry = self.registry
        tags = registry.tags.get(repository, {})
        by_digest = reference.startswith("sha256:")
        if not registry.deletes or (not by_digest and registry.deletes != "tags"):
            self._refuse(405, "UNSUPPORTED")
        elif by_digest:
            known = registry.manifests.get(repository, {}).pop(reference, None)
            registry.tags[repository] = {tag: digest for tag, digest in tags.items() if digest != reference}
            self._answer(202 if known else 404, b"", {})
        else:
            named = tags.pop(reference, None)
            if named and registry.tag_takes_manifest:
                registry.manifests[repository].pop(named, None)
            self._answer(202 if named else 404, b"", {})

    def _referrers(self, repository: str, digest: str, query: dict[str, str]) -> None:
        if not self.registry.referrers_api:
            self._answer(404, b"404 page not found\n", {"Content-Type": "text/plain"})
            return
        entries = []
        for mine, (media_type, raw) in sorted(self.registry.manifests.get(repository, {}).items()):
            parsed = json.loads(raw)
            if parsed.get("subject", {}).get("digest") == digest:
                kind = parsed.get("artifactType") or parsed["config"]["mediaType"]
                entries.append(
                    {"mediaType": media_type, "digest": mine, "size": len(raw), "artifactType": kind}
                )
        headers = {"Content-Type": "application/vnd.oci.image.index.v1+json"}
        if "artifactType" in query:
            entries = [entry for entry in entries if entry["artifactType"] == query["artifactType"]]
            headers["OCI-Filters-Applied"] = "artifactType"
        rest = [entry for entry in entries if str(entry["digest"]) > query.get("last", "")]
        if len(rest) > self.registry.page:
            last = rest[self.registry.page - 1]["digest"]
            headers["Link"] = f'<{urlsplit(self.path).path}?last={last}>; rel="next"'
        self._json(200, {"schemaVersion": 2, "manifests": rest[: self.registry.page]}, headers)

    def _upload(self, repository: str, query: dict[str, str], body: bytes) -> None:
        registry = self.registry
        if self.command == "POST":
            self._answer(
                202,
                b"",
                {"Location": f"{registry.upload_host}/v2/{repository}/blobs/uploads/u1?_state=a%2Fb"},
            )
        elif "sha256:" + hashlib.sha256(body).hexdigest() != query.get("digest"):
            self._refuse(400, "DIGEST_INVALID")
        else:
            digest = registry.put_blob(body)
            registry.manifests.setdefault(repository, {})
            self._answer(
                201, b"", {"Docker-Content-Digest": digest, "Location": f"/v2/{repository}/blobs/{digest}"}
            )

    def _blob(self, digest: str) -> None:
        data = self.registry.blobs.get(digest)
        if data is None:
            self._refuse(404, "BLOB_UNKNOWN")
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        headers = {"Content-Type": "application/octet-stream", "Docker-Content-Digest": digest}
        if match is None or (self.spoil is not None and self.spoil.ignore_range):
            self._answer(200, data, headers)
            return
        first, last = int(match[1]), min(int(match[2]), len(data) - 1)
        if first > last:
            self._answer(416, b"no such range\n", {"Content-Range": f"bytes */{len(data)}"})
            return
        spoil = self.spoil or self.registry.unspoilt
        if spoil.shorter_bytes is not None:
            last = min(last, first + spoil.shorter_bytes - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        body = data[first : last + 1]
        if spoil.swap_bytes:
            body = (data + data)[first + spoil.swap_bytes :][: len(body)]
        self._answer(206, body + bytes(spoil.extra_bytes), headers)

    # -- answers

    def _json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        self._answer(
            status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})}
        )

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._json(status, {"errors": [{"code": code, "message": code.lower().replace("_", " ")}]}, headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        spoil = self.spoil or self.registry.unspoilt
        if spoil.body is not None:
            body = spoil.body
        if spoil.corrupt and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(body))} | headers | spoil.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send(body, spoil)

    def _send(self, body: bytes, spoil: Spoil) -> None:
        self.registry.sent_bytes += len(body)
        for limit in (spoil.truncate_bytes, spoil.stall_bytes):
            if limit is not None and limit < len(body):
                body = body[:limit]
                self.close_connection = True
        if spoil.bytes_per_s is None:
            self.wfile.write(body)
            self.registry.written_bytes += len(body)
        else:
            step = max(1, spoil.bytes_per_s // 20)
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                self.registry.written_bytes += len(body[start : start + step])
                if self.registry.stopping.wait(0.05):
                    break
        self.wfile.flush()
        if spoil.stall_bytes is not None:
            self.registry.stopping.wait()


def _expanded(scope: str) -> list[str]:
    """Return ``repository:a:pull,push`` as one text for each action."""
    found = []
    for one in scope.split(" "):
        head, _, actions = one.rpartition(":")
        found += [f"{head}:{action}" for action in actions.split(",")]
    return found
