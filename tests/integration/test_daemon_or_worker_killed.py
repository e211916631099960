"""Processes end in the middle of things: what goes on, what fails, and how it says so."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import Client, Daemon, children_of, running_daemon
from support.fusetools import NOBODY, has_ended, session, until
from support.publishing import Publisher, simple_image

pytestmark = pytest.mark.usefixtures("node")

MOUNT_POINT = "/user-environment"
READ = f"open('{MOUNT_POINT}/word').read()"
READ_ANEW = (
    f"[open(f'{MOUNT_POINT}/ballast','rb').seek(0), len(open(f'{MOUNT_POINT}/ballast','rb').read())][1]"
)


@pytest.fixture
def daemon(public_dir: Path) -> Iterator[Daemon]:
    registry = f"oci-layout:{public_dir / 'registry'}"
    image = simple_image(public_dir / "app.squashfs", "app", "hello", megabytes=2)
    Publisher(registry).push(image, "app/1.0", "v1")
    with running_daemon(public_dir / "uenvd", registry) as running:
        yield running


def mounted(daemon: Daemon) -> Client:
    client = daemon.client()
    lease = client.ask("mount", uenv="app/1.0")["lease"]
    assert client.ask("wait", lease=lease)["ok"]
    return client


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_running_mount_outlives_the_daemon(daemon: Daemon, number: signal.Signals) -> None:
    client = mounted(daemon)
    (worker,) = daemon.workers()
    with session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
        daemon.stop() if number == signal.SIGTERM else daemon.kill()
        client.close()
        assert inside.eval(READ_ANEW) == 2 << 20
        daemon.start()
        with mounted(daemon) as again, session(NOBODY, again.descriptors[0], MOUNT_POINT) as other:
            assert other.eval(READ) == "hello"
        assert inside.eval(READ) == "hello"
        assert not has_ended(worker)
    until(lambda: daemon.ask("status")["leases"] == [], "nobody uses it")
    daemon.stop()
    until(lambda: has_ended(worker), "a worker without a daemon ends with its last user")


def test_a_killed_libfuse_worker_costs_its_users_an_error_and_nobody_else_anything(
    daemon: Daemon,
) -> None:
    """With the transport pyfuse3; with the other one it costs nothing: test_workers_and_daemon_killed.py."""
    daemon.stop()
    daemon.extra = "fuse: {transport: pyfuse3}\n"
    daemon.start()
    with mounted(daemon) as client, session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
        (worker,) = daemon.workers()
        os.kill(worker, signal.SIGKILL)
        until(lambda: daemon.ask("status")["images"] == [], "the daemon notices")
        assert "errno" in inside.eval(READ_ANEW)
        with mounted(daemon) as again, session(NOBODY, again.descriptors[0], MOUNT_POINT) as other:
            assert other.eval(READ) == "hello"


def test_a_killed_cloner_is_replaced(daemon: Daemon) -> None:
    assert daemon.process is not None
    with mounted(daemon):
        children = children_of(daemon.process.pid)
        cloners = [pid for pid, command in children.items() if "uenvd.daemon.cloner" in command]
        for pid in cloners:
            os.kill(pid, signal.SIGKILL)
        assert len(cloners) == 1
        until(lambda: has_ended(cloners[0]), "the cloner is gone")
        with mounted(daemon) as again, session(NOBODY, again.descriptors[0], MOUNT_POINT) as inside:
            assert inside.eval(READ) == "hello"


def test_a_killed_client_gives_its_lease_back(daemon: Daemon) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            mounted(daemon)
            signal.pause()
        finally:
            os._exit(1)
    try:
        until(lambda: len(daemon.ask("status")["leases"]) == 1, "the lease")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    until(lambda: daemon.ask("status")["leases"] == [], "the lease ends with the client")


def test_no_process_stays_behind(daemon: Daemon) -> None:
    assert daemon.process is not None
    with mounted(daemon):
        pass
    children = children_of(daemon.process.pid)
    assert len(children) >= 2  # the worker, the cloner, perhaps the spare worker
    (worker,) = daemon.workers()
    daemon.stop()
    for pid in children:
        until(lambda pid=pid: has_ended(pid), f"process {pid} ends")
    assert has_ended(worker)


def test_what_a_killed_daemon_left_in_the_cache_is_removed_and_nothing_else(daemon: Daemon) -> None:
    with mounted(daemon):
        pass
    kept = {path.name for path in (daemon.cache / "blobs" / "sha256").iterdir()}
    daemon.kill()
    orphan = daemon.cache / "blobs" / "sha256" / ("0" * 64)
    orphan.write_bytes(b"pulled, but never recorded")
    for path in orphan.parent.iterdir():
        os.utime(path, (0, 0))
    daemon.start()
    assert {path.name for path in orphan.parent.iterdir()} == kept
    with mounted(daemon):
        assert (
            "begins (" not in daemon.log.rsplit("removed", 1)[1]
        )  # the image did not have to be pulled again


def test_a_second_daemon_on_one_socket_is_refused(daemon: Daemon) -> None:
    second = Daemon(daemon.workdir, daemon.registry)
    with pytest.raises(RuntimeError, match="another uenvd serves"):
        second.start()
    assert daemon.ask("status")["ok"]
