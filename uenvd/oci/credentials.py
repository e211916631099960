"""Where the user name and password for a registry come from.

The places are those of docker, podman, skopeo and the oras command (``containers-auth.json(5)``, ``docker login``), first hit wins:
``$REGISTRY_AUTH_FILE``; ``$DOCKER_CONFIG/config.json`` or ``~/.docker/config.json``; ``$XDG_RUNTIME_DIR/containers/auth.json``;
``~/.config/containers/auth.json``. A secret appears in no ``repr``, message or log.
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import json
import logging
import os
import re
import resource
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from uenvd.errors import ConfigError

log = logging.getLogger(__name__)

_PR_SET_DUMPABLE: Final = 4
MAX_FILE_BYTES: Final = 1 << 20
HELPER_TIMEOUT_S: Final = 10.0
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TOKEN_USER = "<token>"  # noqa: S105 -- what a credential helper says for "the secret is an identity token"


@dataclass(frozen=True)
class Credential:
    """A user name and password, or an identity (refresh) token."""

    username: str = ""
    secret: str = field(default="", repr=False)
    identity_token: str | None = field(default=None, repr=False)

    @property
    def basic(self) -> str:
        """The value of an ``Authorization: Basic`` header."""
        return base64.b64encode(f"{self.username}:{self.secret}".encode()).decode("ascii")


Helper = Callable[[str, str], "Credential | None"]
"""Asks the credential helper of a name for the credential of a server."""


class Keyring:
    """The credentials for one registry, each looked up once: a helper is a process. May be used by several threads."""

    def __init__(
        self,
        host: str,
        fixed: Credential | None = None,
        auth_file: Path | None = None,
        token_file: Path | None = None,
        username: str = "",
    ) -> None:
        self._host = host
        self._fixed = fixed
        self._auth_file = auth_file
        self._token_file = token_file
        self._username = username
        self._found: dict[str, Credential | None] = {}
        self._asked: dict[tuple[str, str], Credential | None] = {}

    def find(self, repository: str) -> Credential | None:
        """Return the fixed credential, that of the token file, or that of `find_credential`. Raises `ConfigError`."""
        if self._fixed is not None:
            return self._fixed
        found = self._found  # `forget` puts another in its place
        if self._token_file is not None:
            repository = ""
        if repository not in found:
            found[repository] = (
                read_token_file(self._token_file, self._username)
                if self._token_file is not None
                else find_credential(self._host, repository, auth_file=self._auth_file, ask=self._ask)
            )
        return found[repository]

    def forget(self) -> None:
        """Look again the next time: somebody may have logged in anew."""
        self._found = {}
        self._asked = {}

    def _ask(self, name: str, server: str) -> Credential | None:
        asked = self._asked
        if (name, server) not in asked:
            asked[name, server] = ask_helper(name, server)
        return asked[name, server]


def forbid_core_dumps(*, private: bool) -> None:
    """Keep credentials in the memory of this process out of core files, those of its children included unless they raise the limit.

    ``private``: out of the reach of other processes of the same user, too (prctl(2), PR_SET_DUMPABLE). Not for a program that becomes the
    parent of user namespaces: its files in /proc are then root's.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    if private:
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def find_credential(
    host: str,
    repository: str = "",
    *,
    auth_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    ask: Helper | None = None,
) -> Credential | None:
    """Look up the credential for ``host[:port]`` and, more specific first, the repositories that ``repository`` lies in.

    ``auth_file`` replaces the usual places, ``ask`` the way to ask a credential helper. Raises `ConfigError` for a file or a helper
    that is there but cannot be used.
    """
    environ = os.environ if environ is None else environ
    ask = ask or partial(ask_helper, environ=environ)
    for path in [auth_file] if auth_file is not None else _usual_files(environ):
        config = _load(path, required=path == auth_file or str(path) == environ.get("REGISTRY_AUTH_FILE"))
        if config is not None:
            found = _from_config(config, host, repository, path, ask)
            if found is not None:
                return found
    return None


