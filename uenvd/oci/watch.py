"""Deadlines and cancellation for blocking network calls of one thread.

``requests`` bounds each single ``recv``; a peer that sends a byte now and then holds the caller for ever, and nobody can interrupt
it. Here every wait for a socket is cut into ticks, and at each tick the deadline and the cancel flag of the calling thread are looked at.
"""

from __future__ import annotations

import http.client
import io
import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import urllib3
import urllib3.connection
import urllib3.exceptions
from urllib3.util.connection import create_connection

from uenvd.errors import Cancelled

TICK_S: Final = 0.1
"""How late a deadline or a cancellation may be noticed."""
IDLE_S: Final = 30.0
"""A connection that was not used for so long is not used again: what is between may have forgotten it without a word."""
ENOUGH_BYTES: Final = 2 << 20
"""So much at a time costs few wake-ups; who wants to know of less sooner gives a smaller buffer."""
GATHER_S: Final = 0.05


class ReadStalled(Exception):
    """The peer sent nothing for the read timeout. For the transport, which knows who the peer is."""


class DeadlineOver(Exception):
    """The time for the whole call is over. For the transport."""


@dataclass
class Watch:
    """What bounds the calls of one thread: when to stop (``time.monotonic``), whether to, and how long to wait for a byte."""

    deadline: float | None
    cancelled: Callable[[], bool]
    timeout_read_s: float

    def check(self) -> None:
        """Raise `Cancelled` or `DeadlineOver` if it is time to."""
        if self.cancelled():
            raise Cancelled("the transfer was cancelled")
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise DeadlineOver("no answer in time")

    def remaining(self, at_most_s: float) -> float:
        """Return how long to wait: ``at_most_s`` or what is left, and never 0, which would mean non-blocking."""
        if self.deadline is None:
            return at_most_s
        return max(0.001, min(at_most_s, self.deadline - time.monotonic()))

    def sleep(self, seconds: float) -> None:
        """Sleep, but notice the deadline and cancellation."""
        end = time.monotonic() + seconds
        while True:
            self.check()
            left = end - time.monotonic()
            if left <= 0:
                return
            time.sleep(self.remaining(min(TICK_S, left)))


_local = threading.local()


def current() -> Watch | None:
    """Return the watch of this thread."""
    return cast("Watch | None", getattr(_local, "watch", None))


@contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Make ``watch`` that of this thread inside the ``with`` block."""
    before = current()
    _local.watch = watch
    try:
        yield watch
    finally:
        _local.watch = before


class _TickingReader(io.RawIOBase):
    """The reading side of a socket; waits in ticks. Closing it closes ``owner``, which keeps the socket open."""

    def __init__(self, sock: socket.socket, owner: io.BufferedReader) -> None:
        self._sock = sock
        self._owner = owner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 -- a writable buffer; the type has no name before 3.12
        watch = current()
        if watch is None:
            return self._sock.recv_into(buffer)
        give_up = time.monotonic() + watch.timeout_read_s
        while True:
            watch.check()
            self._sock.settimeout(watch.remaining(TICK_S))
            try:
                return self._sock.recv_into(buffer)
            except TimeoutError:
                if time.monotonic() >= give_up:
                    raise ReadStalled(f"nothing received for {watch.timeout_read_s:g} s") from None

    def close(self) -> None:
        if not self.closed:
            self._owner.close()
            super().close()


class _TickingSocket:
    """What ``http.client.HTTPResponse`` needs of a socket: ``makefile``."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TickingReader(self._sock, self._sock.makefile("rb")), 65536)


