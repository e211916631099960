"""A TCP proxy in a process of its own that limits the rate of each connection: a registry far away, or behind a proxy of a site.

Bytes to the client go by splice(2) and leave at the pace that the kernel keeps (``SO_MAX_PACING_RATE``, socket(7)), so the proxy costs next
to nothing of the machine that it is measured on.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Final

_SO_MAX_PACING_RATE: Final = 47
_PIPE_BYTES: Final = 1 << 20
_F_SETPIPE_SZ: Final = 1031


@contextmanager
def shaping_proxy(target_port: int, bytes_per_s: int) -> Iterator[int]:
    """Return the loopback port of a proxy to another one; every connection receives at most so much."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, target_port, bytes_per_s), daemon=True)
    process.start()
    try:
        theirs.close()
        if not ours.poll(30):
            raise RuntimeError("the shaping proxy does not start")
        yield int(ours.recv())
    finally:
        process.kill()
        process.join(10)
        ours.close()


def _serve(ready: Connection, target_port: int, bytes_per_s: int) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        ready.send(listener.getsockname()[1])
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_carry, args=(client, target_port, bytes_per_s), daemon=True).start()


def _carry(client: socket.socket, target_port: int, bytes_per_s: int) -> None:
    client.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, struct.pack("Q", bytes_per_s))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # What waits in a large buffer would hide from the server that the client is slow.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    try:
        server = socket.create_connection(("127.0.0.1", target_port))
    except OSError:
        client.close()
        return
    back = threading.Thread(target=_copy, args=(client, server), daemon=True)
    back.start()
    _splice(server, client)
    for each in (server, client):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
    back.join()
    server.close()
    client.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _splice(source: socket.socket, target: socket.socket) -> None:
    import fcntl

    reader, writer = os.pipe()
    try:
        fcntl.fcntl(writer, _F_SETPIPE_SZ, _PIPE_BYTES)
        with contextlib.suppress(OSError):
            while moved := os.splice(source.fileno(), writer, _PIPE_BYTES):
                while moved:
                    moved -= os.splice(reader, target.fileno(), moved)
    finally:
        os.close(reader)
        os.close(writer)
