"""``uenvd-fs IMAGE MOUNTPOINT`` as a command: the drop-in for ``squashfuse_ll``."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from support.fusetools import NOBODY, has_ended, is_mounted, open_to_all, served, until
from uenvd import errors, mounts

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root and as another user")

COMMAND = (sys.executable, "-m", "uenvd.fuse.worker")
AS_NOBODY: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []}


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that belongs to nobody, with an image ``i`` in it and a mount point ``m``, which is unmounted at the end."""
    open_to_all()
    with tempfile.TemporaryDirectory() as base:
        path = Path(base)
        path.chmod(0o755)
        (path / "tree").mkdir()
        (path / "tree" / "file").write_text("content\n")
        (path / "tree" / "private").write_text("private\n")
        os.chown(path / "tree" / "private", NOBODY, NOBODY)
        (path / "tree" / "private").chmod(0o600)
        subprocess.run(
            ["mksquashfs", str(path / "tree"), str(path / "i"), "-quiet", "-no-progress"],
            check=True,
            env={"PATH": os.environ["PATH"]},
        )
        (path / "m").mkdir()
        for name in ("", "m", "i"):
            os.chown(path / name, NOBODY, NOBODY)
        try:
            yield path
        finally:
            with suppress(OSError):
                mounts.umount(path / "m", detach=True)


def run(place: Path, *arguments: str, **popen: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=30, cwd=place, check=False, **popen
    )


