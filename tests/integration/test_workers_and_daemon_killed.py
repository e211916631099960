"""Whoever serves an image is killed, again and again, while eight readers check every byte: no read fails, none is wrong, none is stuck.

``UENVD_KILLS=200/20`` runs the full campaign (processes/daemons); without it a short one runs.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support import images
from support.daemon import Client, Daemon, running_daemon
from support.fusetools import NOBODY, Session, session, until
from support.publishing import Publisher, env_json, make_squashfs
from support.readers import readers
from support.supervised import group_of, wait_gone
from support.users import ordinary_user

pytestmark = pytest.mark.usefixtures("node")

MOUNT_POINT = "/user-environment"
EXTRA = "worker: {{user: nobody, grace: {grace}, count: 2}}\nfuse: {{resend: {resend}}}\n"
POISON = """
import os
from uenvd.fuse.answers import Answers
real = Answers.answer
def answer(self, request, length):
    if bytes(request[40:length]).startswith(b'poison'):
        os._exit(3)
    return real(self, request, length)
Answers.answer = answer
"""
"""``sitecustomize`` of an image's processes."""
FILES = {f"file{number}": images.content((number % 7 + 1) * 40_000, number) for number in range(60)}
SUMS = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
PROCESSES = 4
"""Supervisor, standby, two workers."""
READ_ALL = f"[len(open('{MOUNT_POINT}/' + name, 'rb').read()) for name in sorted(os.listdir('{MOUNT_POINT}')) if name[:4] == 'file']"
SIZES = [len(FILES[name]) for name in sorted(FILES)]


def _size() -> tuple[int, int]:
    processes, _slash, daemons = os.environ.get("UENVD_KILLS", "12/2").partition("/")
    return int(processes), int(daemons or 0)


@contextmanager
def serving(public_dir: Path, *, resend: str = "on", grace: str = "60s", extra: str = "") -> Iterator[Daemon]:
    """A daemon with an image ``app/1.0`` in its registry; everything is gone at the end."""
    registry = f"oci-layout:{public_dir / 'registry'}"
    image = make_squashfs(
        public_dir / "app.squashfs", {**FILES, "word": b"hello"}, meta=env_json("app", mount=MOUNT_POINT)
    )
    Publisher(registry).push(image, "app/1.0", "v1")
    groups: set[int] = set()
    with running_daemon(
        public_dir / "uenvd", registry, extra=EXTRA.format(resend=resend, grace=grace) + extra
    ) as daemon:
        daemon.groups = groups  # type: ignore[attr-defined]
        try:
            yield daemon
        except BaseException:
            print(daemon.log[-20_000:])
            raise
        finally:
            for group in groups:
                try:
                    os.killpg(group, signal.SIGKILL)
                except ProcessLookupError:
                    continue


@pytest.fixture
def daemon(public_dir: Path) -> Iterator[Daemon]:
    with serving(public_dir) as running:
        yield running


def mounted(daemon: Daemon) -> Client:
    client = daemon.client()
    lease = client.ask("mount", uenv="app/1.0")["lease"]
    assert client.ask("wait", lease=lease)["ok"]
    group(daemon)
    return client


def group(daemon: Daemon) -> int:
    """Return the process group of the image's supervisor."""

    def lives() -> int:
        (supervisor,) = daemon.workers() or [0]
        with suppress(ProcessLookupError):
            return os.getpgid(supervisor) if supervisor else 0
        return 0

    pgid: int = until(lives, "a supervisor")
    daemon.groups.add(pgid)  # type: ignore[attr-defined]
    return pgid


def healed(daemon: Daemon, pgid: int = 0) -> list[int]:
    """Wait until all processes of an image are there; the first is its process group. Without a daemon it is that of ``pgid``."""

    def whole() -> list[int]:
        leader = group(daemon) if daemon.process is not None else pgid
        found = group_of(leader)
        return [leader, *found] if len(found) == PROCESSES else []

    members: list[int] = until(whole, "an image has all its processes")
    return members


