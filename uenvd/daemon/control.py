"""The control socket: connections, frames, deadlines. What the requests mean is `service`'s matter.

Concurrency: one task a connection, requests of a connection one after the other. A connection's task ends by EOF, by
a fault of its peer or with the server; whatever happens in it, it never reaches the nursery. Nothing is received
with a control buffer, so no peer can put a descriptor into this process (design: a descriptor on a hostile FUSE
blocks even close). Sockets are plain ones: trio's own let other tasks run after each call, also of what was there at once, and a step start
waits for each such round. For the same reason a connection's first request, which is nearly always here when the connection is, may be
answered before the connection has a task (`AtOnce`).
"""

from __future__ import annotations

import array
import errno
import logging
import os
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, closing, suppress
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
REFUSAL_S: Final = 0.1
_ACCEPT_PAUSE_S: Final = 0.1
_TRANSIENT_ACCEPT_ERRORS: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ECONNABORTED, errno.EINTR}
)


@dataclass(slots=True)
class Answer:
    """A final frame, and the descriptors that go out with it; the server closes them once they are sent."""

    frame: Frame
    descriptors: Sequence[int] = ()
    after: Callable[[], None] | None = None
    """What need not keep the peer waiting: done once it is sent, or cannot be."""


class PeerGone(Exception):
    """The peer closed its end, or does not read what it is sent."""


class Connection:
    """One peer. Handlers send events through it and hang what must end with it on ``on_close``."""

    def __init__(self, sock: socket.socket, peer: Peer) -> None:
        self._sock = sock
        self._unsent = memoryview(b"")
        self.peer = peer
        self.on_close: list[Callable[[], None]] = []

    async def send(self, frame: Frame, descriptors: Sequence[int] = ()) -> None:
        """Send one frame whole. Raises `PeerGone`; `InternalError` when the frame is too large."""
        data = protocol.encode(frame)
        if len(data) > protocol.MAX_REPLY_BYTES:
            raise InternalError("the answer is larger than a frame may be")
        self._unsent = memoryview(data)
        await self._flush(descriptors)
        await trio.lowlevel.checkpoint()

    async def _flush(self, descriptors: Sequence[int] = ()) -> None:
        deadline = trio.current_time() + SEND_DEADLINE_S
        try:
            while self._unsent:
                try:
                    self._send_some(descriptors)
                    descriptors = ()
                except BlockingIOError:
                    with trio.fail_at(deadline):
                        await trio.lowlevel.wait_writable(self._sock)
        except (OSError, trio.TooSlowError) as error:
            raise PeerGone(str(error)) from error

    def _send_some(self, descriptors: Sequence[int]) -> None:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        sent = self._sock.sendmsg([self._unsent], [rights] if descriptors else [])
        self._unsent = self._unsent[sent:]

    def send_nowait(self, answer: Answer) -> None:
        """Begin to send the first answer of a connection, whose buffer is empty; `receive` sends the rest. No checkpoint, raises nothing."""
        self._unsent = memoryview(protocol.encode(answer.frame))
        try:
            self._send_some(answer.descriptors)
        except OSError as error:
            log.debug("pid %d was gone before its answer: %s", self.peer.pid, error)
            self._unsent = memoryview(b"")
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def receive_nowait(self) -> bytes:
        """Return what has come already; b"" also at EOF and when the connection is broken, which `receive` will say."""
        try:
            return self._sock.recv(65536)
        except OSError:
            return b""

    async def receive(self) -> bytes:
        """Receive some bytes; b"" at EOF. Raises `PeerGone`. No checkpoint when some are there: the answer to them has one."""
        await self._flush()
        while True:
            try:
                return self._sock.recv(65536)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock)
            except OSError as error:
                raise PeerGone(str(error)) from error

    def close(self) -> None:
        """Close it."""
        self._sock.close()


Handler = Callable[[Connection, Request], Awaitable[Answer]]
AtOnce = Callable[[Connection, Request], Answer | None]
"""Answers what needs no waiting, without a checkpoint; None: it is a matter for the handler."""


