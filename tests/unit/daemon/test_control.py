"""The control socket against its peers: hostile, slow, gone. Whatever they do costs them their connection and the daemon nothing."""

from __future__ import annotations

import array
import errno
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio.testing

from support.fakedaemon import open_descriptors
from uenvd import protocol
from uenvd.daemon import control
from uenvd.daemon.control import Answer, Connection, ControlServer
from uenvd.errors import UnknownLabel
from uenvd.protocol import Request


class Client:
    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock
        self.reader = protocol.FrameReader(protocol.MAX_REPLY_BYTES)

    async def send(self, frame: dict[str, Any]) -> None:
        await self.send_raw(protocol.encode(frame))

    async def send_raw(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[await self.sock.send(view) :]

    async def receive(self) -> dict[str, Any] | None:
        while (frame := self.reader.next_frame()) is None:
            with trio.fail_after(5):
                try:
                    data = await self.sock.recv(65536)
                except ConnectionResetError:
                    return None
            if not data:
                return None
            self.reader.feed(data)
        return frame

    async def ask(self, op: str, **fields: Any) -> dict[str, Any] | None:
        await self.send(protocol.request(op, **fields))
        return await self.receive()


async def echo(connection: Connection, request: Request) -> Answer:
    if request.op == "pull":
        raise UnknownLabel("no such image")
    if request.op == "evict":
        raise RuntimeError("a bug")
    if request.op == "find":
        await connection.send(protocol.progress("pull", 1, 2, "half"))
    if request.op == "mount":
        reading, writing = os.pipe()
        os.close(writing)
        return Answer(protocol.success(), [reading])
    return Answer(protocol.success(op=request.op, uid=connection.peer.identity.uid))


@asynccontextmanager
async def serving(
    path: Path, handler: Any = echo, limit: int = 512
) -> AsyncIterator[tuple[ControlServer, Callable[[], Any]]]:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    server = ControlServer(handler, connections_per_user=limit)
    opened: list[trio.socket.SocketType] = []

    async def connect() -> Client:
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        opened.append(sock)
        await sock.connect(str(path))
        return Client(sock)

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, listener)
            yield server, connect
            nursery.cancel_scope.cancel()
    finally:
        listener.close()
        for sock in opened:
            sock.close()


async def test_requests_are_answered_in_order_on_one_connection(tmp_path: Path) -> None:
    async with serving(tmp_path / "s") as (_server, connect):
        client = await connect()
        await client.send_raw(
            protocol.encode(protocol.request("status")) + protocol.encode(protocol.request("images"))
        )
        assert [(await client.receive())["op"], (await client.receive())["op"]] == ["status", "images"]
        await client.send(protocol.request("find"))
        assert (await client.receive())["event"] == "progress"
        assert (await client.receive())["ok"] is True


async def test_an_error_of_the_tree_is_the_final_frame_and_the_connection_lives(tmp_path: Path) -> None:
    async with serving(tmp_path / "s") as (_server, connect):
        client = await connect()
        answer = await client.ask("pull", uenv="x")
        assert answer["error"]["code"] == "unknown-label"
        assert (await client.ask("status"))["ok"] is True


async def test_a_bug_in_a_handler_is_an_internal_error_for_one_request(tmp_path: Path) -> None:
    async with serving(tmp_path / "s") as (_server, connect):
        client = await connect()
        assert (await client.ask("evict", uenv="x"))["error"]["code"] == "internal"
        assert (await client.ask("status"))["ok"] is True


@pytest.mark.parametrize(
    "hostile",
    [b"x" * (protocol.MAX_REQUEST_BYTES + 2), b"nonsense\n", b"[]\n", b"\0" * 100 + b"\n", b'{"v":1,"op"'],
)
async def test_hostile_bytes_cost_only_their_own_connection(tmp_path: Path, hostile: bytes) -> None:
    async with serving(tmp_path / "s") as (server, connect):
        attacker, honest = await connect(), await connect()
        await attacker.send_raw(hostile)
        attacker.sock.shutdown(socket.SHUT_WR)
        answer = await attacker.receive()
        assert answer is None or answer["error"]["code"] == "protocol"
        assert await attacker.receive() is None
        assert (await honest.ask("status"))["ok"] is True
        attacker.sock.close()
        while server.connections > 1:
            await trio.sleep(0.001)


