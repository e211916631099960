"""Mounts in tests: serve an image, run code as somebody else or in a user namespace, compare trees. Everything is undone at the end."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from uenvd import mounts

NOBODY = 65534
SOMEBODY = 54321
"""Two uids that are not root; neither needs an account."""

ENTER_NAMESPACE = """
import os, sys, errno, stat, json
from uenvd import mounts
fds = [int(word) for word in sys.argv[1:]]
ids = os.getuid(), os.getgid()
mounts.unshare(mounts.CLONE_NEWUSER | mounts.CLONE_NEWNS)
mounts.map_self(*ids)
mounts.make_rslave()
"""
"""Prelude of code for `run_as`: be in a user and mount namespace of one's own, ``fds`` the descriptors that came along."""


def until(condition: Callable[[], Any], what: str, deadline_s: float = 10.0) -> Any:
    """Poll until the condition gives something true, return it; AssertionError after the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.005)


def open_to_all() -> None:
    """Let everybody open /dev/fuse, as udev does."""
    device = Path("/dev/fuse")
    if stat.S_IMODE(device.stat().st_mode) != 0o666:
        device.chmod(0o666)


def is_mounted(path: Path | str) -> bool:
    """Tell, from the mount table, whether something is mounted at a path."""
    wanted = os.fsencode(path).replace(b"\\", b"\\134").replace(b" ", b"\\040")
    return any(
        line.split(b" ")[4] == wanted for line in Path("/proc/self/mountinfo").read_bytes().splitlines()
    )


def held_elsewhere(device: int) -> bool:
    """Tell whether a mount of this device number is in any process's mount namespace."""
    wanted = f" {os.major(device)}:{os.minor(device)} "
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with suppress(OSError):
                if wanted in (process / "mountinfo").read_text(errors="replace"):
                    return True
    return False


def has_ended(pid: int) -> bool:
    """Tell whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def rss_bytes(pid: int) -> int:
    """Return the highest resident size that a process has had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


@contextmanager
def served(
    image: Path, mountpoint: Path, *options: str, transport: str = "pyfuse3"
) -> Iterator[subprocess.Popen[bytes]]:
    """Serve an image with ``uenvd-fs -f`` at a directory; yield the process. Unmounted and ended at the end, whatever happened."""
    assert transport in ("pyfuse3", "channel")
    command = [
        sys.executable,
        "-m",
        "uenvd.fuse.worker",
        str(image),
        str(mountpoint),
        "-f",
        *(word for option in (f"transport={transport}", *options) for word in ("-o", option)),
    ]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    device = 0
    try:
        until(lambda: is_mounted(mountpoint) or process.poll() is not None, "the mount")
        assert process.poll() is None, "uenvd-fs ended"
        device = mountpoint.lstat().st_dev
        yield process
    finally:
        with suppress(OSError):
            mounts.umount(mountpoint, detach=True)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            # A process that took a copy of the mounts into a namespace of its own, as tests beside this one do, keeps the server alive.
            with suppress(AssertionError):
                until(
                    lambda: process.poll() is not None or not held_elsewhere(device),
                    "its last mount's end",
                    90.0,
                )
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)


def run_as(
    uid: int, code: str, fds: Sequence[int] = (), *, gid: int | None = None, timeout_s: float = 30.0
) -> subprocess.CompletedProcess[str]:
    """Run Python code as another user without any groups; the descriptors keep their numbers and are its arguments."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, fds)],
        user=uid,
        group=uid if gid is None else gid,
        extra_groups=[],
        pass_fds=list(fds),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd="/",
        check=False,
    )


@contextmanager
def session(uid: int, fd: int, target: Path | str) -> Iterator[Session]:
    """Attach a mount in a user namespace of an ordinary user's own, in a process that stays until told to end."""
    code = ENTER_NAMESPACE + (
        f"mounts.move_mount(fds[0], {str(target)!r})\nos.close(fds[0])\n"
        "print('attached', flush=True)\n"
        "for line in sys.stdin:\n"
        "    try:\n        print(json.dumps(eval(line)), flush=True)\n"
        "    except OSError as error:\n        print(json.dumps({'errno': error.errno}), flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(fd)],
        user=uid,
        group=uid,
        extra_groups=[],
        pass_fds=[fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "attached\n"
        yield Session(process)
    finally:
        process.kill()
        process.communicate()


class Session:
    """A process in a namespace that evaluates expressions."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def eval(self, expression: str) -> Any:
        """Return the JSON-able value of an expression; ``{"errno": N}`` when it raised `OSError`."""
        import json

        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())
