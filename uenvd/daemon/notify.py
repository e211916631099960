"""systemd: readiness, watchdog, descriptors that it keeps for the next daemon, a listening socket from uenvd.socket.

Sources: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3), systemd.service(5) (FileDescriptorStoreMax).
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import sdnotify
import trio

log = logging.getLogger(__name__)

_FIRST_FD: Final = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)
_STORED: Final = "uenvd-image-"
"""Names in the descriptor store: this, the supervisor's name, ``-``, the descriptor's name."""


class Notifier:
    """Tells the service manager how it goes; silent where there is none."""

    def __init__(self) -> None:
        self._systemd = sdnotify.SystemdNotifier()
        self._address = os.environ.get("NOTIFY_SOCKET", "")

    def ready(self, status: str) -> None:
        """Say that requests are served."""
        self._systemd.notify(f"READY=1\nSTATUS={status}")

    def stopping(self) -> None:
        """Say that the end has begun."""
        self._systemd.notify("STOPPING=1")

    def store(self, name: str, descriptors: Mapping[str, int]) -> None:
        """Have the service manager keep descriptors for the next daemon, by name. It drops a connection by itself when that ends."""
        for kind, descriptor in descriptors.items():
            self._say(f"FDSTORE=1\nFDNAME={_STORED}{name}-{kind}", [descriptor])

    def forget(self, name: str, kinds: tuple[str, ...] = ("fuse", "slots")) -> None:
        """Have the service manager close what it keeps."""
        for kind in kinds:
            self._say(f"FDSTOREREMOVE=1\nFDNAME={_STORED}{name}-{kind}", [])

    def _say(self, text: str, descriptors: list[int]) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                channel.setblocking(False)
                channel.connect(address)
                socket.send_fds(channel, [text.encode()], descriptors)
        except OSError as error:
            log.debug("the service manager does not take descriptors: %s", error.strerror)

    async def watchdog(self) -> None:
        """Pet the watchdog from the event loop itself, so that a stuck loop is noticed (sd_watchdog_enabled(3))."""
        if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            return
        interval_us = os.environ.get("WATCHDOG_USEC", "")
        if not interval_us.isdecimal() or int(interval_us) == 0:
            return
        while True:
            self._systemd.notify("WATCHDOG=1")
            await trio.sleep(int(interval_us) / 1e6 / 2)


@dataclass
class Inherited:
    """What the service manager passed to this process."""

    listener: socket.socket | None = None
    stored: dict[str, dict[str, int]] = field(default_factory=dict)
    """Descriptors of connections: supervisor -> name -> descriptor."""


def inherited() -> Inherited:
    """Return the listening socket and the stored descriptors that systemd passed, if it passed any; all close-on-exec."""
    found = Inherited()
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal():
        return found
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    for index in range(int(count)):
        descriptor = _FIRST_FD + index
        os.set_inheritable(descriptor, False)
        name = names[index] if index < len(names) else ""
        if name.startswith(_STORED):
            supervisor, _dash, kind = name.removeprefix(_STORED).rpartition("-")
            if kind in found.stored.setdefault(supervisor, {}):
                os.close(descriptor)
            else:
                found.stored[supervisor][kind] = descriptor
        elif found.listener is None:
            found.listener = socket.socket(fileno=descriptor)
        else:
            with suppress(OSError):
                os.close(descriptor)
    return found