async def test_an_unfinished_frame_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "FRAME_DEADLINE_S", 0.1)
    async with serving(tmp_path / "s") as (_server, connect):
        slow = await connect()
        await slow.send_raw(b'{"v":1,')
        assert await slow.receive() is None


async def test_an_idle_connection_may_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "FRAME_DEADLINE_S", 0.01)
    async with serving(tmp_path / "s") as (_server, connect):
        idle = await connect()
        assert (await idle.ask("status"))["ok"] is True
        await trio.sleep(0.05)
        assert (await idle.ask("status"))["ok"] is True


async def test_a_peer_that_reads_nothing_loses_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uenvd.daemon.control.SEND_DEADLINE_S", 0.1)
    closed = trio.Event()

    async def flood(connection: Connection, _request: Request) -> Answer:
        connection.on_close.append(closed.set)
        while True:
            await connection.send(protocol.progress("pull", 0, 0, "x" * 60000))

    async with serving(tmp_path / "s", flood) as (_server, connect):
        deaf = await connect()
        await deaf.send(protocol.request("status"))
        with trio.fail_after(5):
            await closed.wait()


async def test_no_descriptor_is_taken_from_a_peer(tmp_path: Path) -> None:
    async with serving(tmp_path / "s") as (_server, connect):
        client = await connect()
        assert (await client.ask("status"))["ok"] is True
        before = open_descriptors()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 100))]
        for _ in range(20):
            await client.sock.sendmsg([protocol.encode(protocol.request("status"))], rights)
            assert (await client.receive())["ok"] is True
        assert open_descriptors() == before


async def test_descriptors_go_out_with_the_final_frame_and_are_closed_here(tmp_path: Path) -> None:
    async with serving(tmp_path / "s") as (_server, connect):
        client = await connect()
        assert (await client.ask("status"))["ok"] is True
        before = open_descriptors()
        await client.send(protocol.request("mount", uenv="x"))
        data, ancillary, _flags, _address = await client.sock.recvmsg(65536, socket.CMSG_SPACE(4 * 8))
        assert json.loads(data)["ok"] is True
        received = array.array("i", ancillary[0][2])
        assert len(received) == 1
        os.close(received[0])
        assert (await client.ask("status"))["ok"] is True  # the mount's answer is dealt with by now
        assert open_descriptors() == before


async def test_what_hangs_on_a_connection_ends_with_it(tmp_path: Path) -> None:
    ended = trio.Event()

    async def lease(connection: Connection, _request: Request) -> Answer:
        connection.on_close.append(ended.set)
        return Answer(protocol.success())

    async with serving(tmp_path / "s", lease) as (_server, connect):
        client = await connect()
        assert (await client.ask("status"))["ok"] is True
        assert not ended.is_set()
        client.sock.close()
        with trio.fail_after(5):
            await ended.wait()


async def test_a_lack_of_descriptors_is_an_ordinary_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uenvd.daemon.control._ACCEPT_PAUSE_S", 0.01)
    failures = [
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.ENFILE, "Too many open files in system"),
    ]
    original = control._accept

    def accept(listener: socket.socket) -> socket.socket:
        if failures:
            raise failures.pop()
        return original(listener)

    monkeypatch.setattr(control, "_accept", accept)
    async with serving(tmp_path / "s") as (_server, connect):
        client = await connect()
        assert (await client.ask("status"))["ok"] is True
    assert not failures


async def test_one_user_cannot_have_all_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from uenvd.daemon.peer import Identity, Peer

    monkeypatch.setattr(control, "peer_of", lambda _sock: Peer(1, Identity(1000, 1000, ())))
    async with serving(tmp_path / "s", limit=2) as (_server, connect):
        first, second, third = await connect(), await connect(), await connect()
        assert (await first.ask("status"))["ok"] is True
        assert (await second.ask("status"))["ok"] is True
        assert (await third.receive())["error"]["code"] == "limit"
        assert await third.receive() is None
        first.sock.close()
        while True:
            again = await connect()
            answer = await again.ask("status")
            if answer is not None and answer.get("ok"):
                break


