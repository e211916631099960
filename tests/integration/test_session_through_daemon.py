"""uenvctl's sessions with a daemon that serves, dies, stops and pulls slowly; as an ordinary user."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.daemon import Daemon, running_daemon
from support.fusetools import until
from support.publishing import Publisher, simple_image
from support.registry import FakeRegistry
from support.users import TestUser, ordinary_user

pytestmark = pytest.mark.usefixtures("node")

UENVCTL = str(Path(sys.executable).parent / "uenvctl")
DEADLINE_S = 30.0
CONFIG = "mounts: {linger: 100ms}\n"
M = "/user-environment"


@dataclass(frozen=True)
class Site:
    """A user and a directory that everybody can traverse."""

    user: TestUser
    directory: Path

    def popen(self, daemon: Daemon, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [UENVCTL, *arguments],
            **{
                "env": {**self.user.environ(), "UENVD_SOCKET": str(daemon.socket_path)},
                "cwd": self.directory,
                "user": self.user.uid,
                "group": self.user.gid,
                "extra_groups": list(self.user.groups),
                "stdin": subprocess.PIPE,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
                **options,
            },
        )

    def uenvctl(
        self, daemon: Daemon, *arguments: str, stdin: str = "", **options: Any
    ) -> subprocess.CompletedProcess[str]:
        with self.popen(daemon, *arguments, **options) as process:
            try:
                out, err = process.communicate(stdin, DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    if os.geteuid() != 0:
        pytest.skip("needs root: uenvd makes mounts for other users")
    directory = Path(tempfile.mkdtemp(prefix="uenvd-test-", dir="/var/tmp"))
    directory.chmod(0o755)
    try:
        with ordinary_user(directory, extra_group=True) as user:
            yield Site(user, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def daemon(site: Site) -> Iterator[Daemon]:
    registry = f"oci-layout:{site.directory / 'layout'}"
    publisher = Publisher(registry)
    app = simple_image(site.directory / "app.squashfs", "app", "hello")
    publisher.push(app, "app/1.0", "v1", "latest")
    publisher.push(simple_image(site.directory / "two.squashfs", "app", "two"), "app/2.0", "v1")
    publisher.push(simple_image(site.directory / "three.squashfs", "app", "three"), "app/2.0", "v2")
    publisher.push(
        simple_image(site.directory / "tool.squashfs", "tool", "tool", mount="/user-tools"), "tool/1", "v1"
    )
    with running_daemon(site.directory / "uenvd", registry, extra=CONFIG) as running:
        yield running


def _leases(daemon: Daemon) -> int:
    return sum(image["leases"] for image in daemon.ask("status")["images"])


def test_run(site: Site, daemon: Daemon) -> None:
    done = site.uenvctl(
        daemon,
        "run",
        "--view=default",
        "app/1.0",
        "sh",
        "-c",
        f"say; cat {M}/word; echo; echo $WORD; env | grep ^UENV_",
    )
    assert done.returncode == 0, done.stderr
    said, word, variable, *variables = done.stdout.splitlines()
    assert (said, word, variable) == ("hello", "hello", "hello")
    environ = dict(line.split("=", 1) for line in variables)
    digest = environ["UENV_DIGEST"]
    assert digest.startswith("sha256:")
    assert environ["UENV_MOUNT_LIST"] == f"{digest}:{M}"
    assert environ["UENV_VIEW"] == f"{M}:app:default"
    assert environ["UENV_LABEL"].startswith("app/1.0:")
    assert os.listdir(M) == []


def test_groups_of_the_user_are_mapped(site: Site, daemon: Daemon) -> None:
    own = site.user.home / "data"
    own.touch()
    os.chown(own, site.user.uid, site.user.gid)
    group = site.user.groups[0]
    for uenv in ("app/1.0", "./app.squashfs"):
        os.chown(own, site.user.uid, site.user.gid)
        done = site.uenvctl(
            daemon, "run", uenv, "sh", "-c", f"id -G; chgrp {group} {own} && stat -c %g {own}"
        )
        assert done.returncode == 0, done.stderr
        groups, changed = done.stdout.splitlines()
        assert set(map(int, groups.split())) == {site.user.gid, group}
        assert int(changed) == group


def test_the_lease_lasts_as_long_as_the_session(site: Site, daemon: Daemon) -> None:
    with site.popen(daemon, "run", "app/1.0", "sh", "-c", "echo ready; read line; exit 5") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert _leases(daemon) == 1
        process.communicate("go\n", DEADLINE_S)
    assert process.returncode == 5
    until(lambda: not daemon.ask("status")["images"], "the image is let go")


def test_few_files_may_be_open(site: Site, daemon: Daemon) -> None:
    command = ["sh", "-c", f"ulimit -n 40; exec {UENVCTL} run app/1.0 cat {M}/word"]
    options = {
        "env": {**site.user.environ(), "UENVD_SOCKET": str(daemon.socket_path)},
        "user": site.user.uid,
        "group": site.user.gid,
    }
    done = subprocess.run(
        command, **options, extra_groups=[], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert (done.stdout, done.stderr) == ("hello", "")


def test_the_command_is_killed(site: Site, daemon: Daemon) -> None:
    with site.popen(daemon, "run", "app/1.0", "sh", "-c", "echo ready; exec sleep 60") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    until(lambda: not daemon.ask("status")["images"], "the image is let go")


def test_start_and_status(site: Site, daemon: Daemon) -> None:
    done = site.uenvctl(
        daemon,
        "start",
        "-v",
        "default",
        "app/1.0",
        stdin=f"say\n{UENVCTL} status\n{UENVCTL} run tool/1 true\nexit $?\n",
    )
    assert done.returncode == 93
    said, session, views, uenvd = done.stdout.splitlines()[:4]
    assert said == "hello"
    assert session.split()[0] == "session:"
    assert session.split()[1].startswith("app/1.0:")
    assert f" at {M} (sha256:" in session
    assert views.split() == ["views:", "app:default"]
    assert "system demo" in uenvd
    assert "inside a session" in done.stderr


def test_images_of_both_kinds_together(site: Site, daemon: Daemon) -> None:
    command = (
        "echo $WORD $PLAIN; cat /user-tools/word; echo; cat /user-environment/word; echo; echo $UENV_VIEW"
    )
    done = site.uenvctl(
        daemon, "run", "--view=tool:default,app:plain", "tool/1,./app.squashfs", "sh", "-c", command
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "tool yes",
        "tool",
        "hello",
        f"{M}:app:plain,/user-tools:tool:default",
    ]


def test_two_labels(site: Site, daemon: Daemon) -> None:
    done = site.uenvctl(
        daemon,
        "run",
        "app/1.0:/user-tools,tool/1:/user-environment",
        "sh",
        "-c",
        "cat /user-tools/word /user-environment/word",
    )
    assert done.stdout == "hellotool", done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["run", "nosuch/1", "true"], 68, "no image is called 'nosuch/1'"),
        (["run", "app/2.0", "true"], 69, "different images"),
        (["run", "--view=zip", "app/1.0", "true"], 70, "available views: app:default, app:plain"),
        (["run", "app/1.0,tool/1:/user-environment", "true"], 82, "/user-environment"),
        (["run", "app/1.0,./app.squashfs", "true"], 82, "both want to be mounted at /user-environment"),
        (["run", "--view=default", "tool/1,./app.squashfs", "true"], 70, "ambiguous: a file and tool/1:v1"),
        (["run", "app/1.0:/no/such", "true"], 81, "no such directory"),
        (["image", "inspect", "nosuch"], 68, "no image is called"),
        (["image", "pull", "nosuch"], 68, "no image is called"),
    ],
)  # fmt: skip
def test_errors(site: Site, daemon: Daemon, arguments: list[str], status: int, says: str) -> None:
    done = site.uenvctl(daemon, *arguments)
    assert done.returncode == status, done.stderr
    assert says in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_catalogue(site: Site, daemon: Daemon) -> None:
    rows = site.uenvctl(daemon, "image", "find", "app", "--no-header").stdout.splitlines()
    assert [row.split()[:3] for row in rows] == [
        ["app/1.0:latest", "zen3", "demo"],
        ["app/1.0:v1", "zen3", "demo"],
        ["app/2.0:v1", "zen3", "demo"],
        ["app/2.0:v2", "zen3", "demo"],
    ]
    pulled = site.uenvctl(daemon, "image", "pull", "--json", "app/2.0:v2")
    digest = json.loads(pulled.stdout)["images"][0]["digest"]
    here = json.loads(site.uenvctl(daemon, "image", "ls", "--here", "--json", "app/2.0").stdout)["records"]
    assert [(one["digest"], one["cached"]) for one in here] == [(digest, True)]
    shown = site.uenvctl(daemon, "image", "inspect", "app/2.0:v2").stdout
    assert digest in shown
    assert "  default  the view default" in shown
    assert site.uenvctl(daemon, "run", f"app@{digest}", "cat", f"{M}/word").stdout == "three"


def test_a_slow_pull_shows_progress_and_ctrl_c_ends_it(site: Site) -> None:
    image = simple_image(site.directory / "big.squashfs", "big", "big", megabytes=4)
    with FakeRegistry() as registry:
        Publisher(registry.url).push(image, "big/1", "v1")
        registry.spoil("/blobs/", bytes_per_s=1 << 20)
        with running_daemon(site.directory / "slow", registry.url, extra=CONFIG) as daemon:
            with site.popen(daemon, "run", "big/1", "cat", f"{M}/word") as process:
                assert process.stderr is not None
                line = process.stderr.readline()
                assert line.startswith("uenvctl: ")
                assert "MB" in line
                process.send_signal(signal.SIGINT)
                start = time.monotonic()
                process.wait(DEADLINE_S)
                assert time.monotonic() - start < 2.0
                assert process.returncode == -signal.SIGINT
            registry.spoils.clear()
            assert site.uenvctl(daemon, "run", "big/1", "cat", f"{M}/word").stdout == "big"


def test_a_stopped_daemon(site: Site) -> None:
    with running_daemon(
        site.directory / "stopped", f"oci-layout:{site.directory / 'layout'}", extra=CONFIG
    ) as daemon:
        daemon.signal(signal.SIGSTOP)
        try:
            start = time.monotonic()
            done = site.uenvctl(daemon, "run", "app/1.0", "true")
            assert time.monotonic() - start < 6.0
            assert done.returncode == 79, done.stderr
            start = time.monotonic()
            done = site.uenvctl(daemon, "run", "./app.squashfs", "cat", f"{M}/word")
            assert time.monotonic() - start < 6.0
            assert (done.returncode, done.stdout) == (0, "hello"), done.stderr
        finally:
            daemon.signal(signal.SIGCONT)


def test_the_daemon_is_killed_under_a_session(site: Site) -> None:
    layout = f"oci-layout:{site.directory / 'layout'}"
    with running_daemon(site.directory / "killed", layout, extra=CONFIG) as daemon:
        with site.popen(
            daemon, "run", "app/1.0", "sh", "-c", f"echo ready; read line; cat {M}/word"
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            daemon.kill()
            out, err = process.communicate("go\n", DEADLINE_S)
        assert (out, err, process.returncode) == ("hello", "", 0)
