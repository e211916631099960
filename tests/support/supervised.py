"""A supervisor and the parent that a test plays: the mount, the slots, the socket for daemons to come, and everybody's end."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from support.forkedfs import ForkedFs
from support.fusetools import NOBODY, until
from uenvd import mounts
from uenvd.fuse.slots import Slots
from uenvd.handover import (
    SLOTS_PER_WORKER,
    Duty,
    Message,
    SupervisorState,
    WorkerReport,
    receive_message,
    send_message,
)

DEADLINE_S = 20.0
DUTY = Duty(
    name="test",
    label="test",
    source="image of a test",
    uid=NOBODY,
    gid=NOBODY,
    cache_bytes=8 << 20,
    grace_s=0.5,
    hang_s=30.0,
)


class Parent:
    """What a daemon holds of one connection."""

    def __init__(
        self, directory: Path, duty: Duty = DUTY, *, mounts_held: int = 1, allow_other: bool = True
    ) -> None:
        self.duty = duty
        self.fuse = mounts.open_fuse_device()
        self.mount = mounts.fuse_mount(self.fuse, source=duty.source, allow_other=allow_other)
        self.slots = os.memfd_create("slots", os.MFD_CLOEXEC)
        os.ftruncate(self.slots, Slots.size_bytes(duty.workers * SLOTS_PER_WORKER))
        self.address = directory / f"{duty.name}.sock"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(self.address))
        self.listener.listen(8)
        self.spares = [self._spare(directory) for _ in range(mounts_held)]
        self.state: SupervisorState | None = None
        self.report: WorkerReport | None = None
        self.received: dict[str, list[int]] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: socket.socket | None = None

    def _spare(self, directory: Path) -> int:
        """Return another detached mount of the connection, as a daemon makes them in its own namespace."""
        code = (
            "import os, sys, socket\nfrom uenvd import mounts\nmount, out = map(int, sys.argv[1:3])\n"
            "mounts.unshare(mounts.CLONE_NEWNS)\nmounts.make_rslave()\nmounts.move_mount(mount, sys.argv[3])\n"
            "with socket.socket(fileno=out) as s: socket.send_fds(s, [b'1'], [mounts.open_tree_clone(sys.argv[3]) for _ in range(2)])\n"
        )
        ours, theirs = socket.socketpair()
        place = directory / "spare"
        place.mkdir(exist_ok=True)
        with ours, theirs:
            subprocess.run(
                [sys.executable, "-c", code, str(self.mount), str(theirs.fileno()), str(place)],
                pass_fds=[self.mount, theirs.fileno()],
                check=True,
            )
            _data, (spare, mount), _flags, _address = socket.recv_fds(ours, 10, 2)
        os.close(self.mount)
        self.mount = mount
        return spare

    def start(
        self, image: int | None = None, *, slots_lost: bool = False, env: Mapping[str, str] | None = None
    ) -> None:
        """Start a supervisor with what there is; with ``negotiated`` of the last state, if any."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "uenvd.fuse.supervise", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **(env or {})},
            )
        self._begin(ours, image, slots_lost=slots_lost)

    def start_forked(self, server: ForkedFs, image: int) -> int:
        """Start a supervisor with its image without paying for Python's start; return its pid, which is its process group."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            pid = server.supervise(theirs.fileno())
        self._begin(ours, image)
        return pid

    def _begin(self, ours: socket.socket, image: int | None, *, slots_lost: bool = False) -> None:
        ours.settimeout(DEADLINE_S)
        self.channel = ours
        named = [("fuse", self.fuse), ("slots", self.slots), ("adopt", self.listener.fileno())]
        named += [("mount", spare) for spare in self.spares]
        if image is not None:
            named.append(("image", image))
        fields: dict[str, Any] = {"duty": self.duty.to_wire(), "slots_lost": slots_lost}
        if self.state is not None:
            fields["negotiated"] = self.state.negotiated
        send_message(
            ours, Message("begin", fields, tuple(name for name, _fd in named)), [fd for _name, fd in named]
        )
        self.listener.close()
        for spare in self.spares:
            os.close(spare)
        self.spares = []

    def forget_slots(self) -> None:
        """Have new ones, as a daemon to which nobody gave the old ones."""
        os.close(self.slots)
        self.slots = os.memfd_create("slots", os.MFD_CLOEXEC)
        os.ftruncate(self.slots, Slots.size_bytes(self.duty.workers * SLOTS_PER_WORKER))

    def listen_again(self) -> None:
        """Listen anew at the same place, as a parent does before it starts another supervisor."""
        self.address.unlink()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(self.address))
        self.listener.listen(8)

    def say(self, op: str, **fields: Any) -> None:
        """Send a message without descriptors."""
        assert self.channel is not None
        send_message(self.channel, Message(op, fields))

    def give_image(self, path: Path) -> None:
        """Hand the image over."""
        assert self.channel is not None
        image = os.open(path, os.O_RDONLY)
        send_message(self.channel, Message("image", {}, ("image",)), [image])
        os.close(image)

    def hear(self) -> bool:
        """Take one message; False at the end of the connection."""
        assert self.channel is not None
        received = receive_message(self.channel)
        if received is None:
            return False
        message, descriptors = received
        for name, descriptor in zip(message.descriptors, descriptors, strict=True):
            self.received.setdefault(name, []).append(descriptor)
        if message.op == "state":
            self.state = SupervisorState.from_wire(message.fields["state"])
        elif message.op == "report":
            import json

            self.report = WorkerReport.decode(json.dumps(message.fields["report"]))
        return True

    def until(self, condition: Callable[[Parent], Any]) -> Any:
        """Take messages until the condition holds."""
        while not (result := condition(self)):
            assert self.hear(), "the supervisor hung up"
        return result

    def serving(self) -> SupervisorState:
        """Wait until all workers serve."""
        self.until(
            lambda p: (
                p.state is not None
                and p.state.phase == "serving"
                and len(p.state.workers) == p.duty.workers
                and p.state.standby
            )
        )
        assert self.state is not None
        return self.state

    def connect(self, *, adopt: bool = False) -> bool:
        """Come as the next daemon does, and hear how it goes; False when nobody is left."""
        known = self.state
        while True:
            if self.channel is not None:
                self.channel.close()
            self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.channel.settimeout(DEADLINE_S)
            try:
                self.channel.connect(str(self.address))
            except ConnectionRefusedError:
                self.channel.close()
                self.channel, self.state = None, known
                return False
            self.state = None
            with suppress(BrokenPipeError, ConnectionResetError):  # processes that are about to end
                self.say("hello", adopt=adopt)
                while self.hear():
                    if self._has_state():
                        return True

    def _has_state(self) -> bool:
        return self.state is not None

    def is_over(self) -> bool:
        """Tell whether the kernel has ended the connection."""
        poll = select.poll()
        poll.register(self.fuse, 0)
        return any(events & select.POLLERR for _fd, events in poll.poll(0))

    def let_go(self) -> None:
        """Close the mount that was handed out."""
        os.close(self.mount)
        self.mount = -1

    def close(self) -> None:
        """End all of it."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.channel is not None:
            self.channel.close()
        self.listener.close()
        for fd in (
            self.fuse,
            self.mount,
            self.slots,
            *self.spares,
            *chain.from_iterable(self.received.values()),
        ):
            with suppress(OSError):
                os.close(fd)


