"""Answers to a registry's challenge (``WWW-Authenticate``), as an authentication backend of oras-py.

Source: distribution, ``docs/spec/auth/token.md`` and ``oauth.md``. What oras-py's own backend lacks: Basic, one token for each
repository and action, expiry, refusal of a token that was just given, identity tokens, more than one thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

import oras.auth
import requests
from oras.auth.token import TokenAuth
from oras.auth.utils import parse_auth_header

from uenvd.errors import RegistryDenied, RegistryError, RegistryUnreachable
from uenvd.oci.credentials import Credential
from uenvd.oci.manifest import load_object

MAX_TOKEN_BYTES: Final = 1 << 20
_DEFAULT_TOKEN_S: Final = 60.0
_MARGIN_S: Final = 5.0
_CLIENT_ID = "uenvd"


class ScopedAuth(TokenAuth):  # type: ignore[misc]
    """Basic and Bearer by challenge. The transport says with `enter` what the calling thread is about to do."""

    session: requests.Session

    def __init__(self) -> None:
        self.registry = ""
        self.registry_is_https = True
        self.tls_verify: bool | str = True
        self.is_ours: Callable[[str], bool] = lambda _url: False
        """Tells whether a URL leads to the registry itself, and not where it redirects to."""
        self._scope = threading.local()
        self._lock = threading.Lock()
        self._tokens: dict[str, tuple[str, float]] = {}
        self._basic = False
        super().__init__()

    def enter(self, scope: str, credential: Credential | None) -> None:
        """Set, for this thread, repository and action of the calls that follow, and the credential for them."""
        self._scope.key = scope
        self._scope.credential = credential

    def forget(self) -> None:
        """Drop all tokens and what was learnt about the registry."""
        with self._lock:
            self._tokens.clear()
        self._basic = False

    @property
    def credential(self) -> Credential | None:
        """The credential for the calls of this thread."""
        found: Credential | None = getattr(self._scope, "credential", None)
        return found

    @property
    def _scope_key(self) -> str:
        return str(getattr(self._scope, "key", ""))

    @property
    def token(self) -> str | None:
        """The token for the current scope; "" where the registry wants Basic; None where nothing is known yet."""
        if self._basic:
            return ""
        with self._lock:
            token, expires = self._tokens.get(self._scope_key, (None, 0.0))
            return token if time.monotonic() < expires else None

    @token.setter
    def token(self, value: str | None) -> None:
        if value is None:
            with self._lock:
                self._tokens.pop(self._scope_key, None)

    def get_auth_header(self) -> dict[str, str]:
        """Return what to send before the registry asks."""
        token = self.token
        if token:
            return {"Authorization": f"Bearer {token}"}
        if self._basic and self.credential is not None and self.credential.identity_token is None:
            return {"Authorization": f"Basic {self.credential.basic}"}
        return {}

    def authenticate_request(
        self, original: requests.Response, headers: dict[str, str], refresh: bool = False
    ) -> tuple[dict[str, str], bool]:
        """Answer the challenge of a 401 or 403. Raises `RegistryDenied` where there is no better answer than the one sent."""
        if not self.is_ours(original.url or ""):
            # A signature that expired, or worse; whatever it says, our credentials are not for it.
            raise RegistryUnreachable(
                f"the storage that the registry {self.registry} redirects to refuses the transfer ({original.status_code})"
            )
        challenge = original.headers.get("Www-Authenticate", "")
        sent = original.request.headers.get("Authorization", "")
        headers = dict(headers or {})
        if challenge.lower().startswith("basic"):
            if self.credential is None or self.credential.identity_token is not None:
                raise RegistryDenied(
                    f"the registry {self.registry} asks for a user name and a password and there are none for it"
                )
            if sent.startswith("Basic"):
                raise RegistryDenied(f"the registry {self.registry} refuses the user name or the password")
            self._basic = True
            headers["Authorization"] = f"Basic {self.credential.basic}"
            return headers, True
        if "bearer" in challenge.lower() and not refresh:
            self.token = None
            token = self._fetch_token(challenge)
            headers["Authorization"] = f"Bearer {token}"
            return headers, True
        raise RegistryDenied(f"the registry {self.registry} does not allow this ({original.status_code})")

    def _fetch_token(self, challenge: str) -> str:
        start = challenge.lower().index("bearer")
        found = parse_auth_header(challenge[start:])
        realm = found.realm or ""
        parts = urlsplit(realm)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise RegistryError(f"the registry {self.registry} names no token server that can be asked")
        if self.registry_is_https and parts.scheme != "https":
            raise RegistryDenied(
                f"the registry {self.registry} sends its users to a token server without TLS ({parts.hostname}); nothing was sent"
            )
        response = self._ask(realm, found.service, found.scope)
        if response.status_code in {400, 401, 403}:
            whom = "the credentials" if self.credential else "anonymous access"
            raise RegistryDenied(f"the token server {parts.hostname} of {self.registry} refuses {whom}")
        if response.status_code == 429 or response.status_code >= 500:
            raise RegistryUnreachable(
                f"the token server {parts.hostname} of {self.registry} answers {response.status_code}"
            )
        if response.status_code != 200:
            raise RegistryError(
                f"the token server {parts.hostname} of {self.registry} answers {response.status_code}"
            )
        body = load_object(_read(response), "the answer of the token server")
        token = body.get("token") or body.get("access_token")
        if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable():
            raise RegistryError(f"the token server {parts.hostname} of {self.registry} gave no token")
        lifetime = body.get("expires_in")
        lifetime_s = (
            float(lifetime) if isinstance(lifetime, int | float) and lifetime > 0 else _DEFAULT_TOKEN_S
        )
        with self._lock:
            self._tokens[self._scope_key] = (token, time.monotonic() + max(_MARGIN_S, lifetime_s - _MARGIN_S))
        return token

    def _ask(self, realm: str, service: str | None, scope: str | None) -> requests.Response:
        """Send the credential to the realm, and to nobody that it redirects to."""
        fields: dict[str, Any] = {}
        if service:
            fields["service"] = service
        if scope:
            # A challenge may hold several scopes, separated by spaces; the token server wants one parameter for each.
            fields["scope"] = scope.split(" ")
        headers = {"Accept": "application/json"}
        if self.credential is not None and self.credential.identity_token is not None:
            fields |= {
                "grant_type": "refresh_token",
                "client_id": _CLIENT_ID,
                "refresh_token": self.credential.identity_token,
                "scope": scope or "",
            }
            return self.session.request(
                "POST",
                realm,
                data=fields,
                headers=headers,
                stream=True,
                verify=self.tls_verify,
                allow_redirects=False,
            )
        if self.credential is not None:
            headers["Authorization"] = f"Basic {self.credential.basic}"
        return self.session.request(
            "GET",
            realm,
            params=fields,
            headers=headers,
            stream=True,
            verify=self.tls_verify,
            allow_redirects=False,
        )


def _read(response: requests.Response) -> bytes:
    data: bytes = response.raw.read(MAX_TOKEN_BYTES, decode_content=True)
    response.close()
    return data


oras.auth.auth_backends["uenvd"] = ScopedAuth
