"""A worker and its parent: setup, report, and what happens when either is not as the other expects."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support import images
from support.fusetools import (
    ENTER_NAMESPACE,
    NOBODY,
    SOMEBODY,
    has_ended,
    open_to_all,
    run_as,
    session,
    until,
)
from support.minidaemon import report_of, start_worker
from uenvd import mounts
from uenvd.errors import AccessDenied, FormatError, ProtocolError, UsageError, WorkerFailed
from uenvd.handover import WorkerSetup, send_setup

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="plays a parent that is root")

META = {
    "name": "test",
    "description": "an image",
    "mount": "/user-environment",
    "default-view": "default",
    "views": {
        "default": {"description": "all", "env": {"version": 1, "values": {"scalar": {"X": "y"}, "list": {}}}}
    },
}


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody can enter, with an image ``i`` that has metadata."""
    open_to_all()
    with tempfile.TemporaryDirectory() as base:
        path = Path(base)
        path.chmod(0o755)
        tree = path / "tree"
        (tree / "meta").mkdir(parents=True)
        (tree / "meta" / "env.json").write_text(json.dumps(META))
        (tree / "file").write_text("content\n")
        (tree / "big").write_bytes(images.content(1 << 20, 1))
        images.make_image(tree, path / "i").chmod(0o644)
        yield path


class Started:
    """A worker, the mount that waits for it, and the parent's ends."""

    def __init__(self) -> None:
        self.fuse = mounts.open_fuse_device()
        self.mount = mounts.fuse_mount(self.fuse, source="image of a test")
        self.process, self.channel = start_worker()

    def send(self, setup: WorkerSetup, *more: int) -> None:
        send_setup(self.channel, setup, [self.fuse, *more])
        os.close(self.fuse)
        self.fuse = -1


@contextmanager
def started() -> Iterator[Started]:
    worker = Started()
    try:
        yield worker
    finally:
        for fd in (worker.fuse, worker.mount):
            with suppress(OSError):
                os.close(fd)
        worker.channel.close()
        try:
            worker.process.wait(5)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
            raise


def test_report_holds_the_metadata_and_the_end_is_clean(place: Path) -> None:
    with started() as worker:
        image = os.open(place / "i", os.O_RDONLY)
        worker.send(WorkerSetup(("fuse", "image"), uid=NOBODY, gid=NOBODY), image)
        os.close(image)
        report = report_of(worker.channel)
        assert report.error is None
        assert report.meta is not None
        assert (report.meta.mount, report.meta.default_view) == ("/user-environment", "default")
        assert report.meta.views[0].ops == (("set", "X", "y"),)
        with session(NOBODY, worker.mount, "/mnt") as user:
            os.close(worker.mount)
            assert user.eval("open('/mnt/file').read()") == "content\n"
        assert worker.process.wait(10) == 0
        assert worker.channel.recv(1) == b"", "EOF is the worker's end"


def test_reader_that_came_before_the_worker_is_served(place: Path) -> None:
    """The mount is handed out at once; whoever looks into it waits until the image is there."""
    with started() as worker, session(0, worker.mount, "/mnt") as user:
        assert user.process.stdin is not None
        user.process.stdin.write("open('/mnt/file').read()\n")
        user.process.stdin.flush()
        state = Path(f"/proc/{user.process.pid}/stat")
        until(
            lambda: state.read_text().rpartition(")")[2].split()[0] == "D",
            "the reader's waiting in the kernel",
        )
        worker.send(WorkerSetup(("fuse",), path=str(place / "i"), uid=NOBODY, gid=NOBODY))
        assert user.process.stdout is not None
        assert json.loads(user.process.stdout.readline()) == "content\n"
        os.close(worker.mount)


def test_spare_worker_ends_with_its_parent() -> None:
    process, channel = start_worker()
    channel.close()
    assert process.wait(10) == 0


