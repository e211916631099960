"""A blocking client of the control socket (docs/protocol.md) with a deadline on every wait.

Errors of the daemon are raised as their class of the error tree; `DaemonUnreachable`, `DaemonTimeout` and `ProtocolError` are the client's
own. A client is used by one thread. Descriptors that arrive are close-on-exec and belong to the caller of `Client.call`.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from uenvd import protocol
from uenvd.errors import DaemonTimeout, DaemonUnreachable, ProtocolError, UsageError

DEFAULT_SOCKET = "/run/uenvd/control"
CONNECT_S = 3.0
ANSWER_S = 3.0
"""For requests that the daemon answers from what it knows."""
REGISTRY_ANSWER_S = 35.0
"""For requests for which it may have to ask the registry, without events meanwhile."""

_MAX_DESCRIPTORS = 253  # SCM_MAX_FD, include/net/scm.h: the most that one message can carry
_RECEIVE_BYTES = 65536
_OVERFLOW_UID = 65534  # what a uid without a mapping reads as (kernel.overflowuid, never changed in practice)
_RETRY_S = 0.02


class Reply(NamedTuple):
    """A final frame of success and the descriptors that came with it."""

    frame: dict[str, Any]
    descriptors: tuple[int, ...]


def socket_path(option: str | None, environ: Mapping[str, str]) -> str:
    """Return where the daemon listens: the ``--socket`` option, else ``$UENVD_SOCKET``, else the default."""
    return option or environ.get("UENVD_SOCKET") or DEFAULT_SOCKET


class Client:
    """One connection to uenvd; closing it ends what was leased on it."""

    def __init__(self, path: str, *, connect_s: float = CONNECT_S) -> None:
        """Connect and check who listens. Raises `DaemonUnreachable`, `DaemonTimeout`, `UsageError` (no possible path)."""
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect(time.monotonic() + connect_s)
            _check_peer(self._socket, path)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def fileno(self) -> int:
        """Return the descriptor of the connection."""
        return self._socket.fileno()

    def _connect(self, deadline: float) -> None:
        self._socket.setblocking(False)
        while True:
            try:
                self._socket.connect(self.path)
            except BlockingIOError:  # a Unix socket's backlog is full: uenvd is stopped or overloaded
                if time.monotonic() >= deadline:
                    raise DaemonTimeout(f"uenvd does not accept connections on {self.path}") from None
                time.sleep(_RETRY_S)
            except OSError as error:
                if error.errno is None or error.errno == errno.ENAMETOOLONG:
                    raise UsageError(f"no possible path of a socket: {self.path}") from None
                why = {
                    errno.ENOENT: "there is no socket",
                    errno.ECONNREFUSED: "nobody listens on",
                    errno.EACCES: "no permission to use",
                }.get(error.errno, f"{error.strerror}:")
                raise DaemonUnreachable(f"uenvd does not answer on this node: {why} {self.path}") from None
            else:
                return

    def call(
        self,
        op: str,
        *,
        answer_s: float = ANSWER_S,
        silence_s: float = protocol.SILENCE_S,
        on_event: Callable[[Mapping[str, Any]], None] | None = None,
        **fields: Any,  # noqa: ANN401 - any JSON value
    ) -> Reply:
        """Send a request and wait for its final frame.

        Args:
            op: the operation.
            answer_s: how long to wait for the first frame, in seconds.
            silence_s: how long to wait for each later one.
            on_event: gets each event.
            **fields: of the request; those that are ``None`` are left out.

        Raises:
            UenvError: what the daemon answered.
            DaemonTimeout: it was silent for too long.
            DaemonUnreachable: it hung up.
            ProtocolError: it sent something that is not the protocol.

        """
        request = protocol.encode(protocol.request(op, **fields))
        if len(request) > protocol.MAX_REQUEST_BYTES:
            raise UsageError("the request is too long")
        descriptors: list[int] = []
        try:
            self._send(request, op)
            reader = protocol.FrameReader(protocol.MAX_REPLY_BYTES)
            wait_s = answer_s
            while True:
                frame = self._next_frame(reader, descriptors, op, wait_s)
                if "event" not in frame:
                    break
                wait_s = silence_s
                if on_event is not None:
                    on_event(frame)
            protocol.raise_failure(frame)
            if frame.get("ok") is not True:
                raise ProtocolError("uenvd sent a frame that is neither an event nor an answer")
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return Reply(frame, tuple(descriptors))

    def post(self, op: str, **fields: Any) -> None:  # noqa: ANN401 - any JSON value
        """Send a request whose answer nobody waits for; then the connection is only good for closing. Raises what `call` raises of sending."""
        self._send(protocol.encode(protocol.request(op, **fields)), op)

    def _send(self, data: bytes, op: str) -> None:
        self._socket.settimeout(ANSWER_S)
        try:
            self._socket.sendall(data, socket.MSG_NOSIGNAL)
        except TimeoutError:
            raise DaemonTimeout(f"uenvd does not take the request '{op}'") from None
        except OSError as error:
            raise DaemonUnreachable(f"uenvd hung up before the request '{op}': {error.strerror}") from None

    def _next_frame(
        self, reader: protocol.FrameReader, descriptors: list[int], op: str, wait_s: float
    ) -> dict[str, Any]:
        deadline = time.monotonic() + wait_s
        begun = False
        while True:
            frame = reader.next_frame()
            if frame is not None:
                return frame
            if reader.in_frame and not begun:
                begun = True
                deadline = time.monotonic() + protocol.FRAME_DEADLINE_S
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise DaemonTimeout(f"uenvd did not answer '{op}' for {wait_s:.0f} s")
            self._socket.settimeout(remaining)
            try:
                data, ancillary, flags, _address = self._socket.recvmsg(
                    _RECEIVE_BYTES, socket.CMSG_SPACE(4 * _MAX_DESCRIPTORS), socket.MSG_CMSG_CLOEXEC
                )
            except TimeoutError:
                continue
            except OSError as error:
                raise DaemonUnreachable(f"uenvd hung up during '{op}': {error.strerror}") from None
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    descriptors.extend(
                        struct.unpack(f"{len(payload) // 4}i", payload[: len(payload) // 4 * 4])
                    )
            if flags & socket.MSG_CTRUNC or len(descriptors) > _MAX_DESCRIPTORS:
                raise ProtocolError("uenvd sent more descriptors than this process can take")
            if not data:
                raise DaemonUnreachable(f"uenvd hung up during '{op}'")
            reader.feed(data)


def _check_peer(connection: socket.socket, path: str) -> None:
    """Refuse a listener that is neither root nor the user himself: it would hand out mounts of its own making."""
    pid, uid, _gid = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid not in (0, os.getuid()) and not (uid == _OVERFLOW_UID and _root_is_hidden()):
        raise DaemonUnreachable(
            f"the process {pid} that listens on {path} is not uenvd: it belongs to uid {uid}",
            hint="tell the site's administrators; somebody may have put a socket of his own there",
        )


def _root_is_hidden() -> bool:
    """Tell whether the node's root has no uid in this user namespace, as inside a session."""
    with open("/proc/self/uid_map", encoding="ascii") as file:  # noqa: PTH123 - pathlib is slow to import
        return file.readline().split()[:2] != ["0", "0"]