def test_all_processes_of_an_image_killed_at_once(daemon: Daemon) -> None:
    with mounted(daemon) as client, session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
        pgid = healed(daemon)[0]
        os.killpg(pgid, signal.SIGKILL)
        assert inside.eval(READ_ALL) == SIZES
        until(lambda: healed(daemon)[0] != pgid, "another group")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_next_daemon_adopts_what_it_finds(daemon: Daemon, number: signal.Signals) -> None:
    """It shows it, serves new users on the same connection, and restarts it when all of it is killed."""
    with mounted(daemon) as client, session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
        (before,) = daemon.ask("status")["images"]
        healed(daemon)
        daemon.stop() if number == signal.SIGTERM else daemon.kill()
        client.close()
        assert inside.eval(READ_ALL) == SIZES
        daemon.start()
        (after,) = daemon.ask("status")["images"] or pytest.fail(daemon.log[-4000:])
        assert after == before | {"leases": 0, "done_bytes": after["done_bytes"]}
        with mounted(daemon) as again, session(NOBODY, again.descriptors[0], MOUNT_POINT) as other:
            assert daemon.workers() == [before["worker"]]
            assert other.eval(READ_ALL) == SIZES
            assert inside.eval("os.stat('.').st_dev") is not None
            place = f"os.stat('{MOUNT_POINT}').st_dev"
            assert inside.eval(place) == other.eval(place)
            os.killpg(group(daemon), signal.SIGKILL)
            drop = f"[os.posix_fadvise(os.open('{MOUNT_POINT}/' + name, 0), 0, 0, 4) for name in sorted(os.listdir('{MOUNT_POINT}'))]"
            inside.eval(drop)
            assert inside.eval(READ_ALL) == other.eval(READ_ALL) == SIZES


def mounts_held(pgid: int) -> int:
    """Return how many detached mounts the processes of an image hold: descriptors of the root of a tree."""
    held = 0
    for pid in group_of(pgid):
        with suppress(FileNotFoundError):  # a standby that was replaced meanwhile
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(FileNotFoundError):
                    held += os.readlink(link) == "/"
    return held


@contextmanager
def newcomer(daemon: Daemon) -> Iterator[Session]:
    """A further user, whatever connection he gets."""
    with daemon.client() as client:
        lease = client.ask("mount", uenv="app/1.0")["lease"]
        assert client.ask("wait", lease=lease)["ok"]
        daemon.groups.update(map(os.getpgid, daemon.workers()))  # type: ignore[attr-defined]
        with session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
            yield inside


def image_of(user: Session) -> int:
    """Return the device number of the connection that a user has."""
    number: int = user.eval(f"os.stat('{MOUNT_POINT}').st_dev")
    return number


def test_adoption_after_the_grace_time_leaves_users_their_image(public_dir: Path) -> None:
    """Without a mount nobody new can come to the connection; its users stay, others get one of their own."""
    with (
        serving(public_dir, grace="0.3s") as daemon,
        mounted(daemon) as client,
        session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside,
    ):
        pgid = healed(daemon)[0]
        assert mounts_held(pgid) > 0
        daemon.kill()
        client.close()
        until(lambda: not mounts_held(pgid), "the grace time is over")
        daemon.start()
        with newcomer(daemon) as other:
            assert other.eval(READ_ALL) == inside.eval(READ_ALL) == SIZES
            assert image_of(other) != image_of(inside)


def test_image_evicted_while_it_is_adopted(daemon: Daemon) -> None:
    """Its users' leases died with the former daemon; the lock that its processes hold keeps it in the cache."""
    with mounted(daemon) as client, session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
        healed(daemon)
        daemon.kill()
        client.close()
        daemon.start()
        refused = daemon.ask("evict", uenv="app/1.0")
        assert refused["error"]["code"] == "in-use"
        assert inside.eval(READ_ALL) == SIZES
        with newcomer(daemon) as other:
            assert other.eval(READ_ALL) == SIZES


