"""A request that is gone when pyfuse3 comes to read it: the process blocks in read(2) with Python's lock, and others wait behind it.

The kernel's part of this race (poll says that a request is there, its asker is killed, read finds none) cannot be timed from outside, so a
server is started in which poll lies once, at the worst moment: when a thread is about to decode for somebody.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support import images
from support.fusetools import is_mounted, open_to_all, until
from uenvd import mounts

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root")

SERVER = """
import sys, time, trio
from uenvd.fuse import pyfuse3_ops, standalone
from uenvd.fuse.tree import Tree
image, mountpoint, nudge_s = sys.argv[1:]
pyfuse3_ops._NUDGE_S = float(nudge_s)
lie = False
really_wait = trio.lowlevel.wait_readable
really_part = Tree.part
async def wait_readable(fd):
    global lie
    if lie:
        lie = False
        return
    await really_wait(fd)
def part(self, span):
    time.sleep(0.2)  # the lock is free: the main thread goes to its read
    return really_part(self, span)
def peek(self, span, inline_bytes=0):
    global lie
    lie = True
    return None
trio.lowlevel.wait_readable = wait_readable
Tree.part, Tree.peek = part, peek
sys.exit(standalone.run([image, mountpoint, '-f', '-o', 'transport=pyfuse3']))
"""


@contextmanager
def server(tmp_path: Path, nudge_s: float) -> Iterator[Path]:
    open_to_all()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"content " * 1000)
    image = images.make_image(tmp_path / "tree", tmp_path / "i")
    mountpoint = tmp_path / "m"
    mountpoint.mkdir()
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(image), str(mountpoint), str(nudge_s)])
    try:
        until(lambda: is_mounted(mountpoint), "the mount")
        yield mountpoint
    finally:
        process.kill()
        process.wait()
        with suppress(OSError):
            mounts.umount(mountpoint, detach=True)


@contextmanager
def reader(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_the_others_get_their_answers(tmp_path: Path) -> None:
    with server(tmp_path, 0.1) as mountpoint, reader(mountpoint / "file") as process:
        begin = time.monotonic()
        output, _ = process.communicate(timeout=20)
        assert output == b"content " * 1000
        assert time.monotonic() - begin < 10


def test_control_without_the_nudge_they_wait_for_the_next_request(tmp_path: Path) -> None:
    with server(tmp_path, 1000.0) as mountpoint, reader(mountpoint / "file") as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        with suppress(OSError):
            os.stat(mountpoint / "another")  # somebody's next request
        output, _ = process.communicate(timeout=20)
        assert output == b"content " * 1000
