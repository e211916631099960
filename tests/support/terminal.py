"""A program at a terminal: started on a pseudo-terminal of its own, typed at, and read."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

DEADLINE_S = 20.0
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()][0-9A-B]|\x1b\][^\x07]*\x07|\x1b[=>]|\r")


class Terminal:
    """A process that has us for a terminal. ``raw`` is all that it wrote."""

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid = pid
        self._descriptor = descriptor
        self.raw = ""
        self._seen = 0
        self.status: int | None = None

    @property
    def text(self) -> str:
        """What it wrote, without control sequences."""
        return _CONTROL.sub("", self.raw)

    def type(self, line: str) -> None:
        """Type a line."""
        os.write(self._descriptor, line.encode() + b"\n")

    def expect(self, pattern: str, deadline_s: float = DEADLINE_S) -> re.Match[str]:
        """Wait until new text matches a regular expression; what is before the end of the match is not looked at again."""
        end_s = time.monotonic() + deadline_s
        while True:
            match = re.compile(pattern, re.MULTILINE).search(self.text, self._seen)
            if match:
                self._seen = match.end()
                return match
            if not self._read(end_s):
                raise AssertionError(f"{pattern!r} does not come; there is:\n{self.text}")

    def _read(self, end_s: float) -> bool:
        if not select.select([self._descriptor], [], [], max(0.0, end_s - time.monotonic()))[0]:
            return False
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # EIO: nobody has the terminal any more
            return False
        self.raw += data.decode(errors="replace")
        return bool(data)

    def finish(self, deadline_s: float = DEADLINE_S) -> int:
        """Read to the end and return the exit status as subprocess does."""
        end_s = time.monotonic() + deadline_s
        while self._read(end_s):
            pass
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end_s:
                raise AssertionError(f"it does not end; there is:\n{self.text}")
            else:
                time.sleep(0.01)
        return self.status

    def close(self) -> None:
        """End the process and all that has its terminal."""
        os.close(self._descriptor)
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@contextlib.contextmanager
def terminal(
    command: Sequence[str], environ: Mapping[str, str], cwd: Path, *, columns: int = 200, lines: int = 40
) -> Iterator[Terminal]:
    """Start a command on a terminal of this size."""
    pid, descriptor = pty.fork()
    if pid == 0:
        try:
            os.chdir(cwd)
            os.execvpe(command[0], list(command), dict(environ))
        finally:
            os._exit(127)
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    running = Terminal(pid, descriptor)
    try:
        yield running
    finally:
        running.close()
