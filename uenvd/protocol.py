"""Frames of the control socket, without the socket: bytes in, values out (docs/protocol.md).

Concurrency: values and one `FrameReader` per connection; nothing is shared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from uenvd.errors import ProtocolError, UenvError, by_code

VERSION: Final = 1
MAX_REQUEST_BYTES: Final = 64 * 1024
MAX_REPLY_BYTES: Final = 4 * 1024 * 1024
FRAME_DEADLINE_S: Final = 10.0
"""A frame must be complete this long after its first byte."""
HEARTBEAT_S: Final = 1.0
"""A request that waits sends an event at least this often."""
SILENCE_S: Final = 5.0
"""A client that has heard nothing for this long gives up."""

Frame = dict[str, Any]


def encode(frame: Mapping[str, Any]) -> bytes:
    """Return the frame as it goes over the wire, newline included."""
    return json.dumps(frame, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"


class FrameReader:
    """Splits a byte stream into frames of at most ``limit_bytes`` each."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._pending = bytearray()
        self._searched = 0

    @property
    def in_frame(self) -> bool:
        """Whether the first byte of a frame has arrived and its end has not."""
        return bool(self._pending)

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        self._pending += data

    def next_frame(self) -> Frame | None:
        """Return the next complete frame, or None when more bytes are needed.

        Raises `ProtocolError` for a frame that is too long or is no JSON object; the stream is then unusable.
        """
        end = self._pending.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self._pending)
            if len(self._pending) > self._limit_bytes:
                raise ProtocolError(f"a frame is longer than {self._limit_bytes} bytes")
            return None
        if end > self._limit_bytes:
            raise ProtocolError(f"a frame is longer than {self._limit_bytes} bytes")
        line = bytes(self._pending[:end])
        del self._pending[: end + 1]
        self._searched = 0
        try:
            frame = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProtocolError("a frame is not valid JSON") from error
        if not isinstance(frame, dict):
            raise ProtocolError("a frame is not a JSON object")
        return frame


_OPTIONAL_FIELDS: Final[Mapping[str, type | tuple[type, ...]]] = {
    "uenv": str,
    "view": str,
    "cwd": str,
    "uid": int,
    "gid": int,
    "groups": list,
    "job": (dict, int),
    "refresh": bool,
    "remembered": bool,
    "submit": bool,
    "lease": str,
    "pin": bool,
}

_OPERATIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "resolve": ("uenv",),
    "mount": ("uenv",),
    "wait": ("lease",),
    "trace": ("lease",),
    "idmap": (),
    "pull": ("uenv",),
    "find": (),
    "images": (),
    "inspect": ("uenv",),
    "recipe": ("uenv",),
    "status": (),
    "metrics": (),
    "job": ("job",),
    "evict": ("uenv",),
    "pin": ("uenv", "pin"),
}
"""Operation -> the fields that it needs."""


class Request(NamedTuple):
    """A checked request: the types are right, the texts are not yet parsed."""

    op: str
    uenv: str = ""
    view: str | None = None
    cwd: str | None = None
    uid: int | None = None
    gid: int | None = None
    groups: tuple[int, ...] | None = None
    """With ``uid``, from root: the user's ids as the asker knows them, so that nobody has to look them up."""
    job: tuple[int, int] | None = None
    """Job id and step id, for the log and `status`."""
    refresh: bool = False
    remembered: bool = False
    """Answer from what is remembered, without asking the registry."""
    submit: bool = False
    """The question is asked for a job that is being submitted."""
    lease: str = ""
    pin: bool = False
    job_id: int = 0
    """Of the operation `job`: whose images are asked for."""


def parse_request(frame: Frame) -> Request:
    """Check a frame against the protocol. Raises `ProtocolError`."""
    if frame.get("v") != VERSION:
        raise ProtocolError(
            f"this uenvd speaks version {VERSION} of the protocol, the request has {frame.get('v')!r}"
        )
    op = frame.get("op")
    if not isinstance(op, str) or op not in _OPERATIONS:
        raise ProtocolError(f"unknown operation {op!r}")
    fields: dict[str, Any] = {}
    for name, kind in _OPTIONAL_FIELDS.items():
        value = frame.get(name)
        if value is None:
            continue
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ProtocolError(f"{op}: {name!r} has the wrong type")
        fields[name] = value
    for name in _OPERATIONS[op]:
        if name not in fields:
            raise ProtocolError(f"{op}: {name!r} is missing")
    for name in ("uid", "gid"):
        if name in fields and not _is_id(fields[name]):
            raise ProtocolError(f"{op}: {name!r} is out of range")
    if "groups" in fields:
        if not all(type(one) is int and _is_id(one) for one in fields["groups"]):
            raise ProtocolError(f"{op}: 'groups' is no list of group ids")
        fields["groups"] = tuple(fields["groups"])
    job = fields.pop("job", None)
    if op == "job":
        if not isinstance(job, int) or isinstance(job, bool) or not 0 < job < 2**32:
            raise ProtocolError("job: 'job' is the number of a job")
        fields["job_id"] = job
    elif job is not None:
        if not isinstance(job, dict):
            raise ProtocolError(f"{op}: 'job' has the wrong type")
        numbers = (job.get("id"), job.get("step"))
        if not all(isinstance(number, int) for number in numbers):
            raise ProtocolError(f"{op}: 'job' needs the numbers 'id' and 'step'")
        fields["job"] = numbers
    return Request(op=op, **fields)


def _is_id(number: int) -> bool:
    return 0 <= number < 2**32 - 1


def request(op: str, **fields: Any) -> Frame:  # noqa: ANN401
    """Build a request; fields that are None are left out."""
    return {"v": VERSION, "op": op, **{name: value for name, value in fields.items() if value is not None}}


def success(**fields: Any) -> Frame:  # noqa: ANN401
    """Build a final frame of success."""
    return {"ok": True, **fields}


def failure(error: UenvError) -> Frame:
    """Build a final frame from an error of the tree."""
    return {
        "ok": False,
        "error": {
            "code": error.code,
            "exit_status": error.exit_status,
            "message": error.message,
            "hint": error.hint,
        },
    }


def progress(
    phase: str, done_bytes: int, total_bytes: int, message: str, rate_bytes_per_s: float = 0.0
) -> Frame:
    """Build an event. ``total_bytes`` is 0 while it is unknown; where the rate is known it is told, with the time that is left."""
    frame: Frame = {
        "event": "progress",
        "phase": phase,
        "done_bytes": done_bytes,
        "total_bytes": total_bytes,
        "message": message,
    }
    if rate_bytes_per_s >= 1:
        frame["rate_bytes_per_s"] = round(rate_bytes_per_s)
        frame["eta_s"] = round(max(0, total_bytes - done_bytes) / rate_bytes_per_s)
    return frame


def raise_failure(frame: Frame) -> None:
    """Raise the error that a final frame carries, as its class of the tree; return for any other frame."""
    if frame.get("ok") is not False:
        return
    error = frame.get("error")
    if not isinstance(error, dict):
        raise ProtocolError("a failure without an error")
    text = {name: str(error.get(name, "")) for name in ("code", "message", "hint")}
    raise by_code(text["code"])(text["message"], hint=text["hint"])
