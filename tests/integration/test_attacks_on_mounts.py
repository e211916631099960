"""What an ordinary user tries with a mount that he was handed, and what becomes of mounts and workers when others end (design.md 12)."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
from support.minidaemon import MiniDaemon, mini_daemon
from uenvd import mounts

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="plays the daemon, which is root")

TARGET = "/mnt"

ATTACK = (
    ENTER_NAMESPACE
    + """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
mounts.move_mount(fds[0], '/mnt')
def attempt(function, *args, **kwargs):
    try: function(*args, **kwargs)
    except OSError as error: return errno.errorcode[error.errno]
    return 'done'
def remount(flags):
    if libc.mount(None, b'/mnt', None, ctypes.c_ulong(flags), None): raise OSError(ctypes.get_errno(), 'mount')
MS_BIND, MS_REMOUNT, RO, NOSUID, NODEV = 4096, 32, 1, 2, 4
told = {
    'remount rw': attempt(remount, MS_REMOUNT | MS_BIND | NOSUID | NODEV),
    'remount suid': attempt(remount, MS_REMOUNT | MS_BIND | RO | NODEV),
    'remount dev': attempt(remount, MS_REMOUNT | MS_BIND | RO | NOSUID),
    'setattr rw': attempt(mounts.mount_setattr, '/mnt', clear_bits=mounts.MOUNT_ATTR_RDONLY),
    'setattr suid': attempt(mounts.mount_setattr, '/mnt', clear_bits=mounts.MOUNT_ATTR_NOSUID),
    'setattr dev': attempt(mounts.mount_setattr, '/mnt', clear_bits=mounts.MOUNT_ATTR_NODEV),
}
copy = mounts.open_tree_clone('/mnt')
told['setattr on a copy'] = attempt(mounts.mount_setattr, copy, clear_bits=mounts.IMAGE_ATTRIBUTES)
told['superblock rw'] = attempt(remount, MS_REMOUNT | NOSUID | NODEV)
told['write'] = attempt(open, '/mnt/file', 'r+')
told['device'] = attempt(os.open, '/mnt/disk', os.O_RDONLY)
info = os.stat('/mnt/disk')
told['rdev'] = [os.major(info.st_rdev), os.minor(info.st_rdev)]
told['suid'] = oct(os.stat('/mnt/suid').st_mode & 0o7777)
told['xattrs'] = os.listxattr('/mnt/suid')
told['capability'] = attempt(os.getxattr, '/mnt/suid', 'security.capability')
told['options'] = [l.split()[5] for l in open('/proc/self/mountinfo') if l.split()[4] == '/mnt'][0]
print(json.dumps(told))
"""
)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with a block device (major 1, a RAM disk's: nothing is lost if an attack works), a setuid file with capabilities, data."""
    open_to_all()
    base = tmp_path_factory.mktemp("attacks")
    tree = base / "tree"
    tree.mkdir()
    (tree / "file").write_text("content\n")
    (tree / "large").write_bytes(os.urandom(3 << 20))
    os.mknod(tree / "disk", stat.S_IFBLK | 0o666, os.makedev(1, 0))
    os.chmod(tree / "disk", 0o666)
    (tree / "suid").write_text("#!/bin/sh\n")
    os.setxattr(
        tree / "suid", "security.capability", bytes.fromhex("0000000200200000000000000000000000000000")
    )
    (tree / "suid").chmod(0o4755)
    path = base / "image.squashfs"
    subprocess.run(
        ["mksquashfs", str(tree), str(path), "-quiet", "-no-progress"],
        check=True,
        env={"PATH": os.environ["PATH"]},
    )
    return path


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[MiniDaemon]:
    """The mount side of the daemon."""
    with mini_daemon(tmp_path / "work") as running:
        yield running


