"""A token server as registries name it in a Bearer challenge (distribution, ``docs/spec/auth/jwt.md``): tokens are JWTs signed by a real key.

docker-registry trusts it by its certificate. It knows `support.registry.USER`, lets anybody pull from ``public/``, and grants what is asked for.
"""

from __future__ import annotations

import base64
import json
import secrets
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from support.registry import PASSWORD, USER

SERVICE, ISSUER = "test-registry", "test-issuer"


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class TokenServer:
    """The server thread; a context manager. ``lifetime_s`` may be changed at any time."""

    def __init__(self, directory: Path, lifetime_s: int = 300) -> None:
        self.lifetime_s = lifetime_s
        self.asked: list[str] = []
        self.given: list[str] = []
        directory.mkdir(parents=True, exist_ok=True)
        self.certificate, self._key = directory / "token.crt", directory / "token.key"
        files: list[str | Path] = ["-keyout", self._key, "-out", self.certificate]
        request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        subprocess.run([*request, *files, "-subj", "/CN=token server"], check=True, capture_output=True)
        der = subprocess.run(
            ["openssl", "x509", "-in", self.certificate, "-outform", "DER"], check=True, capture_output=True
        ).stdout
        self._header = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.tokens = self  # type: ignore[attr-defined]
        self.realm = f"http://127.0.0.1:{self._server.server_address[1]}/token"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def auth(self) -> str:
        """The line for docker-registry's configuration."""
        return (
            f'auth: {{token: {{realm: "{self.realm}", service: {SERVICE}, issuer: {ISSUER},'
            f" rootcertbundle: {self.certificate}}}}}"
        )

    def __enter__(self) -> TokenServer:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def token(self, subject: str, scopes: list[str]) -> str:
        """Make a token for scopes like ``repository:name:pull,push``."""
        now = int(time.time())
        access = []
        for scope in scopes:
            kind, _, rest = scope.partition(":")
            name, _, actions = rest.rpartition(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        claims = {
            "iss": ISSUER,
            "sub": subject,
            "aud": SERVICE,
            "nbf": now - 5,
            "iat": now,
            "exp": now + self.lifetime_s,
            "jti": secrets.token_hex(8),
            "access": access,
        }
        signed = ".".join(_encoded(json.dumps(part).encode()) for part in (self._header, claims))
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", self._key],
            input=signed.encode(),
            check=True,
            capture_output=True,
        ).stdout
        self.given.append(f"{signed}.{_encoded(signature)}")
        return self.given[-1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None:
        pass

    def do_GET(self) -> None:
        """Answer a request for a token."""
        tokens: TokenServer = self.server.tokens  # type: ignore[attr-defined]
        scopes = parse_qs(urlsplit(self.path).query).get("scope", [])
        tokens.asked.append(" ".join(scopes))
        basic = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        given = self.headers.get("Authorization", "")
        public = all(scope.startswith("repository:public/") and scope.endswith(":pull") for scope in scopes)
        if given == basic or (not given and public):
            answer = {"token": tokens.token(USER, scopes), "expires_in": tokens.lifetime_s}
            status, body = 200, json.dumps(answer).encode()
        else:
            status, body = 401, b"{}"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