@contextmanager
def supervised(directory: Path, **changes: Any) -> Iterator[Parent]:
    """A connection without a supervisor yet."""
    parent = Parent(directory, replace(DUTY, **changes))
    try:
        yield parent
    finally:
        parent.close()


def group_of(pid: int) -> list[int]:
    """Return the living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == pid and fields[0] not in "ZX":
                found.append(int(stat.parent.name))
    return found


def wait_gone(pid: int, deadline_s: float = 10.0) -> None:
    """Wait for the end of a whole process group."""
    until(lambda: not group_of(pid), f"the end of group {pid}", deadline_s)


def now_ns() -> int:
    """As the slots have it."""
    return time.monotonic_ns()


@contextmanager
def supervised_at(
    server: ForkedFs, image: Path, mountpoint: Path, *, allow_other: bool = False
) -> Iterator[int]:
    """Serve an image at a directory as the daemon does: supervisor, standby, two workers. Yields their process group; all end at the end."""
    duty = replace(DUTY, mask_privileged=False)
    with tempfile.TemporaryDirectory() as base:
        parent = Parent(Path(base), duty, mounts_held=0, allow_other=allow_other)
        pid = 0
        try:
            image_fd = os.open(image, os.O_RDONLY)
            try:
                pid = parent.start_forked(server, image_fd)
            finally:
                os.close(image_fd)
            parent.serving()
            mounts.move_mount(parent.mount, mountpoint)
            yield pid
        finally:
            with suppress(OSError):
                mounts.umount(mountpoint, detach=True)
            if pid:
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                until(lambda: server.status(pid) is not None, "the supervisor's end")
            parent.close()
