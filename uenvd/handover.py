"""What passes between the processes that serve an image and whoever has them do it. Two contracts, both on ``SOCK_SEQPACKET`` sockets.

**A worker by itself** (``python -m uenvd.fuse.worker --supervised N``, N its end of a pair): one `WorkerSetup` with the descriptors named
in ``descriptors`` attached, in that order. The worker confines itself (namespace, uid, no_new_privs) **before** it looks at a byte of the
image, reads the image's metadata and answers with one `WorkerReport`, then serves until the kernel says ENODEV. It keeps its end open:
EOF at the parent means that the worker ended. Names of descriptors:
  ``fuse``   an open ``/dev/fuse`` that is already mounted
  ``image``  the image file, open for reading (absent when ``path`` is given: then the worker opens it, as ``reader`` or as ``uid``)
  ``mntns``  the mount namespace to enter before serving (absent: stay)

**A supervisor with its workers** (``python -m uenvd.fuse.supervise N``): `Message`s in both directions, for as long as either likes. It
outlives the daemon; the next one connects to its socket and says ``hello``. From the daemon:
  ``begin``    the `Duty` (and ``negotiated``, when INIT was answered by a predecessor; ``slots_lost`` true, when the slots are not that
               one's: then the kernel is asked to send again what it had in hand; ``file``, which file of the user's own it served:
               no other is opened), with the descriptors ``fuse``, ``slots`` (shared
               memory for requests; absent: nobody else needs them), ``adopt`` (a listening socket), ``mntns``, and any number of ``mount``
  ``image``    serve it; descriptor ``image``. With ``board`` and ``reads`` (`uenvd.fuse.arrival`) it is still arriving; such an image may
               be followed by another file of the same one
  ``have``     the board has changed
  ``mounts``   descriptors ``mount`` in place of those it has: detached mounts of the connection, for daemons to come
  ``hello``    tell ``state`` (and the report); with ``adopt`` true the descriptors ``fuse``, ``slots`` and one ``mount`` come with it
  ``release``  give up the mounts: nobody new will come
  ``abandon``  give up the connection: its users get ENOTCONN
From the supervisor: ``refused``, before it hangs up on somebody who speaks otherwise (another version: its message tells the version, too);
``state`` (`SupervisorState`), whenever it has changed; ``report``, a `WorkerReport`, once it is known; ``want``, bytes
``first`` .. ``end`` - 1 of an arriving image that somebody waits for. Unknown operations are ignored by both, so that later versions may say more.
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from uenvd.errors import ProtocolError, UenvError, by_code
from uenvd.views import ImageMeta

VERSION = 1
SUPERVISOR_VERSION = 1
"""Changes with what is said, what the slots hold or how they are numbered: a daemon adopts only its own version."""
MAX_REPORT_BYTES = (
    192 * 1024
)  # one SEQPACKET datagram must fit the default socket buffer (net.core.wmem_default, 208 KiB)


@dataclass(frozen=True)
class WorkerSetup:
    """How to serve one image. ``uid is None`` keeps the credentials of the process."""

    descriptors: tuple[str, ...]
    path: str | None = None
    uid: int | None = None
    gid: int | None = None
    groups: tuple[int, ...] = ()
    reader: tuple[int, int, tuple[int, ...]] | None = None
    """Whose rights open ``path``: uid, gid, groups. None: those that the worker has when it is confined."""
    mask_privileged: bool = True
    """Show no device numbers, setuid or setgid bits or ``security.*`` attributes (design.md 12.1)."""
    cache_bytes: int = 64 << 20
    """Bound of the decoded blocks kept in memory."""
    name: str = "uenvd-fs"
    """For the log: the label or path."""

    def encode(self) -> bytes:
        """Return the datagram."""
        return json.dumps({"v": VERSION, **asdict(self)}).encode()

    @classmethod
    def decode(cls, data: bytes) -> WorkerSetup:
        """Parse the datagram. Raises `ProtocolError`."""
        try:
            fields: dict[str, Any] = json.loads(data)
            if fields.pop("v") != VERSION:
                raise ProtocolError("the worker's setup has another version")
            fields["descriptors"] = tuple(fields["descriptors"])
            fields["groups"] = tuple(fields["groups"])
            if fields.get("reader") is not None:
                uid, gid, groups = fields["reader"]
                fields["reader"] = (uid, gid, tuple(groups))
            return cls(**fields)
        except (ValueError, TypeError, KeyError) as error:
            raise ProtocolError(f"malformed worker setup: {error}") from error


@dataclass(frozen=True)
class WorkerReport:
    """The worker's one answer: it serves (``error is None``) and read this metadata, or it gave up."""

    meta: ImageMeta | None = None
    error: UenvError | None = None
    notes: tuple[str, ...] = field(default=())

    def encode(self) -> bytes:
        """Return the datagram; metadata too large for it becomes an error."""
        body: dict[str, Any] = {"v": VERSION, "notes": list(self.notes)}
        if self.error is not None:
            body["error"] = {"code": self.error.code, "message": self.error.message, "hint": self.error.hint}
        elif self.meta is not None:
            body["meta"] = self.meta.to_wire()
        data = json.dumps(body).encode()
        if len(data) > MAX_REPORT_BYTES:
            return WorkerReport(error=ProtocolError("the metadata of the image is too large")).encode()
        return data

    @classmethod
    def decode(cls, data: bytes | str) -> WorkerReport:
        """Parse the datagram; its sender met hostile bytes, so nothing in it is trusted. Raises `ProtocolError`."""
        try:
            body = json.loads(data)
            if body["v"] != VERSION:
                raise ProtocolError("the worker's report has another version")
            notes = tuple(str(note) for note in body.get("notes", ()))
            if "error" in body:
                error = body["error"]
                return cls(
                    error=by_code(str(error["code"]))(str(error["message"]), hint=str(error["hint"])),
                    notes=notes,
                )
            meta = ImageMeta.from_wire(body["meta"]) if "meta" in body else None
            return cls(meta=meta, notes=notes)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ProtocolError(f"malformed worker report: {error}") from error


