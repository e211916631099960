"""Sessions of uenvctl as an ordinary user has them: an image of his own, a home, files of the machine replaced for one command."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.publishing import env_json, make_squashfs
from support.terminal import Terminal, terminal
from support.users import TestUser, ordinary_user

CHECKOUT = Path(__file__).resolve().parents[2]
UENVCTL = str(Path(sys.executable).parent / "uenvctl")
MOUNT = "/user-environment"
DEADLINE_S = 60.0
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
Result = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class SessionSite:
    """A user, and a directory that everybody can traverse with the image ``app.squashfs``. ``socket`` is that of a daemon, if there is one."""

    user: TestUser
    directory: Path
    socket: Path

    @property
    def image(self) -> str:
        """A file with the view ``default``: ``say`` in PATH, WORD, and a few lists."""
        return str(self.directory / "app.squashfs")

    def environ(self, **extra: str) -> dict[str, str]:
        """Return the environment of a fresh login, which knows the socket."""
        return {
            **self.user.environ(),
            "PATH": SYSTEM_PATH,
            "TERM": "dumb",
            "UENVD_SOCKET": str(self.socket),
            **extra,
        }

    def write(self, name: str, text: str, *, mode: int = 0o644, root: bool = False) -> Path:
        """Write a file in the user's home; his own unless ``root``."""
        path = self.user.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        if not root:
            for one in (path, *path.parents):
                if one == self.user.home:
                    break
                os.chown(one, self.user.uid, self.user.gid)
        return path

    def _command(self, arguments: tuple[str, ...], replaced: Mapping[str, Path] | None) -> list[str]:
        groups = ",".join(map(str, self.user.groups))
        become = [
            "setpriv",
            *("--reuid", str(self.user.uid), "--regid", str(self.user.gid)),
            *(("--groups", groups) if groups else ("--clear-groups",)),
            *arguments,
        ]
        if not replaced:
            return become
        binds = " && ".join(
            f"mount --bind {shlex.quote(str(source))} {shlex.quote(target)}"
            for target, source in replaced.items()
        )
        return [
            "unshare",
            "-m",
            "--propagation",
            "private",
            "sh",
            "-c",
            f'{binds} && exec "$@"',
            "sh",
            *become,
        ]

    def run(
        self,
        *arguments: str,
        stdin: str = "",
        replaced: Mapping[str, Path] | None = None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Result:
        """Run a command as the user to its end; ``replaced`` are files or directories of the machine that it sees others for."""
        return subprocess.run(
            self._command(arguments, replaced),
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            env=dict(env or self.environ()),
            timeout=DEADLINE_S,
            **{"cwd": self.user.home, **options},
        )

    def inside(self, *command: str, **options: Any) -> Result:
        """Run a command in a session of the image with its view ``default``."""
        return self.run(UENVCTL, "run", "--view=default", self.image, "--", *command, **options)

    @contextlib.contextmanager
    def start(
        self,
        *arguments: str,
        replaced: Mapping[str, Path] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Iterator[Terminal]:
        """Start ``uenvctl start`` with these arguments at a terminal."""
        command = self._command((UENVCTL, "start", *arguments), replaced)
        with terminal(command, env or self.environ(), self.user.home) as running:
            yield running


def view_values(mount: str = MOUNT) -> dict[str, Any]:
    """Return what the view ``default`` of the image does: lists before and after, with a space and characters that shells treat specially."""
    return {
        "list": {
            "PATH": [
                {"op": "prepend", "value": [f"{mount}/bin", f"{mount}/more bin"]},
                {"op": "append", "value": [f"{mount}/last"]},
            ],
            "MANPATH": [{"op": "prepend", "value": [f"{mount}/man"]}],
            "ODD_LIST": [{"op": "append", "value": ["it's", "a!b", "$HOME", "`id`", "*"]}],
        },
        "scalar": {"WORD": "hello"},
    }


@contextlib.contextmanager
def session_site() -> Iterator[SessionSite]:
    """Make a site without a daemon."""
    directory = Path(tempfile.mkdtemp(prefix="uenvd-test-", dir="/var/tmp"))
    directory.chmod(0o755)
    try:
        make_squashfs(
            directory / "app.squashfs",
            {
                "bin/say": "#!/bin/sh\necho hello\n",
                "include/answer.h": "#define ANSWER 42\n",
                "data": "x" * 1000,
            },
            meta=env_json("app", views={"default": view_values(), "other": {"scalar": {"OTHER": "1"}}}),
        )
        with ordinary_user(directory, extra_group=True) as user:
            yield SessionSite(user, directory, directory / "no-socket")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
