"""Image files of the user's own: served by processes that run as the user, without the daemon.

They are those that the daemon would start, a supervisor with its workers: the mount is made in the session's user namespace, where the user
may make it, so nothing speaks against the fast transport. ``UENVD_TRANSPORT=pyfuse3`` in the environment takes one process through libfuse.

The server is started in the user's namespaces, before he leaves them: it must not hold its own mount alive. It is no child of the command
that will run: twice forked, in a session of its own. It ends when the session's mount namespace does.
"""

from __future__ import annotations

import fcntl
import json
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
_MAX_WORKERS = 2


class Worker:
    """A server that waits for its setup. Closing it before `serve` ends the process."""

    def __init__(self) -> None:
        """Start the process. Raises `ResourceMissing`."""
        self._libfuse = os.environ.get("UENVD_TRANSPORT") == "pyfuse3"
        try:
            self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._errors, errors = os.pipe()
            with theirs:
                try:
                    what = (
                        ("uenvd.fuse.worker", "--supervised") if self._libfuse else ("uenvd.fuse.supervise",)
                    )
                    _spawn(what, theirs.fileno(), errors)
                finally:
                    os.close(errors)
        except OSError as error:
            raise ResourceMissing(f"cannot start the server of images: {error.strerror}") from error

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
            source = f"uenvd:{path}"
            mount_fd = mounts.fuse_mount(fuse_fd, source=source, uid=os.getuid(), gid=os.getgid())
            try:
                report = self._exchange(path, source, fuse_fd, name)
            except BaseException:
                os.close(mount_fd)
                raise
        finally:
            os.close(fuse_fd)  # only the server has it now: its death must end the connection
        return mount_fd, report.meta, report.notes

    def _exchange(self, path: str, source: str, fuse_fd: int, name: str) -> handover.WorkerReport:
        self._channel.settimeout(REPORT_S)
        try:
            if self._libfuse:
                setup = handover.WorkerSetup(("fuse",), path=path, cache_bytes=_CACHE_BYTES, name=name)
                handover.send_setup(self._channel, setup, [fuse_fd])
                data = self._channel.recv(handover.MAX_REPORT_BYTES + 1)
            else:
                data = self._supervise(
                    handover.Duty(
                        "own",
                        name,
                        source,
                        path=path,
                        cache_bytes=_CACHE_BYTES,
                        workers=min(_MAX_WORKERS, len(os.sched_getaffinity(0))),
                    ),
                    fuse_fd,
                )
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

    def _supervise(self, duty: handover.Duty, fuse_fd: int) -> bytes:
        """Have a supervisor begin; return its report as a worker's datagram, empty at its end. Raises `OSError`, `ProtocolError`."""
        begin = handover.Message("begin", {"duty": duty.to_wire()}, ("fuse",))
        handover.send_message(self._channel, begin, [fuse_fd])
        while (received := handover.receive_message(self._channel)) is not None:
            message, descriptors = received
            for descriptor in descriptors:
                os.close(descriptor)
            if message.op == "report":
                return json.dumps(message.fields.get("report")).encode()
        return b""

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


def _spawn(what: tuple[str, ...], channel_fd: int, errors_fd: int) -> None:
    """Start the server with the channel as its only inherited descriptor but the standard ones. Raises OSError."""
    command = [sys.executable, "-I", "-m", *what]
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
