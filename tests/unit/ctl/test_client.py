"""The client against a daemon that answers, stalls, lies and dies."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.fakedaemon import FakeDaemon, Hang, HangUp, Pause, Raw, Step, failure, open_descriptors, progress
from uenvd import errors
from uenvd.ctl import client as client_module
from uenvd.ctl.client import Client, socket_path
from uenvd.errors import DaemonTimeout, DaemonUnreachable, ProtocolError, UenvError, UnknownLabel, UsageError


@contextmanager
def connected(directory: Path, *steps: Step) -> Iterator[tuple[Client, FakeDaemon]]:
    with FakeDaemon(directory / "control", {"status": steps}) as daemon, Client(str(daemon.path)) as client:
        yield client, daemon


def _fails(directory: Path, steps: Sequence[Step], kind: type[UenvError], **options: Any) -> UenvError:
    before = open_descriptors()
    with connected(directory, *steps) as (client, _daemon), pytest.raises(kind) as caught:
        client.call("status", **options)
    assert open_descriptors() == before
    return caught.value


def test_request_and_answer(tmp_path: Path) -> None:
    events: list[Any] = []
    with connected(tmp_path, progress(1, 2), progress(2, 2), {"ok": True, "x": "é"}) as (client, daemon):
        reply = client.call("status", uenv="app", refresh=None, on_event=events.append)
        assert reply.frame == {"ok": True, "x": "é"}
        assert reply.descriptors == ()
        assert [event["done_bytes"] for event in events] == [1, 2]
        assert daemon.requests == [{"v": 1, "op": "status", "uenv": "app"}]
        assert client.call("status").frame["ok"] is True


def test_an_answer_in_single_bytes(tmp_path: Path) -> None:
    steps = [Raw(bytes([byte])) for byte in b'{"ok":true}\n']
    with connected(tmp_path, *steps) as (client, _daemon):
        assert client.call("status").frame == {"ok": True}


def test_descriptors_arrive_closed_on_exec(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+") as file:
        step = Raw(b'{"ok":true}\n', (file.fileno(), file.fileno()))
        with connected(tmp_path, progress(1, 2), step) as (client, _daemon):
            descriptors = client.call("status").descriptors
        assert len(descriptors) == 2
        for descriptor in descriptors:
            assert not os.get_inheritable(descriptor)
            assert os.path.samestat(os.fstat(descriptor), os.fstat(file.fileno()))
            os.close(descriptor)


def test_descriptors_of_a_failure_are_closed(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+") as file:
        before = open_descriptors()
        step = Raw(json.dumps(failure("unknown-label", "x")).encode() + b"\n", (file.fileno(),) * 3)
        with connected(tmp_path, step) as (client, _daemon), pytest.raises(UnknownLabel):
            client.call("status")
        assert open_descriptors() == before


@pytest.mark.parametrize("kind", errors.all_errors(), ids=lambda kind: kind.code)
def test_an_error_of_the_daemon_keeps_its_class(tmp_path: Path, kind: type[UenvError]) -> None:
    error = _fails(tmp_path, [failure(kind.code, "what", "do")], kind)
    assert type(error) is kind
    assert (error.message, error.hint) == ("what", "do")


def test_an_error_of_a_newer_daemon(tmp_path: Path) -> None:
    assert type(_fails(tmp_path, [failure("invented-later", "what")], UenvError)) is UenvError


@pytest.mark.parametrize(
    "data",
    [b"garbage\n", b"[]\n", b"null\n", b"{}\n", b'{"ok":1}\n', b'{"ok":false}\n',
        b'{"ok":false,"error":3}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"\n"],
    ids=lambda data: str(data[:24]),
)  # fmt: skip
def test_garbage(tmp_path: Path, data: bytes) -> None:
    _fails(tmp_path, [Raw(data)], ProtocolError)


def test_an_oversized_frame(tmp_path: Path) -> None:
    _fails(tmp_path, [Raw(b'{"ok":true,"x":"' + b"x" * (4 << 20)), Hang()], ProtocolError)


@pytest.mark.parametrize("start", [b"", b'{"ok":tr'])
def test_the_daemon_hangs_up(tmp_path: Path, start: bytes) -> None:
    _fails(tmp_path, [Raw(start), HangUp()] if start else [HangUp()], DaemonUnreachable)


def test_a_silent_daemon(tmp_path: Path) -> None:
    start = time.monotonic()
    error = _fails(tmp_path, [Hang()], DaemonTimeout, answer_s=0.2)
    assert 0.2 <= time.monotonic() - start < 2.0
    assert "'status'" in error.message


def test_a_daemon_that_falls_silent(tmp_path: Path) -> None:
    _fails(tmp_path, [progress(1, 2), Hang()], DaemonTimeout, answer_s=5.0, silence_s=0.2)


def test_heartbeats_keep_the_client_waiting(tmp_path: Path) -> None:
    steps: list[Step] = []
    for done in range(5):
        steps += [Pause(0.15), progress(done, 5)]
    with connected(tmp_path, *steps, {"ok": True}) as (client, _daemon):
        assert client.call("status", silence_s=0.6, answer_s=0.6).frame == {"ok": True}


def test_a_frame_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module.protocol, "FRAME_DEADLINE_S", 0.3)
    start = time.monotonic()
    _fails(tmp_path, [step for _ in range(100) for step in (Raw(b"x"), Pause(0.05))], DaemonTimeout)
    assert time.monotonic() - start < 2.0


def test_a_request_that_is_too_long(tmp_path: Path) -> None:
    with connected(tmp_path, {"ok": True}) as (client, daemon):
        with pytest.raises(UsageError, match="too long"):
            client.call("status", uenv="x" * 65536)
        assert daemon.requests == []


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable, match="there is no socket") as caught:
        Client(str(tmp_path / "none"))
    assert "systemctl start uenvd" in caught.value.hint


def test_a_socket_without_listener(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    with pytest.raises(DaemonUnreachable, match="nobody listens"):
        Client(str(tmp_path / "dead"))


def test_a_path_that_is_no_socket(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DaemonUnreachable):
        Client(str(tmp_path / "file"))
    with pytest.raises(UsageError):
        Client("x" * 200)


def test_a_stopped_daemon_with_a_full_backlog(tmp_path: Path) -> None:
    path = str(tmp_path / "full")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        start = time.monotonic()
        with pytest.raises(DaemonTimeout):
            Client(path, connect_s=0.2)
        assert time.monotonic() - start < 2.0


def test_a_listener_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    # Not in the module itself: threads of pytest-xdist unpack messages with it.
    foreign = SimpleNamespace(calcsize=struct.calcsize, unpack=lambda *_args: (7, 54321, 0))
    monkeypatch.setattr(client_module, "struct", foreign)
    with (
        FakeDaemon(tmp_path / "control", {}) as daemon,
        pytest.raises(DaemonUnreachable, match="belongs to uid 54321"),
    ):
        Client(str(daemon.path))


def test_where_the_socket_is() -> None:
    assert socket_path("/a", {"UENVD_SOCKET": "/b"}) == "/a"
    assert socket_path(None, {"UENVD_SOCKET": "/b"}) == "/b"
    assert socket_path(None, {"UENVD_SOCKET": ""}) == "/run/uenvd/control"
