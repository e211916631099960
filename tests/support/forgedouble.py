"""GitHub, Gitea and GitLab as far as statuses of commits go: the checks of the real APIs, on a loopback port."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "s3cret-token"
PROJECT = "site/uenv"
NUMBER = "4711"
SHA = "0123456789abcdef0123456789abcdef01234567"


class ForgeDouble:
    """The server thread; a context manager. `faults` are answered first: ``(status, headers)``, or None to hang up."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.posted: list[dict[str, Any]] = []
        self.states: dict[str, str] = {}
        self.faults: list[tuple[int, dict[str, str]] | None] = []
        self.requests = 0
        self.stray: list[str] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.double = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        base = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.api = base + {"github": "", "gitea": "/api/v1", "gitlab": "/api/v4"}[kind]

    def __enter__(self) -> ForgeDouble:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def answer(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, object]:
        """Answer a POST as the real thing does."""
        if self.kind == "gitlab":
            return self._gitlab(path, headers, body)
        prefix = "/api/v1" if self.kind == "gitea" else ""
        match = re.fullmatch(rf"{prefix}/repos/([^/]+/[^/]+)/statuses/([0-9a-f]+)", path)
        scheme = "token" if self.kind == "gitea" else "Bearer"
        if headers.get("Authorization") != f"{scheme} {TOKEN}":
            return 401, {"message": "Bad credentials"}
        if not match or match[1] != PROJECT:
            return 404, {"message": "Not Found"}
        if match[2] != SHA:
            return 422, {"message": f"No commit found for SHA: {match[2]}"}
        states = {"error", "failure", "pending", "success"}
        if self.kind == "github":
            if headers.get("Accept") != "application/vnd.github+json":
                return 415, {"message": "Unsupported 'Accept' header"}
            if len(body.get("description", "")) > 140:
                return 422, {
                    "message": "Validation Failed: description is too long (maximum is 140 characters)"
                }
        else:
            states |= {"warning"}
        if body.get("state") not in states or body.keys() - {"state", "context", "description", "target_url"}:
            return 422, {"message": "Validation Failed"}
        self._keep(body, body["context"])
        return 201, {"id": len(self.posted), **body}

    def _gitlab(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, object]:
        match = re.fullmatch(r"/api/v4/projects/([^/]+)/statuses/([0-9a-f]+)", path)
        if headers.get("PRIVATE-TOKEN") != TOKEN:
            return 401, {"message": "401 Unauthorized"}
        if not match or unquote(match[1]) not in {PROJECT, NUMBER}:
            return 404, {"message": "404 Project Not Found"}
        if match[2] != SHA:
            return 404, {"message": "404 Commit Not Found"}
        if body.get("state") not in {"pending", "running", "success", "failed", "canceled", "skipped"}:
            return 400, {"error": "state does not have a valid value"}
        if len(body.get("target_url", "")) > 255 or len(body.get("name", "")) > 255:
            return 400, {"message": "is too long (maximum is 255 characters)"}
        if self.states.get(body["name"]) == body["state"]:
            verb = {"pending": "enqueue", "running": "run"}.get(body["state"], "drop")
            return 400, {"message": f"Cannot transition status via :{verb} from :{body['state']}"}
        self._keep(body, body["name"])
        return 201, {"id": len(self.posted), **body}

    def _keep(self, body: dict[str, Any], context: str) -> None:
        self.posted.append(body)
        self.states[context] = body["state"]


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        double: ForgeDouble = self.server.double  # type: ignore[attr-defined]
        double.requests += 1
        text = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if double.faults:
            fault = double.faults.pop(0)
            if fault is None:
                self.close_connection = True
                self.connection.close()
                return
            status, headers = fault
            self._send(status, {"message": "not now"}, headers)
            return
        if self.headers.get("Content-Type") != "application/json":
            self._send(415, {"message": "no JSON"}, {})
            return
        status, reply = double.answer(self.path, dict(self.headers.items()), json.loads(text))
        self._send(status, reply, {})

    def do_GET(self) -> None:
        self.server.double.stray.append(self.path)  # type: ignore[attr-defined]
        self._send(200, {}, {})

    def _send(self, status: int, reply: object, headers: dict[str, str]) -> None:
        body = json.dumps(reply).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return