def pack_descriptors(descriptors: Sequence[int]) -> bytes:
    """Return the payload of an SCM_RIGHTS message."""
    return array.array("i", descriptors).tobytes()


def send_setup(channel: socket.socket, setup: WorkerSetup, descriptors: list[int]) -> None:
    """Send the setup with its descriptors (``len(descriptors) == len(setup.descriptors)``)."""
    socket.send_fds(channel, [setup.encode()], descriptors)


def receive_setup(channel: socket.socket) -> tuple[WorkerSetup, dict[str, int]]:
    """Wait for the setup (blocking). Raises `ProtocolError`, also when the parent is gone."""
    data, descriptors, _flags, _address = socket.recv_fds(channel, 65536, 8)
    setup = WorkerSetup.decode(data)
    if len(descriptors) != len(setup.descriptors):
        raise ProtocolError("descriptors are missing from the worker's setup")
    return setup, dict(zip(setup.descriptors, descriptors, strict=True))


# -- a supervisor ---------------------------------------------------------------------------------------------------------------------

SLOTS_PER_WORKER = 32
"""One for the request in hand; the others hold requests that wait for bytes of the image."""
MAX_MESSAGE_BYTES = MAX_REPORT_BYTES + 4096
MAX_DESCRIPTORS = 16
"""As many as one message carries at most."""


