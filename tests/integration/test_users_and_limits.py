"""Who may do what: own files, speaking for others, limits, id maps of a session."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import support.daemon
from support.daemon import Client, Daemon, running_daemon
from support.fusetools import NOBODY, run_as, session, until
from support.lazyimage import push_lazy
from support.publishing import Publisher, simple_image
from support.registry import FakeRegistry
from support.users import ordinary_user

pytestmark = pytest.mark.usefixtures("node")

MOUNT_POINT = "/user-environment"


@pytest.fixture
def daemon(public_dir: Path) -> Iterator[Daemon]:
    registry = f"oci-layout:{public_dir / 'registry'}"
    Publisher(registry).push(simple_image(public_dir / "app.squashfs", "app", "hello"), "app/1.0", "v1")
    extra = "limits: {mounts: 2, files: 1, connections: 4}\nmounts: {linger: 100ms}\n"
    with running_daemon(public_dir / "uenvd", registry, extra=extra) as running:
        yield running


ASK = """
import sys, json
sys.path.insert(0, sys.argv.pop(1))
from support.daemon import Client
from pathlib import Path
path, *requests = sys.argv[1:]
client = Client(Path(path))
for request in requests:
    print(json.dumps(client.ask(**json.loads(request))), flush=True)
"""


def harness_for_all(daemon: Daemon) -> str:
    """Copy the client to where every user can import it, wherever the checkout is; return the directory for sys.path."""
    directory = daemon.workdir / "harness" / "support"
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    shutil.copy(support.daemon.__file__, directory / "daemon.py")
    return str(directory.parent)


def ask_as(uid: int, daemon: Daemon, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """Ask on one connection as another user."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            ASK,
            harness_for_all(daemon),
            str(daemon.socket_path),
            *map(json.dumps, requests),
        ],
        user=uid,
        group=uid,
        extra_groups=[],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=60,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def mount_file(daemon: Daemon, path: Path, uid: int) -> tuple[Client, dict[str, Any]]:
    client = daemon.client()
    answer = client.ask("mount", uenv=f"{path}:{MOUNT_POINT}", uid=uid)
    return client, client.ask("wait", lease=answer["lease"]) if answer["ok"] else answer


def test_an_ordinary_user_mounts_lists_and_looks(daemon: Daemon) -> None:
    mount, find, status = ask_as(
        NOBODY, daemon, {"op": "mount", "uenv": "app/1.0"}, {"op": "find"}, {"op": "status"}
    )
    assert mount["ok"]
    assert find["records"]
    assert status["leases"][0]["uid"] == NOBODY


def test_what_is_roots_is_refused_to_others(daemon: Daemon) -> None:
    answers = ask_as(
        NOBODY,
        daemon,
        {"op": "evict", "uenv": "app/1.0"},
        {"op": "pin", "uenv": "app/1.0", "pin": True},
        {"op": "mount", "uenv": "app/1.0", "uid": 0},
    )
    assert [answer["error"]["code"] for answer in answers] == ["access-denied"] * 3


def test_somebody_elses_lease_cannot_be_waited_for(daemon: Daemon) -> None:
    with daemon.client() as client:
        lease = client.ask("mount", uenv="app/1.0")["lease"]
        (answer,) = ask_as(NOBODY, daemon, {"op": "wait", "lease": lease})
        assert answer["error"]["code"] == "session"
        (guess,) = ask_as(NOBODY, daemon, {"op": "wait", "lease": "0" * 32})
        assert guess == answer  # a stranger does not even learn whether a lease exists


def test_mounts_of_one_user_are_limited_and_given_back(daemon: Daemon) -> None:
    mount = {"op": "mount", "uenv": "app/1.0"}
    answers = ask_as(NOBODY, daemon, mount, mount, mount)
    assert [answer["ok"] for answer in answers] == [True, True, False]
    assert answers[2]["error"]["code"] == "limit"
    until(lambda: daemon.ask("status")["leases"] == [], "the leases end with the connection")
    assert ask_as(NOBODY, daemon, mount)[0]["ok"]


def test_files_of_one_user_are_limited_more_and_end_at_once(daemon: Daemon, public_dir: Path) -> None:
    for number in range(2):
        simple_image(public_dir / f"{number}.squashfs", "own", "mine")
    first, second = (
        {"op": "mount", "uenv": f"{public_dir}/{number}.squashfs:{MOUNT_POINT}"} for number in range(2)
    )
    answers = ask_as(NOBODY, daemon, first, second, {"op": "mount", "uenv": "app/1.0"})
    assert [answer["ok"] for answer in answers] == [True, False, True]
    assert answers[1]["error"]["code"] == "limit"
    assert "files of one's own" in answers[1]["error"]["message"]
    until(
        lambda: not [image for image in daemon.ask("status")["images"] if image["digest"] is None],
        "the file's worker ends",
    )


