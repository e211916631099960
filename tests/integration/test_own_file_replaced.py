"""All processes that serve a user's own file are killed at once: successors open the same file again, as him, or nobody gets a byte."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import Daemon, running_daemon
from support.fusetools import Session, session, until
from support.publishing import env_json, make_squashfs
from support.supervised import group_of, wait_gone
from support.users import TestUser, ordinary_user

pytestmark = pytest.mark.usefixtures("node")

MOUNT_POINT = "/user-environment"
PROCESSES = 4
"""Supervisor, standby, two workers."""
BALLAST = b"ballast " * 100_000


@pytest.fixture
def daemon(public_dir: Path) -> Iterator[Daemon]:
    with running_daemon(public_dir / "uenvd", f"oci-layout:{public_dir / 'registry'}") as running:
        yield running


@pytest.fixture
def owner(public_dir: Path) -> Iterator[TestUser]:
    with ordinary_user(public_dir) as user:
        yield user


@pytest.fixture
def image(public_dir: Path, owner: TestUser) -> Path:
    """An image that only its owner may read."""
    return make(owner.home / "app.squashfs", owner, "first")


def make(path: Path, owner: TestUser, word: str) -> Path:
    files = {"word": word.encode(), "other": word.encode(), "ballast": BALLAST}
    make_squashfs(path, files, meta=env_json("app", mount=MOUNT_POINT))
    path.chmod(0o400)
    os.chown(path, owner.uid, owner.gid)
    return path


def read(user: Session, name: str) -> object:
    return user.eval(f"open('{MOUNT_POINT}/{name}').read()")


def kill_all(daemon: Daemon) -> int:
    """Kill the processes that serve, all at once; return their group."""

    def whole() -> int:
        (supervisor,) = daemon.workers() or [0]
        return supervisor if supervisor and len(group_of(os.getpgid(supervisor))) == PROCESSES else 0

    group = os.getpgid(until(whole, "the image has all its processes"))
    os.killpg(group, signal.SIGKILL)
    wait_gone(group)
    return group


def test_same_file_is_served_again(daemon: Daemon, image: Path, owner: TestUser) -> None:
    with daemon.client() as client:
        answer = client.ask("mount", uenv=f"{image}:{MOUNT_POINT}", uid=owner.uid)
        assert client.ask("wait", lease=answer["lease"])["ok"]
        with session(owner.uid, client.descriptors[0], MOUNT_POINT) as user:
            assert read(user, "word") == "first"
            for _ in range(2):
                kill_all(daemon)
                user.eval(f"os.posix_fadvise(os.open('{MOUNT_POINT}/ballast', 0), 0, 0, 4)")
                assert user.eval(f"len(open('{MOUNT_POINT}/ballast').read())") == len(BALLAST)
            assert read(user, "other") == "first"


@pytest.mark.parametrize("harm", ["replaced", "written to", "removed", "closed to him"])
def test_another_file_is_not(daemon: Daemon, image: Path, owner: TestUser, harm: str) -> None:
    with daemon.client() as client:
        answer = client.ask("mount", uenv=f"{image}:{MOUNT_POINT}", uid=owner.uid)
        assert client.ask("wait", lease=answer["lease"])["ok"]
        with session(owner.uid, client.descriptors[0], MOUNT_POINT) as user:
            assert read(user, "word") == "first"
            match harm:
                case "replaced":
                    make(image.with_name("new"), owner, "other").rename(image)
                case "written to":
                    with image.open("r+b") as file:
                        file.write(file.read(1))
                case "removed":
                    image.unlink()
                case _:
                    image.chmod(0)
                    os.chown(image, 0, 0)
            kill_all(daemon)
            assert read(user, "other") == {"errno": errno.EIO}
            assert user.eval(f"os.listdir('{MOUNT_POINT}/nothing')") == {"errno": errno.EIO}
            assert "it cannot be served any more, its users get EIO" in daemon.log
            until(lambda: daemon.ask("status")["images"] == [], "the daemon has let go of it")
            assert read(user, "other") == {"errno": errno.EIO}, "without the daemon, too"
            if harm == "replaced":
                with daemon.client() as again:
                    answer = again.ask("mount", uenv=f"{image}:{MOUNT_POINT}", uid=owner.uid)
                    assert again.ask("wait", lease=answer["lease"])["ok"]
                    with session(owner.uid, again.descriptors[0], MOUNT_POINT) as other:
                        assert read(other, "word") == "other"
                    assert read(user, "other") == {"errno": errno.EIO}
