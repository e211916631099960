"""Image files in a directory of a user who has no daemon, and uenvctl as he runs it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.fusetools import has_ended, until
from support.images import make_image
from support.users import TestUser, ordinary_user

UENVCTL = str(Path(sys.executable).parent / "uenvctl")
DEADLINE_S = 30.0
SERVER = "uenvd.fuse.supervise"
"""What serves a file: this is in the command lines of its processes."""


@dataclass(frozen=True)
class Site:
    """A user, a directory that everybody can traverse, and images in it."""

    user: TestUser
    directory: Path

    @property
    def mount(self) -> str:
        """Where the image ``app`` wants to be mounted."""
        return str(self.directory / "mnt")

    def environ(self, **extra: str) -> dict[str, str]:
        return {**self.user.environ(), "UENVD_SOCKET": str(self.directory / "no-socket"), **extra}

    def popen(
        self, *arguments: str, prefix: Sequence[str] = (), env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[bytes]:
        who = (
            {}
            if prefix
            else {"user": self.user.uid, "group": self.user.gid, "extra_groups": list(self.user.groups)}
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            [*prefix, UENVCTL, *arguments],
            env=env or self.environ(),
            **{"cwd": self.directory, **pipes, **who, **options},
        )

    def uenvctl(
        self, *arguments: str, stdin: bytes = b"", **options: Any
    ) -> subprocess.CompletedProcess[str]:
        with self.popen(*arguments, **options) as process:
            try:
                out, err = process.communicate(stdin, DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(
            process.args, process.returncode, (out or b"").decode(), err.decode()
        )

    def processes(self) -> list[str]:
        """Return the command lines of all processes of the user; zombies wait for init and do not count."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                if uid_of(pid) == self.user.uid and not has_ended(int(pid)):
                    found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue  # it ended meanwhile
        return found


def uid_of(pid: str) -> int:
    """Return the real uid of a process; the owner of its directory in /proc may be another. Raises OSError."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("\nUid:\t")[2].split()[0])


def _env_json(name: str, mount: Path, views: dict[str, Any], **more: Any) -> str:
    return json.dumps(
        {"name": name, "description": f"the {name}", "mount": str(mount), "views": views, **more}
    )


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file, and the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def _make_images(directory: Path) -> None:
    mount = directory / "mnt"
    trees = directory / "trees"
    default = {
        "description": "all of it",
        "env": {
            "version": 1,
            "values": {
                "list": {"PATH": [{"op": "prepend", "value": [f"{mount}/bin"]}]},
                "scalar": {"APP_HOME": str(mount), "CONFLICT": None},
            },
        },
    }
    other = {"env": {"version": 1, "values": {"scalar": {"OTHER": "${@USER@}'s"}}}}
    write(trees / "app/meta/env.json", _env_json("app", mount, {"default": default, "other": other}))
    write(trees / "app/bin/hello", "#!/bin/sh\necho hello from the image\n", 0o755)
    write(trees / "app/bin/headless", "echo I have no interpreter line: $1\n", 0o755)
    write(trees / "app/bin/lost", "#!/no/such/interpreter\n", 0o755)
    write(trees / "app/secret", "secret", 0o600)
    (trees / "app/nested").mkdir()
    write(
        trees / "tool/meta/env.json",
        _env_json(
            "tool",
            mount / "nested",
            {"default": {"env": {"values": {"scalar": {"TOOL": "1"}}}}},
            **{"default-view": "default"},
        ),
    )
    write(trees / "bare/file", "bare")
    write(
        trees / "old/meta/env.json",
        _env_json("old", mount, {"v": {"root": f"{mount}/env/v", "activate": f"{mount}/env/v/activate.sh"}}),
    )
    write(
        trees / "old/env/v/activate.sh",
        f"export PATH={mount}/env/v/bin:/usr/bin:/bin;\nexport OLD=yes; touch /tmp/never\n",
    )
    for name in ("app", "tool", "bare", "old"):
        make_image(trees / name, directory / f"{name}.squashfs")
        (directory / f"{name}.squashfs").chmod(0o644)
    shutil.rmtree(trees)
    write(directory / "text.squashfs", "this is no image\n" * 100)
    write(directory / "cut.squashfs", "")
    (directory / "cut.squashfs").write_bytes((directory / "app.squashfs").read_bytes()[:200])
    shutil.copy(directory / "app.squashfs", directory / "private.squashfs")
    (directory / "private.squashfs").chmod(0o600)
    mount.mkdir()
    (directory / "elsewhere").mkdir()


@contextlib.contextmanager
def file_site() -> Iterator[Site]:
    """Make a user and the images."""
    directory = Path(tempfile.mkdtemp(prefix="uenvd-test-", dir="/var/tmp"))
    directory.chmod(0o755)
    try:
        _make_images(directory)
        with ordinary_user(directory, extra_group=True) as user:
            yield Site(user, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def check_nothing_left(site: Site) -> None:
    """No process of the user's is left, and no mount."""
    until(lambda: not site.processes(), "no process of the user is left")
    mounted = Path("/proc/self/mountinfo").read_text()
    assert str(site.directory) not in mounted