@pytest.mark.parametrize("peer_waits", [True, False])
async def test_what_need_not_keep_the_peer_waiting_is_done_after_the_answer(
    tmp_path: Path, peer_waits: bool
) -> None:
    order: list[str] = []
    done = trio.Event()

    async def handler(connection: Connection, _request: Request) -> Answer:
        send = connection.send

        async def noted_send(frame: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
            order.append("answer")
            await send(frame, descriptors)

        connection.send = noted_send  # type: ignore[method-assign]
        if not peer_waits:
            client.sock.close()
        return Answer(protocol.success(), after=after)

    def after() -> None:
        order.append("after")
        done.set()

    async with serving(tmp_path / "socket", handler) as (_server, connect):
        client = await connect()
        await client.send(protocol.request("status"))
        with trio.fail_after(5):
            if peer_waits:
                assert await client.receive() == {"ok": True}
            await done.wait()
    assert order == ["answer", "after"]


def known(connection: Connection, request: Request) -> Answer | None:
    """Answer `status`, hand a descriptor out for `mount`, stumble over `find`, leave the rest."""
    if request.op == "find":
        raise RuntimeError("a bug")
    if request.op == "mount":
        reading, writing = os.pipe()
        os.close(writing)
        connection.on_close.append(lambda: ended.append(request.uenv))
        return Answer(protocol.success(at_once=True), [reading])
    return Answer(protocol.success(at_once=True)) if request.op == "status" else None


ended: list[str] = []


@pytest.mark.parametrize("first", ["status", "resolve", "find"])
async def test_a_first_request_may_be_answered_before_the_connection_has_a_task(
    tmp_path: Path, first: str
) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    with listener, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(tmp_path / "s"))  # accepted only when the server runs: the request is there by then
        sock.sendall(protocol.encode(protocol.request(first, uenv="a")))
        server = ControlServer(echo, connections_per_user=9, at_once=known)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, listener)
            client = Client(trio.socket.from_stdlib_socket(sock))
            frame = await client.receive()
            while frame is not None and "event" in frame:
                frame = await client.receive()
            assert frame is not None
            assert frame["ok"]
            assert frame.get("at_once", False) == (first == "status")
            later = await client.ask("status")
            assert later is not None
            assert later["op"] == "status"  # the handler's
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "data",
    [
        b'{"v":1,"op":"sta',
        b'{"v":1,"op":"status"}\n{"v":1,"op":"status"}\n',
        b'{"v":1,"op":"status"}\n{"v":1,',
        b"{]\n",
        b'{"v":2,"op":"status"}\n',
    ],
)
async def test_bytes_that_are_no_single_request_are_the_handlers(tmp_path: Path, data: bytes) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    with listener, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(tmp_path / "s"))
        sock.sendall(data)
        server = ControlServer(echo, connections_per_user=9, at_once=known)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, listener)
            client = Client(trio.socket.from_stdlib_socket(sock))
            if data.endswith(b"sta"):
                await trio.testing.wait_all_tasks_blocked()
                await client.send_raw(b'tus"}\n')
            frame = await client.receive()
            assert frame is not None
            assert "at_once" not in frame
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("gone", [False, True])
async def test_what_was_handed_out_at_once_ends_with_the_connection(tmp_path: Path, gone: bool) -> None:
    ended.clear()
    before = open_descriptors()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with listener, sock:
        sock.connect(str(tmp_path / "s"))
        sock.sendall(protocol.encode(protocol.request("mount", uenv="lease")))
        if gone:
            sock.close()
        server = ControlServer(echo, connections_per_user=9, at_once=known)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, listener)
            with trio.fail_after(5):
                if not gone:
                    peer = trio.socket.from_stdlib_socket(sock)
                    data, ancillary, _flags, _address = await peer.recvmsg(65536, socket.CMSG_SPACE(32))
                    assert json.loads(data)["at_once"] is True
                    os.close(array.array("i", ancillary[0][2])[0])
                    assert ended == []
                    peer.close()
                while server.connections or not ended:
                    await trio.sleep(0.001)
            assert ended == ["lease"]
            nursery.cancel_scope.cancel()
    assert open_descriptors() == before
