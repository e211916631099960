"""The control socket: connections, frames, deadlines. What the requests mean is `service`'s matter.

Concurrency: one task a connection, requests of a connection one after the other. A connection's task ends by EOF, by
a fault of its peer or with the server; whatever happens in it, it never reaches the nursery. Nothing is received
with a control buffer, so no peer can put a descriptor into this process (design: a descriptor on a hostile FUSE
blocks even close).
"""

from __future__ import annotations

import array
import errno
import logging
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import trio

from uenvd import protocol
from uenvd.daemon.logs import about, step_name
from uenvd.daemon.metrics import METRICS, result_of
from uenvd.daemon.peer import Peer, peer_of
from uenvd.errors import InternalError, LimitExceeded, ProtocolError, UenvError
from uenvd.protocol import Frame, Request

log = logging.getLogger(__name__)

SEND_DEADLINE_S: Final = 10.0
_ACCEPT_PAUSE_S: Final = 0.1
_TRANSIENT_ACCEPT_ERRORS: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ECONNABORTED, errno.EINTR}
)


@dataclass(slots=True)
class Answer:
    """A final frame, and the descriptors that go out with it; the server closes them once they are sent."""

    frame: Frame
    descriptors: Sequence[int] = ()


class PeerGone(Exception):
    """The peer closed its end, or does not read what it is sent."""


class Connection:
    """One peer. Handlers send events through it and hang what must end with it on ``on_close``."""

    def __init__(self, sock: trio.socket.SocketType, peer: Peer) -> None:
        self._sock = sock
        self.peer = peer
        self.on_close: list[Callable[[], None]] = []

    async def send(self, frame: Frame, descriptors: Sequence[int] = ()) -> None:
        """Send one frame whole. Raises `PeerGone`; `InternalError` when the frame is too large."""
        data = memoryview(protocol.encode(frame))
        if len(data) > protocol.MAX_REPLY_BYTES:
            raise InternalError("the answer is larger than a frame may be")
        try:
            with trio.fail_after(SEND_DEADLINE_S):
                if descriptors:
                    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
                    data = data[await self._sock.sendmsg([data], [rights]) :]
                while data:
                    data = data[await self._sock.send(data) :]
        except (OSError, trio.TooSlowError) as error:
            raise PeerGone(str(error)) from error

    async def receive(self) -> bytes:
        """Receive some bytes; b"" at EOF. Raises `PeerGone`."""
        try:
            return await self._sock.recv(65536)
        except OSError as error:
            raise PeerGone(str(error)) from error


Handler = Callable[[Connection, Request], Awaitable[Answer]]


class ControlServer:
    """Accepts connections and turns frames into calls of a handler."""

    def __init__(self, handler: Handler, *, connections_per_user: int) -> None:
        self._handler = handler
        self._limit = connections_per_user
        self._by_uid: Counter[int] = Counter()

    @property
    def connections(self) -> int:
        """How many peers are connected now."""
        return self._by_uid.total()

    async def serve(
        self, listener: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until cancelled. A lack of descriptors or memory is an ordinary event: pause, go on."""
        accepting = trio.socket.from_stdlib_socket(listener)
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                try:
                    sock, _address = await accepting.accept()
                except OSError as error:
                    if error.errno not in _TRANSIENT_ACCEPT_ERRORS:
                        raise
                    log.warning("cannot accept a connection: %s", error)
                    await trio.sleep(_ACCEPT_PAUSE_S)
                    continue
                nursery.start_soon(self._serve_peer, sock)

    async def _serve_peer(self, sock: trio.socket.SocketType) -> None:
        with sock:
            try:
                peer = peer_of(sock)
            except OSError as error:
                log.info("a peer was gone before it could be identified: %s", error)
                return
            connection = Connection(sock, peer)
            uid = peer.identity.uid
            try:
                async with self._counted(uid):
                    if uid != 0 and self._by_uid[uid] > self._limit:
                        METRICS.refused_connections.inc(reason="limit")
                        await connection.send(
                            protocol.failure(
                                LimitExceeded(f"uid {uid} has {self._limit} connections to uenvd already")
                            )
                        )
                        return
                    await self._converse(connection)
            except (PeerGone, trio.TooSlowError) as error:
                log.debug("connection of pid %d (uid %d) ended: %r", peer.pid, uid, error)
            except ProtocolError as error:
                METRICS.refused_connections.inc(reason="protocol")
                log.info("pid %d (uid %d) broke the protocol: %s", peer.pid, uid, error)
            except Exception:
                log.exception("connection of pid %d (uid %d) failed", peer.pid, uid)
            finally:
                for callback in connection.on_close:
                    callback()

    @asynccontextmanager
    async def _counted(self, uid: int) -> AsyncIterator[None]:
        self._by_uid[uid] += 1
        try:
            yield
        finally:
            self._by_uid[uid] -= 1
            if not self._by_uid[uid]:
                del self._by_uid[uid]

    async def _converse(self, connection: Connection) -> None:
        reader = protocol.FrameReader(protocol.MAX_REQUEST_BYTES)
        while True:
            try:
                frame = await self._next_frame(connection, reader)
            except ProtocolError as error:
                await connection.send(protocol.failure(error))
                raise
            if frame is None:
                return
            answer = await self._answer(connection, frame)
            try:
                await connection.send(answer.frame, answer.descriptors)
            finally:
                for descriptor in answer.descriptors:
                    os.close(descriptor)

    async def _next_frame(self, connection: Connection, reader: protocol.FrameReader) -> Frame | None:
        deadline = trio.current_time() + protocol.FRAME_DEADLINE_S if reader.in_frame else float("inf")
        while True:
            frame = reader.next_frame()
            if frame is not None:
                return frame
            with trio.fail_at(deadline):
                data = await connection.receive()
            if not data:
                return None
            if not reader.in_frame:
                deadline = trio.current_time() + protocol.FRAME_DEADLINE_S
            reader.feed(data)

    async def _answer(self, connection: Connection, frame: Frame) -> Answer:
        try:
            request = protocol.parse_request(frame)
        except ProtocolError as error:
            METRICS.requests.inc(op="none", result=error.code)
            return Answer(protocol.failure(error))
        uid = connection.peer.identity.uid if request.uid is None else request.uid
        job, step = request.job or (request.job_id or None, None)
        with about(op=request.op, uid=uid, job=job, step=step_name(step)):
            return await self._carry_out(connection, request)

    async def _carry_out(self, connection: Connection, request: Request) -> Answer:
        began_s = trio.current_time()
        result = "gone"  # the peer, or the server
        try:
            answer = await self._handler(connection, request)
        except UenvError as error:
            result = result_of(error)
            log.info("%s: %s", error.code, error.message.partition("\n")[0])
            return Answer(protocol.failure(error))
        except PeerGone:
            raise
        except Exception:
            log.exception("request %r failed", request.op)
            result = InternalError.code
            return Answer(
                protocol.failure(
                    InternalError("uenvd met an unexpected fault; the request was not carried out")
                )
            )
        else:
            result = "ok"
            return answer
        finally:
            METRICS.requests.inc(op=request.op, result=result)
            METRICS.request_seconds.observe(trio.current_time() - began_s, op=request.op)
