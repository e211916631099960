"""The optional loopback port on which a Prometheus server reads the metrics (``metrics.port``).

As much of HTTP/1.1 as that needs: one request a connection, its head read to a bound and a deadline, everything else refused. It listens on
127.0.0.1 only, and says nothing that a user of the node may not know: counts and sizes, no names.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from uenvd.daemon.metrics import CONTENT_TYPE
from uenvd.errors import ConfigError

log = logging.getLogger(__name__)

MAX_HEAD_BYTES: Final = 8192
DEADLINE_S: Final = 5.0
MAX_CONNECTIONS: Final = 16


async def serve(
    port: int,
    text: Callable[[], Awaitable[str]],
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer ``GET /metrics`` on 127.0.0.1 until cancelled; reports the port (of interest when ``port`` is 0). Raises `ConfigError`."""
    try:
        listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    except OSError as error:
        raise ConfigError(
            f"metrics.port: cannot listen on 127.0.0.1:{port}: {error.strerror or error}",
            hint="configure another port",
        ) from error
    (listener,) = listeners
    limit = trio.CapacityLimiter(MAX_CONNECTIONS)

    async def answer(stream: trio.SocketStream) -> None:
        async with limit:
            await _answer(stream, text)

    task_status.started(listener.socket.getsockname()[1])
    await trio.serve_listeners(answer, listeners)


async def _answer(stream: trio.SocketStream, text: Callable[[], Awaitable[str]]) -> None:
    try:
        with trio.move_on_after(DEADLINE_S):
            status, body = await _reply(await _head(stream), text)
            head = (
                f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            await stream.send_all(head.encode() + body)
            await stream.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        log.debug("a reader of the metrics went away: %r", error)
    except Exception:
        log.exception("the metrics cannot be shown")
    finally:
        await trio.aclose_forcefully(stream)


async def _head(stream: trio.SocketStream) -> bytes:
    """Return the request's head as far as it came, at most `MAX_HEAD_BYTES`."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) < MAX_HEAD_BYTES:
        data = await stream.receive_some(MAX_HEAD_BYTES - len(head))
        if not data:
            break
        head += data
    return head


async def _reply(head: bytes, text: Callable[[], Awaitable[str]]) -> tuple[str, bytes]:
    if b"\r\n\r\n" not in head:
        return "400 Bad Request", b"no complete request\n"
    method, _, rest = head.split(b"\r\n", 1)[0].partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    if path != b"/metrics":
        return "404 Not Found", b"there is /metrics\n"
    if method not in (b"GET", b"HEAD"):
        return "405 Method Not Allowed", b"GET it\n"
    return "200 OK", b"" if method == b"HEAD" else (await text()).encode()