def read_token_file(path: Path, username: str) -> Credential:
    """Read a token from the first line of a file that only its owner may read. Raises `ConfigError`."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(65536)
    except OSError as error:
        raise ConfigError(f"the token file {path} cannot be read: {error.strerror}") from error
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(
            f"the token file {path} can be read by others (mode {stat.S_IMODE(mode):04o})",
            hint=f"run: chmod 0600 {path}",
        )
    try:
        token = text.decode("ascii").partition("\n")[0].strip()
    except UnicodeDecodeError:
        token = ""
    if not token:
        raise ConfigError(f"the token file {path} holds no token in its first line")
    return Credential(username, token)


def _usual_files(environ: Mapping[str, str]) -> Iterator[Path]:
    if environ.get("REGISTRY_AUTH_FILE"):
        yield Path(environ["REGISTRY_AUTH_FILE"])
    home = Path(environ.get("HOME") or "/nonexistent")
    yield (
        Path(environ["DOCKER_CONFIG"]) / "config.json"
        if environ.get("DOCKER_CONFIG")
        else home / ".docker" / "config.json"
    )
    if environ.get("XDG_RUNTIME_DIR"):
        yield Path(environ["XDG_RUNTIME_DIR"]) / "containers" / "auth.json"
    yield Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "containers" / "auth.json"


def _load(path: Path, *, required: bool) -> Mapping[str, Any] | None:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not required:
            return None
        raise ConfigError(f"the credentials file {path} does not exist") from error
    except OSError as error:
        if not required:
            return None
        raise ConfigError(f"the credentials file {path} cannot be read: {error.strerror}") from error
    try:
        config = json.loads(data[:MAX_FILE_BYTES])
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the credentials file {path} is no JSON") from error.with_traceback(None)
    if not isinstance(config, dict):
        raise ConfigError(f"the credentials file {path} is no JSON object")
    if mode & 0o044 and _holds_secrets(config):
        log.warning(
            "the credentials file %s can be read by others (mode %04o): chmod 0600 %s", path, mode, path
        )
    return config


def _holds_secrets(config: Mapping[str, Any]) -> bool:
    entries = config.get("auths")
    return isinstance(entries, dict) and any(isinstance(entry, dict) and entry for entry in entries.values())


def _from_config(
    config: Mapping[str, Any], host: str, repository: str, path: Path, ask: Helper
) -> Credential | None:
    helpers, auths = _object(config, "credHelpers", path), _object(config, "auths", path)
    for key in _keys(host, repository):
        helper = helpers.get(key)
        if isinstance(helper, str) and helper:
            found = ask(helper, key)
            if found is not None:
                return found
        entry = next((auths[name] for name in auths if _normal(name) == key), None)
        if isinstance(entry, dict):
            found = _from_entry(entry, key, path)
            if found is not None:
                return found
    store = config.get("credsStore")
    if isinstance(store, str) and store:
        return ask(store, host)
    return None


def _object(config: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"the credentials file {path} has a {key!r} that is no object")
    return value


def _keys(host: str, repository: str) -> Iterator[str]:
    parts = repository.split("/") if repository else []
    for length in range(len(parts), -1, -1):
        yield "/".join([host, *parts[:length]])


def _normal(key: str) -> str:
    """Bring ``https://host/v2/`` and the like to ``host``; ``host/team`` stays."""
    _, separator, rest = key.partition("://")
    key = (rest if separator else key).rstrip("/")
    host, _, path = key.partition("/")
    return host.lower() if path in {"", "v1", "v2"} else f"{host.lower()}/{path}"


def _from_entry(entry: Mapping[str, Any], key: str, path: Path) -> Credential | None:
    token = entry.get("identitytoken")
    if isinstance(token, str) and token:
        return Credential(identity_token=token)
    encoded = entry.get("auth")
    if isinstance(encoded, str) and encoded:
        try:
            text = base64.b64decode(encoded, validate=True).decode().rstrip("\0")
        except (binascii.Error, ValueError):
            text = ""
        if ":" not in text:
            raise ConfigError(
                f"the entry for {key} in the credentials file {path} cannot be decoded",
                hint="log in again to rewrite it",
            )
        user, _, secret = text.partition(":")
        return Credential(user, secret)
    username, password = entry.get("username"), entry.get("password")
    if isinstance(username, str) and isinstance(password, str) and username:
        return Credential(username, password)
    return None


def ask_helper(name: str, server: str, *, environ: Mapping[str, str] | None = None) -> Credential | None:
    """Run ``docker-credential-NAME get`` (docker-credential-helpers protocol); None if it knows no credential."""
    if not _HELPER_NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no valid name of a credential helper")
    program = f"docker-credential-{name}"
    try:
        answer = subprocess.run(
            [program, "get"],
            input=server.encode(),
            capture_output=True,
            timeout=HELPER_TIMEOUT_S,
            env=dict(os.environ if environ is None else environ),
            check=False,
        )
    except FileNotFoundError as error:
        raise ConfigError(
            f"the credential helper {program} for {server} is not installed",
            hint="install it or remove it from the configuration",
        ) from error
    except subprocess.TimeoutExpired as error:
        # The exception carries the helper's output, so it is not chained.
        raise ConfigError(
            f"the credential helper {program} did not answer within {error.timeout:g} s"
        ) from None
    except OSError as error:
        raise ConfigError(f"the credential helper {program} cannot be run: {error.strerror}") from error
    if answer.returncode != 0:
        return None
    try:
        body = json.loads(answer.stdout)
        username, secret = str(body["Username"]), str(body["Secret"])
    except (ValueError, TypeError, KeyError):
        raise ConfigError(
            f"the credential helper {program} answered something that is no credential"
        ) from None
    return Credential(identity_token=secret) if username == _TOKEN_USER else Credential(username, secret)