@dataclass(frozen=True)
class Duty:
    """What a supervisor serves, and how; fixed for its life, and told to each daemon that adopts it."""

    name: str
    """Of its socket, and of the mount in the daemon's namespace: one path component."""
    label: str
    source: str
    """What mountinfo shows."""
    uid: int | None = None
    """Whom the processes become; None keeps the credentials."""
    gid: int | None = None
    groups: tuple[int, ...] = ()
    digest: str | None = None
    """Of the manifest; None for a file of a user's own."""
    blob: str | None = None
    """Digest of the image itself, by which a daemon finds it in its cache."""
    size_bytes: int = 0
    repository: str | None = None
    path: str | None = None
    """A file of a user's own, opened by the supervisor with the rights of ``reader`` before it gives up its privileges."""
    reader: tuple[int, int, tuple[int, ...]] | None = None
    mask_privileged: bool = True
    """See `WorkerSetup`."""
    cache_bytes: int = 64 << 20
    """Bound of the decoded blocks kept in memory, of all workers together."""
    workers: int = 2
    nice: int = 0
    """Of the workers, 0..19."""
    affinity: tuple[int, ...] = ()
    """Processors on which the workers may run; empty for all."""
    hang_s: float = 60.0
    """How long a worker may work on one request; waiting for storage is not counted."""
    grace_s: float = 60.0
    """How long an image that nobody uses waits for the next daemon."""
    max_readahead_bytes: int = 1 << 20

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON object."""
        return asdict(self)

    @classmethod
    def from_wire(cls, value: dict[str, Any]) -> Duty:
        """Check and take over a JSON object. Raises `ProtocolError`."""
        try:
            known = {one.name: value[one.name] for one in fields(cls)}
            known["groups"] = tuple(map(int, known["groups"]))
            known["affinity"] = tuple(map(int, known["affinity"]))
            if known["reader"] is not None:
                uid, gid, groups = known["reader"]
                known["reader"] = (int(uid), int(gid), tuple(map(int, groups)))
            for name in ("name", "label", "source"):
                if not isinstance(known[name], str):
                    raise TypeError(f"{name} is no text")
            return cls(**known)
        except (ValueError, TypeError, KeyError) as error:
            raise ProtocolError(f"malformed duty of a supervisor: {error}") from error


@dataclass(frozen=True)
class SupervisorState:
    """How it goes."""

    phase: str
    """``attending`` (answers for an image that is not there yet), ``starting``, ``serving``, ``failed`` (the report says why), ``refusing``
    (likewise, but it had users: they get EIO to the end), ``ended``, ``abandoned``."""
    pid: int
    workers: tuple[int, ...] = ()
    standby: int | None = None
    deaths: int = 0
    """Workers that were replaced so far, by this supervisor process."""
    mounts: int = 0
    """Detached mounts it holds."""
    negotiated: dict[str, Any] | None = None
    """What INIT agreed on; None before."""
    arriving: bool = False
    """The image is served from a file that is not complete yet."""
    slots_lost: bool = False
    """The kernel has not been asked yet for what was in hand when the former slots were lost."""
    file: tuple[int, ...] | None = None
    """Which file of the user's own is served: device, inode, size in bytes, mtime and ctime in ns. None for an image of the cache."""

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON object."""
        return asdict(self)

    @classmethod
    def from_wire(cls, value: dict[str, Any]) -> SupervisorState:
        """Check and take over a JSON object. Raises `ProtocolError`."""
        try:
            negotiated = value["negotiated"]
            if negotiated is not None and not isinstance(negotiated, dict):
                raise TypeError("negotiated is no object")
            return cls(
                phase=str(value["phase"]),
                pid=int(value["pid"]),
                workers=tuple(map(int, value["workers"])),
                standby=None if value["standby"] is None else int(value["standby"]),
                deaths=int(value["deaths"]),
                mounts=int(value["mounts"]),
                negotiated=negotiated,
                arriving=bool(value.get("arriving", False)),
                slots_lost=bool(value.get("slots_lost", False)),
                file=None if value.get("file") is None else tuple(map(int, value["file"])),
            )
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ProtocolError(f"malformed state of a supervisor: {error}") from error


@dataclass(frozen=True)
class Message:
    """One datagram: an operation, its fields, the names of the descriptors that come with it."""

    op: str
    fields: dict[str, Any] = field(default_factory=dict)
    descriptors: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """Return the datagram. Raises `ProtocolError` when it would be too long to be sent."""
        data = json.dumps(
            {"v": SUPERVISOR_VERSION, "op": self.op, "fds": self.descriptors, **self.fields}
        ).encode()
        if len(data) > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"the message {self.op!r} is too long ({len(data)} bytes)")
        return data

    @classmethod
    def decode(cls, data: bytes) -> Message:
        """Parse a datagram. Raises `ProtocolError`, also when the peer is of another version."""
        try:
            body: dict[str, Any] = json.loads(data)
            version, op, names = body.pop("v"), body.pop("op"), body.pop("fds")
            if version != SUPERVISOR_VERSION:
                raise ProtocolError(f"a supervisor speaks version {version!r}, not {SUPERVISOR_VERSION}")
            if not isinstance(op, str) or not all(isinstance(name, str) for name in names):
                raise TypeError("op and fds are no text")
            return cls(op, body, tuple(names))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ProtocolError(f"malformed message of a supervisor: {error}") from error


def take_descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors that came with a datagram; the caller owns them."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return found.tolist()


DESCRIPTORS_SPACE_BYTES = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
"""Room for the descriptors of one message, for ``recvmsg``."""


def send_message(channel: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """Send a message with its descriptors (``len(descriptors) == len(message.descriptors)``). Raises `OSError`."""
    socket.send_fds(channel, [message.encode()], descriptors)


def receive_message(channel: socket.socket) -> tuple[Message, list[int]] | None:
    """Receive a message and its descriptors, close-on-exec, which the caller owns; None at the end.

    Raises `OSError`, `ProtocolError`.
    """
    data, ancillary, _flags, _address = channel.recvmsg(
        MAX_MESSAGE_BYTES, DESCRIPTORS_SPACE_BYTES, socket.MSG_CMSG_CLOEXEC
    )
    descriptors = take_descriptors(ancillary)
    if not data:
        return None
    try:
        message = Message.decode(data)
        if len(message.descriptors) != len(descriptors):
            raise ProtocolError(f"descriptors are missing from the message {message.op!r}")
    except ProtocolError:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return message, descriptors
