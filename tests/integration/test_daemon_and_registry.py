"""The daemon and a registry that moves its tags, stops, hangs, lies or is slow."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.daemon import Daemon, running_daemon
from support.fusetools import NOBODY, session, until
from support.publishing import Publisher, make_squashfs, simple_image
from support.registry import FakeRegistry, docker_registry

pytestmark = pytest.mark.usefixtures("node")

MOUNT_POINT = "/user-environment"
FAST = "resolve: {ttl: 0s}\nmounts: {linger: 100ms}\n"


@pytest.fixture
def fake(public_dir: Path) -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        yield registry


def word_in(daemon: Daemon, uenv: str) -> str:
    """Mount an image and read what it says."""
    with daemon.client() as client:
        answer = client.ask("mount", uenv=uenv)
        assert answer["ok"], answer
        done = client.ask("wait", lease=answer["lease"])
        assert done["ok"], done
        with session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
            return str(inside.eval(f"open('{MOUNT_POINT}/word').read()"))


def waiting_error(daemon: Daemon, uenv: str) -> dict[str, Any]:
    """Mount an image that never comes; return the error."""
    with daemon.client() as client:
        answer = client.ask("mount", uenv=uenv)
        if answer["ok"]:
            answer = client.ask("wait", lease=answer["lease"])
        assert not answer["ok"]
        error: dict[str, Any] = answer["error"]
        return error


def test_tags_move_digests_stay(public_dir: Path) -> None:
    one = simple_image(public_dir / "1.squashfs", "app", "one")
    two = simple_image(public_dir / "2.squashfs", "app", "two")
    with (
        docker_registry(public_dir / "registry") as registry,
        running_daemon(public_dir / "uenvd", registry.url, extra=FAST) as daemon,
    ):
        publisher = Publisher(registry.url)
        first = publisher.push(one, "app/1.0", "v1", "latest")
        queued = daemon.ask("resolve", uenv="app/1.0")["resolved"]  # a job is submitted now
        assert f"@{first}" in queued
        assert word_in(daemon, "app/1.0") == "one"
        second = publisher.push(two, "app/1.0", "v2")
        assert word_in(daemon, "app/1.0") == "one"  # latest has not moved yet
        publisher.retag("app/1.0", second, "latest")
        assert word_in(daemon, "app/1.0") == "two"
        assert word_in(daemon, "app/1.0:v1") == "one"
        assert word_in(daemon, f"app/1.0@{first}") == "one"
        assert word_in(daemon, queued) == "one"  # the queued job keeps its digest
        publisher.retag("app/1.0", first, "latest")  # a downgrade is choosing another image
        assert word_in(daemon, "app/1.0") == "one"


def test_a_warm_label_starts_without_the_registry_also_after_a_restart(public_dir: Path) -> None:
    image = simple_image(public_dir / "1.squashfs", "app", "one")
    with docker_registry(public_dir / "registry") as registry:
        Publisher(registry.url).push(image, "app/1.0", "v1", "latest")
        daemon = Daemon(public_dir / "uenvd", registry.url, extra=FAST).start()
        try:
            assert word_in(daemon, "app/1.0") == "one"
            registry.process.kill()
            registry.process.wait()
            daemon.stop()
            daemon.start()
            begin = time.monotonic()
            resolved = daemon.ask("resolve", uenv="app/1.0")
            assert time.monotonic() - begin < 3
            assert resolved["ok"]
            (note,) = resolved["notes"]
            assert "using what it said" in note
            assert word_in(daemon, "app/1.0") == "one"
            error = daemon.ask("resolve", uenv="other/2.0", refresh=True)["error"]
            assert error["code"] in ("registry-unreachable", "unknown-label")
        finally:
            daemon.kill()


def test_a_label_that_was_never_seen_needs_the_registry(public_dir: Path) -> None:
    with running_daemon(public_dir / "uenvd", "http://127.0.0.1:9") as daemon:
        begin = time.monotonic()
        error = daemon.ask("resolve", uenv="app/1.0")["error"]
        assert error["code"] == "registry-unreachable"
        assert error["hint"]
        assert time.monotonic() - begin < 3


def test_a_black_hole_is_waited_for_no_longer_than_the_deadline(public_dir: Path, fake: FakeRegistry) -> None:
    fake.spoil(".*", silent=True)
    with running_daemon(public_dir / "uenvd", fake.url) as daemon:
        begin = time.monotonic()
        error = daemon.ask("resolve", uenv="app/1.0")["error"]
        assert error["code"] == "registry-unreachable"
        assert time.monotonic() - begin < 3


def pushed(fake: FakeRegistry, public_dir: Path, **fields: Any) -> str:
    image = simple_image(public_dir / "app.squashfs", "app", "hello", megabytes=4)
    return Publisher(fake.url).push(image, "app/1.0", "v1", **fields)


def test_wrong_bytes_are_never_served(public_dir: Path, fake: FakeRegistry) -> None:
    pushed(fake, public_dir)
    fake.spoil("/blobs/sha256", corrupt=True)
    with running_daemon(public_dir / "uenvd", fake.url, extra=FAST) as daemon:
        # The config blob is damaged as well, and refused first.
        assert daemon.ask("resolve", uenv="app/1.0")["error"]["code"] == "digest-mismatch"
        assert waiting_error(daemon, "app/1.0")["code"] == "digest-mismatch"
        assert daemon.ask("images")["records"] == []


def test_a_damaged_layer_is_thrown_away_and_pulled_again_once_it_is_mended(
    public_dir: Path, fake: FakeRegistry
) -> None:
    pushed(fake, public_dir, stock=True)
    fake.spoil("/blobs/sha256", corrupt=True, times=1)
    with running_daemon(public_dir / "uenvd", fake.url, extra=FAST) as daemon:
        error = waiting_error(daemon, f"app/1.0:{MOUNT_POINT}")
        assert error["code"] == "digest-mismatch"
        assert not list((daemon.cache / "partial").iterdir())
        assert word_in(daemon, f"app/1.0:{MOUNT_POINT}") == "hello"


def test_a_body_that_breaks_off_is_continued(public_dir: Path, fake: FakeRegistry) -> None:
    pushed(fake, public_dir, stock=True)
    fake.spoil("/blobs/sha256", truncate_bytes=1_500_000, times=2)
    with running_daemon(public_dir / "uenvd", fake.url, extra=FAST) as daemon:
        assert word_in(daemon, f"app/1.0:{MOUNT_POINT}") == "hello"


def test_an_artifact_that_is_no_squashfs_is_refused(public_dir: Path, fake: FakeRegistry) -> None:
    path = public_dir / "text.squashfs"
    path.write_text("no image at all\n" * 1000)
    Publisher(fake.url).push(path, "text/1", "v1", stock=True)
    with running_daemon(public_dir / "uenvd", fake.url, extra=FAST) as daemon:
        error = waiting_error(daemon, f"text/1:{MOUNT_POINT}")
        assert error["code"] == "bad-image"


def test_refused_credentials_say_so(public_dir: Path) -> None:
    with (
        docker_registry(public_dir / "registry", htpasswd=True) as registry,
        running_daemon(public_dir / "uenvd", registry.url) as daemon,
    ):
        error = daemon.ask("resolve", uenv="app/1.0")["error"]
        assert error["code"] == "registry-denied"
        assert error["hint"]


def test_many_who_want_one_image_cost_one_pull(public_dir: Path, fake: FakeRegistry) -> None:
    digest = pushed(fake, public_dir)
    fake.spoil("/blobs/sha256", bytes_per_s=8_000_000)
    with running_daemon(public_dir / "uenvd", fake.url, extra=FAST) as daemon:
        clients = [daemon.client() for _ in range(16)]
        try:
            leases = [client.ask("mount", uenv="app/1.0")["lease"] for client in clients]
            for client, lease in zip(clients, leases, strict=True):
                assert client.ask("wait", lease=lease)["ok"]
        finally:
            for client in clients:
                client.close()
        (record,) = daemon.ask("images")["records"]
        assert record["digest"] == digest
        assert daemon.log.count(" begins (") == 1


def test_a_pull_that_nobody_waits_for_ends_and_is_continued_later(
    public_dir: Path, fake: FakeRegistry
) -> None:
    pushed(fake, public_dir)
    spoilt = fake.spoil("/blobs/sha256", bytes_per_s=1_000_000)
    with running_daemon(public_dir / "uenvd", fake.url, extra=FAST) as daemon:
        with daemon.client() as client:
            client.ask("mount", uenv="app/1.0")
            until(
                lambda: [image["done_bytes"] > 0 for image in daemon.ask("status")["images"]] == [True],
                "bytes flow",
            )
        until(lambda: "the pull was cancelled" in daemon.log, "the pull is cancelled", 3)
        until(lambda: daemon.ask("status")["images"] == [], "the image is given up")
        (part,) = (daemon.cache / "partial").glob("*.part")
        assert part.stat().st_size > 0
        spoilt.bytes_per_s = None
        assert word_in(daemon, "app/1.0") == "hello"


def test_who_waits_hears_how_it_goes(public_dir: Path, fake: FakeRegistry) -> None:
    pushed(fake, public_dir)
    fake.spoil("/blobs/sha256", bytes_per_s=2_500_000)
    with running_daemon(public_dir / "uenvd", fake.url, extra=FAST) as daemon, daemon.client() as client:
        lease = client.ask("mount", uenv="app/1.0")["lease"]
        assert client.ask("wait", lease=lease)["ok"]
        pulls = [event for event in client.events if event["phase"] == "pull"]
        assert len(pulls) >= 2
        assert pulls[-1]["done_bytes"] > pulls[0]["done_bytes"]
        assert pulls[0]["total_bytes"] > 4 << 20
        assert "app/1.0" in pulls[0]["message"]


def test_a_full_cache_says_so_and_running_mounts_go_on(public_dir: Path, fake: FakeRegistry) -> None:
    pushed(fake, public_dir)
    small = simple_image(public_dir / "small.squashfs", "small", "small")
    Publisher(fake.url).push(small, "small/1", "v1")
    cache = public_dir / "uenvd" / "cache"
    cache.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", cache], check=True)
    try:
        with running_daemon(public_dir / "uenvd", fake.url, extra=FAST) as daemon, daemon.client() as client:
            client.ask("wait", lease=client.ask("mount", uenv="small/1")["lease"])
            with session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
                error = waiting_error(daemon, "app/1.0")
                assert error["code"] == "storage-full"
                assert error["hint"]
                assert inside.eval(f"open('{MOUNT_POINT}/word').read()") == "small"
    finally:
        subprocess.run(["umount", "-l", cache], check=True)


def test_an_empty_tree_is_an_image_too(public_dir: Path, fake: FakeRegistry) -> None:
    Publisher(fake.url).push(make_squashfs(public_dir / "empty.squashfs", {}), "empty/1", "v1", stock=True)
    with running_daemon(public_dir / "uenvd", fake.url, extra=FAST) as daemon, daemon.client() as client:
        lease = client.ask("mount", uenv=f"empty/1:{MOUNT_POINT}")["lease"]
        assert client.ask("wait", lease=lease)["ok"]
