"""Image files of the user's own: served by a `uenvd-fs` process that runs as the user, without the daemon.

The worker is started in the user's namespaces, before he leaves them: it must not hold its own mount alive. It is no child of the command
that will run: twice forked, in a session of its own. It ends when the session's mount namespace does.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import sys
import time

from uenvd import handover, mounts
from uenvd.errors import DaemonTimeout, ProtocolError, ResourceMissing, WorkerFailed
from uenvd.views import ImageMeta

REPORT_S = 60.0
"""How long the worker may take to read an image's metadata; the file may lie on a slow parallel file system."""

_LAST_WORDS_BYTES = 4096
_LAST_WORDS_S = 2.0
_CACHE_BYTES = 256 << 20


class Worker:
    """A `uenvd-fs` process that waits for its setup. Closing it before `serve` ends the process."""

    def __init__(self) -> None:
        """Start the process. Raises `ResourceMissing`."""
        try:
            self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._errors, errors = os.pipe()
            with theirs:
                try:
                    _spawn(theirs.fileno(), errors)
                finally:
                    os.close(errors)
        except OSError as error:
            raise ResourceMissing(f"cannot start uenvd-fs: {error.strerror}") from error

    def serve(self, path: str, name: str) -> tuple[int, ImageMeta | None, tuple[str, ...]]:
        """Mount and serve an image. Call in the user namespace of the session.

        Args:
            path: absolute path of the image.
            name: what the user calls it.

        Returns:
            The descriptor of the detached mount, what the image says of itself, and notes for the user.

        Raises:
            UenvError: what the worker reported, or `WorkerFailed`, `MountFailed`, `ResourceMissing`, `ProtocolError`.

        """
        fuse_fd = mounts.open_fuse_device()
        try:
            mount_fd = mounts.fuse_mount(fuse_fd, source=f"uenvd:{path}", uid=os.getuid(), gid=os.getgid())
            try:
                setup = handover.WorkerSetup(("fuse",), path=path, cache_bytes=_CACHE_BYTES, name=name)
                report = self._exchange(setup, fuse_fd, name)
            except BaseException:
                os.close(mount_fd)
                raise
        finally:
            os.close(fuse_fd)  # the worker's is the only one now: its death must end the connection
        return mount_fd, report.meta, report.notes

    def _exchange(self, setup: handover.WorkerSetup, fuse_fd: int, name: str) -> handover.WorkerReport:
        self._channel.settimeout(REPORT_S)
        try:
            handover.send_setup(self._channel, setup, [fuse_fd])
            data = self._channel.recv(handover.MAX_REPORT_BYTES + 1)
        except TimeoutError:
            raise DaemonTimeout(
                f"{name} could not be opened within {REPORT_S:.0f} s", hint="is its file system slow or hung?"
            ) from None
        except OSError:  # EPIPE, ECONNRESET
            data = b""
        if not data:
            words = self._last_words()
            raise WorkerFailed(
                f"the server of {name} ended before it served" + (f": {words}" if words else ""), hint=""
            )
        if len(data) > handover.MAX_REPORT_BYTES:
            raise ProtocolError(f"the server of {name} sent too long a report")
        report = handover.WorkerReport.decode(data)
        if report.error is not None:
            raise report.error
        return report

    def _last_words(self) -> str:
        """Return the end of what the dead worker wrote to stderr, on one line."""
        text = b""
        deadline = time.monotonic() + _LAST_WORDS_S
        while select.select([self._errors], [], [], max(0.0, deadline - time.monotonic()))[0]:
            piece = os.read(self._errors, 65536)
            if not piece:
                break
            text = (text + piece)[-_LAST_WORDS_BYTES:]
        lines = text.decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def close(self) -> None:
        """Let go of the worker; it goes on if it serves."""
        self._channel.close()
        os.close(self._errors)


def _spawn(channel_fd: int, errors_fd: int) -> None:
    """Start the worker with the channel as its only inherited descriptor but the standard ones. Raises OSError."""
    command = [sys.executable, "-I", "-m", "uenvd.fuse.worker", "--supervised"]
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                # numbers above the standard three, which may be closed in this process
                channel_fd = fcntl.fcntl(channel_fd, fcntl.F_DUPFD, 3)
                errors_fd = fcntl.fcntl(errors_fd, fcntl.F_DUPFD_CLOEXEC, 3)
                null_fd = fcntl.fcntl(os.open(os.devnull, os.O_RDWR), fcntl.F_DUPFD_CLOEXEC, 3)
                for target, source in enumerate((null_fd, null_fd, errors_fd)):
                    os.dup2(source, target)
                os.execv(command[0], [*command, str(channel_fd)])  # noqa: S606 - our own program
        finally:
            os._exit(127)
    os.waitpid(pid, 0)
