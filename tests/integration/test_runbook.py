"""docs/operations.md: registry down, cache full, node sick. Each step is done as the page says, and users see what it says they see."""

from __future__ import annotations

import contextlib
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

import pytest

from support.daemon import Daemon, running_daemon
from support.fusetools import until
from support.publishing import Publisher, simple_image
from support.registry import RealRegistry, docker_registry
from support.users import TestUser, ordinary_user

pytestmark = pytest.mark.usefixtures("node")

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
PROGRAMS = Path(sys.executable).parent
MOUNT = "/user-environment"
DISK_BYTES = 14 << 20
IMAGES = {"small": 1, "first": 6, "second": 6, "third": 6}
"""Name -> MiB: two of the big ones fit on the disk."""

Result = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Host:
    """A node whose cache is on a small disk of its own."""

    daemon: Daemon
    registry: RealRegistry
    user: TestUser
    disk: Path

    def _options(self, root: bool) -> dict[str, object]:
        who = {} if root else {"user": self.user.uid, "group": self.user.gid, "extra_groups": []}
        environ = {
            **self.user.environ(),
            "PATH": f"{PROGRAMS}:{os.defpath}",
            "UENVD_SOCKET": str(self.daemon.socket_path),
        }
        return {"env": environ, "cwd": "/", "text": True, **who}

    def run(self, command: str, *, root: bool = False) -> Result:
        """Type a command line."""
        return subprocess.run(
            ["bash", "-c", command],
            capture_output=True,
            check=False,
            timeout=60,
            stdin=subprocess.DEVNULL,
            **self._options(root),  # type: ignore[call-overload]
        )

    def admin(self, command: str) -> Result:
        return self.run(command, root=True)

    def use(self, label: str) -> Result:
        """Be a user who needs an image."""
        return self.run(f"uenvctl run {label} -- cat {MOUNT}/word")

    @contextlib.contextmanager
    def job(self, label: str) -> Iterator[subprocess.Popen[str]]:
        """Be a program that runs on in an image until it gets a line, and then reads of it."""
        script = f"echo runs; read line; cat {MOUNT}/word"
        with subprocess.Popen(
            [PROGRAMS / "uenvctl", "run", label, "--", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            **self._options(False),  # type: ignore[call-overload]
        ) as running:
            try:
                assert running.stdout.readline() == "runs\n"
                yield running
            finally:
                running.kill()


@contextlib.contextmanager
def stopped(registry: RealRegistry) -> Iterator[None]:
    """Let a registry accept connections and answer nothing."""
    registry.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        registry.process.send_signal(signal.SIGCONT)


def documented(*words: str) -> None:
    """What an administrator looks for is on the page."""
    for one in words:
        assert one in PAGE, one


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    if os.geteuid() != 0:
        pytest.skip("needs root: makes a disk and an ordinary user")
    directory = Path(tempfile.mkdtemp(prefix="uenvd-test-", dir="/var/tmp"))
    directory.chmod(0o755)
    disk = directory / "disk"
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", disk], check=True)
        with docker_registry(directory / "registry") as registry, ordinary_user(directory) as user:
            publisher = Publisher(registry.url)
            for name, size in IMAGES.items():
                image = simple_image(directory / f"{name}.squashfs", name, name, megabytes=size)
                publisher.push(image, f"{name}/1", "v1")
            settings = f"cache: {{local: {disk}/cache}}\nmounts: {{linger: 100ms}}\nresolve: {{ttl: 50ms}}\n"
            with running_daemon(directory / "uenvd", registry.url, extra=settings) as daemon:
                yield Host(daemon, registry, user, disk)
    finally:
        subprocess.run(["umount", "-l", disk], check=False)
        shutil.rmtree(directory, ignore_errors=True)


def test_the_registry_is_down(host: Host) -> None:
    assert host.use("small/1").stdout == "small"
    with host.job("small/1") as running, stopped(host.registry):
        known = host.use("small/1")
        assert (known.returncode, known.stdout) == (0, "small"), known.stderr
        assert "did not answer in time" in known.stderr and "using what it said" in known.stderr
        documented("did not answer in time", "using what it said")
        begin = time.monotonic()
        unknown = host.use("first/1")
        assert (unknown.returncode, unknown.stdout) == (71, "")
        assert time.monotonic() - begin < 3.5
        doctor = host.run("uenvctl doctor")
        assert "wrong registry: " in doctor.stdout
        counted = host.admin("uenvctl status --metrics | grep registry_questions").stdout
        assert 'result="registry-unreachable"' in counted
        assert host.admin("uenvctl doctor --node").returncode == 0
        documented("`uenvctl doctor --node` stays well", "grep registry_questions", "(status 71)")
        assert running.communicate("\n", timeout=20)[0] == "small"
    begin = time.monotonic()
    until(lambda: host.use("first/1").returncode == 0, "it asks again by itself", 10)
    assert time.monotonic() - begin < 6, "some 3 s, and a slow machine"


def test_the_cache_is_full(host: Host) -> None:
    assert host.admin("uenvctl image pull first/1 && uenvctl image pull second/1").returncode == 0
    assert host.daemon.ask("status")["cache"]["free_bytes"] < 2 << 20
    assert host.admin("uenvctl doctor --node").returncode == 0, "of what is here much may go"
    assert host.run("uenvctl image evict second/1").returncode == 84, "root's affair"
    with host.job("first/1") as running, host.job("second/1"):
        full = host.use("third/1")
        assert full.returncode == 88, full.stderr
        assert "no room left: " in full.stderr
        documented("`no room left: …` (`storage-full`, status 88)")
        assert host.use("second/1").stdout == "second", "what is here is used"
        here = host.admin("uenvctl image ls --here --no-header").stdout
        assert {line.partition(":")[0] for line in here.splitlines()} == {"first/1", "second/1"}
        other = host.disk / "of somebody else"
        other.write_bytes(bytes(max(0, shutil.disk_usage(host.disk).free - 200_000)))
        sick = host.admin("uenvctl doctor --node")
        other.unlink()
        assert (sick.returncode, sick.stdout.startswith("uenvd FAIL: no room in ")) == (1, True)
        used = host.admin("uenvctl image evict first/1")
        assert used.returncode == 89
        assert "have it mounted: 1;" in used.stderr
    assert running.poll() is not None
    assert host.admin("uenvctl image pin second/1").returncode == 0
    pinned = host.admin("uenvctl image evict second/1")
    assert pinned.returncode == 89
    assert "uenvctl image unpin" in pinned.stderr
    assert host.use("third/1").stdout == "third", "the first one went by itself"
    here = host.admin("uenvctl image ls --here --no-header").stdout
    assert {line.partition(":")[0] for line in here.splitlines()} == {"second/1", "third/1"}
    assert host.admin("uenvctl image unpin second/1 && uenvctl image evict second/1").returncode == 0


def test_the_node_is_sick(host: Host) -> None:
    with host.job("small/1") as running:
        host.daemon.signal(signal.SIGSTOP)
        begin = time.monotonic()
        hangs = host.admin("uenvctl doctor --node")
        assert (hangs.returncode, hangs.stdout.count("\n")) == (1, 1)
        assert time.monotonic() - begin < 4
        host.daemon.signal(signal.SIGCONT)
        host.daemon.kill()
        gone = host.use("small/1")
        assert gone.returncode == 78
        assert "uenvd does not answer on this node" in gone.stderr
        assert host.admin("uenvctl doctor --node").returncode == 1
        documented("`uenvd does not answer on this node` (status 78)")
        host.daemon.start()
        assert host.admin("uenvctl doctor --node").returncode == 0
        assert running.communicate("\n", timeout=20)[0] == "small"


def test_programs_behave_oddly(host: Host) -> None:
    assert host.use("small/1").stdout == "small"
    until(lambda: not host.daemon.ask("status")["images"], "nobody uses it")
    blobs = sorted(
        (host.disk / "cache/blobs/sha256").iterdir(),
        key=lambda path: path.stat().st_size,
    )
    (damaged,) = [path for path in blobs if 1 << 20 <= path.stat().st_size < 2 << 20]
    with damaged.open("r+b") as file:
        file.seek(500_000)
        file.write(b"oddly")
    config = host.daemon.workdir / "config.yaml"
    scrub = host.admin(f"uenvd --config {config} scrub")
    assert scrub.returncode == 1
    assert damaged.name in scrub.stdout
    assert host.admin(f"uenvd --config {config} scrub").returncode == 0
    assert host.use("small/1").stdout == "small", "it was pulled anew"
