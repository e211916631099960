"""A real uenvd for tests: private run directory, cache and socket; readiness by sd_notify; a raw client."""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uenvd import protocol

START_DEADLINE_S = 20.0
STOP_DEADLINE_S = 10.0


class Client:
    """A connection to the control socket, blocking; keeps the descriptors of the last answer."""

    def __init__(self, path: Path, timeout_s: float = 30.0) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(timeout_s)
        self.sock.connect(str(path))
        self._reader = protocol.FrameReader(protocol.MAX_REPLY_BYTES)
        self.descriptors: list[int] = []
        self.events: list[dict[str, Any]] = []

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send a request; return the final frame, whether it is a success or not."""
        self.sock.sendall(protocol.encode(protocol.request(op, **fields)))
        self.events = []
        while True:
            frame = self.receive()
            if "event" not in frame:
                return frame
            self.events.append(frame)

    def receive(self) -> dict[str, Any]:
        """Receive one frame."""
        while (frame := self._reader.next_frame()) is None:
            data, ancillary, _flags, _address = self.sock.recvmsg(
                65536, socket.CMSG_SPACE(4 * 64), socket.MSG_CMSG_CLOEXEC
            )
            for _level, _kind, payload in ancillary:
                self.descriptors += array.array("i", payload)
            if not data:
                raise EOFError("uenvd closed the connection")
            self._reader.feed(data)
        return frame

    def close(self) -> None:
        """Close the connection (the lease) and the descriptors."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []
        self.sock.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


@dataclass
class Daemon:
    """One uenvd. ``workdir`` must be traversable by the users of a test."""

    workdir: Path
    registry: str
    system: str = "demo"
    extra: str = ""
    """Further lines of the configuration."""
    control: Path | None = None
    """The control socket, if not in ``workdir``."""
    wrapper: tuple[str, ...] = ()
    """A command that runs it."""
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def socket_path(self) -> Path:
        """The control socket."""
        return self.control or self.workdir / "run" / "control"

    @property
    def cache(self) -> Path:
        """The node's cache."""
        return self.workdir / "cache"

    @property
    def log_path(self) -> Path:
        """Standard error of the daemon and its workers."""
        return self.workdir / "uenvd.log"

    @property
    def log(self) -> str:
        """What it has said so far."""
        return self.log_path.read_text(errors="replace")

    def start(self) -> Daemon:
        """Start it and wait for READY=1."""
        self.workdir.mkdir(mode=0o755, parents=True, exist_ok=True)
        config = self.workdir / "config.yaml"
        config.write_text(
            f"system: {self.system}\nregistry: {self.registry}\n"
            f"run_dir: {self.workdir / 'run'}\ncontrol: {{socket: {self.socket_path}}}\n"
            + ("" if "cache:" in self.extra else f"cache: {{local: {self.cache}}}\n")
            + ("" if "worker:" in self.extra else "worker: {user: nobody, grace: 2s}\n")
            + self.extra
        )
        notify_path = self.workdir / "notify"
        notify_path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self.log_path.open("ab") as log:
            notify.bind(str(notify_path))
            notify.settimeout(0.05)
            self.process = subprocess.Popen(
                [
                    *self.wrapper,
                    sys.executable,
                    "-m",
                    "uenvd.daemon.main",
                    "--config",
                    str(config),
                    "--verbose",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": str(notify_path), "UENVD_SECCOMP": "kill"},
            )
            deadline = time.monotonic() + START_DEADLINE_S
            said = ""
            while "READY=1" not in said:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    raise RuntimeError(f"uenvd did not start:\n{self.log}")
                try:
                    said = notify.recv(4096).decode()
                except TimeoutError:
                    continue
        return self

    def stop(self) -> None:
        """Ask it to end (SIGTERM) and wait."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once (SIGKILL) and wait."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.send_signal(number)
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise RuntimeError(f"uenvd did not stop:\n{self.log}") from None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def client(self) -> Client:
        """Connect."""
        return Client(self.socket_path)

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Ask one thing on a connection of its own."""
        with self.client() as client:
            return client.ask(op, **fields)

    def workers(self) -> list[int]:
        """Pids of the processes that serve its images, as it says."""
        return [image["worker"] for image in self.ask("status")["images"] if image["worker"]]


@contextmanager
def running_daemon(workdir: Path, registry: str, **fields: Any) -> Iterator[Daemon]:
    """Run a daemon; whatever happens it and its workers are gone in the end."""
    daemon = Daemon(workdir, registry, **fields)
    daemon.start()
    workers: list[int] = []
    try:
        yield daemon
        if daemon.process is not None and daemon.process.poll() is None:
            workers = daemon.workers()
    finally:
        daemon.kill()
        for pid in workers:
            end_process(pid)


def end_process(pid: int) -> None:
    """SIGKILL a server of images with its whole group (any other process in it would take over); one that is gone is no error."""
    try:
        if os.getpgid(pid) != os.getpgid(0):
            os.killpg(os.getpgid(pid), signal.SIGKILL)
    except ProcessLookupError:
        return


def children_of(parent: int) -> dict[int, str]:
    """Return the child processes of a process and their command lines."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == parent and fields[0] != "Z":
                found[int(stat.parent.name)] = (
                    (stat.parent / "cmdline").read_text().replace("\0", " ").strip()
                )
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
