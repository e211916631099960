"""What is noted of supervisors in the run directory: the sockets at which they listen, and what their successors have to know."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Final

from uenvd import handover
from uenvd.errors import ProtocolError, StorageError
from uenvd.handover import Duty, SupervisorState

_BACKLOG: Final = 8


class ImageDirectory:
    """Where the sockets of supervisors are, root's alone: ``NAME.sock``, and ``NAME.json`` with what their successors have to know."""

    def __init__(self, path: Path) -> None:
        """Make it. Raises `StorageError`."""
        try:
            path.mkdir(mode=0o700, exist_ok=True)
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"cannot make {path}: {error.strerror}") from error
        self._path = path

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)

    def names(self) -> list[str]:
        """Return the names of all supervisors that have, or had, a socket or a record here."""
        return sorted({entry.stem for entry in self._path.iterdir() if entry.suffix in (".sock", ".json")})

    def _address(self, name: str) -> str:
        return (
            f"/proc/self/fd/{self._fd}/{name}.sock"  # whatever the length of the path: sun_path has 108 bytes
        )

    def listen(self, name: str) -> socket.socket:
        """Return a listening socket in place of one that a predecessor left. Raises `OSError`."""
        with suppress(FileNotFoundError):
            (self._path / f"{name}.sock").unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(self._address(name))
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener

    def connect(self, name: str) -> socket.socket | None:
        """Return a non-blocking connection, None when nobody is there (any more). Raises `OSError`, `BlockingIOError` among them."""
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        channel.setblocking(False)
        try:
            channel.connect(self._address(name))
        except (ConnectionRefusedError, FileNotFoundError):
            channel.close()
            return None
        except BaseException:
            channel.close()
            raise
        return channel

    def record(self, duty: Duty, state: SupervisorState) -> None:
        """Note what a successor has to know. Raises `OSError`."""
        text = json.dumps(
            {"v": handover.SUPERVISOR_VERSION, "duty": duty.to_wire(), "state": state.to_wire()}
        )
        temporary = self._path / f".{duty.name}.tmp"
        temporary.write_text(text)
        temporary.replace(self._path / f"{duty.name}.json")

    def recorded(self, name: str) -> tuple[Duty, SupervisorState] | None:
        """Return what was noted, None when nothing was, or not in this version's words."""
        try:
            body = json.loads((self._path / f"{name}.json").read_text())
            if body["v"] != handover.SUPERVISOR_VERSION:
                return None
            return Duty.from_wire(body["duty"]), SupervisorState.from_wire(body["state"])
        except (OSError, ValueError, KeyError, TypeError, ProtocolError):
            return None

    def forget(self, name: str) -> None:
        """Remove what is here of a supervisor."""
        for suffix in (".sock", ".json"):
            with suppress(OSError):
                (self._path / f"{name}{suffix}").unlink()
