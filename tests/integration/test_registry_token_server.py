"""A real registry behind a token server with real signatures: scopes are what they should be, and tokens may expire at any moment."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.registry import PASSWORD, USER, RealRegistry, docker_registry, oras_manifest
from support.tokenserver import TokenServer
from uenvd.cache.pull import pull_blob
from uenvd.cache.store import Store
from uenvd.cache.transfer import Tuning
from uenvd.errors import RegistryDenied
from uenvd.oci.credentials import Credential
from uenvd.oci.manifest import EMPTY_BLOB, EMPTY_TYPE, Descriptor, digest_of
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import Remote, never, no_progress, open_remote

DATA = os.urandom(3_000_000)
LAYER = Descriptor("application/x-squashfs", digest_of(DATA), len(DATA))


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[TokenServer]:
    with TokenServer(tmp_path / "tokens") as server:
        yield server


@pytest.fixture
def registry(tmp_path: Path, tokens: TokenServer) -> Iterator[RealRegistry]:
    with docker_registry(tmp_path / "registry", auth=tokens.auth) as running:
        yield running


@pytest.fixture(autouse=True)
def no_credentials_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "DOCKER_CONFIG", "REGISTRY_AUTH_FILE"):
        monkeypatch.delenv(name, raising=False)


def push(remote: Remote, repository: str, file: Path) -> None:
    file.write_bytes(DATA)
    remote.push_blob(repository, file, LAYER)
    remote.push_bytes(repository, EMPTY_BLOB, EMPTY_TYPE)
    remote.push_manifest(repository, "v1", oras_manifest(LAYER.digest, len(DATA)))


def test_push_pull_and_expiry(registry: RealRegistry, tokens: TokenServer, tmp_path: Path) -> None:
    address = parse_registry(registry.url)
    alice = open_remote(address, credential=Credential(USER, PASSWORD))
    for repository in ("public/app", "private/app"):
        push(alice, repository, tmp_path / "file")
    # The registry puts the actions into any order.
    assert {"".join(sorted(scope)) for scope in tokens.asked} <= {
        "".join(sorted(f"repository:{name}/app:{actions}"))
        for name in ("public", "private")
        for actions in ("pull", "pull,push")
    }
    store = Store(tmp_path / "cache")
    store.prepare()
    # Each piece meets a token that has just expired: the registry itself allows a minute of clock skew, so the client must not wait for it.
    tokens.lifetime_s = 1
    before = len(tokens.asked)
    fresh = open_remote(address, credential=Credential(USER, PASSWORD))
    tuning = Tuning(connections=2, piece_bytes=1 << 20)
    pull_blob(fresh, "private/app", LAYER, store, progress=no_progress, cancelled=never, tuning=tuning)
    assert store.has(LAYER.digest)
    assert len(tokens.asked) > before
    anonymous = open_remote(address)
    assert anonymous.tags("public/app") == ["v1"]
    with pytest.raises(RegistryDenied):
        anonymous.tags("private/app")
    with pytest.raises(RegistryDenied):
        open_remote(address, credential=Credential(USER, "wrong")).tags("private/app")
    for remote in (alice, fresh, anonymous):
        remote.close()


def test_the_token_in_a_file(registry: RealRegistry, tmp_path: Path) -> None:
    address = parse_registry(registry.url)
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\n")
    file.chmod(0o600)
    remote = open_remote(address, token_file=file, username=USER)
    push(remote, "private/app", tmp_path / "file")
    assert remote.tags("private/app") == ["v1"]
    file.write_text("outdated\n")
    rotated = open_remote(address, token_file=file, username=USER)
    with pytest.raises(RegistryDenied):
        rotated.tags("private/app")
    file.write_text(f"{PASSWORD}\n")
    assert rotated.tags("private/app") == ["v1"], "a new token needs no restart"
    for each in (remote, rotated):
        each.close()
