"""Serve an image over the channel with several workers of one parent, without daemon: what ``uenvd-fs IMAGE MOUNTPOINT`` is made of.

The parent makes the mount, answers INIT, forks the workers and replaces those that end early; it reads no request itself.
"""

from __future__ import annotations

import errno
import gc
import logging
import mmap
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from uenvd import mounts
from uenvd.errors import MountFailed
from uenvd.fuse.channel import Channel
from uenvd.fuse.faults import Faults
from uenvd.fuse.protocol import Negotiated, is_init, negotiate
from uenvd.fuse.slots import Slots
from uenvd.fuse.tree import Tree

_log = logging.getLogger("uenvd-fs")

READAHEAD_BYTES = 512 << 10
"""Of the mount: what the kernel asks for at once when a file is read from begin to end, or around a fault in a mapped one."""
_STOPPING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_SHORT_LIFE_S = 1.0
_MAX_SHORT_LIVES = 20
"""In a row; from then on there is a pause before the next."""
_PAUSE_S = 0.5
_INIT_BYTES = 65536


@dataclass(frozen=True)
class Plan:
    """How to serve."""

    mountpoint: str
    source: str
    workers: int
    attributes: int
    """MOUNT_ATTR_* bits of the mount."""
    allow_other: bool = False


def mount(plan: Plan) -> tuple[int, Negotiated]:
    """Mount at ``plan.mountpoint`` and answer INIT. Returns the descriptor of the connection and what was agreed.

    Needs CAP_SYS_ADMIN over the mount namespace. Raises `ResourceMissing`, `MountFailed`, `ProtocolError`.
    """
    fuse_fd = mounts.open_fuse_device()
    try:
        mount_fd = mounts.fuse_mount(
            fuse_fd,
            source=plan.source,
            uid=os.getuid(),
            gid=os.getgid(),
            allow_other=plan.allow_other,
            attributes=plan.attributes,
        )
        try:
            request = os.read(fuse_fd, _INIT_BYTES)
            if not is_init(request):
                raise MountFailed("the kernel does not begin the FUSE connection with INIT")
            reply, negotiated = negotiate(request)
            os.write(fuse_fd, reply)
            mounts.move_mount(mount_fd, os.path.realpath(plan.mountpoint))
            set_readahead(mount_fd, READAHEAD_BYTES)
        finally:
            os.close(mount_fd)
    except OSError as error:
        os.close(fuse_fd)
        raise MountFailed(f"cannot mount at {plan.mountpoint}: {error.strerror}") from error
    except BaseException:
        os.close(fuse_fd)
        raise
    return fuse_fd, negotiated


def set_readahead(mount_fd: int, size_bytes: int) -> None:
    """Set how far the kernel reads ahead on an attached mount, where we may: the files of its bdi are root's."""
    with suppress(OSError):
        device = _device_of(mount_fd)
        path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        path.write_text(str(size_bytes >> 10))


def _device_of(mount_fd: int) -> int:
    """Return the device number of an attached mount without asking its server. Raises `OSError`."""
    text = Path(f"/proc/self/fdinfo/{mount_fd}").read_text()
    wanted = next(line.split()[1] for line in text.splitlines() if line.startswith("mnt_id:"))
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[0] == wanted:
            major, minor = fields[2].split(":")
            return os.makedev(int(major), int(minor))
    raise FileNotFoundError(errno.ENOENT, "the mount is not attached")


class Crew:
    """The workers of one connection, and their parent's loop."""

    def __init__(self, plan: Plan, tree: Tree, fuse_fd: int, negotiated: Negotiated) -> None:
        self._plan = plan
        self._fd = fuse_fd
        self._negotiated = negotiated
        self._slots = Slots(mmap.mmap(-1, Slots.size_bytes(plan.workers)), plan.workers)
        self._tree = tree
        self._born: dict[int, tuple[int, float]] = {}

    def serve(self) -> None:
        """Serve until the mount is gone; SIGTERM, SIGINT and SIGHUP unmount."""
        signals = {*_STOPPING, signal.SIGCHLD}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        gc.collect()
        gc.freeze()
        for number in range(self._plan.workers):
            self._start(number)
        short_lives = 0
        while self._born:
            if signal.sigwaitinfo(signals).si_signo in _STOPPING:
                with suppress(OSError):
                    mounts.umount(self._plan.mountpoint, detach=True)
                continue
            for pid, status in _ended():
                number, born_s = self._born.pop(pid)
                if status == 0:
                    continue
                short_lives = short_lives + 1 if time.monotonic() - born_s < _SHORT_LIFE_S else 0
                if short_lives > _MAX_SHORT_LIVES:
                    time.sleep(_PAUSE_S)
                _log.warning(
                    "%s: worker %d ended with status %d, another takes over", self._plan.source, pid, status
                )
                self._start(number)

    def _start(self, number: int) -> None:
        pid = os.fork()
        if pid:
            self._born[pid] = number, time.monotonic()
            return
        status = 1
        try:
            for one in _STOPPING:
                signal.signal(one, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            Channel(
                self._fd, self._tree, self._negotiated, self._slots.some(number, 1), Faults(self._plan.source)
            ).serve()
            status = 0
        except BaseException:  # noqa: BLE001 - the boundary: nothing of the parent may run in the child
            _log.exception("a worker ends")
        finally:
            os._exit(status)


def _ended() -> list[tuple[int, int]]:
    """Return (pid, wait status) of the children that have ended."""
    found: list[tuple[int, int]] = []
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            found.append((pid, status))
    return found
