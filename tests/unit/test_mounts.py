"""The system call module: each call against the kernel, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fusetools import ENTER_NAMESPACE, NOBODY, open_to_all, run_as
from uenvd import mounts
from uenvd.errors import MountFailed

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes mounts and id maps as root")


def in_own_namespace(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code as root in a mount namespace of its own."""
    prelude = (
        "import os, sys\nfrom uenvd import mounts\nmounts.unshare(mounts.CLONE_NEWNS)\nmounts.make_rslave()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", prelude + code, *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_imports_stay_light() -> None:
    code = "import sys, uenvd.mounts\nprint([m for m in ('trio', 'subprocess', 'socket', 'logging', 'json') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        (b"abc", True),
        (b"...", True),
        (b"x" * 255, True),
        (b"", False),
        (b".", False),
        (b"..", False),
        (b"a/b", False),
        (b"a\0b", False),
        (b"x" * 256, False),
    ],
)
def test_valid_name(name: bytes, valid: bool) -> None:
    assert mounts.valid_name(name) is valid


def test_gid_map_joins_neighbours_and_drops_repetitions() -> None:
    assert mounts._gid_map([100, 5, 101, 5, 102, 7]) == ("5 5 1\n7 7 1\n100 100 3\n", 5)


def test_gid_map_keeps_the_first_of_too_many_groups() -> None:
    gids = [4_000_000_000 - 2 * i for i in range(500)]
    text, count = mounts._gid_map(gids)
    assert len(text) <= 4095
    assert text.count("\n") == count < 340
    assert {int(line.split()[0]) for line in text.splitlines()} == set(gids[:count])


def test_gid_map_of_340_lines_at_most() -> None:
    text, count = mounts._gid_map(range(0, 2000, 2))
    assert count == text.count("\n") <= 340


def test_fuse_mount_says_why_not(tmp_path: Path) -> None:
    other = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(MountFailed, match="cannot make a FUSE mount for uenvd:x: "):
            mounts.fuse_mount(other, source="uenvd:x")
    finally:
        os.close(other)


def test_fuse_mount_without_privilege_has_a_hint() -> None:
    open_to_all()
    code = (
        "from uenvd import mounts\nfrom uenvd.errors import UenvError\n"
        "fd = mounts.open_fuse_device()\n"
        "try: mounts.fuse_mount(fd, source='uenvd:x')\n"
        "except UenvError as error: print(error, '|', error.hint)\n"
    )
    done = run_as(NOBODY, code)
    assert done.stdout.startswith(
        "cannot make a FUSE mount: Operation not permitted (fsopen) | this needs root"
    ), done


def test_fuse_mount_in_a_user_namespace_with_its_type_source_and_flags(tmp_path: Path) -> None:
    open_to_all()
    code = ENTER_NAMESPACE + (
        "fuse = mounts.open_fuse_device()\n"
        "fd = mounts.fuse_mount(fuse, source='uenvd:sha256:abc', uid=ids[0], gid=ids[1])\n"
        "mounts.move_mount(fd, '/mnt')\n"
        "line = [l.split() for l in open('/proc/self/mountinfo') if l.split()[4] == '/mnt'][0]\n"
        "print(json.dumps(line))\n"
    )
    done = run_as(NOBODY, code)
    assert done.returncode == 0, done.stderr
    fields = json.loads(done.stdout)
    assert fields[5].split(",")[:3] == ["ro", "nosuid", "nodev"]
    assert fields[-3:-1] == ["fuse.uenvd", "uenvd:sha256:abc"]
    assert {"ro", f"user_id={NOBODY}", f"group_id={NOBODY}", "default_permissions", "allow_other"} <= set(
        fields[-1].split(",")
    )


def test_detached_mount_is_nowhere_and_ends_with_its_descriptor() -> None:
    fuse = mounts.open_fuse_device()
    try:
        fd = mounts.fuse_mount(fuse, source="uenvd:nowhere")
        assert "uenvd:nowhere" not in Path("/proc/self/mountinfo").read_text()
        os.set_blocking(fuse, False)
        assert len(os.read(fuse, 1 << 16)) >= 40  # FUSE_INIT waits for whoever will serve
        os.close(fd)
        with pytest.raises(OSError, match="No such device"):
            os.read(fuse, 1 << 16)
    finally:
        os.close(fuse)


