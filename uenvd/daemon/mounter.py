"""Mounts in the daemon's private namespace, and clones of them for the users, for trio.

Concurrency: each method runs its system calls in a thread. Clones go through one process (`cloner`), one request at a
time; a cloner that ended is started again.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
from functools import partial
from typing import Final

import trio

from uenvd import mounts
from uenvd.daemon.cloner import request_clone, start_cloner
from uenvd.daemon.peer import Identity
from uenvd.errors import MountFailed
from uenvd.mounts import PrivateMounts

log = logging.getLogger(__name__)

SPARES: Final = 2
"""Each daemon that adopts an image uses one up and brings new ones; a daemon may be killed in between."""


class Mounter:
    """The trio side of `PrivateMounts` and of the cloner."""

    def __init__(self, private: PrivateMounts) -> None:
        self._private = private
        self._cloner: tuple[subprocess.Popen[bytes], socket.socket] | None = None
        self._cloning = trio.Lock()

    @property
    def serving_namespace_fd(self) -> int:
        """The mount namespace that workers enter."""
        return self._private.outer_namespace_fd

    async def start(self) -> None:
        """Start the cloner. Raises `MountFailed` where it cannot run, so that the daemon ends before it says READY."""
        self._cloner = await trio.to_thread.run_sync(start_cloner, self._private.directory)

    async def open_fuse(self) -> int:
        """Open ``/dev/fuse``. Raises `ResourceMissing`."""
        return await trio.to_thread.run_sync(mounts.open_fuse_device)

    async def add(self, name: str, fuse_fd: int, source: str, owner: Identity) -> None:
        """Make the FUSE mount of an image and attach it as ``name``. Raises `MountFailed`."""
        work = partial(self._private.add, name, fuse_fd, source=source, uid=owner.uid, gid=owner.gid)
        await trio.to_thread.run_sync(work)

    async def attach(self, name: str, mount_fd: int) -> None:
        """Attach a mount that an earlier daemon made, and close the descriptor. Raises `MountFailed`."""
        try:
            await trio.to_thread.run_sync(self._private.attach, name, mount_fd)
        finally:
            os.close(mount_fd)

    async def spares(self, name: str) -> list[int]:
        """Return detached copies of a mount, for daemons to come; the caller closes them. Raises `MountFailed`."""
        return await trio.to_thread.run_sync(self._private.spares, name, SPARES)

    async def set_readahead(self, name: str, size_bytes: int) -> None:
        """Set how far the kernel reads ahead in files of an image; where that cannot be done the log says so."""
        try:
            await trio.to_thread.run_sync(self._private.set_readahead, name, size_bytes)
        except MountFailed as error:
            log.warning("%s", error)

    async def remove(self, name: str) -> None:
        """Let go of an image's mount; its clones live on. Completes even when cancelled; a failure is logged."""
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(self._private.remove, name)
            except MountFailed as error:
                log.warning("a mount stays behind in uenvd's namespace: %s", error)

    async def clone(self, name: str) -> int:
        """Return a descriptor of a detached clone with locked flags; the caller owns it. Raises `MountFailed`."""
        async with self._cloning:
            if self._cloner is not None and self._cloner[0].poll() is not None:
                log.warning("the cloner ended with status %s; starting another", self._cloner[0].returncode)
                self.close()
            if self._cloner is None:
                self._cloner = await trio.to_thread.run_sync(start_cloner, self._private.directory)
            channel = self._cloner[1]
            try:
                return await trio.to_thread.run_sync(request_clone, channel, name)
            except MountFailed:
                if channel.fileno() < 0:  # closed by request_clone: the exchange itself broke
                    self.close()
                raise

    def close(self) -> None:
        """End the cloner."""
        if self._cloner is not None:
            process, channel = self._cloner
            self._cloner = None
            channel.close()
            process.kill()
            process.wait()
