"""Frames: whole, byte by byte, too long, no JSON; requests with wrong fields."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uenvd import protocol
from uenvd.errors import ProtocolError, UnknownLabel
from uenvd.protocol import FrameReader, parse_request

FRAMES: list[dict[str, Any]] = [{"v": 1, "op": "status"}, {"a": "ü\n"}, {}]


def read_all(pieces: list[bytes], limit_bytes: int = 1000) -> list[dict[str, Any]]:
    reader = FrameReader(limit_bytes)
    found = []
    for piece in pieces:
        reader.feed(piece)
        while (frame := reader.next_frame()) is not None:
            found.append(frame)
    return found


def test_frames_arrive_whole_and_byte_by_byte() -> None:
    stream = b"".join(protocol.encode(frame) for frame in FRAMES)
    assert read_all([stream]) == FRAMES
    assert read_all([bytes([byte]) for byte in stream]) == FRAMES


def test_a_reader_knows_whether_a_frame_has_begun() -> None:
    reader = FrameReader(100)
    assert not reader.in_frame
    reader.feed(b"{")
    assert reader.next_frame() is None
    assert reader.in_frame
    reader.feed(b"}\n")
    assert reader.next_frame() == {}
    assert not reader.in_frame


@pytest.mark.parametrize(
    "stream",
    [b"x" * 101, b"x" * 101 + b"\n", b"[1]\n", b"nonsense\n", b"\xff\xfe\n", b"\n", b"[" * 99 + b"\n"],
)
def test_what_is_no_frame_breaks_the_protocol(stream: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_all([stream], limit_bytes=100)


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_else(stream: bytes) -> None:
    try:
        frames = read_all([stream], limit_bytes=200)
    except ProtocolError:
        return
    for frame in frames:
        with contextlib.suppress(ProtocolError):
            parse_request(frame)


@pytest.mark.parametrize(
    "frame",
    [
        {"op": "status"},
        {"v": 2, "op": "status"},
        {"v": 1},
        {"v": 1, "op": "reboot"},
        {"v": 1, "op": ["status"]},
        {"v": 1, "op": "mount"},
        {"v": 1, "op": "mount", "uenv": 7},
        {"v": 1, "op": "mount", "uenv": "x", "uid": "0"},
        {"v": 1, "op": "mount", "uenv": "x", "uid": True},
        {"v": 1, "op": "mount", "uenv": "x", "uid": -1},
        {"v": 1, "op": "mount", "uenv": "x", "uid": 2**32 - 1},
        {"v": 1, "op": "mount", "uenv": "x", "uid": 1, "gid": -1},
        {"v": 1, "op": "mount", "uenv": "x", "uid": 1, "gid": "1"},
        {"v": 1, "op": "mount", "uenv": "x", "uid": 1, "gid": 1, "groups": 1},
        {"v": 1, "op": "mount", "uenv": "x", "uid": 1, "gid": 1, "groups": ["1"]},
        {"v": 1, "op": "mount", "uenv": "x", "uid": 1, "gid": 1, "groups": [True]},
        {"v": 1, "op": "mount", "uenv": "x", "uid": 1, "gid": 1, "groups": [2**32 - 1]},
        {"v": 1, "op": "mount", "uenv": "x", "job": [1, 2]},
        {"v": 1, "op": "mount", "uenv": "x", "job": {"id": "1", "step": 2}},
        {"v": 1, "op": "wait"},
        {"v": 1, "op": "pin", "uenv": "x"},
    ],
)
def test_wrong_requests_are_refused(frame: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        parse_request(frame)


def test_a_request_keeps_its_fields_and_ignores_unknown_ones() -> None:
    frame = protocol.request(
        "mount", uenv="a/1", view=None, uid=1000, job={"id": 5, "step": 0}, later="field"
    )
    assert "view" not in frame
    request = parse_request(json.loads(protocol.encode(frame)))
    assert (request.op, request.uenv, request.view, request.uid, request.job) == (
        "mount",
        "a/1",
        None,
        1000,
        (5, 0),
    )


def test_a_failure_is_raised_as_its_class_at_the_other_end() -> None:
    frame = json.loads(protocol.encode(protocol.failure(UnknownLabel("no image", hint="look around"))))
    with pytest.raises(UnknownLabel) as caught:
        protocol.raise_failure(frame)
    assert (caught.value.message, caught.value.hint) == ("no image", "look around")
    protocol.raise_failure({"ok": True})
    with pytest.raises(ProtocolError):
        protocol.raise_failure({"ok": False})
