"""The real daemon and its cache: shared with a second daemon, owned by somebody else, full, read-only, gone, damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support.daemon import Client, running_daemon
from support.fusetools import NOBODY, session, until
from support.nfsdouble import BROKEN, mounted
from support.publishing import Publisher, simple_image
from support.registry import FakeRegistry
from uenvd.oci.files import hash_file

pytestmark = pytest.mark.usefixtures("node")

MOUNT_POINT = "/user-environment"
FAST = "mounts: {linger: 100ms}\n"
WITHOUT_OVERRIDES = ("setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner")


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        yield registry


@pytest.fixture
def disk(public_dir: Path) -> Iterator[Path]:
    """A file system of 12 MB."""
    path = public_dir / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m,mode=0755", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=False, stderr=subprocess.DEVNULL)


def push(fake: FakeRegistry, public_dir: Path, name: str, megabytes: int = 2) -> str:
    image = simple_image(public_dir / f"{name}.squashfs", name, name, megabytes=megabytes)
    return Publisher(fake.url).push(image, f"{name}/1.0", "v1")


def mount(client: Client, uenv: str, **fields: Any) -> dict[str, Any]:
    """Ask for a mount and wait for it; return the last answer."""
    answer = client.ask("mount", uenv=uenv, **fields)
    return client.ask("wait", lease=answer["lease"]) if answer["ok"] else answer


def layers_sent(fake: FakeRegistry, image: Path) -> float:
    """Return how many copies of an image were asked for."""
    size_bytes, digest = image.stat().st_size, hash_file(image)[0]
    sent = 0
    for seen in fake.seen:
        if seen.method == "GET" and seen.path.endswith(f"/blobs/{digest}"):
            text = seen.headers.get("Range", f"bytes=0-{size_bytes - 1}").removeprefix("bytes=")
            first, _, last = text.partition("-")
            sent += int(last or size_bytes - 1) - int(first) + 1
    return sent / size_bytes


# --- shared -------------------------------------------------------------------------------------------------------------------------


def test_two_daemons_without_rights_share_a_directory_of_somebody_else(
    public_dir: Path, fake: FakeRegistry
) -> None:
    """As root on a server that squashes root: everything is done as cache.user."""
    push(fake, public_dir, "app")
    shared = public_dir / "shared"
    shared.mkdir(mode=0o700)
    os.chown(shared, NOBODY, NOBODY)
    extra = FAST + f"cache: {{local: none, shared: {shared}, user: nobody}}\n"
    with ExitStack() as stack:
        one, two = (
            stack.enter_context(
                running_daemon(public_dir / name, fake.url, extra=extra, wrapper=WITHOUT_OVERRIDES)
            )
            for name in ("one", "two")
        )
        held = stack.enter_context(one.client())
        assert mount(held, "app/1.0")["ok"]
        with two.client() as client:
            assert mount(client, "app/1.0")["ok"]
            with session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
                assert inside.eval(f"open('{MOUNT_POINT}/word').read()") == "app"
        assert layers_sent(fake, public_dir / "app.squashfs") <= 1.02
        assert {path.stat().st_uid for path in shared.rglob("*")} == {NOBODY}
        # The first still reads it: the second must not remove it, by whatever way.
        assert two.ask("images")["records"][0]["cached"]
        until(lambda: not two.ask("status")["images"], "the second lets go")
        assert two.ask("evict", uenv="app/1.0:v1")["error"]["code"] == "in-use"
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "uenvd.daemon.main",
                "--config",
                str(two.workdir / "config.yaml"),
                "gc",
                "--free",
                "1GiB",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "in use" in done.stdout
        with session(NOBODY, held.descriptors[0], MOUNT_POINT) as inside:
            assert inside.eval(f"open('{MOUNT_POINT}/word').read()") == "app"


def test_many_mounts_of_an_absent_image_cost_one_pull(public_dir: Path, fake: FakeRegistry) -> None:
    push(fake, public_dir, "app", megabytes=4)
    fake.spoil("/blobs/", bytes_per_s=16_000_000)
    with running_daemon(public_dir / "uenvd", fake.url, extra=FAST) as daemon, ExitStack() as stack:
        clients = [stack.enter_context(daemon.client()) for _ in range(64)]
        leases = [client.ask("mount", uenv="app/1.0")["lease"] for client in clients]
        for client, lease in zip(clients, leases, strict=True):
            assert client.ask("wait", lease=lease)["ok"]
        assert layers_sent(fake, public_dir / "app.squashfs") <= 1.02


def test_a_file_server_in_trouble_costs_nothing_while_there_is_a_local_disk(
    public_dir: Path, fake: FakeRegistry
) -> None:
    push(fake, public_dir, "one")
    push(fake, public_dir, "two")
    server = public_dir / "server"
    server.mkdir()
    os.chown(server, NOBODY, NOBODY)
    with mounted(server, public_dir / "nfs", squash=True) as nfs:
        extra = FAST + f"cache: {{local: {public_dir}/local, shared: {nfs}/cache, user: nobody}}\n"
        with running_daemon(public_dir / "uenvd", fake.url, extra=extra) as daemon, daemon.client() as client:
            assert mount(client, "one/1.0")["ok"]
            assert not list((public_dir / "local/partial").iterdir())
            (server / BROKEN).touch()
            try:
                with daemon.client() as other:
                    assert mount(other, "two/1.0")["ok"]
            finally:
                (server / BROKEN).unlink()
            assert "Input/output error" in daemon.log
            assert len(list((public_dir / "local/blobs/sha256").iterdir())) > 0


# --- full, read-only, gone ----------------------------------------------------------------------------------------------------------


def test_trouble_with_the_disk_is_told_to_newcomers_only(
    public_dir: Path, fake: FakeRegistry, disk: Path
) -> None:
    """One after the other on one daemon: running mounts go on, and with the trouble gone the same request succeeds."""
    push(fake, public_dir, "one", megabytes=3)
    push(fake, public_dir, "two", megabytes=3)
    extra = FAST + f"cache: {{local: {disk}/cache}}\n"
    with running_daemon(public_dir / "uenvd", fake.url, extra=extra) as daemon, daemon.client() as running:
        assert mount(running, "one/1.0")["ok"]
        with session(NOBODY, running.descriptors[0], MOUNT_POINT) as inside:

            def newcomer(code: str, words: str) -> None:
                with daemon.client() as client:
                    error = mount(client, "two/1.0")["error"]
                assert error["code"] == code
                assert words in error["message"] + error["hint"], error
                assert error["hint"]
                assert inside.eval(f"open('{MOUNT_POINT}/word').read()") == "one"
                size = inside.eval(f"len(open('{MOUNT_POINT}/ballast', 'rb').read())")
                assert size >= 3_000_000

            ballast = disk / "ballast"
            with ballast.open("wb") as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
            newcomer("storage-full", "no room left")
            ballast.unlink()
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            newcomer("storage", "read-only")
            subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
            (disk / "cache").rename(disk / "elsewhere")
            newcomer("storage", "removed or its file system is not mounted")
            (disk / "elsewhere").rename(disk / "cache")
            with daemon.client() as client:
                assert mount(client, "two/1.0")["ok"]


def test_a_quota_makes_room_where_nobody_is(public_dir: Path, fake: FakeRegistry) -> None:
    for name in ("one", "two", "three"):
        push(fake, public_dir, name)
    size_bytes = (public_dir / "one.squashfs").stat().st_size
    extra = (
        FAST + f"cache: {{local: {public_dir}/cache, quota: {size_bytes * 5 // 2}B, high: 100%, low: 90%}}\n"
    )
    with running_daemon(public_dir / "uenvd", fake.url, extra=extra) as daemon:
        assert daemon.ask("pull", uenv="one/1.0")["ok"]
        assert daemon.ask("pull", uenv="two/1.0")["ok"]
        with daemon.client() as client:
            assert mount(client, "one/1.0")["ok"]  # in use, and the older
            assert daemon.ask("pull", uenv="three/1.0")["ok"]
            names = {record["name"] for record in daemon.ask("images")["records"]}
            assert names == {"one", "three"}
            assert daemon.ask("pin", uenv="three/1.0:v1", pin=True)["ok"]
            error = daemon.ask("pull", uenv="two/1.0")["error"]
            assert error["code"] == "storage-full" and "quota" in error["message"]


def test_gc_and_scrub_by_hand(public_dir: Path, fake: FakeRegistry) -> None:
    digest = push(fake, public_dir, "app")
    with running_daemon(public_dir / "uenvd", fake.url, extra=FAST) as daemon:
        assert daemon.ask("pull", uenv="app/1.0")["ok"]
        uenvd = [sys.executable, "-m", "uenvd.daemon.main", "--config", str(daemon.workdir / "config.yaml")]

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*uenvd, *arguments], capture_output=True, text=True, check=False, timeout=60
            )

        dry = run("gc", "--dry-run", "--free", "1GiB")
        assert "remove" in dry.stdout and "app/1.0:v1" in dry.stdout and daemon.ask("images")["records"]
        assert run("scrub").returncode == 0
        layer = max((daemon.cache / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
        with layer.open("r+b") as file:
            file.seek(5000)
            file.write(b"\0\1\2\3")
        found = run("scrub")
        assert found.returncode == 1 and layer.name in found.stdout
        assert daemon.ask("images")["records"] == []
        with daemon.client() as client:
            assert mount(client, f"app/1.0@{digest}")["ok"], "a damaged image is pulled again"
        until(lambda: not daemon.ask("status")["images"], "the image is let go")
        assert run("gc", "--free", "1GiB").returncode == 0
        assert daemon.ask("images")["records"] == []
        assert run("gc", "--free", "some").returncode == 2
