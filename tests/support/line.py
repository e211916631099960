"""A TCP proxy in a process of its own that behaves like one line: a total rate for all connections, and a round trip that requests take."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from typing import Final

_STEP_BYTES: Final = 64 << 10


@dataclass
class Line:
    """A line that is up."""

    port: int
    """Of the loopback interface."""
    _sent: Synchronized[int]

    @property
    def sent_bytes(self) -> int:
        """How much came through to the clients so far."""
        return self._sent.value


@contextmanager
def line(target_port: int, bytes_per_s: float, round_trip_s: float = 0.0) -> Iterator[Line]:
    """Lay a line to a port of the loopback interface."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    sent = context.Value("Q", 0)
    process = context.Process(
        target=_serve, args=(theirs, target_port, bytes_per_s, round_trip_s, sent), daemon=True
    )
    process.start()
    try:
        theirs.close()
        if not ours.poll(60):
            raise RuntimeError("the line does not come up")
        yield Line(int(ours.recv()), sent)
    finally:
        process.kill()
        process.join(10)
        ours.close()


class _Pace:
    """One queue for everything that goes down the line."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0
        self._lock = threading.Lock()

    def wait(self, size_bytes: int) -> None:
        with self._lock:
            now_s = time.monotonic()
            self._free_s = max(self._free_s, now_s - 0.005) + size_bytes / self._bytes_per_s
            left_s = self._free_s - now_s
        if left_s > 0:
            time.sleep(left_s)


def _serve(
    ready: Connection, target_port: int, bytes_per_s: float, round_trip_s: float, sent: Synchronized[int]
) -> None:
    pace = _Pace(bytes_per_s)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        ready.send(listener.getsockname()[1])
        while True:
            client, _ = listener.accept()
            threading.Thread(
                target=_carry, args=(client, target_port, pace, round_trip_s, sent), daemon=True
            ).start()


def _carry(
    client: socket.socket, target_port: int, pace: _Pace, round_trip_s: float, sent: Synchronized[int]
) -> None:
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 256 << 10)
    time.sleep(round_trip_s)  # the handshake
    server = socket.create_connection(("127.0.0.1", target_port))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 << 10)

    def up() -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(_STEP_BYTES):
                time.sleep(round_trip_s)
                server.sendall(data)
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    threading.Thread(target=up, daemon=True).start()
    with contextlib.suppress(OSError):
        while data := server.recv(_STEP_BYTES):
            pace.wait(len(data))
            client.sendall(data)
            with sent.get_lock():
                sent.value += len(data)
    for one in (client, server):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()