def test_supervisor_of_another_version_is_left_to_its_users(
    public_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_version = public_dir / "other"
    other_version.mkdir()
    (other_version / "sitecustomize.py").write_text(
        "from uenvd import handover\nhandover.SUPERVISOR_VERSION = 99\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(other_version))
    with (
        serving(public_dir) as daemon,
        mounted(daemon) as client,
        session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside,
    ):
        healed(daemon)
        daemon.kill()
        client.close()
        monkeypatch.delenv("PYTHONPATH")
        daemon.start()
        assert "speaks version 99" in daemon.log
        assert daemon.ask("status")["images"] == []
        with newcomer(daemon) as other:
            assert other.eval(READ_ALL) == inside.eval(READ_ALL) == SIZES
            assert image_of(other) != image_of(inside)


def test_request_that_kills_its_workers_is_an_error_for_its_user_only(
    public_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harm = public_dir / "harm"
    harm.mkdir()
    (harm / "sitecustomize.py").write_text(POISON)
    monkeypatch.setenv("PYTHONPATH", str(harm))
    with serving(public_dir) as daemon, mounted(daemon) as client:
        monkeypatch.delenv("PYTHONPATH")
        with session(NOBODY, client.descriptors[0], MOUNT_POINT) as user:
            assert user.eval(f"os.listdir('{MOUNT_POINT}/poison')") == {"errno": errno.EIO}
            assert user.eval(READ_ALL) == SIZES
            counted = 'uenvd_takeovers_total{what="worker"} 3'
            until(lambda: counted in daemon.ask("metrics")["text"], "the deaths are counted")


def test_own_file_of_a_user_is_served_whoever_is_killed(daemon: Daemon, public_dir: Path) -> None:
    """It was opened with that user's rights; the processes that serve it have others, and never open it again."""
    image = public_dir / "app.squashfs"
    image.chmod(0o400)
    with ordinary_user(public_dir) as owner, daemon.client() as client:
        os.chown(image, owner.uid, owner.gid)
        answer = client.ask("mount", uenv=f"{image}:{MOUNT_POINT}", uid=owner.uid)
        assert client.ask("wait", lease=answer["lease"])["ok"]
        with session(owner.uid, client.descriptors[0], MOUNT_POINT) as user:
            for victim in range(PROCESSES):
                os.kill(healed(daemon)[1:][victim], signal.SIGKILL)
                assert user.eval(READ_ALL) == SIZES


@pytest.mark.parametrize("resend", ["on", "off"])
def test_no_read_fails_whoever_is_killed(public_dir: Path, resend: str) -> None:
    """Workers, supervisors, standbys and the daemon; with and without a daemon in between; now and then all at once."""
    processes, daemons = _size()
    dice = random.Random(7)
    plan = ["process"] * processes + ["daemon"] * daemons
    dice.shuffle(plan)
    with serving(public_dir, resend=resend) as daemon, mounted(daemon) as client:
        pgid = group(daemon)
        killed = {"process": 0, "daemon": 0, "all": 0}
        with readers(client.descriptors[0], MOUNT_POINT, SUMS) as reading:
            client.close()
            time_down = 0
            for step, what in enumerate(plan):
                if daemon.process is not None:
                    pgid = group(daemon)
                if what == "daemon" and daemon.process is not None:
                    pgid = healed(daemon)[0]
                    daemon.kill()
                    time_down = dice.randrange(3)
                elif daemon.process is not None and step % 40 == 20:
                    pgid = healed(daemon)[0]
                    os.killpg(pgid, signal.SIGKILL)
                    what = "all"
                    wait_gone(pgid)
                    pgid = group(daemon)
                else:
                    victim = dice.choice(
                        healed(daemon, pgid)[1:] if daemon.process is None else group_of(pgid) or [0]
                    )
                    if victim:
                        with suppress(ProcessLookupError):  # it was about to end with its supervisor
                            os.kill(victim, signal.SIGKILL)
                    what = "process"
                killed[what] += 1
                time.sleep(dice.uniform(0.02, 0.12))  # no synchronisation: the moment of harm is random
                if daemon.process is None:
                    if time_down == 0:
                        daemon.start()
                    time_down -= 1
            if daemon.process is None:
                daemon.start()
            pgid = healed(daemon)[0]
            told = reading.stop()
        print(f"\nkilled {killed}: {told}")
        assert (told.failed, told.wrong, told.errors) == (0, 0, [])
        assert told.reads > len(plan)
        states = {
            pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in group_of(pgid)
        }
        assert "D" not in states.values()
        daemon.stop()
        wait_gone(pgid)
