"""Scoped bearer tokens: what a registry of a site, a forge or a cloud asks for."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.registry import PASSWORD, USER, FakeRegistry, make_certificate, oras_manifest
from uenvd.errors import RegistryDenied, RegistryError, RegistryUnreachable
from uenvd.oci.credentials import Credential
from uenvd.oci.manifest import MANIFEST_TYPE, Descriptor, digest_of
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import Remote, never, open_remote


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry(auth="bearer") as registry:
        blob = registry.put_blob(b"x")
        for name in ("public/app", *(f"private/app{number}" for number in range(6))):
            registry.put_manifest(name, "v1", oras_manifest(blob, 1), MANIFEST_TYPE)
        yield registry


def client(fake: FakeRegistry, credential: Credential | None = None) -> Remote:
    return open_remote(parse_registry(fake.url), credential=credential)


@pytest.fixture(autouse=True)
def no_credentials_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "DOCKER_CONFIG", "REGISTRY_AUTH_FILE"):
        monkeypatch.delenv(name, raising=False)


ALICE = Credential(USER, PASSWORD)


def test_anonymous_pulls_and_refused_ones(fake: FakeRegistry) -> None:
    remote = client(fake)
    assert remote.tags("public/app") == ["v1"]
    with pytest.raises(RegistryDenied, match="anonymous"):
        remote.tags("private/app0")
    assert remote.manifest("public/app", "v1").digest


def test_push_and_several_repositories_with_one_client(fake: FakeRegistry, tmp_path: Path) -> None:
    remote = client(fake, ALICE)
    data = os.urandom(500_000)
    (tmp_path / "file").write_bytes(data)
    for number in range(3):
        repository = f"private/new{number}"
        assert remote.tags(repository) == []
        remote.push_blob(repository, tmp_path / "file", Descriptor("x", digest_of(data), len(data)))
        remote.push_bytes(repository, b"{}", "x")
        remote.push_manifest(repository, "v1", oras_manifest(digest_of(data), len(data)))
        assert remote.tags(repository) == ["v1"]
        layer = Descriptor("x", digest_of(data), len(data))
        assert b"".join(remote.stream_blob(repository, layer, 0, never)) == data
    assert fake.blobs[digest_of(data)] == data
    assert "private/new0" in remote.repositories("private/")


def test_a_token_is_asked_for_once(fake: FakeRegistry) -> None:
    remote = client(fake, ALICE)
    for _ in range(5):
        remote.tags("private/app0")
    assert fake.count("GET", "^/token") == 1
    assert fake.count("GET", "/tags/") == 6


def test_tokens_that_expire_or_are_withdrawn(fake: FakeRegistry) -> None:
    remote = client(fake, ALICE)
    remote.tags("private/app0")
    fake.tokens.clear()
    assert remote.tags("private/app0") == ["v1"]
    assert fake.count("GET", "^/token") == 2


def test_a_body_is_sent_again_after_the_challenge(fake: FakeRegistry, tmp_path: Path) -> None:
    """The token is withdrawn between POST and PUT: the PUT is answered 401 after its body was sent."""
    remote = client(fake, ALICE)
    data = os.urandom(700_000)
    (tmp_path / "file").write_bytes(data)
    challenge = (
        f'Bearer realm="{fake.url}/token",service="test-registry",scope="repository:private/app0:pull,push"'
    )
    fake.spoil("/uploads/", method="PUT", status=401, headers={"WWW-Authenticate": challenge}, times=1)
    remote.push_blob("private/app0", tmp_path / "file", Descriptor("x", digest_of(data), len(data)))
    assert fake.blobs[digest_of(data)] == data
    assert fake.count("PUT", "/uploads/") == 2
    assert fake.count("POST", "/uploads/") == 2, "401, then 202"


def test_wrong_credentials_are_one_error_without_the_password(fake: FakeRegistry) -> None:
    remote = client(fake, Credential(USER, "hunter2"))
    with pytest.raises(RegistryDenied, match="credentials") as caught:
        remote.tags("private/app0")
    assert "hunter2" not in str(caught.value) + caught.value.hint


def test_a_token_that_does_not_help_is_one_error(fake: FakeRegistry) -> None:
    fake.spoil("/token", status=200, body=b'{"token":"useless"}')
    with pytest.raises(RegistryDenied):
        client(fake, ALICE).tags("private/app0")
    assert fake.count("GET", "^/token") <= 2


def test_identity_tokens(fake: FakeRegistry) -> None:
    fake.identity_token = "refresh-me"
    assert client(fake, Credential(identity_token="refresh-me")).tags("private/app0") == ["v1"]
    with pytest.raises(RegistryDenied) as caught:
        client(fake, Credential(identity_token="hunter2")).tags("private/app0")
    assert "hunter2" not in str(caught.value)


def test_threads_share_a_client(fake: FakeRegistry) -> None:
    remote = client(fake, ALICE)
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(12):
                repository = f"private/app{(number + turn) % 6}"
                assert remote.manifest(repository, "v1").digest
                if turn % 3 == 0:
                    remote.push_bytes(repository, f"{number} {turn}".encode(), "x")
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert problems == []


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"status": 503}, RegistryUnreachable),
        ({"status": 200, "body": b"<html>"}, Exception),
        ({"status": 200, "body": b'{"token":"a\\nX-Evil: 1"}'}, RegistryError),
        ({"status": 200, "body": b'{"token":5}'}, RegistryError),
        ({"status": 200, "body": b"{}"}, RegistryError),
        ({"status": 404}, RegistryError),
        ({"status": 307, "headers": {"Location": "http://127.0.0.1:1/"}}, RegistryError),
        ({"silent": True}, RegistryUnreachable),
    ],
)
def test_token_servers_that_fail(fake: FakeRegistry, how: dict[str, object], error: type[Exception]) -> None:
    fake.spoil("/token", **how)
    remote = client(fake, ALICE)
    with remote.deadline(0.6), pytest.raises(error):
        remote.tags("private/app0")


@pytest.mark.parametrize(
    "challenge",
    ["Bearer", 'Bearer realm=""', 'Bearer realm="file:///etc/passwd"', "Negotiate", "", "Basic x"],
)
def test_challenges_that_cannot_be_answered(fake: FakeRegistry, challenge: str) -> None:
    fake.spoil("/v2/", status=401, headers={"WWW-Authenticate": challenge})
    with pytest.raises(RegistryError if "realm" in challenge or challenge == "Bearer" else RegistryDenied):
        client(fake, ALICE).tags("private/app0")


def test_credentials_of_a_tls_registry_go_to_no_plain_token_server(
    tmp_path: Path, fake: FakeRegistry
) -> None:
    certificate = make_certificate(tmp_path)
    with FakeRegistry(tls=certificate) as front:
        front.spoil(
            "/v2/", status=401, headers={"WWW-Authenticate": f'Bearer realm="{fake.url}/token",service="s"'}
        )
        remote = open_remote(parse_registry(front.url), credential=ALICE, ca_file=certificate[0])
        with pytest.raises(RegistryDenied, match="without TLS"):
            remote.tags("private/app0")
    assert fake.seen == []


def test_a_new_login_is_noticed_without_a_restart(fake: FakeRegistry, tmp_path: Path) -> None:
    config = tmp_path / ".docker/config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"auths": {fake.host: {"username": USER, "password": "old"}}}))
    remote = client(fake)
    with pytest.raises(RegistryDenied):
        remote.tags("private/app0")
    config.write_text(json.dumps({"auths": {fake.host: {"username": USER, "password": PASSWORD}}}))
    assert remote.tags("private/app0") == ["v1"]


def test_repositories_may_have_credentials_of_their_own(fake: FakeRegistry, tmp_path: Path) -> None:
    config = tmp_path / ".docker/config.json"
    config.parent.mkdir()
    auths = {
        f"{fake.host}/private/app0": {"username": USER, "password": PASSWORD},
        fake.host: {"username": "bob", "password": "x"},
    }
    config.write_text(json.dumps({"auths": auths}))
    remote = client(fake)
    assert remote.tags("private/app0") == ["v1"]
    with pytest.raises(RegistryDenied):
        remote.tags("private/app1")
    assert remote.tags("private/app0") == ["v1"]


def test_a_credential_helper_is_asked_once(
    fake: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = tmp_path / "bin/docker-credential-test"
    helper.parent.mkdir()
    answer = json.dumps({"Username": USER, "Secret": PASSWORD})
    helper.write_text(f"#!/bin/sh\necho asked >> {tmp_path}/asked\necho '{answer}'\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{helper.parent}:{os.environ['PATH']}")
    (tmp_path / ".docker").mkdir()
    (tmp_path / ".docker/config.json").write_text('{"credsStore":"test"}')
    remote = client(fake)
    for number in range(6):
        assert remote.tags(f"private/app{number}") == ["v1"]
    assert (tmp_path / "asked").read_text() == "asked\n"
