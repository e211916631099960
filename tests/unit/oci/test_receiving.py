"""Bodies that are received into a caller's buffer: slowly, in one go, cut off; and the connection afterwards."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from uenvd.oci.watch import ENOUGH_BYTES, Response

DATA = random.Random(11).randbytes(3 * ENOUGH_BYTES + 12_345)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with ours, theirs:
        ours.settimeout(10)
        yield ours, theirs


def head(size_bytes: int) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {size_bytes}\r\n\r\n".encode()


def opened(sock: socket.socket) -> Response:
    response = Response(sock, method="GET")
    response.begin()
    return response


def received(response: Response) -> bytes:
    buffer, found = bytearray(ENOUGH_BYTES), bytearray()
    while count := response.receive_into(memoryview(buffer)):
        found += buffer[:count]
    return bytes(found)


def low_water(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)


def test_two_bodies_over_one_connection(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    for data in (DATA, DATA[:70_000]):
        sender = threading.Thread(target=theirs.sendall, args=(head(len(data)) + data,))
        sender.start()
        assert received(opened(ours)) == data
        sender.join(10)
        assert low_water(ours) == 1, "the head of the next answer is shorter than that of a body"


def test_a_slow_body_is_handed_on_as_it_comes(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.sendall(head(len(DATA)) + DATA[:100_000])
    with closing(opened(ours)) as response:
        buffer, at = memoryview(bytearray(ENOUGH_BYTES)), 0
        while at < 100_000:
            at += response.receive_into(buffer)
        theirs.sendall(DATA[at : at + 10])
        began_s = time.monotonic()
        assert response.receive_into(buffer) == 10 and buffer[:10] == DATA[at : at + 10]
        assert time.monotonic() - began_s < 5, "0.05 s on a quiet machine"


def test_a_body_that_is_cut_off_ends(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.sendall(head(len(DATA)) + DATA[:100_000])
    theirs.close()
    assert received(opened(ours)) == DATA[:100_000]
