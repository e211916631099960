"""A private systemd as pid 1 of its own namespaces, with the units of an installed tree and nothing else of this machine.

It sees this machine's file system with the tree laid over it; what it writes to ``/etc``, ``/opt``, ``/run`` and ``/var/cache`` is gone at the end.
Of the machine's own units it knows none: the few targets that every service depends on are empty here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_SYSTEMD = Path("/lib/systemd/systemd")
_TARGETS = (
    "sysinit",
    "basic",
    "sockets",
    "shutdown",
    "network-online",
    "remote-fs",
    "multi-user",
    "umount",
    "final",
)
_START_S = 30.0
_STOP_S = 10.0
_COMMAND_S = 90.0

Result = subprocess.CompletedProcess[str]

_OUTER = """
set -e
mount -t cgroup2 cgroup2 "$1/cgroup"
mkdir "$1/cgroup/$2"
echo $$ > "$1/cgroup/$2/cgroup.procs"
exec unshare --mount --propagation private --pid --fork --kill-child --cgroup --ipc --uts bash -c "$3" bash "$1"
"""
"""Arguments: directory, name of the control group, `_INNER`. A group of its own, so that everything in it can be removed."""

_INNER = """
set -e
mount -t tmpfs tmpfs "$1/upper"
for name in etc opt var/cache; do
    mkdir -p "$1/upper/$name" "$1/upper/work-$name"
    lower=/$name
    [ ! -d "$1/tree/$name" ] || lower=$1/tree/$name:$lower
    mount -t overlay -o "lowerdir=$lower,upperdir=$1/upper/$name,workdir=$1/upper/work-$name" overlay "/$name"
done
for directory in /lib/systemd/system /usr/lib/systemd/system; do
    mountpoint -q "$directory" || mount --bind "$1/units" "$directory"
done
mkdir -p "$1/upper/empty"
for directory in /etc/systemd/system /lib/systemd/system-generators /usr/lib/systemd/system-generators; do
    mount --bind "$1/upper/empty" "$directory"
done
mount -t tmpfs -o mode=755 tmpfs /run
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec env -i container=uenvd-test /lib/systemd/systemd --unit=uenvd-test.target --log-target=console
"""
"""Argument: directory, which holds ``tree`` and ``units``."""


def missing() -> str:
    """Say why no private systemd can run on this machine; empty when one can."""
    if os.geteuid() != 0:
        return "a private systemd needs root"
    if not _SYSTEMD.exists() or shutil.which("systemctl") is None:
        return "systemd is not installed (Debian: systemd)"
    probe = (
        'mount -t cgroup2 cgroup2 "$0" && umount "$0" && mount -t tmpfs tmpfs "$0" && mkdir "$0/u" "$0/w"'
        ' && mount -t overlay -o "lowerdir=/etc,upperdir=$0/u,workdir=$0/w" overlay /etc'
    )
    tried = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", probe, "/mnt"],
        capture_output=True,
        text=True,
        check=False,
    )
    return (
        f"a private systemd needs cgroup2 and overlay mounts: {tried.stderr.strip()}"
        if tried.returncode
        else ""
    )


class PrivateSystemd:
    """A booted systemd, as a context manager.

    ``directory`` exists and holds the installed tree as ``directory/tree``; ``wanted`` are the units to start. ``dropins`` maps a unit's name
    to lines that are added to its definition. `log` has what systemd and, with the right drop-in, its services say.
    """

    def __init__(self, directory: Path, wanted: tuple[str, ...], dropins: dict[str, str]) -> None:
        self.directory = directory
        self._wanted = wanted
        self._dropins = dropins
        self._group = f"uenvd-test-{os.getpid()}"
        self._outer: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self.log_path = directory / "systemd.log"

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def log(self) -> str:
        """What it has said so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def run(self, *command: str | Path, user: str | None = None) -> Result:
        """Run a command to its end in systemd's namespaces; its status is the caller's to check."""
        return subprocess.run(
            self._entered(command, user),
            capture_output=True,
            text=True,
            check=False,
            timeout=_COMMAND_S,
            stdin=subprocess.DEVNULL,
        )

    def popen(self, *command: str | Path, user: str | None = None) -> subprocess.Popen[str]:
        """Start a command in systemd's namespaces; it ends with them at the latest."""
        return subprocess.Popen(
            self._entered(command, user),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()

    def _entered(self, command: tuple[str | Path, ...], user: str | None) -> list[str]:
        become = ["setpriv", "--reuid", user, "--regid", "nogroup", "--clear-groups"] if user else []
        enter = ["nsenter", "-t", str(self._pid), "-m", "-p", "-i", "-u", "-C"]
        clean = ["env", "-i", "PATH=/opt/uenvd/bin:/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_PAGER="]
        return [*enter, *become, *clean, *map(str, command)]

    def _start(self) -> None:
        for name in ("units", "upper", "cgroup"):
            (self.directory / name).mkdir()
        units = self.directory / "units"
        for target in _TARGETS:
            (units / f"{target}.target").write_text(f"[Unit]\nDescription={target}\nDefaultDependencies=no\n")
        (units / "uenvd-test.target").write_text(
            f"[Unit]\nDescription=test\nDefaultDependencies=no\nWants={' '.join(self._wanted)}\n"
        )
        shutil.copytree(self.directory / "tree/usr/lib/systemd/system", units, dirs_exist_ok=True)
        for unit, lines in self._dropins.items():
            (units / f"{unit}.d").mkdir()
            (units / f"{unit}.d" / "test.conf").write_text(lines)
        with self.log_path.open("ab") as log:
            self._outer = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"),
                    *("bash", "-c", _OUTER, "bash", str(self.directory), self._group, _INNER),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )
        deadline_s = time.monotonic() + _START_S
        while not self._is_up():
            if self._outer.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"systemd did not start:\n{self.log}")
            time.sleep(0.05)

    def _is_up(self) -> bool:
        assert self._outer is not None
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text().split()
        if not children or Path(f"/proc/{children[0]}/comm").read_text() != "systemd\n":
            return False
        self._pid = int(children[0])
        return self.run("systemctl", "is-active", "uenvd-test.target").stdout == "active\n"

    def _stop(self) -> None:
        if self._outer is None:
            return
        # The end of pid 1 is that of the whole pid namespace; unshare reaps it and ends.
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        try:
            self._outer.wait(_STOP_S if self._pid else 0)
        except subprocess.TimeoutExpired:
            os.killpg(self._outer.pid, signal.SIGKILL)
            self._outer.wait()
        self._outer = None
        remove = (
            'mount -t cgroup2 cgroup2 "$1" && for try in $(seq 100); do find "$1/$2" -depth -type d -exec rmdir {} + 2>/dev/null;'
            ' [ -e "$1/$2" ] || exit 0; read -rt 0.05 <> <(:) || true; done; exit 1'
        )
        done = subprocess.run(
            [
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "bash",
                "-c",
                remove,
                "bash",
                self.directory / "cgroup",
                self._group,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"processes of the private systemd are left in its control group: {done.stderr}"
            )