CONNECT = """
import sys
sys.path.insert(0, sys.argv[1])
from support.daemon import Client
from pathlib import Path
clients = [Client(Path(sys.argv[2])) for _ in range(4)]
assert all(client.ask("status")["ok"] for client in clients)
print(Client(Path(sys.argv[2])).receive()["error"]["code"])
clients.pop().close()
while not (again := Client(Path(sys.argv[2])).ask("status"))["ok"]:
    pass
print("ok")
"""


def test_connections_of_one_user_are_limited_and_given_back(daemon: Daemon) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CONNECT, harness_for_all(daemon), str(daemon.socket_path)],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == ["limit", "ok"], done.stderr
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(daemon.client()) for _ in range(6)]
        assert all(client.ask("status")["ok"] for client in clients), "root is exempt"


@pytest.mark.parametrize("lazy", ["auto", "off"])
def test_images_that_come_because_of_one_user_are_limited(public_dir: Path, lazy: str) -> None:
    with FakeRegistry() as fake:
        first, second = (push_lazy(fake, public_dir, files=3, name=name) for name in ("one", "two"))
        slow = [fake.spoil(image.blob_path, bytes_per_s=1_000_000) for image in (first, second)]
        extra = f"limits: {{pulls: 1}}\nmounts: {{linger: 100ms}}\nlazy: {lazy}\n"
        with running_daemon(public_dir / "uenvd", fake.url, extra=extra) as daemon, daemon.client() as client:
            one, two = ({"op": "mount", "uenv": f"{name}/1.0", "uid": NOBODY} for name in ("one", "two"))
            assert client.ask(**one)["ok"]
            with daemon.client() as other:
                refused = other.ask(**two)
                assert refused["error"]["code"] == "limit", refused
                assert "on their way" in refused["error"]["message"]
                assert other.ask("mount", uenv="two/1.0", uid=1)["ok"], "others are not concerned"
            for rule in slow:
                rule.bytes_per_s = None
            fake.hang_up()
            with daemon.client() as other:
                until(lambda: other.ask(**two)["ok"], "the first one is here", 30)


def test_memory_for_files_of_ones_own_is_limited_and_bounded(public_dir: Path) -> None:
    registry = f"oci-layout:{public_dir / 'registry'}"
    Publisher(registry).push(simple_image(public_dir / "app.squashfs", "app", "hello"), "app/1.0", "v1")
    mounts = [
        {
            "op": "mount",
            "uenv": f"{simple_image(public_dir / f'{n}.squashfs', 'own', 'mine')}:{MOUNT_POINT}",
        }
        for n in range(3)
    ]
    extra = (
        "limits: {memory: 1100MiB}\nworker: {user: nobody, cache: 8MiB, count: 2}\nmounts: {linger: 100ms}\n"
    )
    with running_daemon(public_dir / "uenvd", registry, extra=extra) as daemon:
        answers = ask_as(NOBODY, daemon, *mounts, {"op": "mount", "uenv": "app/1.0"})
        assert [answer["ok"] for answer in answers] == [True, True, False, True], answers
        assert answers[2]["error"]["code"] == "limit"
        assert "limits.memory" in answers[2]["error"]["hint"]
        with daemon.client() as client:
            lease = client.ask("mount", uenv=str(mounts[0]["uenv"]), uid=NOBODY)["lease"]
            assert client.ask("wait", lease=lease)["ok"]
            for pid in daemon.workers():
                (line,) = (
                    line
                    for line in Path(f"/proc/{pid}/limits").read_text().splitlines()
                    if "data size" in line
                )
                assert line.split()[3] == str((192 + 16) << 20), "what it counts as is what it can have"


def test_a_users_own_file_is_read_with_his_rights_and_served_out_of_his_reach(
    daemon: Daemon, public_dir: Path
) -> None:
    own = simple_image(public_dir / "own.squashfs", "own", "mine")
    own.chmod(0o600)
    with ordinary_user(public_dir) as user:
        os.chown(own, user.uid, user.gid)
        client, done = mount_file(daemon, own, user.uid)
        with client:
            assert done["ok"], done
            (worker,) = daemon.workers()
            assert (
                Path(f"/proc/{worker}/status").read_text().split("Uid:")[1].split()[:4] == [str(NOBODY)] * 4
            )
            # A worker that its user can stop is a mount on which root's part of a job step hangs.
            attempt = run_as(user.uid, f"import os; os.kill({worker}, 19)")
            assert "PermissionError" in attempt.stderr
            with session(user.uid, client.descriptors[0], MOUNT_POINT) as inside:
                assert inside.eval(f"open('{MOUNT_POINT}/word').read()") == "mine"
    assert daemon.ask("images")["records"] == []  # never in the shared cache


def test_a_file_of_the_users_group_is_read_with_his_groups(daemon: Daemon, public_dir: Path) -> None:
    shared = simple_image(public_dir / "shared.squashfs", "shared", "ours")
    shared.chmod(0o640)
    with ordinary_user(public_dir, extra_group=True) as member, ordinary_user(public_dir) as stranger:
        os.chown(shared, 0, member.groups[0])
        for user, is_allowed in ((member, True), (stranger, False)):
            client, done = mount_file(daemon, shared, user.uid)
            with client:
                assert done["ok"] is is_allowed, done