def test_tmpfs_move_mount_and_propagation(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    done = in_own_namespace(
        "a, b = sys.argv[1] + '/a', sys.argv[1] + '/b'\n"
        "mounts.mount_tmpfs(a, mode=0o750, size_bytes=1 << 16)\n"
        "mounts.make_shared(a)\n"
        "assert oct(os.stat(a).st_mode)[-3:] == '750'\n"
        "open(a + '/file', 'w').close()\n"
        "clone = mounts.open_tree_clone(a)\n"
        "target = os.open(b, os.O_PATH)\n"
        "mounts.move_mount(clone, target)\n"
        "os.close(clone)\n"
        "assert os.listdir(b) == ['file']\n"
        "lines = {l.split()[4]: l.split() for l in open('/proc/self/mountinfo')}\n"
        "assert lines[a][6].startswith('shared:') and lines[a][5].startswith('rw,nosuid,nodev,noexec'), lines[a]\n"
        "mounts.make_private(b)\n"
        "mounts.mount_setattr(b, set_bits=mounts.MOUNT_ATTR_RDONLY)\n"
        "try: open(b + '/other', 'w')\n"
        "except OSError as error: print(error.errno)\n"
        "mounts.umount(b)\n"
        "assert os.listdir(b) == []\n"
        "handle = open(a + '/file')\n"
        "try: mounts.umount(a)\n"
        "except OSError as error: print(error.errno, error.filename.decode() == a)\n"
        "mounts.umount(a, detach=True)\n",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "30\n16 True\n"
    assert not any(str(tmp_path) in line for line in Path("/proc/self/mountinfo").read_text().splitlines())


def test_errors_name_their_object(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError) as caught:
        mounts.open_tree_clone(missing)
    assert os.fsdecode(caught.value.filename) == str(missing)
    with pytest.raises(FileNotFoundError):
        mounts.make_shared(missing)
    with pytest.raises(FileNotFoundError):
        mounts.umount(missing)
    fd = mounts.open_tree_clone(tmp_path)
    try:
        with pytest.raises(FileNotFoundError):
            mounts.move_mount(fd, missing)
    finally:
        os.close(fd)


@pytest.fixture
def namespace_process() -> Iterator[subprocess.Popen[str]]:
    """A process of an ordinary user that has made a user namespace and then prints its ids when a line comes."""
    code = (
        "import os, sys\nfrom uenvd import mounts\n"
        "mounts.unshare(mounts.CLONE_NEWUSER)\nprint('made', flush=True)\nsys.stdin.readline()\n"
        "print(os.getuid(), os.getgid(), sorted(os.getgroups()), open('/proc/self/setgroups').read().strip())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[20, 21, 50],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "made\n"
    yield process
    process.kill()
    process.communicate()


def test_root_maps_all_groups_of_a_session(namespace_process: subprocess.Popen[str]) -> None:
    proc = mounts.open_process(namespace_process.pid)
    try:
        assert mounts.write_id_maps(proc, NOBODY, [NOBODY, 20, 21, 50]) == 4
        with pytest.raises(MountFailed, match="id maps: Operation not permitted"):
            mounts.write_id_maps(proc, NOBODY, [NOBODY])  # only once
    finally:
        os.close(proc)
    output, _ = namespace_process.communicate("\n", timeout=10)
    assert output == f"{NOBODY} {NOBODY} [20, 21, 50] deny\n"


def test_id_maps_of_a_process_that_is_gone() -> None:
    process = subprocess.Popen(["sleep", "60"])
    proc = mounts.open_process(process.pid)
    try:
        process.kill()
        process.wait()
        with pytest.raises(MountFailed, match="No such"):
            mounts.write_id_maps(proc, NOBODY, [NOBODY])
    finally:
        os.close(proc)


def test_id_maps_of_a_process_without_a_namespace_of_its_own() -> None:
    process = subprocess.Popen(["sleep", "60"])
    proc = mounts.open_process(process.pid)
    try:
        with pytest.raises(MountFailed):
            mounts.write_id_maps(proc, NOBODY, [NOBODY])
    finally:
        os.close(proc)
        process.kill()
        process.wait()


def test_map_self() -> None:
    done = run_as(NOBODY, ENTER_NAMESPACE + "print(os.getuid(), os.getgid())")
    assert done.stdout == f"{NOBODY} {NOBODY}\n", done.stderr


def test_setns_enters_the_namespace_of_a_descriptor() -> None:
    done = in_own_namespace(
        "inner = mounts.mount_namespace()\n"
        "outer = mounts.mount_namespace(os.getppid())\n"
        "mounts.setns(outer, mounts.CLONE_NEWNS)\n"
        "print(os.stat('/proc/self/ns/mnt').st_ino == os.fstat(outer).st_ino != os.fstat(inner).st_ino)\n"
    )
    assert done.stdout == "True\n", done.stderr


def test_private_mounts_leave_no_trace(tmp_path: Path) -> None:
    work = tmp_path / "deep" / "work"
    code = (
        "from uenvd.errors import MountFailed\n"
        "private = mounts.PrivateMounts.create(sys.argv[1])\n"
        "fuse = mounts.open_fuse_device()\n"
        "private.add('one', fuse, source='uenvd:one')\n"
        "assert any(' uenvd:one ' in line for line in open('/proc/self/mountinfo'))\n"
        "try: private.add('one', fuse, source='uenvd:one')\n"
        "except MountFailed as error: print(error)\n"
        "try: private.add('../x', fuse, source='uenvd:one')\n"
        "except MountFailed as error: print(error)\n"
        "private.remove('one')\n"
        "assert os.listdir(sys.argv[1]) == []\n"
        "private.remove('one')\n"
        "other = mounts.open_fuse_device()\n"
        "private.add('one', other, source='uenvd:one')\n"
        "private.close()\n"
        "assert not any(' uenvd:' in line for line in open('/proc/self/mountinfo'))\n"
    )
    done = in_own_namespace(code, str(work))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert work.is_dir()
    assert list(work.iterdir()) == []


def test_private_mounts_need_root(tmp_path: Path) -> None:
    code = (
        "from uenvd import mounts\nfrom uenvd.errors import MountFailed\n"
        "try: mounts.PrivateMounts.create('/tmp/never')\n"
        "except MountFailed as error: print(error, '|', error.hint)\n"
    )
    done = run_as(NOBODY, code)
    assert "Operation not permitted (unshare) | uenvd has to run as root" in done.stdout, done
