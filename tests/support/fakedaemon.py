"""A stand-in for uenvd on a control socket: says what a test tells it to, right or wrong, and remembers what it was asked."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_STOP_S = 10.0


@dataclass(frozen=True)
class Raw:
    """Bytes as they are, with descriptors attached to the first of them."""

    data: bytes
    descriptors: tuple[int, ...] = ()


@dataclass(frozen=True)
class Pause:
    """Silence for ``seconds`` (less if the daemon is stopped)."""

    seconds: float


class HangUp:
    """Close the connection."""


class Hang:
    """Say nothing more until the daemon is stopped or the peer is gone."""


@dataclass(frozen=True)
class Call:
    """Compute the next step from the request and the peer's pid."""

    function: Callable[[dict[str, Any], int], Step]


Step = dict[str, Any] | Raw | Pause | HangUp | Hang | Call
"""One thing to do; a dict is a frame."""


class FakeDaemon:
    """Use as a context manager. ``script`` holds for each operation what is done when it is asked for.

    ``requests`` are the frames received, ``leases`` how many connections are open now.
    """

    def __init__(self, path: Path, script: Mapping[str, Sequence[Step]], *, mode: int = 0o666) -> None:
        self.path = path
        self.requests: list[dict[str, Any]] = []
        self.leases = 0
        self._script = script
        self._mode = mode
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._peers: set[socket.socket] = set()
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self.path.chmod(self._mode)
        self._listener.listen(16)
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        with self._changed:
            for open_socket in (self._listener, *self._peers):
                with contextlib.suppress(OSError):
                    open_socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it
        for thread in self._threads:
            thread.join(_STOP_S)
        self._listener.close()
        self.path.unlink(missing_ok=True)

    def wait_until(self, condition: Callable[[FakeDaemon], bool], seconds: float = 10.0) -> bool:
        """Wait until a condition on ``requests`` and ``leases`` holds; tell whether it does."""
        with self._changed:
            return self._changed.wait_for(lambda: condition(self), seconds)

    def _start(self, function: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=function, args=args, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # shut down
            while not self._stop.is_set():
                peer = self._listener.accept()[0]
                with self._changed:
                    self._peers.add(peer)
                self._start(self._serve, peer)

    def _count(self, change: int) -> None:
        with self._changed:
            self.leases += change
            self._changed.notify_all()

    def _serve(self, peer: socket.socket) -> None:
        self._count(+1)
        pid, _uid, _gid = struct.unpack("iII", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        try:
            with peer:
                self._converse(peer, pid)
        except OSError:
            return  # the peer hung up: many tests are about that
        finally:
            with self._changed:
                self._peers.discard(peer)
            self._count(-1)

    def _converse(self, peer: socket.socket, pid: int) -> None:
        pending = b""
        while not self._stop.is_set():
            data = peer.recv(65536)
            if not data:
                return
            pending += data
            while b"\n" in pending:
                line, _, pending = pending.partition(b"\n")
                request = json.loads(line)
                with self._changed:
                    self.requests.append(request)
                    self._changed.notify_all()
                for step in self._script.get(request["op"], [unknown(request["op"])]):
                    if not self._do(peer, pid, request, step):
                        return

    def _do(self, peer: socket.socket, pid: int, request: dict[str, Any], step: Step) -> bool:
        """Do one step; tell whether the connection goes on."""
        while isinstance(step, Call):
            step = step.function(request, pid)
        if isinstance(step, dict):
            step = Raw(json.dumps(step).encode() + b"\n")
        if isinstance(step, Raw):
            if step.descriptors:
                sent = socket.send_fds(peer, [step.data], list(step.descriptors))
                peer.sendall(step.data[sent:])
            else:
                peer.sendall(step.data)
        elif isinstance(step, Pause):
            self._stop.wait(step.seconds)
        elif isinstance(step, Hang):
            while peer.recv(65536):
                continue
            return False
        return not isinstance(step, HangUp)


def unknown(op: str) -> dict[str, Any]:
    """Return the answer to an operation that is not in the script."""
    return failure("protocol", f"unknown operation {op!r}")


def failure(code: str, message: str, hint: str = "") -> dict[str, Any]:
    """Return a final frame of failure."""
    return {"ok": False, "error": {"code": code, "exit_status": 0, "message": message, "hint": hint}}


def progress(done_bytes: int, total_bytes: int, message: str = "pulling") -> dict[str, Any]:
    """Return a progress event."""
    return {
        "event": "progress",
        "phase": "pull",
        "done_bytes": done_bytes,
        "total_bytes": total_bytes,
        "message": message,
    }


def open_descriptors() -> int:
    """Return how many descriptors this process has, to find leaks; those of earlier tests' garbage do not count."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