class Response(http.client.HTTPResponse):
    """An answer whose body can be received straight into a buffer of the caller's: `requests` and urllib3 copy it twice."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 -- handed through
        super().__init__(cast("socket.socket", _TickingSocket(sock)), *args, **kwargs)
        self._failure: Exception | None = None
        # What TLS has decoded already no readiness of the socket would tell of.
        self._plain = sock if type(sock) is socket.socket else None
        self._low_water = 1
        self._unbuffered = False

    def receive_into(self, buffer: memoryview) -> int:
        """Fill a part of the buffer with what follows of the body; 0 at its end, which may have come too early.

        Returns with `ENOUGH_BYTES`, or with less as soon as `GATHER_S` are over. What was received before an error is returned first.
        """
        if self._failure is not None:
            raise self._failure
        filled, begin = 0, time.monotonic()
        try:
            while filled < len(buffer):
                if not self._await(len(buffer) - filled) and filled:
                    break
                count = self._receive(buffer[filled:])
                filled += count
                if not count or filled >= ENOUGH_BYTES or time.monotonic() - begin > GATHER_S:
                    break
        except Exception as error:
            if not filled:
                raise
            self._failure = error
        return filled

    def _receive(self, buffer: memoryview) -> int:
        if self.isclosed():
            return 0
        if self.chunked:
            data = self.read1(len(buffer))
            buffer[: len(data)] = data
            return len(data)
        if self.length is not None:
            buffer = buffer[: self.length]
        count = self.fp.readinto1(buffer)
        # `io.BufferedReader` hands out what it has, or reads past itself: less than asked for means that it has nothing left.
        self._unbuffered = self._unbuffered or count < len(buffer)
        if self.length is not None:
            self.length -= count
        if not count or self.length == 0:
            if self._plain is not None:
                self._set_low_water(self._plain, 1)
            self._close_conn()  # type: ignore[attr-defined]  # what http.client's own readers do at the end of a body
        return count

    def _await(self, size_bytes: int) -> bool:
        """Sleep, `GATHER_S` at most, until so much of the body is here, once and not for each of its segments; tell whether there is anything.

        Where that cannot be known it does not sleep.
        """
        sock = self._plain
        if sock is None or not self._unbuffered or not self.length or self.isclosed():
            return True
        self._set_low_water(sock, min(size_bytes, self.length, ENOUGH_BYTES))
        waiting = select.poll()
        waiting.register(sock, select.POLLIN)
        if waiting.poll(GATHER_S * 1000):
            return True
        self._set_low_water(sock, 1)
        return bool(waiting.poll(0))

    def _set_low_water(self, sock: socket.socket, size_bytes: int) -> None:
        """Let the socket count as readable from so many bytes on, or at its end (``SO_RCVLOWAT``, socket(7))."""
        if size_bytes != self._low_water:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size_bytes)
            self._low_water = size_bytes


def _resolve(host: str, port: int, timeout_s: float) -> list[str]:
    """``getaddrinfo`` with a timeout (it has none of its own): the addresses as text. Raises `TimeoutError`, `socket.gaierror`."""
    answers: queue.SimpleQueue[list[str] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put(list(dict.fromkeys(str(entry[4][0]) for entry in found)))
        except OSError as error:
            answers.put(error)
        except UnicodeError as error:
            answers.put(socket.gaierror(socket.EAI_NONAME, str(error)))

    threading.Thread(target=ask, name=f"resolve {host}", daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, OSError):
        raise answer
    return answer


class _Bounded(urllib3.connection.HTTPConnection):
    """Name look-up and all connection attempts together stay within the connect timeout; sending has the read timeout."""

    response_class = Response

    def send(self, data: Any) -> None:  # noqa: ANN401 -- whatever http.client sends
        # A pooled socket still has the timeout of its last read, and urllib3 gives a new one the *connect* timeout for sends:
        # either would end a slow upload.
        watch = current()
        if watch is not None and self.sock is not None:
            watch.check()
            self.sock.settimeout(watch.remaining(watch.timeout_read_s))
        super().send(data)

    def _new_conn(self) -> socket.socket:
        host = self._dns_host
        timeout = self.timeout if isinstance(self.timeout, int | float) else 5.0
        end = time.monotonic() + timeout
        problem: OSError | None = None
        try:
            for address in _resolve(host, self.port, timeout):
                left = end - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                try:
                    sock = create_connection(
                        (address, self.port), left, self.source_address, self.socket_options
                    )
                except OSError as error:
                    problem = error
                else:
                    return sock
        except socket.gaierror as error:
            raise urllib3.exceptions.NameResolutionError(host, self, error) from error
        except TimeoutError as error:
            raise urllib3.exceptions.ConnectTimeoutError(
                self, f"no connection to {host} within {timeout:g} s"
            ) from error
        if isinstance(problem, TimeoutError):
            raise urllib3.exceptions.ConnectTimeoutError(
                self, f"no connection to {host} within {timeout:g} s"
            ) from problem
        raise urllib3.exceptions.NewConnectionError(self, f"no connection to {host}: {problem}") from problem


class _BoundedTLS(_Bounded, urllib3.connection.HTTPSConnection):
    """The same over TLS."""


class _Pool(urllib3.HTTPConnectionPool):
    """Connections that are used again, but none that lay idle for `IDLE_S`: that one leads nowhere is known after a read timeout only.

    After one that failed urllib3 takes a new one: the pool is a stack, and who fails puts an empty place on top of it.
    """

    ConnectionCls = _Bounded

    def _get_conn(self, timeout: float | None = None) -> Any:  # noqa: ANN401 -- as in the base class
        connection: Any = super()._get_conn(timeout)
        put_s = getattr(connection, "put_s", None)
        if put_s is not None and time.monotonic() - put_s >= IDLE_S:
            connection.close()  # it is opened anew when it is used
        return connection

    def _put_conn(self, conn: Any) -> None:  # noqa: ANN401
        if conn is not None:
            conn.put_s = time.monotonic()
        super()._put_conn(conn)


class _TLSPool(_Pool, urllib3.HTTPSConnectionPool):
    ConnectionCls = _BoundedTLS


def install(manager: urllib3.PoolManager) -> None:
    """Make a pool manager open connections that obey the watch of the calling thread."""
    manager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}
