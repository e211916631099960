import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from uenvd.errors import ConfigError
from uenvd.oci.credentials import Credential, find_credential, read_token_file

HOST = "registry.example.org:5000"


def encoded(user: str, secret: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{secret}".encode()).decode()}


def write(path: Path, body: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body))
    return path


def helper(directory: Path, name: str, script: str) -> dict[str, str]:
    directory.mkdir(exist_ok=True)
    program = directory / f"docker-credential-{name}"
    program.write_text("#!/bin/sh\n" + script)
    program.chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


def test_the_usual_files_in_their_order(tmp_path: Path) -> None:
    home = tmp_path / "home"
    env = {"HOME": str(home)}
    assert find_credential(HOST, environ=env) is None
    write(home / ".config/containers/auth.json", {"auths": {HOST: encoded("xdg-config", "p")}})
    assert find_credential(HOST, environ=env) == Credential("xdg-config", "p")
    env["XDG_RUNTIME_DIR"] = str(tmp_path / "run")
    write(tmp_path / "run/containers/auth.json", {"auths": {HOST: encoded("runtime", "p")}})
    assert find_credential(HOST, environ=env) == Credential("runtime", "p")
    write(home / ".docker/config.json", {"auths": {HOST: encoded("home", "p")}})
    assert find_credential(HOST, environ=env) == Credential("home", "p")
    env["DOCKER_CONFIG"] = str(tmp_path / "docker")
    write(tmp_path / "docker/config.json", {"auths": {HOST: encoded("docker-config", "p")}})
    assert find_credential(HOST, environ=env) == Credential("docker-config", "p")
    env["REGISTRY_AUTH_FILE"] = str(
        write(tmp_path / "auth.json", {"auths": {HOST: encoded("auth-file", "p")}})
    )
    assert find_credential(HOST, environ=env) == Credential("auth-file", "p")
    explicit = write(tmp_path / "explicit.json", {"auths": {HOST: encoded("explicit", "p:with:colons")}})
    assert find_credential(HOST, auth_file=explicit, environ=env) == Credential("explicit", "p:with:colons")


@pytest.mark.parametrize("key", [f"https://{HOST}/v2/", f"http://{HOST}", f"{HOST}/v1/", HOST.upper()])
def test_keys_may_have_a_scheme_and_a_version(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "a.json", {"auths": {key: encoded("alice", "p")}})
    assert find_credential(HOST, "team/app", auth_file=path) == Credential("alice", "p")


def test_the_most_specific_repository_wins(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.json",
        {
            "auths": {
                HOST: encoded("host", "p"),
                f"{HOST}/team": encoded("team", "p"),
                f"{HOST}/team/app": encoded("app", "p"),
            }
        },
    )
    assert find_credential(HOST, "team/app/x", auth_file=path) == Credential("app", "p")
    assert find_credential(HOST, "team/other", auth_file=path) == Credential("team", "p")
    assert find_credential(HOST, "teams", auth_file=path) == Credential("host", "p")
    assert find_credential("other.example.org", "team", auth_file=path) is None


def test_other_forms_of_an_entry(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.json",
        {"auths": {"a": {"username": "u", "password": "p"}, "b": {"identitytoken": "t"}, "c": {}}},
    )
    assert find_credential("a", auth_file=path) == Credential("u", "p")
    assert find_credential("b", auth_file=path) == Credential(identity_token="t")
    assert find_credential("c", auth_file=path) is None


def test_credential_helpers(tmp_path: Path) -> None:
    env = helper(
        tmp_path / "bin",
        "test",
        'read server\n[ "$server" = known.example.org ] || exit 1\necho \'{"ServerURL":"x","Username":"bob","Secret":"from-helper"}\'\n',
    )
    path = write(
        tmp_path / "a.json", {"credHelpers": {"known.example.org": "test", "unknown.example.org": "test"}}
    )
    assert find_credential("known.example.org", auth_file=path, environ=env) == Credential(
        "bob", "from-helper"
    )
    assert find_credential("unknown.example.org", auth_file=path, environ=env) is None
    path = write(tmp_path / "b.json", {"auths": {"known.example.org": {}}, "credsStore": "test"})
    assert find_credential("known.example.org", auth_file=path, environ=env) == Credential(
        "bob", "from-helper"
    )


def test_a_helper_may_give_an_identity_token(tmp_path: Path) -> None:
    env = helper(tmp_path / "bin", "test", 'echo \'{"Username":"<token>","Secret":"refresh"}\'\n')
    path = write(tmp_path / "a.json", {"credsStore": "test"})
    assert find_credential("h", auth_file=path, environ=env) == Credential(identity_token="refresh")


@pytest.mark.parametrize(
    ("name", "script", "says"),
    [
        ("absent", None, "not installed"),
        ("broken", "echo 'hunter2 is no json'\n", "no credential"),
        ("../evil", None, "no valid name"),
    ],
)
def test_helpers_that_fail_are_named_without_their_output(
    tmp_path: Path, name: str, script: str | None, says: str
) -> None:
    env = helper(tmp_path / "bin", name, script) if script else {"PATH": str(tmp_path)}
    path = write(tmp_path / "a.json", {"credsStore": name})
    with pytest.raises(ConfigError, match=says) as caught:
        find_credential("h", auth_file=path, environ=env)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["no json", "[]", '{"auths":[]}', '{"auths":{"h":{"auth":"hunter2!"}}}', "[" * 100_000]
)
def test_damaged_files_are_named_without_their_content(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)) as caught:
        find_credential("h", auth_file=path)
    assert "hunter2" not in str(caught.value)


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        find_credential("h", auth_file=tmp_path / "none")
    with pytest.raises(ConfigError):
        find_credential("h", environ={"REGISTRY_AUTH_FILE": str(tmp_path / "none"), "HOME": str(tmp_path)})


def test_secrets_are_not_shown() -> None:
    shown = repr(Credential("alice", "hunter2", identity_token="hunter3"))
    assert "alice" in shown and "hunter" not in shown


def test_token_files(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("the-token\nsecond line\n")
    path.chmod(0o600)
    assert read_token_file(path, "alice") == Credential("alice", "the-token")
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="0640") as caught:
        read_token_file(path, "alice")
    assert "chmod 0600" in caught.value.hint and "the-token" not in str(caught.value)
    path.chmod(0o600)
    for content in (b"", b"\n", b"\xff\xfe\n"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="no token"):
            read_token_file(path, "alice")
    with pytest.raises(ConfigError):
        read_token_file(tmp_path / "none", "alice")
