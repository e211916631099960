"""Every way to fail that a user or an admin meets: one clear message, what to do, an exit status of its own, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import Daemon, running_daemon
from support.fusetools import NOBODY
from support.publishing import Publisher, simple_image
from support.registry import FakeRegistry
from uenvd import errors
from uenvd.errors import UenvError

pytestmark = pytest.mark.usefixtures("node")

BIN = Path(sys.executable).parent
MOUNT_POINT = "/user-environment"


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        yield registry


@pytest.fixture
def daemon(public_dir: Path, fake: FakeRegistry) -> Iterator[Daemon]:
    publisher = Publisher(fake.url)
    publisher.push(simple_image(public_dir / "1.squashfs", "app", "one"), "app/1.0", "v1")
    publisher.push(simple_image(public_dir / "2.squashfs", "app", "two"), "app/2.0", "v1")
    publisher.push(
        simple_image(public_dir / "3.squashfs", "lost", "x", mount="/no/such/place"), "lost/1", "v1"
    )
    text = public_dir / "text.squashfs"
    text.write_text("no image\n" * 100)
    publisher.push(text, "text/1", "v1", stock=True)
    with running_daemon(public_dir / "uenvd", fake.url, extra="resolve: {ttl: 0s}\n") as running:
        yield running


def uenvctl(socket: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "uenvctl", *args],
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "UENVD_SOCKET": str(socket)},
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=60,
        check=False,
    )


def expect(
    done: subprocess.CompletedProcess[str], error: type[UenvError], *words: str, hint: bool = True
) -> None:
    assert done.returncode == error.exit_status, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr, done.stderr
    if hint:
        assert "hint: " in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) <= 8


def test_unknown_label(daemon: Daemon) -> None:
    expect(
        uenvctl(daemon.socket_path, "run", "app/3.0", "true"), errors.UnknownLabel, "app/3.0", "app/2.0:v1"
    )


def test_ambiguous_label(daemon: Daemon) -> None:
    expect(
        uenvctl(daemon.socket_path, "run", "app", "true"), errors.AmbiguousLabel, "app/1.0:v1", "app/2.0:v1"
    )


def test_label_syntax(daemon: Daemon) -> None:
    expect(uenvctl(daemon.socket_path, "run", "app/1.0:", "true"), errors.LabelError, "^")


def test_unknown_view(daemon: Daemon) -> None:
    expect(
        uenvctl(daemon.socket_path, "run", "--view=nice", "app/1.0", "true"),
        errors.UnknownView,
        "nice",
        "app:default",
    )


def test_registry_down(daemon: Daemon, fake: FakeRegistry) -> None:
    fake.spoil(".*", reset=True)
    expect(uenvctl(daemon.socket_path, "run", "app/1.0", "true"), errors.RegistryUnreachable)


def test_wrong_digest_served(daemon: Daemon, fake: FakeRegistry) -> None:
    fake.spoil("/blobs/sha256", corrupt=True)
    expect(uenvctl(daemon.socket_path, "run", "app/1.0", "true"), errors.DigestMismatch)


def test_not_a_squashfs(daemon: Daemon, public_dir: Path) -> None:
    path = public_dir / "text.squashfs"
    expect(
        uenvctl(daemon.socket_path, "run", f"{path}:{MOUNT_POINT}", "true"),
        errors.FormatError,
        "text.squashfs",
    )
    expect(uenvctl(daemon.socket_path, "run", f"text/1:{MOUNT_POINT}", "true"), errors.FormatError, "text/1")


def test_uenvd_not_running(public_dir: Path) -> None:
    expect(uenvctl(public_dir / "nothing", "run", "app/1.0", "true"), errors.DaemonUnreachable)


def test_mount_point_missing(daemon: Daemon) -> None:
    expect(uenvctl(daemon.socket_path, "run", "lost/1", "true"), errors.MountPointError, "/no/such/place")


def test_no_permission(daemon: Daemon, public_dir: Path) -> None:
    secret = simple_image(public_dir / "secret.squashfs", "secret", "x")
    secret.chmod(0o600)
    expect(uenvctl(daemon.socket_path, "run", str(secret), "true"), errors.AccessDenied, "secret.squashfs")


def test_no_such_file(daemon: Daemon) -> None:
    done = uenvctl(daemon.socket_path, "run", "/nowhere/x.squashfs", "true")
    expect(done, errors.UsageError, "/nowhere/x.squashfs")


def test_wrong_config_key(public_dir: Path) -> None:
    config = public_dir / "c.yaml"
    config.write_text("system: demo\nregistry: oci-layout:/x\ncache:\n  lcoal: /x\n")
    done = subprocess.run(
        [BIN / "uenvd", "--check", "--config", config], capture_output=True, text=True, check=False
    )
    expect(done, errors.ConfigError, f"{config}:4: cache.lcoal", "local")


def test_a_check_that_was_to_do_something_besides(tmp_path: Path) -> None:
    done = subprocess.run(
        [BIN / "uenvd", "--check", "--config", tmp_path / "none", "gc"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "--check does not go with gc" in done.stderr) == (2, True)


def test_no_worker_user(public_dir: Path) -> None:
    config = public_dir / "c.yaml"
    config.write_text(
        f"system: demo\nregistry: oci-layout:/x\nworker: {{user: nobody-of-this-name}}\nrun_dir: {public_dir}\n"
    )
    done = subprocess.run(
        [BIN / "uenvd", "--config", config], capture_output=True, text=True, timeout=30, check=False
    )
    expect(done, errors.ConfigError, "nobody-of-this-name")


def test_a_registry_address_that_is_none(public_dir: Path) -> None:
    config = public_dir / "c.yaml"
    config.write_text("system: demo\nregistry: 'ftp://old.example/x'\nworker: {user: nobody}\n")
    done = subprocess.run(
        [BIN / "uenvd", "--check", "--config", config],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    expect(done, errors.ConfigError, f"{config}:2: registry: ", "ftp://old.example", hint=False)


def test_a_cache_that_cannot_be_written(public_dir: Path) -> None:
    config = public_dir / "c.yaml"
    (public_dir / "file").touch()
    config.write_text(
        f"system: demo\nregistry: oci-layout:{public_dir}\nworker: {{user: nobody}}\nrun_dir: {public_dir}/run\n"
        f"control: {{socket: {public_dir}/run/control}}\ncache: {{local: {public_dir}/file/cache}}\n"
    )
    done = subprocess.run(
        [BIN / "uenvd", "--config", config], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == errors.StorageError.exit_status, done.stderr
    assert "file/cache" in done.stderr
    assert "Traceback" not in done.stderr


def test_uenvd_as_an_ordinary_user(public_dir: Path) -> None:
    config = public_dir / "c.yaml"
    config.write_text("system: demo\nregistry: oci-layout:/x\n")
    done = subprocess.run(
        [BIN / "uenvd", "--config", config],
        capture_output=True,
        text=True,
        user=NOBODY,
        cwd="/",
        timeout=30,
        check=False,
    )
    expect(done, errors.ResourceMissing, "root")


def test_the_exit_statuses_above_differ() -> None:
    met = (
        errors.UnknownLabel,
        errors.AmbiguousLabel,
        errors.LabelError,
        errors.UnknownView,
        errors.RegistryUnreachable,
        errors.DigestMismatch,
        errors.FormatError,
        errors.DaemonUnreachable,
        errors.MountPointError,
        errors.AccessDenied,
        errors.ConfigError,
    )
    assert len({error.exit_status for error in met}) == len(met)
    assert os.EX_OK not in {error.exit_status for error in met}
