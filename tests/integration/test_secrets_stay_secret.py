"""Credentials are in no argument list, log, error, answer, file of the cache or core file, whatever the registry does with them."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.daemon import running_daemon
from support.registry import PASSWORD, USER, FakeRegistry, oras_manifest
from uenvd.oci.manifest import MANIFEST_TYPE

PROGRAMS = Path(sys.executable).parent
SIGNATURE = "sig=very-secret-signature"
REPOSITORY = "deploy/demo/zen3/app/1.0"


def secrets(fake: FakeRegistry) -> list[str]:
    import base64

    encoded = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    return [PASSWORD, encoded, "very-secret-signature", *fake.tokens]


def assert_no_secrets(text: str, fake: FakeRegistry, where: str) -> None:
    for secret in secrets(fake):
        assert secret not in text, f"a secret is in {where}"


def process_view(pid: int) -> str:
    """What others on the machine may see of a process."""
    return Path(f"/proc/{pid}/cmdline").read_text() + Path(f"/proc/{pid}/environ").read_text(errors="replace")


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_the_daemon_tells_nobody(public_dir: Path, auth: str) -> None:
    with FakeRegistry(auth=auth) as fake:
        data = b"hsqs" + os.urandom(300_000)
        layer = fake.put_blob(data)
        fake.put_blob(b"{}")
        fake.put_manifest(REPOSITORY, "v1", oras_manifest(layer, len(data)), MANIFEST_TYPE)
        credentials = public_dir / "auth.json"
        credentials.write_text(json.dumps({"auths": {fake.host: {"username": USER, "password": PASSWORD}}}))
        credentials.chmod(0o600)
        registry = f'{{url: "{fake.url}", auth_file: {credentials}, timeout: 1s}}'
        with running_daemon(public_dir / "node", registry) as daemon, FakeRegistry() as storage:
            storage.put_blob(data)
            answers = [daemon.ask("resolve", uenv="app/1.0:v1%zen3")]
            assert answers[0]["ok"], answers
            target = f"{storage.url}/v2/{REPOSITORY}/blobs/{layer}?{SIGNATURE}"
            fake.spoil("/blobs/", status=307, headers={"Location": target})
            storage.spoil("/blobs/", status=403, times=1)
            answers.append(daemon.ask("pull", uenv="app/1.0:v1%zen3"))
            for spoil in (
                {"status": 401, "headers": {"WWW-Authenticate": f'Bearer realm="{fake.url}/token"'}},
                {"status": 403, "body": PASSWORD.encode()},
                {"status": 200, "body": b"no manifest"},
            ):
                fake.spoils.clear()
                fake.spoil("/manifests/|/tags/|/token", **spoil)
                answers.append(daemon.ask("resolve", uenv="app/1.0:v1%zen3", refresh=True))
            answers.append(daemon.ask("status"))
            assert daemon.process is not None
            pid = daemon.process.pid
            seen = process_view(pid)
            limit = re.search(r"Max core file size\s+(\S+)", Path(f"/proc/{pid}/limits").read_text())
            assert limit is not None and limit[1] == "0"
            # Root without the capabilities for it is refused the memory of a process that must not be dumped.
            drop = "--drop=cap_sys_ptrace,cap_perfmon,cap_sys_admin"
            reader = ["capsh", drop, "--", "-c", f"head -c 1 /proc/{pid}/maps"]
            assert subprocess.run(reader, capture_output=True, check=False).returncode != 0
        assert any("Authorization" in one.headers for one in fake.seen)
        assert any(SIGNATURE in one.path for one in storage.seen), "it was used"
        assert not any("Authorization" in one.headers for one in storage.seen)
        assert_no_secrets(json.dumps(answers), fake, "an answer")
        assert_no_secrets(daemon.log, fake, "the log")
        assert_no_secrets(seen, fake, "the command line or the environment")
        for path in (public_dir / "node").rglob("*"):
            if path.is_file():
                assert_no_secrets(path.read_bytes().decode(errors="replace"), fake, str(path))


def test_publish_tells_nobody(tmp_path: Path) -> None:
    with FakeRegistry(auth="bearer") as fake:
        (tmp_path / ".docker").mkdir()
        config = {"auths": {fake.host: {"username": USER, "password": PASSWORD}}}
        (tmp_path / ".docker/config.json").write_text(json.dumps(config))
        command = [PROGRAMS / "uenvd-publish", "list", "--system", "demo", "--registry", fake.url]
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        said = ""
        for spoil in (None, {"status": 403, "body": PASSWORD.encode()}, {"status": 500}):
            fake.spoils.clear()
            if spoil is not None:
                fake.spoil("/v2/", **spoil)
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=60
            )
            said += done.stdout + done.stderr
        assert any("Authorization" in one.headers for one in fake.seen)
        assert_no_secrets(said, fake, "the output of uenvd-publish")


@pytest.mark.parametrize("protected", [True, False])
def test_a_crash_leaves_no_core_file(tmp_path: Path, protected: bool) -> None:
    program = (
        "import os, resource, signal, sys\n"
        "from uenvd.oci.credentials import Credential, forbid_core_dumps\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_CORE)\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))\n"
        "secret = Credential('alice', 'in-memory-only')\n"
        + ("forbid_core_dumps(private=True)\n" if protected else "")
        + "os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "HOME": "/"})
    _, status = os.waitpid(process.pid, 0)
    process.returncode = -signal.SIGSEGV
    assert os.WTERMSIG(status) == signal.SIGSEGV
    if protected:
        assert not os.WCOREDUMP(status)
        assert list(tmp_path.iterdir()) == []
    elif resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        pytest.skip("this machine allows no core files at all")
