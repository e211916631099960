"""The loopback port answers a Prometheus server and refuses everything else within its deadlines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from uenvd.daemon import exporter
from uenvd.errors import ConfigError

TEXT = "# HELP up Up.\n# TYPE up gauge\nup 1\n"


@asynccontextmanager
async def served() -> AsyncIterator[int]:
    async def text() -> str:
        return TEXT

    async with trio.open_nursery() as nursery:
        yield await nursery.start(exporter.serve, 0, text)
        nursery.cancel_scope.cancel()


async def ask(port: int, request: bytes, *, end: bool = False) -> tuple[str, bytes]:
    """Send bytes; return the status line and the body."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        await stream.send_all(request)
        if end:
            await stream.send_eof()
        answer = b""
        with trio.fail_after(10):
            async for data in stream:
                answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0].decode(), body


async def test_the_metrics() -> None:
    async with served() as port:
        status, body = await ask(port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (status, body.decode()) == ("HTTP/1.1 200 OK", TEXT)
        assert (await ask(port, b"GET /metrics?x=1 HTTP/1.0\r\n\r\n"))[1].decode() == TEXT
        assert await ask(port, b"HEAD /metrics HTTP/1.1\r\n\r\n") == ("HTTP/1.1 200 OK", b"")


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "404"),
        (b"GET /metricsx HTTP/1.1\r\n\r\n", "404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"\r\n\r\n", "404"),
        (b"\x16\x03\x01\x00", "400"),
        (b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 5000, "400"),
    ],
)
async def test_anything_else_is_refused(request_text: bytes, status: str) -> None:
    async with served() as port:
        line, _body = await ask(port, request_text[: exporter.MAX_HEAD_BYTES], end=True)
        assert line.split()[1] == status


async def test_a_silent_peer_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "DEADLINE_S", 0.05)
    async with served() as port:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            with trio.fail_after(10):
                try:
                    assert await stream.receive_some(100) == b""
                except trio.BrokenResourceError:
                    return


async def test_a_port_in_use_is_a_clear_error() -> None:
    async def text() -> str:
        return TEXT

    async with served() as port:
        with pytest.raises(ConfigError, match=f"metrics.port: cannot listen on 127.0.0.1:{port}"):
            await exporter.serve(port, text)