def attack(fd: int) -> dict[str, Any]:
    done = run_as(NOBODY, ATTACK, [fd])
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_flags_of_a_clone_cannot_be_cleared_and_nothing_privileged_shows(
    daemon: MiniDaemon, image: Path
) -> None:
    daemon.add("a", image)
    clone = daemon.clone("a")
    told = attack(clone)
    os.close(clone)
    assert told["options"].startswith("ro,nosuid,nodev")
    for attempt in ("remount rw", "remount suid", "remount dev", "setattr rw", "setattr suid", "setattr dev"):
        assert told[attempt] == "EPERM", attempt
    assert told["setattr on a copy"] == told["superblock rw"] == "EPERM"
    assert told["write"] == "EROFS"
    assert told["device"] == "EACCES"
    assert told["rdev"] == [0, 0]
    assert told["suid"] == "0o755"
    assert told["xattrs"] == []
    assert told["capability"] == "ENODATA"


def test_control_without_cloner_and_mask_the_attacks_work(daemon: MiniDaemon, image: Path) -> None:
    """The test above can fail: a plain clone of an unmasked image gives all of it away."""
    daemon.add("a", image, mask=False)
    clone = daemon.raw("a")
    told = attack(clone)
    os.close(clone)
    assert {told[key] for key in told if key.startswith(("remount", "setattr"))} == {"done"}
    assert not {"ro", "nosuid", "nodev"} & set(told["options"].split(","))
    assert told["rdev"] == [1, 0]
    assert told["suid"] == "0o4755"
    assert told["device"] != "EACCES", "the mount's nodev was in force"


def test_root_in_a_job_step_cannot_clear_them_either(daemon: MiniDaemon, image: Path) -> None:
    """slurmstepd attaches the clone as root, in a namespace of the initial user namespace: flags stay locked there as well."""
    daemon.add("a", image)
    clone = daemon.clone("a")
    code = (
        "import os, sys\nfrom uenvd import mounts\n"
        "mounts.unshare(mounts.CLONE_NEWNS)\nmounts.make_rslave()\nmounts.move_mount(int(sys.argv[1]), '/mnt')\n"
        "assert open('/mnt/file').read() == 'content\\n'\n"
        "try: mounts.mount_setattr('/mnt', clear_bits=mounts.MOUNT_ATTR_NODEV)\n"
        "except OSError as error: print(error.errno)\n"
    )
    done = run_as(0, code, [clone])
    os.close(clone)
    assert done.stdout == f"{errno.EPERM}\n", done.stderr


