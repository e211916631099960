"""What a parent hands to a `uenvd-fs` process that serves an image: one datagram there, one report back.

The parent (the daemon, or `uenvctl` where there is no daemon) starts ``python -m uenvd.fuse.worker --supervised N``, where N is the worker's
end of a ``SOCK_SEQPACKET`` pair. It sends one `WorkerSetup` with the descriptors named in ``descriptors`` attached, in that order. The
worker confines itself (namespace, uid, no_new_privs) **before** it looks at a byte of the image, reads the image's metadata and answers
with one `WorkerReport`, then serves until the kernel says ENODEV. It keeps its end open: EOF at the parent means that the worker ended.

Names of descriptors:
  ``fuse``   an open ``/dev/fuse`` that is already mounted
  ``image``  the image file, open for reading (absent when ``path`` is given: then the worker opens it, as ``reader`` or as ``uid``)
  ``mntns``  the mount namespace to enter before serving (absent: stay)
"""

from __future__ import annotations

import array
import json
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from uenvd.errors import ProtocolError, UenvError, by_code
from uenvd.views import ImageMeta

VERSION = 1
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
    def decode(cls, data: bytes) -> WorkerReport:
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