def test_others_do_not_learn_of_a_users_files(daemon: Daemon, public_dir: Path) -> None:
    own = simple_image(public_dir / "own.squashfs", "own", "mine")
    client, done = mount_file(daemon, own, NOBODY)
    with client:
        assert done["ok"]
        (stranger,) = ask_as(NOBODY - 1, daemon, {"op": "status"})
        (owner,) = ask_as(NOBODY, daemon, {"op": "status"})
        assert stranger["images"] == stranger["leases"] == []
        assert [lease["labels"] for lease in owner["leases"]] == [[str(own)]]


def test_root_opens_no_file_for_a_user(daemon: Daemon, public_dir: Path) -> None:
    secret = simple_image(public_dir / "secret.squashfs", "secret", "roots")
    secret.chmod(0o600)
    client, done = mount_file(daemon, secret, NOBODY)
    with client:
        assert not done["ok"]
        assert done["error"]["code"] == "access-denied"
        assert "secret.squashfs" in done["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"hsqs", b"#!/bin/sh\n" * 100])
def test_what_is_no_squashfs_is_refused_clearly(daemon: Daemon, public_dir: Path, content: bytes) -> None:
    path = public_dir / "not.squashfs"
    path.write_bytes(content)
    path.chmod(0o644)
    client, done = mount_file(daemon, path, NOBODY)
    with client:
        assert done["error"]["code"] == "bad-image"
        assert done["error"]["hint"]


def test_a_file_that_is_not_there_says_so(daemon: Daemon, public_dir: Path) -> None:
    client, done = mount_file(daemon, public_dir / "absent.squashfs", NOBODY)
    with client:
        assert not done["ok"]
        assert "absent.squashfs" in done["error"]["message"]


def test_a_fifo_as_image_blocks_nobody(daemon: Daemon, public_dir: Path) -> None:
    fifo = public_dir / "fifo.squashfs"
    os.mkfifo(fifo, 0o666)
    client, done = mount_file(daemon, fifo, NOBODY)
    with client:
        assert not done["ok"]
    assert daemon.ask("status")["ok"]


def test_workers_of_shared_images_are_nobody_in_particular(daemon: Daemon) -> None:
    with daemon.client() as client:
        client.ask("wait", lease=client.ask("mount", uenv="app/1.0")["lease"])
        (worker,) = daemon.workers()
        status = Path(f"/proc/{worker}/status").read_text()
        fields = {line.split(":")[0]: line.split(":")[1].split() for line in status.splitlines()}
        assert fields["Uid"] == [str(NOBODY)] * 4
        assert fields["Groups"] == []
        assert {fields[name][0] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert fields["NoNewPrivs"] == ["1"]
        assert os.readlink(f"/proc/{worker}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
        assert daemon.process is not None
        assert os.readlink(f"/proc/{worker}/ns/mnt") != os.readlink(f"/proc/{daemon.process.pid}/ns/mnt")


IDMAP = """
import os, sys, json
sys.path.insert(0, sys.argv[1])
from support.daemon import Client
from pathlib import Path
from uenvd import mounts
client = Client(Path(sys.argv[2]))
mounts.unshare(mounts.CLONE_NEWUSER | mounts.CLONE_NEWNS)
answer = client.ask("idmap")
try:
    os.setgroups([])
    dropped = True
except PermissionError:
    dropped = False
project = int(sys.argv[3])
os.chown(sys.argv[4], -1, project)
print(json.dumps({"answer": answer, "uid": os.getuid(), "gid": os.getgid(), "groups": sorted(os.getgroups()), "dropped": dropped,
                  "again": client.ask("idmap")}))
"""


def test_a_session_keeps_its_groups(daemon: Daemon, public_dir: Path) -> None:
    with ordinary_user(public_dir, extra_group=True) as user:
        mine = public_dir / "mine"
        mine.touch()
        os.chown(mine, user.uid, user.gid)
        (project,) = user.groups
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                IDMAP,
                harness_for_all(daemon),
                str(daemon.socket_path),
                str(project),
                str(mine),
            ],
            user=user.uid,
            group=user.gid,
            extra_groups=[project],
            capture_output=True,
            text=True,
            cwd="/",
            check=False,
        )
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["answer"]["ok"]
        assert (told["uid"], told["gid"]) == (user.uid, user.gid)
        assert set(told["groups"]) == {project}
        assert not told["dropped"]  # a user may not shed a group that denies him something
        assert not told["again"]["ok"]
        assert mine.stat().st_gid == project


def test_an_id_map_is_written_for_the_asking_process_only(daemon: Daemon) -> None:
    (answer,) = ask_as(NOBODY, daemon, {"op": "idmap"})  # made no user namespace
    assert answer["error"]["code"] == "mount-failed"
    assert run_as(NOBODY, "print('ok')").stdout == "ok\n"