def test_other_users_files_stay_private(daemon: MiniDaemon, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name, owner in (("mine", NOBODY), ("theirs", SOMEBODY), ("roots", 0)):
        (tree / name).write_text(name)
        os.chown(tree / name, owner, owner)
        (tree / name).chmod(0o600)
    image = tmp_path / "private.squashfs"
    subprocess.run(
        ["mksquashfs", str(tree), str(image), "-quiet", "-no-progress"],
        check=True,
        env={"PATH": os.environ["PATH"]},
    )
    daemon.add("p", image)
    clone = daemon.clone("p")
    with session(NOBODY, clone, TARGET) as user:
        os.close(clone)
        assert user.eval("open('/mnt/mine').read()") == "mine"
        assert user.eval("open('/mnt/theirs').read()") == {"errno": errno.EACCES}
        assert user.eval("open('/mnt/roots').read()") == {"errno": errno.EACCES}


def test_mount_and_worker_end_with_the_last_user(daemon: MiniDaemon, image: Path) -> None:
    pid = daemon.add("a", image)["pid"]
    one, two = daemon.clone("a"), daemon.clone("a")
    with session(NOBODY, one, TARGET) as first:
        with session(SOMEBODY, two, TARGET) as second:
            os.close(one)
            os.close(two)
            daemon.remove("a")
            assert second.eval("open('/mnt/file').read()") == "content\n"
        assert first.eval("len(open('/mnt/large', 'rb').read())") == 3 << 20
        assert not has_ended(pid)
    until(lambda: has_ended(pid), "the worker's end after the last session's")


def test_clone_outlives_the_daemon_and_its_namespace(daemon: MiniDaemon, image: Path) -> None:
    pid = daemon.add("a", image)["pid"]
    clone = daemon.clone("a")
    with session(NOBODY, clone, TARGET) as user:
        os.close(clone)
        daemon.kill()
        assert user.eval("open('/mnt/file').read()") == "content\n"
        assert user.eval("len(open('/mnt/large', 'rb').read())") == 3 << 20
        assert not has_ended(pid)
    until(lambda: has_ended(pid), "the worker's end")


def test_worker_ends_when_a_daemon_dies_that_nobody_used(daemon: MiniDaemon, image: Path) -> None:
    pid = daemon.add("a", image)["pid"]
    daemon.kill()
    until(lambda: has_ended(pid), "the worker's end")


def test_control_a_worker_in_the_daemons_namespace_keeps_its_own_mount(
    daemon: MiniDaemon, image: Path
) -> None:
    """Why workers leave the daemon's namespace: one that did not outlives everything."""
    pid = daemon.add("a", image, leave=False)["pid"]
    daemon.kill()
    try:
        namespace = os.stat(f"/proc/{pid}/ns/mnt").st_ino
        assert namespace != os.stat("/proc/self/ns/mnt").st_ino
        assert "uenvd:a" in Path(f"/proc/{pid}/mountinfo").read_text()
        assert not has_ended(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
    until(lambda: has_ended(pid), "its end")


def test_nothing_shows_in_the_nodes_mount_table(daemon: MiniDaemon, image: Path) -> None:
    daemon.add("a", image)
    clone = daemon.clone("a")
    assert " uenvd:a " not in Path("/proc/self/mountinfo").read_text()
    os.close(clone)


def test_damaged_image_is_a_report_and_the_mount_can_be_taken_back(
    daemon: MiniDaemon, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(b"hsqs" + bytes(4096))
    answer = daemon.add("a", bad)
    assert answer["error"] == "bad-image"
    daemon.remove("a")
    until(lambda: has_ended(answer["pid"]), "the worker's end")


def test_job_signals_do_not_end_a_worker(daemon: MiniDaemon, image: Path) -> None:
    pid = daemon.add("a", image)["pid"]
    clone = daemon.clone("a")
    with session(NOBODY, clone, TARGET) as user:
        os.close(clone)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGTSTP):
            os.kill(pid, number)
        assert user.eval("open('/mnt/file').read()") == "content\n"


def test_worker_cannot_be_traced_by_its_own_uid(daemon: MiniDaemon, image: Path) -> None:
    pid = daemon.add("a", image, uid=NOBODY)["pid"]
    code = (
        "import os, sys\n"
        f"for path in ('mem', 'environ', 'fd/3'):\n"
        f"    try: os.open('/proc/{pid}/' + path, os.O_RDONLY)\n"
        "    except OSError as error: print(error.errno)\n"
    )
    assert run_as(NOBODY, code).stdout == f"{errno.EACCES}\n" * 3


def test_worker_has_no_rights(daemon: MiniDaemon, image: Path) -> None:
    pid = daemon.add("a", image, uid=NOBODY)["pid"]
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert status["Uid"].split() == status["Gid"].split() == [str(NOBODY)] * 4
    assert status["Groups"].strip() == ""
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    opened = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    assert opened - {"/dev/null"} >= {"/dev/fuse", str(image)}
    assert not {name for name in opened if name.startswith("mnt:")}
    assert os.stat(f"/proc/{pid}/ns/mnt").st_ino == os.stat("/proc/self/ns/mnt").st_ino


def test_mounts_module_closes_what_it_opens() -> None:
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    fuse = mounts.open_fuse_device()
    os.close(mounts.fuse_mount(fuse, source="uenvd:x"))
    os.close(fuse)
    assert set(os.listdir("/proc/self/fd")) == before