def servers_of(place: Path) -> list[int]:
    """Processes that hold the image of a place open."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                files = [os.readlink(fd) for fd in (entry / "fd").iterdir()]
                if str(place / "i") in files:
                    found.append(int(entry.name))
    return found


@pytest.mark.parametrize("who", ["root", "nobody"])
def test_mounts_in_the_background_and_unmounts(place: Path, who: str) -> None:
    popen = {} if who == "root" else AS_NOBODY
    done = run(place, "i", "m", **popen)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert is_mounted(place / "m")
    (server,) = servers_of(place)
    assert os.stat(f"/proc/{server}/cwd").st_ino == os.stat("/").st_ino, "keeps no directory busy"
    if who == "nobody":
        code = "print(open('m/file').read(), open('m/private').read())"
        told = subprocess.run(
            [sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=True, **AS_NOBODY
        )
        assert told.stdout == "content\n private\n\n"
    else:
        assert (place / "m" / "file").read_text() == "content\n"
    table = next(
        line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"{place}/m " in line
    )
    assert table.split()[-3:-1] == ["fuse.uenvd", f"{place}/i"]
    assert table.split()[5].split(",")[:3] == ["ro", "nosuid", "nodev"]
    subprocess.run(["fusermount3", "-u", "m"], cwd=place, check=True, **popen)
    until(lambda: has_ended(server), "the server's end")
    assert not is_mounted(place / "m")


def test_ordinary_user_may_mount_in_a_namespace_of_his_own(place: Path) -> None:
    """There he has the privilege, so no libfuse is needed: the server has worker processes."""
    script = '"$0" -m uenvd.fuse.worker -o workers=2 i m && cat m/file && read line && umount m'
    with subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, sys.executable],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=place,
        **AS_NOBODY,
    ) as shell:
        assert shell.stdout is not None
        assert shell.stdout.readline() == "content\n"
        assert len(servers_of(place)) == 3
        shell.communicate("\n", timeout=30)
    assert shell.returncode == 0
    until(lambda: servers_of(place) == [], "all of them end")
    assert not is_mounted(place / "m")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_unmounts(place: Path, number: signal.Signals) -> None:
    with served(place / "i", place / "m") as process:
        busy = os.open(place / "m" / "file", os.O_RDONLY)
        try:
            process.send_signal(number)
            assert process.wait(10) == 0
            assert not is_mounted(place / "m")
            with pytest.raises(OSError, match="not connected"):
                os.pread(busy, 1, 0)
        finally:
            with suppress(OSError):  # the FLUSH that close means has nobody to go to
                os.close(busy)


def test_foreground_ends_when_unmounted(place: Path) -> None:
    with served(place / "i", place / "m") as process:
        subprocess.run(["umount", str(place / "m")], check=True)
        assert process.wait(10) == 0


def test_image_replaced_while_mounted(place: Path) -> None:
    """The server holds the file: a new one under its name changes nothing."""
    with served(place / "i", place / "m"):
        shutil.copy("/etc/passwd", place / "new")
        (place / "new").rename(place / "i")
        assert (place / "m" / "file").read_text() == "content\n"


def test_image_truncated_while_mounted(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Reads fail, the server lives."""
    with served(place / "i", place / "m") as process:
        os.truncate(place / "i", 100)
        for _attempt in range(3):
            with pytest.raises(OSError, match="Input/output error"):
                (place / "m" / "file").read_text()
        assert process.poll() is None
    assert capfd.readouterr().err.count("damaged squashfs image") == 1, "said once"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["missing", "m"], errors.UsageError, "cannot open missing: No such file or directory"),
        (["m", "m"], errors.UsageError, "m is not a regular file"),
        (["fifo", "m"], errors.UsageError, "fifo is not a regular file"),
        (["closed", "m"], errors.AccessDenied, "cannot open closed: Permission denied"),
        (["text", "m"], errors.FormatError, "text: not a squashfs image"),
        (["empty", "m"], errors.FormatError, "empty: not a squashfs image"),
        (["short", "m"], errors.FormatError, "short: truncated squashfs image"),
        (["i", "nowhere"], errors.MountPointError, "the mount point nowhere does not exist"),
        (["i", "text"], errors.MountPointError, "the mount point text is not a directory"),
        (["i", "m", "-o", "rw"], errors.UsageError, "unknown mount option 'rw'"),
        (["i", "m", "-o"], errors.UsageError, "-o needs an option"),
        (["i", "m", "-x"], errors.UsageError, "unknown option -x"),
        (["i"], errors.UsageError, "an image and a mount point are needed"),
        (["i", "m", "-o", "ro,offset=-1"], errors.UsageError, "unknown mount option 'offset=-1'"),
        (["i", "m", "-o", "offset=7"], errors.FormatError, "i: not a squashfs image"),
        (["i", "m", "-o", "offset=999999999999999"], errors.FormatError, "i: not a squashfs image"),
        (["i", "/usr"], errors.WorkerFailed, "cannot serve"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_clear_errors(place: Path, arguments: list[str], error: type[errors.UenvError], words: str) -> None:
    (place / "text").write_text("no image\n" * 100)
    (place / "empty").write_bytes(b"")
    (place / "short").write_bytes((place / "i").read_bytes()[:200])
    (place / "closed").write_bytes(b"")
    (place / "closed").chmod(0)
    os.mkfifo(place / "fifo", 0o666)
    done = run(place, *arguments, **AS_NOBODY)
    assert done.returncode == error.exit_status
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not is_mounted(place / "m")


def test_help_and_version(place: Path) -> None:
    assert run(place, "--help").stdout.startswith("usage: uenvd-fs IMAGE MOUNTPOINT")
    assert run(place, "--version").stdout.startswith("uenvd-fs ")


def test_awkward_paths(place: Path) -> None:
    """A comma, a backslash, a blank and bytes that are no UTF-8 in the path of the image and of the mount point."""
    directory = os.fsencode(place) + b"/a,b\\c \xff"
    os.mkdir(directory)
    os.mkdir(directory + b"/m")
    shutil.copy(place / "i", directory + b"/i")
    path = Path(os.fsdecode(directory))
    with served(path / "i", path / "m"):
        assert (path / "m" / "file").read_text() == "content\n"


def test_options_are_ignored_or_applied(place: Path) -> None:
    with served(place / "i", place / "m", "ro,allow_other", "fsname=hello,noexec"):
        line = next(
            line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"{place}/m " in line
        )
        assert "noexec" in line.split()[5]
        assert line.split()[-2] == "hello"
        assert "allow_other" in line
