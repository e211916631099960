"""A user asks, a mount comes back: what is in it, who shares it, when it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import Daemon, running_daemon
from support.fusetools import NOBODY, SOMEBODY, has_ended, is_mounted, session, until
from support.publishing import Publisher, env_json, make_squashfs, simple_image

pytestmark = pytest.mark.usefixtures("node")

MOUNT_POINT = "/user-environment"


@pytest.fixture
def registry(public_dir: Path) -> str:
    return f"oci-layout:{public_dir / 'registry'}"


@pytest.fixture
def daemon(public_dir: Path, registry: str) -> Iterator[Daemon]:
    Publisher(registry)
    with running_daemon(public_dir / "uenvd", registry, extra="mounts: {linger: 100ms}\n") as running:
        yield running


@pytest.fixture
def app(public_dir: Path, registry: str) -> str:
    return Publisher(registry).push(
        simple_image(public_dir / "app.squashfs", "app", "hello"), "app/1.0", "v1"
    )


def test_the_mount_holds_the_image_and_the_view_its_environment(daemon: Daemon, app: str) -> None:
    with daemon.client() as client:
        answer = client.ask("mount", uenv="app/1.0", view="default")
        assert answer["ok"], answer
        assert [mount["mount"] for mount in answer["mounts"]] == [MOUNT_POINT]
        assert answer["mounts"][0]["digest"] == app
        done = client.ask("wait", lease=answer["lease"])
        assert done["ok"], done
        assert ["set", "WORD", "hello"] in done["env"]
        with session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
            assert inside.eval(f"open('{MOUNT_POINT}/word').read()") == "hello"
            mountinfo = inside.eval("open('/proc/self/mountinfo').read()")
            line = next(line for line in mountinfo.splitlines() if f" {MOUNT_POINT} " in line)
            assert f"- fuse.uenvd uenvd:{app} ro" in line
            assert "nosuid" in line
            assert "nodev" in line
    assert not is_mounted(MOUNT_POINT)
    assert os.listdir(MOUNT_POINT) == []


def test_users_of_one_image_share_one_worker(daemon: Daemon, app: str) -> None:
    with daemon.client() as first, daemon.client() as second:
        for client in (first, second):
            lease = client.ask("mount", uenv="app/1.0")["lease"]
            assert client.ask("wait", lease=lease)["ok"]
        with (
            session(NOBODY, first.descriptors[0], MOUNT_POINT) as one,
            session(SOMEBODY, second.descriptors[0], MOUNT_POINT) as two,
        ):
            device = f"os.stat('{MOUNT_POINT}/word').st_dev"
            assert one.eval(device) == two.eval(device)
        (image,) = daemon.ask("status")["images"]
        assert image["leases"] == 2


def test_a_second_mount_needs_no_waiting(daemon: Daemon, app: str) -> None:
    with daemon.client() as first:
        lease = first.ask("mount", uenv="app/1.0")["lease"]
        first.ask("wait", lease=lease)
        with daemon.client() as second:
            answer = second.ask("mount", uenv="app/1.0", view="default")
            assert answer["state"] == "ready"
            assert ["set", "WORD", "hello"] in answer["env"]


def test_the_worker_ends_with_the_last_user_not_before(daemon: Daemon, app: str) -> None:
    with daemon.client() as client:
        lease = client.ask("mount", uenv="app/1.0")["lease"]
        client.ask("wait", lease=lease)
        (worker,) = daemon.workers()
        with session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
            client.close()  # the lease and this process's descriptor are gone, the session's mount is not
            until(lambda: daemon.ask("status")["images"][0]["leases"] == 0, "the lease ends")
            until(lambda: "letting go" in daemon.log, "the daemon lets go")
            assert inside.eval(f"open('{MOUNT_POINT}/word').read()") == "hello"
            assert not has_ended(worker)
    until(lambda: has_ended(worker), "the worker ends with the last namespace")
    until(lambda: daemon.ask("status")["images"] == [], "the daemon knows")


def test_the_daemon_itself_shows_no_mount_on_the_node(daemon: Daemon, app: str) -> None:
    with daemon.client() as client:
        lease = client.ask("mount", uenv="app/1.0")["lease"]
        client.ask("wait", lease=lease)
        assert f"uenvd:{app}" not in Path("/proc/self/mountinfo").read_text()


def test_several_images_go_to_their_own_places_outer_first(
    daemon: Daemon, app: str, public_dir: Path, registry: str
) -> None:
    tool = simple_image(public_dir / "tool.squashfs", "tool", "tool", mount=f"{MOUNT_POINT}/meta")
    Publisher(registry).push(tool, "tool/1", "v1")
    with daemon.client() as client:
        answer = client.ask("mount", uenv="tool/1,app/1.0", view="app:default,tool:plain", refresh=True)
        assert [mount["mount"] for mount in answer["mounts"]] == [MOUNT_POINT, f"{MOUNT_POINT}/meta"]
        done = client.ask("wait", lease=answer["lease"])
        assert ["set", "WORD", "hello"] in done["env"]
        assert ["set", "PLAIN", "yes"] in done["env"]


@pytest.mark.parametrize(
    ("uenv", "view", "code"),
    [
        ("nothing/1", None, "unknown-label"),
        ("app/1.0:v7", None, "unknown-label"),
        ("app/1.0", "sparkling", "unknown-view"),
        ("app/1.0", "tool:default", "unknown-view"),
        ("app//1", None, "label-syntax"),
        ("app/1.0", "a/b", "label-syntax"),
        ("app/1.0,app/1.0:/mnt", None, "mount-conflict"),
        ("app/1.0:/", None, "mount-conflict"),
        ("build::app/1.0", None, "access-denied"),
        ("@demo", None, "label-syntax"),
    ],
)
def test_what_cannot_be_is_refused_at_resolution(
    daemon: Daemon, app: str, uenv: str, view: str | None, code: str
) -> None:
    answer = daemon.ask("resolve", uenv=uenv, view=view)
    assert not answer["ok"]
    assert answer["error"]["code"] == code
    assert answer["error"]["hint"]


def test_two_images_for_one_place_conflict(daemon: Daemon, app: str, public_dir: Path, registry: str) -> None:
    Publisher(registry).push(simple_image(public_dir / "b.squashfs", "other", "b"), "other/1", "v1")
    answer = daemon.ask("resolve", uenv="app/1.0,other/1")
    assert answer["error"]["code"] == "mount-conflict"
    assert daemon.ask("resolve", uenv="app/1.0,other/1:/user-tools")["ok"]


def test_a_failed_mount_leaves_no_lease(daemon: Daemon, app: str) -> None:
    with daemon.client() as client:
        assert client.ask("mount", uenv="app/1.0,nothing/2")["error"]["code"] == "unknown-label"
        assert client.descriptors == []
        assert daemon.ask("status")["leases"] == []


def test_a_stock_image_tells_its_mount_point_only_after_the_pull(
    daemon: Daemon, public_dir: Path, registry: str
) -> None:
    image = simple_image(public_dir / "old.squashfs", "old", "old", mount="/user-tools")
    Publisher(registry).push(image, "old/1", "v1", stock=True)
    resolved = daemon.ask("resolve", uenv="old/1", view="default")
    assert resolved["images"][0]["mount"] is None
    assert resolved["images"][0]["views"] is None
    with daemon.client() as client:
        lease = client.ask("mount", uenv="old/1")["lease"]
        error = client.ask("wait", lease=lease)["error"]
        assert error["code"] == "mount-conflict"
        assert "old/1:/user-tools" in error["hint"]
    with daemon.client() as client:
        lease = client.ask("mount", uenv="old/1:/user-tools", view="default")["lease"]
        assert ["set", "WORD", "old"] in client.ask("wait", lease=lease)["env"]


def test_an_image_without_metadata_needs_an_explicit_mount_point(
    daemon: Daemon, public_dir: Path, registry: str
) -> None:
    Publisher(registry).push(
        make_squashfs(public_dir / "bare.squashfs", {"word": "bare"}), "bare/1", "v1", stock=True
    )
    with daemon.client() as client:
        lease = client.ask("mount", uenv="bare/1")["lease"]
        error = client.ask("wait", lease=lease)["error"]
        assert error["code"] == "no-metadata"
        assert ":/user-environment" in error["hint"]
    with daemon.client() as client:
        lease = client.ask("mount", uenv=f"bare/1:{MOUNT_POINT}")["lease"]
        assert client.ask("wait", lease=lease)["env"] == [["unset", "UENV_RESTORE"]]


def test_what_the_worker_notes_of_an_image_reaches_its_users(
    daemon: Daemon, public_dir: Path, registry: str
) -> None:
    huge = make_squashfs(public_dir / "huge.squashfs", {"word": "huge"}, meta=b" " * (2 << 20))
    Publisher(registry).push(huge, "huge/1", "v1", stock=True)
    with daemon.client() as client:
        lease = client.ask("mount", uenv=f"huge/1:{MOUNT_POINT}")["lease"]
        (note,) = client.ask("wait", lease=lease)["notes"]
        assert "huge/1" in note
        assert "meta/env.json" in note
        again = client.ask("mount", uenv=f"huge/1:{MOUNT_POINT}")
        assert (again["state"], again["notes"]) == ("ready", [note])


def test_a_view_of_a_stock_image_is_checked_once_it_is_known(
    daemon: Daemon, public_dir: Path, registry: str
) -> None:
    meta = env_json("old", views={"default": {"list": {}, "scalar": {"A": "1"}}})
    Publisher(registry).push(
        make_squashfs(public_dir / "o.squashfs", {"f": "x"}, meta=meta), "old/2", "v1", stock=True
    )
    with daemon.client() as client:
        lease = client.ask("mount", uenv="old/2", view="missing")["lease"]
        error = client.ask("wait", lease=lease)["error"]
        assert error["code"] == "unknown-view"
        assert "default" in error["hint"]


def test_an_image_for_another_processor_is_refused_on_the_node(
    daemon: Daemon, public_dir: Path, registry: str
) -> None:
    publisher = Publisher(registry)
    image = simple_image(public_dir / "far.squashfs", "far", "far")
    publisher.push(image, "far/1", "v1", uarch="gh200")
    publisher.push(image, "told/1", "v1", architecture="riscv64")
    assert daemon.ask("resolve", uenv="far/1")[
        "ok"
    ]  # a login node may be of another kind than the compute nodes
    for label in ("far/1", "told/1"):
        with daemon.client() as client:
            error = client.ask("mount", uenv=label)["error"]
            assert error["code"] == "wrong-architecture"
            assert "this node has" in error["message"]


def test_two_microarchitectures_are_ambiguous_until_one_is_named(
    daemon: Daemon, public_dir: Path, registry: str
) -> None:
    publisher = Publisher(registry)
    publisher.push(simple_image(public_dir / "1.squashfs", "both", "one"), "both/1", "v1", uarch="zen2")
    publisher.push(simple_image(public_dir / "2.squashfs", "both", "two"), "both/1", "v1", uarch="zen3")
    error = daemon.ask("resolve", uenv="both/1")["error"]
    assert error["code"] == "ambiguous-label"
    assert "%zen2" in error["message"]
    assert "%zen3" in error["message"]
    assert daemon.ask("resolve", uenv="both/1%zen3")["ok"]


def test_the_cache_is_listed_inspected_pinned_and_emptied(daemon: Daemon, app: str) -> None:
    assert daemon.ask("images")["records"] == []
    (record,) = daemon.ask("find", uenv="ap")["records"]
    assert (record["name"], record["version"], record["tag"], record["cached"]) == ("app", "1.0", "v1", False)
    pulled = daemon.ask("pull", uenv="app/1.0")
    assert pulled["images"][0]["cached"] is True
    (record,) = daemon.ask("images")["records"]
    assert (record["digest"], record["cached"], record["pinned"]) == (app, True, False)
    inspected = daemon.ask("inspect", uenv="app/1.0")
    assert inspected["mount"] == MOUNT_POINT
    assert [view["name"] for view in inspected["views"]] == ["default", "plain"]
    assert daemon.ask("pin", uenv="app/1.0", pin=True)["ok"]
    assert daemon.ask("evict", uenv="app/1.0")["error"]["code"] == "in-use"
    assert daemon.ask("pin", uenv="app/1.0", pin=False)["ok"]
    with daemon.client() as client:
        client.ask("wait", lease=client.ask("mount", uenv="app/1.0")["lease"])
        error = daemon.ask("evict", uenv="app/1.0")["error"]
        assert error["code"] == "in-use"
    until(lambda: daemon.ask("evict", uenv="app/1.0")["ok"], "evicted once the lease is gone")
    assert daemon.ask("images")["records"] == []


def test_a_job_gets_the_same_answer_from_a_daemon_that_was_restarted(
    daemon: Daemon, public_dir: Path, registry: str
) -> None:
    """What a job was told where it was submitted without a uenvd; its tag moves, and the node's daemon is killed."""
    publisher = Publisher(registry)
    first = publisher.push(simple_image(public_dir / "p1.squashfs", "p", "one"), "promised/1", "v1")

    def resolved(job: int) -> str:
        answer = daemon.ask(
            "resolve", uenv="promised/1", job={"id": job, "step": 0}, uid=os.getuid(), refresh=True
        )
        return str(answer["images"][0]["digest"])

    assert resolved(7) == first
    second = publisher.push(simple_image(public_dir / "p2.squashfs", "p", "two"), "promised/1", "v1")
    daemon.kill()
    daemon.start()
    assert (resolved(8), resolved(7)) == (second, first)