def _accept(listener: socket.socket) -> socket.socket:
    sock, _address = listener.accept()
    sock.setblocking(False)
    return sock


class ControlServer:
    """Accepts connections and turns frames into calls of a handler."""

    def __init__(
        self,
        handler: Handler,
        *,
        connections_per_user: int,
        at_once: AtOnce = lambda _connection, _request: None,
    ) -> None:
        self._handler = handler
        self._at_once = at_once
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
        listener.setblocking(False)
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                await trio.lowlevel.wait_readable(listener)
                try:
                    sock = _accept(listener)
                except BlockingIOError:
                    continue  # it is gone again
                except OSError as error:
                    if error.errno not in _TRANSIENT_ACCEPT_ERRORS:
                        raise
                    log.warning("cannot accept a connection: %s", error)
                    await trio.sleep(_ACCEPT_PAUSE_S)
                    continue
                try:
                    connection = Connection(sock, peer_of(sock))
                except OSError as error:
                    log.info("a peer was gone before it could be identified: %s", error)
                    sock.close()
                    continue
                uid = connection.peer.identity.uid
                self._by_uid[uid] += 1
                if uid != 0 and self._by_uid[uid] > self._limit:
                    nursery.start_soon(self._attend, connection, self._refuse(connection))
                else:
                    nursery.start_soon(
                        self._attend, connection, self._converse(connection, *self._begin(connection))
                    )

    def _begin(self, connection: Connection) -> tuple[bytes, Callable[[], None] | None]:
        """Answer the first request if it is here already and `AtOnce` can; else return what came. And return what is left to be done."""
        data = connection.receive_nowait()
        answer = self._known(connection, data) if data else None
        if answer is None:
            return data, None
        connection.send_nowait(answer)
        for descriptor in answer.descriptors:
            os.close(descriptor)
        return b"", answer.after

    def _known(self, connection: Connection, data: bytes) -> Answer | None:
        reader = protocol.FrameReader(protocol.MAX_REQUEST_BYTES)
        reader.feed(data)
        try:
            frame = reader.next_frame()
            if frame is None or reader.in_frame:
                return None
            request = protocol.parse_request(frame)
        except ProtocolError:
            return None
        began_s = trio.current_time()
        try:
            with self._about(connection, request):
                answer = self._at_once(connection, request)
        except Exception:
            log.exception("request %r could not be answered at once", request.op)
            return None
        if answer is not None:
            METRICS.requests.inc(op=request.op, result="ok")
            METRICS.request_seconds.observe(trio.current_time() - began_s, op=request.op)
        return answer

    async def _refuse(self, connection: Connection) -> None:
        METRICS.refused_connections.inc(reason="limit")
        # Who still sends when this end is closed does not get to read why.
        with trio.move_on_after(REFUSAL_S):
            await connection.receive()
        uid = connection.peer.identity.uid
        await connection.send(
            protocol.failure(LimitExceeded(f"uid {uid} has {self._limit} connections to uenvd already"))
        )

    async def _attend(self, connection: Connection, work: Coroutine[None, None, None]) -> None:
        """Do the work of a connection's task; whatever happens in it, it ends here."""
        peer = connection.peer
        uid = peer.identity.uid
        with closing(connection):
            try:
                await work
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
                self._by_uid[uid] -= 1
                if not self._by_uid[uid]:
                    del self._by_uid[uid]

    async def _converse(
        self, connection: Connection, received: bytes, after: Callable[[], None] | None
    ) -> None:
        if after is not None:
            after()
        reader = protocol.FrameReader(protocol.MAX_REQUEST_BYTES)
        reader.feed(received)
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
                if answer.after is not None:
                    answer.after()

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
        with self._about(connection, request):
            return await self._carry_out(connection, request)

    @staticmethod
    def _about(connection: Connection, request: Request) -> AbstractContextManager[None]:
        uid = connection.peer.identity.uid if request.uid is None else request.uid
        job, step = request.job or (request.job_id or None, None)
        return about(op=request.op, uid=uid, job=job, step=step_name(step))

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
