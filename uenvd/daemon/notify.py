"""systemd: readiness, watchdog, a listening socket from uenvd.socket."""

from __future__ import annotations

import os
import socket
from typing import Final

import sdnotify
import trio

_FIRST_FD: Final = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)


class Notifier:
    """Tells the service manager how it goes; silent where there is none."""

    def __init__(self) -> None:
        self._systemd = sdnotify.SystemdNotifier()

    def ready(self, status: str) -> None:
        """Say that requests are served."""
        self._systemd.notify(f"READY=1\nSTATUS={status}")

    def stopping(self) -> None:
        """Say that the end has begun."""
        self._systemd.notify("STOPPING=1")

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


def inherited_listener() -> socket.socket | None:
    """Return the listening socket that systemd passed, if it passed one."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        return None
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    os.set_inheritable(_FIRST_FD, False)
    return socket.socket(fileno=_FIRST_FD)
