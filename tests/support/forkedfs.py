"""Many short-lived ``uenvd-fs`` processes without paying Python's start for each: ``python forkedfs.py FD``, a server that forks.

A datagram ``[image, mountpoint]`` is answered with the pid of a child that serves it as ``uenvd-fs IMAGE MOUNTPOINT -f`` does; ``pid`` with
its exit status as waitpid gives it, or null while it runs.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _serve(channel: socket.socket) -> None:
    from uenvd.fuse.standalone import run

    while data := channel.recv(65536):
        request = json.loads(data)
        answer: Any
        if isinstance(request, int):
            pid, status = os.waitpid(request, os.WNOHANG)
            answer = None if pid == 0 else status
        else:
            answer = os.fork()
            if answer == 0:
                channel.close()
                os._exit(run([*request, "-f"]))
        channel.send(json.dumps(answer).encode())


class ForkedFs:
    """The test's side."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    def _ask(self, request: Any) -> Any:
        self._channel.send(json.dumps(request).encode())
        return json.loads(self._channel.recv(65536))

    def start(self, image: Path, mountpoint: Path) -> int:
        """Serve an image; return the pid of the server."""
        pid: int = self._ask([str(image), str(mountpoint)])
        return pid

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