@pytest.mark.parametrize("uid", [NOBODY, SOMEBODY])
def test_image_is_opened_as_the_user(place: Path, uid: int) -> None:
    os.chown(place / "i", NOBODY, NOBODY)
    (place / "i").chmod(0o600)
    with started() as worker:
        worker.send(WorkerSetup(("fuse",), path=str(place / "i"), uid=uid, gid=uid))
        report = report_of(worker.channel)
        if uid == NOBODY:
            assert report.error is None
        else:
            assert type(report.error) is AccessDenied
            assert worker.process.wait(10) == 1


def test_supplementary_groups_count(place: Path) -> None:
    os.chown(place / "i", 0, 4711)
    (place / "i").chmod(0o640)
    with started() as worker:
        worker.send(WorkerSetup(("fuse",), path=str(place / "i"), uid=NOBODY, gid=NOBODY, groups=(5, 4711)))
        assert report_of(worker.channel).error is None


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("missing", UsageError),
        ("tree", UsageError),
        ("fifo", UsageError),
        ("text", FormatError),
        ("i/x", UsageError),
    ],
)
def test_faults_before_serving_are_reported(place: Path, name: str, error: type[Exception]) -> None:
    (place / "text").write_text("no image" * 100)
    os.mkfifo(place / "fifo", 0o666)
    with started() as worker:
        worker.send(WorkerSetup(("fuse",), path=str(place / name), uid=NOBODY, gid=NOBODY, name="label"))
        report = report_of(worker.channel)
        assert type(report.error) is error
        assert worker.process.wait(10) == 1


def test_setups_that_make_no_sense() -> None:
    for setup, error in (
        (WorkerSetup(("fuse",)), WorkerFailed),
        (WorkerSetup(("image",), path="/x"), WorkerFailed),
        (WorkerSetup(("fuse",), path="/x", uid=NOBODY), WorkerFailed),
        (WorkerSetup(("fuse", "image")), ProtocolError),
    ):
        with started() as worker:
            worker.send(setup)
            assert type(report_of(worker.channel).error) is error
    with started() as worker:
        worker.channel.send(b'{"v": 1}')
        assert type(report_of(worker.channel).error) is ProtocolError


def test_oversized_metadata_is_a_note(place: Path) -> None:
    (place / "tree" / "meta" / "env.json").write_text(json.dumps({**META, "x": "x" * (2 << 20)}))
    images.make_image(place / "tree", place / "i2").chmod(0o644)
    with started() as worker:
        worker.send(WorkerSetup(("fuse",), path=str(place / "i2"), uid=NOBODY, gid=NOBODY))
        report = report_of(worker.channel)
        assert (report.error, report.meta) == (None, None)
        assert "too large" in report.notes[0]


def test_parent_that_dies_before_the_report_costs_no_reader(place: Path) -> None:
    with started() as worker:
        worker.process.send_signal(signal.SIGSTOP)
        worker.send(WorkerSetup(("fuse",), path=str(place / "i"), uid=NOBODY, gid=NOBODY))
        worker.channel.close()
        worker.process.send_signal(signal.SIGCONT)
        with session(0, worker.mount, "/mnt") as user:
            os.close(worker.mount)
            assert user.eval("open('/mnt/file').read()") == "content\n"
        assert worker.process.wait(10) == 0


def test_killed_worker_is_an_error_at_once_not_a_hang(place: Path) -> None:
    with started() as worker:
        worker.send(WorkerSetup(("fuse",), path=str(place / "i"), uid=NOBODY, gid=NOBODY))
        assert report_of(worker.channel).error is None
        with session(0, worker.mount, "/mnt") as user:
            assert user.eval("open('/mnt/file').read()") == "content\n"
            worker.process.kill()
            worker.process.wait()
            assert user.eval("open('/mnt/big').read()") == {"errno": errno.ENOTCONN}


