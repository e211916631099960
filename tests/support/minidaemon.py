"""The mount side of the daemon alone, as a process that a test may command, kill and ask: ``python minidaemon.py FD DIRECTORY``.

One JSON datagram each way on the socket: ``{"op": "add"|"clone"|"raw"|"remove", "name": ...}``. ``raw`` clones a mount *without* the
cloner, as a daemon would that trusts the mount's flags: the attack that the cloner prevents has to work on it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from uenvd import mounts
from uenvd.daemon.cloner import request_clone, start_cloner
from uenvd.handover import WorkerReport, WorkerSetup, send_setup

REPORT_DEADLINE_S = 20.0
ANSWER_DEADLINE_S = 30.0


def start_worker() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a supervised worker; return it and the parent's end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        worker = subprocess.Popen(
            [sys.executable, "-m", "uenvd.fuse.worker", "--supervised", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    ours.settimeout(REPORT_DEADLINE_S)
    return worker, ours


def report_of(channel: socket.socket) -> WorkerReport:
    """Wait for the worker's report."""
    return WorkerReport.decode(channel.recv(1 << 20))


class _Daemon:
    def __init__(self, directory: str) -> None:
        self.private = mounts.PrivateMounts.create(directory)
        self.cloner, self.clones = start_cloner(self.private.directory)
        self.channels: list[socket.socket] = []

    def add(
        self,
        name: str,
        image: str,
        mask: bool = True,
        uid: int | None = 65534,
        leave: bool = True,
        cache_bytes: int = 8 << 20,
    ) -> dict[str, Any]:
        fuse = mounts.open_fuse_device()
        self.private.add(name, fuse, source=f"uenvd:{name}")
        worker, channel = start_worker()
        file = os.open(image, os.O_RDONLY)
        named = {"fuse": fuse, "image": file, **({"mntns": self.private.outer_namespace_fd} if leave else {})}
        setup = WorkerSetup(
            descriptors=tuple(named),
            uid=uid,
            gid=uid,
            mask_privileged=mask,
            cache_bytes=cache_bytes,
            name=name,
        )
        send_setup(channel, setup, list(named.values()))
        os.close(fuse)
        os.close(file)
        report = report_of(channel)
        self.channels.append(channel)
        if report.error is not None:
            return {"error": report.error.code, "message": str(report.error), "pid": worker.pid}
        return {"pid": worker.pid, "meta": report.meta is not None}

    def serve(self, channel: socket.socket) -> None:
        while data := channel.recv(65536):
            request = json.loads(data)
            operation, name = request.pop("op"), request.pop("name")
            answer: dict[str, Any] = {}
            fds: list[int] = []
            if operation == "add":
                answer = self.add(name, **request)
            elif operation == "clone":
                fds = [request_clone(self.clones, name)]
            elif operation == "raw":
                fds = [mounts.open_tree_clone(self.private.path(name))]
            else:
                self.private.remove(name)
            socket.send_fds(channel, [json.dumps(answer).encode()], fds)
            for fd in fds:
                os.close(fd)


class MiniDaemon:
    """The test's side."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        self.process = process
        self._channel = channel

    def _ask(self, **request: Any) -> tuple[dict[str, Any], list[int]]:
        self._channel.send(json.dumps(request).encode())
        data, fds, _flags, _address = socket.recv_fds(self._channel, 65536, 1)
        if not data:
            raise RuntimeError("the mini daemon ended")
        return json.loads(data), fds

    def add(self, name: str, image: Path | str, **how: Any) -> dict[str, Any]:
        """Mount an image and start its worker; return the answer (``pid``, ``error``)."""
        return self._ask(op="add", name=name, image=str(image), **how)[0]

    def clone(self, name: str) -> int:
        """Return a descriptor of a clone, made by the cloner."""
        return self._ask(op="clone", name=name)[1][0]

    def raw(self, name: str) -> int:
        """Return a descriptor of a clone that the cloner did not make."""
        return self._ask(op="raw", name=name)[1][0]

    def remove(self, name: str) -> None:
        """Let go of a mount."""
        self._ask(op="remove", name=name)

    def kill(self) -> None:
        """SIGKILL it."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


@contextmanager
def mini_daemon(directory: Path) -> Iterator[MiniDaemon]:
    """Run a mini daemon; it, its cloner, its namespace and its mounts are gone at the end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(ANSWER_DEADLINE_S)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno()), str(directory)], pass_fds=[theirs.fileno()]
        )
    try:
        yield MiniDaemon(process, ours)
    finally:
        ours.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as parent:
        _Daemon(sys.argv[2]).serve(parent)
