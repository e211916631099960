"""A supervisor's connections to daemons: the one that started it, those that come to its socket. Never waits for one of them.

Sources: unix(7) (SO_PEERCRED).
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Final

from uenvd.errors import ProtocolError
from uenvd.handover import Message, SupervisorState, WorkerReport, receive_message, send_message

_log = logging.getLogger("uenvd-fs")

_MAX_CONNECTIONS: Final = 8
_UCRED: Final = struct.Struct("iii")

Obey = Callable[[socket.socket, Message, dict[str, list[int]]], None]
"""Does what a message says; descriptors that it takes over leave the dictionary (name -> descriptors)."""


class Daemons:
    """All of them.

    Args:
        label: for the log.
        parent: the connection to the daemon that started us; non-blocking.
        listener: where others come; None: nowhere. Owned.
        uids: whose processes may come there.
        obey: called with each message.

    """

    def __init__(
        self,
        label: str,
        parent: socket.socket,
        listener: socket.socket | None,
        uids: Collection[int],
        obey: Obey,
    ) -> None:
        self._label = label
        self._listener = listener
        if listener is not None:
            listener.setblocking(False)
        self._uids = uids
        self._obey = obey
        self._connections: dict[int, socket.socket] = {parent.fileno(): parent}
        self.alone_since_s: float | None = None
        """Since when there has been no daemon (monotonic); None: there is one."""

    def events(self) -> Iterator[tuple[int, Callable[[], None]]]:
        """Yield the descriptors to be polled for input, and what to call then."""
        for channel in self._connections.values():
            yield channel.fileno(), partial(self._hear, channel)
        if self._listener is not None and len(self._connections) < _MAX_CONNECTIONS:
            yield self._listener.fileno(), self._accept

    def forget(self) -> None:
        """In a new process: the connections are those of the one that forked it. The listening socket stays."""
        for channel in self._connections.values():
            channel.close()
        self._connections.clear()
        self.alone_since_s = time.monotonic()

    def tell(self, state: SupervisorState, report: WorkerReport | None = None) -> None:
        """Tell all daemons how it goes."""
        message = Message("state", {"state": state.to_wire()})
        for channel in list(self._connections.values()):
            self.send_report(channel, report)
            self.send(channel, message)

    def send_all(self, message: Message) -> None:
        """Send a message to all daemons."""
        for channel in list(self._connections.values()):
            self.send(channel, message)

    def send_report(self, channel: socket.socket, report: WorkerReport | None) -> None:
        """Send what a worker said of the image, if it has."""
        if report is not None:
            self.send(channel, Message("report", {"report": json.loads(report.encode())}))

    def send(self, channel: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send without waiting: a daemon that does not listen loses its connection, and hears all of it when it comes back."""
        if channel.fileno() < 0:
            return
        try:
            send_message(channel, message, descriptors)
        except OSError:
            self._hang_up(channel)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            channel, _address = self._listener.accept()
        except OSError:
            return
        _pid, uid, _gid = _UCRED.unpack(
            channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        )
        if uid not in self._uids:
            _log.warning("%s: uid %d may not come to its socket", self._label, uid)
            channel.close()
            return
        channel.setblocking(False)
        self._connections[channel.fileno()] = channel
        self.alone_since_s = None

    def _hear(self, channel: socket.socket) -> None:
        """Take one message from a daemon."""
        if channel.fileno() < 0:
            return
        try:
            received = receive_message(channel)
        except BlockingIOError:
            return
        except (OSError, ProtocolError) as error:
            if isinstance(error, ProtocolError):
                _log.warning("%s: %s", self._label, error)
                self.send(channel, Message("refused", {"why": error.message}))
                if channel.fileno() < 0:
                    return
            received = None
        if received is None:
            self._hang_up(channel)
            return
        message, descriptors = received
        named = group(message, descriptors)
        self._obey(channel, message, named)
        for descriptor in (one for those in named.values() for one in those):
            os.close(descriptor)

    def _hang_up(self, channel: socket.socket) -> None:
        del self._connections[channel.fileno()]
        channel.close()
        if not self._connections:
            self.alone_since_s = time.monotonic()


def group(message: Message, descriptors: Sequence[int]) -> dict[str, list[int]]:
    """Return the descriptors of a message by name."""
    named: dict[str, list[int]] = {}
    for name, descriptor in zip(message.descriptors, descriptors, strict=True):
        named.setdefault(name, []).append(descriptor)
    return named
