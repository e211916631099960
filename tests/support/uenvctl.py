"""uenvctl as people run it: an ordinary user, a directory of his, a daemon of his own."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.users import TestUser, ordinary_user

UENVCTL = str(Path(sys.executable).parent / "uenvctl")
DEADLINE_S = 30.0


@dataclass(frozen=True)
class Desk:
    """A user and a directory of his that everybody can traverse. ``socket`` is where he looks for uenvd."""

    user: TestUser
    directory: Path
    socket: Path

    def environ(self) -> dict[str, str]:
        """Return his environment: uenvctl is in PATH."""
        environ = {**self.user.environ(), "UENVD_SOCKET": str(self.socket)}
        environ["PATH"] = f"{Path(UENVCTL).parent}:{environ['PATH']}"
        return environ

    def options(self) -> dict[str, Any]:
        """Return what makes a `subprocess` his."""
        return {
            "env": self.environ(),
            "cwd": self.directory,
            "user": self.user.uid,
            "group": self.user.gid,
            "extra_groups": list(self.user.groups),
        }

    def uenvctl(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run uenvctl to its end."""
        return self.command([UENVCTL, *arguments], **options)

    def command(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            command,
            **{
                **self.options(),
                "stdin": subprocess.DEVNULL,
                "capture_output": True,
                "text": True,
                "timeout": DEADLINE_S,
                "check": False,
                **options,
            },
        )


@contextmanager
def desk() -> Iterator[Desk]:
    """Make a user with a directory; both are removed in the end."""
    directory = Path(tempfile.mkdtemp(prefix="uenvd-test-", dir="/var/tmp"))
    directory.chmod(0o755)
    try:
        with ordinary_user(directory, extra_group=True) as user:
            work = directory / "work"
            work.mkdir()
            os.chown(work, user.uid, user.gid)
            yield Desk(user, work, directory / "uenvd" / "run" / "control")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Terminal:
    """A program on a terminal of its own, driven by keys."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], *, cwd: Path) -> None:
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={"TERM": "xterm", "COLUMNS": "300", "LINES": "50", **environ},
            cwd=cwd,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._master, keys.encode())

    def wait_for(self, text: str, *, since: int = 0, deadline_s: float = DEADLINE_S) -> str:
        """Wait until a text has appeared after what was seen at ``since``; return everything after that."""
        deadline = time.monotonic() + deadline_s
        while text not in self.seen[since:]:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._master], [], [], left)[0]:
                raise AssertionError(f"no {text!r} on the terminal, but {self.seen[since:]!r}")
            try:
                data = os.read(self._master, 65536)
            except OSError:  # EIO: nobody has the other side open any more
                data = b""
            if not data:
                raise AssertionError(f"the program ended: {self.seen!r}")
            self.seen += data.decode(errors="replace")
        return self.seen[since:]

    def close(self) -> None:
        """End the program."""
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