def test_readers_that_are_killed_do_not_stop_the_others(place: Path) -> None:
    """Twenty rounds of four cold readers, three of them killed while they read."""
    code = ENTER_NAMESPACE + (
        "mounts.move_mount(fds[0], '/mnt')\n"
        "import signal, time\n"
        "for round in range(20):\n"
        "    children = []\n"
        "    for _ in range(4):\n"
        "        pid = os.fork()\n"
        "        if pid == 0:\n"
        "            fd = os.open('/mnt/big', os.O_RDONLY)\n"
        "            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)\n"
        "            for at in range(0, 1 << 20, 65536): os.pread(fd, 65536, at)\n"
        "            os._exit(0)\n"
        "        children.append(pid)\n"
        "    time.sleep(0.001 * (round % 5))\n"
        "    for pid in children[:3]: os.kill(pid, signal.SIGKILL)\n"
        "    statuses = [os.waitpid(pid, 0)[1] for pid in children]\n"
        "    assert statuses[3] == 0, statuses\n"
        "print('done')\n"
    )
    with started() as worker:
        worker.send(
            WorkerSetup(("fuse",), path=str(place / "i"), uid=NOBODY, gid=NOBODY, cache_bytes=1 << 20)
        )
        assert report_of(worker.channel).error is None
        done = run_as(0, code, [worker.mount])
        assert done.stdout == "done\n", done.stderr


def test_without_root_anywhere(place: Path) -> None:
    """All of it as an ordinary user: worker started first, mount made in his namespaces, image opened by his worker."""
    code = (
        "import os, socket, subprocess, sys, json\n"
        "from uenvd import mounts\nfrom uenvd.handover import WorkerReport, WorkerSetup, send_setup\n"
        "ids = os.getuid(), os.getgid()\n"
        "ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "worker = subprocess.Popen([sys.executable, '-m', 'uenvd.fuse.worker', '--supervised', str(theirs.fileno())],\n"
        "                          pass_fds=[theirs.fileno()])\n"
        "theirs.close()\n"
        "mounts.unshare(mounts.CLONE_NEWUSER | mounts.CLONE_NEWNS)\nmounts.map_self(*ids)\nmounts.make_rslave()\n"
        "fuse = mounts.open_fuse_device()\n"
        "mount = mounts.fuse_mount(fuse, source='uenvd:file', uid=ids[0], gid=ids[1])\n"
        f"send_setup(ours, WorkerSetup(('fuse',), path={str(place / 'i')!r}, mask_privileged=False), [fuse])\n"
        "os.close(fuse)\n"
        "ours.settimeout(20)\nreport = WorkerReport.decode(ours.recv(1 << 20))\n"
        "mounts.move_mount(mount, '/mnt')\nos.close(mount)\n"
        "print(report.error, report.meta.mount, open('/mnt/file').read().strip(), os.getuid(), worker.pid, flush=True)\n"
        "try: open(f'/proc/{worker.pid}/mem')\nexcept OSError as e: print('closed')\n"
    )
    done = run_as(NOBODY, code)
    lines = done.stdout.splitlines()
    assert lines[0].rpartition(" ")[0] == f"None /user-environment content {NOBODY}", done.stderr
    assert lines[1] == "closed"
    pid = int(lines[0].rpartition(" ")[2])
    until(lambda: has_ended(pid), "the worker's end after the last process of the namespace")


def test_without_libseccomp_a_worker_serves_and_says_so_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "pyseccomp.py").write_text("raise RuntimeError('Unable to find libseccomp')\n")
    monkeypatch.setenv("PYTHONPATH", str(place))
    with started() as worker:
        worker.send(WorkerSetup(("fuse",), path=str(place / "i"), uid=NOBODY, gid=NOBODY))
        assert report_of(worker.channel).error is None
        status = Path(f"/proc/{worker.process.pid}/status").read_text()
        assert "Seccomp:\t0\n" in status
        assert "NoNewPrivs:\t1\n" in status
        with session(NOBODY, worker.mount, "/mnt") as user:
            os.close(worker.mount)
            assert user.eval("open('/mnt/file').read()") == "content\n"
        assert worker.process.wait(10) == 0
    assert capfd.readouterr().err == (
        "uenvd-fs: system calls are not restricted: Unable to find libseccomp\n"
    )


def test_a_descriptor_that_is_no_mount(place: Path) -> None:
    process, channel = start_worker()
    fuse = mounts.open_fuse_device()
    send_setup(channel, WorkerSetup(("fuse",), path=str(place / "i"), uid=NOBODY, gid=NOBODY), [fuse])
    os.close(fuse)
    assert process.wait(10) == 1
    channel.close()
