"""Many short-lived ``uenvd-fs`` processes without paying Python's start for each: ``python forkedfs.py FD``, a server that forks.

A datagram ``[image, mountpoint, ...]`` is answered with the pid of a child that serves it as ``uenvd-fs IMAGE MOUNTPOINT -f`` does; ``pid`` with
its exit status as waitpid gives it, or null while it runs. A datagram with a descriptor, a supervisor's end of its channel, is answered with the
pid of a child that is that supervisor, leader of a process group.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

if __name__ != "__main__":  # the forking server needs nothing of this
    from support.fusetools import held_elsewhere, until
    from uenvd.mounts import umount


def _serve(channel: socket.socket) -> None:
    from uenvd.fuse.standalone import run
    from uenvd.fuse.supervise import supervise

    while True:
        data, descriptors, _flags, _address = socket.recv_fds(channel, 65536, 1)
        if not data:
            return
        request = json.loads(data)
        answer: Any
        if isinstance(request, int):
            pid, status = os.waitpid(request, os.WNOHANG)
            answer = None if pid == 0 else status
        else:
            answer = os.fork()
            if answer == 0:
                channel.close()
                if descriptors:
                    os.setsid()
                    os._exit(supervise(socket.socket(fileno=descriptors[0])))
                os._exit(run([*request, "-f"]))
            for descriptor in descriptors:
                os.close(descriptor)
        channel.send(json.dumps(answer).encode())


class ForkedFs:
    """The test's side."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    def _ask(self, request: Any) -> Any:
        self._channel.send(json.dumps(request).encode())
        return json.loads(self._channel.recv(65536))

    def start(self, image: Path, mountpoint: Path, *words: str) -> int:
        """Serve an image, with more words for the command line; return the pid of the server."""
        pid: int = self._ask([str(image), str(mountpoint), *words])
        return pid

    def supervise(self, channel_fd: int) -> int:
        """Start a supervisor with its end of a channel; return its pid."""
        socket.send_fds(self._channel, [b"[]"], [channel_fd])
        pid: int = json.loads(self._channel.recv(65536))
        return pid

    def end(self, pid: int, mountpoint: Path) -> None:
        """Unmount and wait until the server has ended by itself, status 0.

        A process that took a copy of the mounts into a namespace of its own meanwhile, as tests beside this one do, keeps the server
        alive: then it is killed, and that is nobody's fault. AssertionError when it does not end, or not well.
        """
        device = mountpoint.stat().st_dev
        umount(mountpoint)
        status: list[int] = []

        def ended() -> bool:
            found = self.status(pid)
            status.extend([] if found is None else [found])
            return bool(status)

        with suppress(AssertionError):
            until(ended, "the end of the server", 2.0)
        if not status and held_elsewhere(device):
            os.kill(pid, signal.SIGKILL)
            until(ended, "the death of the server", 30.0)
            return
        until(lambda: status or ended(), "the end of the server", 30.0)
        assert status == [0], f"the server ended with {status[0]}"

    @contextmanager
    def mounted(self, image: Path, mountpoint: Path, *words: str) -> Iterator[int]:
        """Serve an image as long as the block runs; yield the pid of the server. AssertionError when it does not mount."""
        device = mountpoint.stat().st_dev
        pid = self.start(image, mountpoint, *words)
        try:
            until(
                lambda: mountpoint.stat().st_dev != device or self.status(pid) is not None, "the mount", 30.0
            )
            assert mountpoint.stat().st_dev != device, "uenvd-fs ended"
            yield pid
        finally:
            if mountpoint.stat().st_dev != device:
                self.end(pid, mountpoint)

    def status(self, pid: int) -> int | None:
        """Return how a server ended, as waitpid tells it; None while it runs."""
        status: int | None = self._ask(pid)
        return status


@contextmanager
def forked_fs() -> Iterator[ForkedFs]:
    """Run the forking server; what its children say on stderr is dropped."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(30)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.DEVNULL,
        )
    try:
        yield ForkedFs(ours)
    finally:
        ours.close()
        process.wait(10)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as parent:
        _serve(parent)
