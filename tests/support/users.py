"""Ordinary users for tests that need somebody who is not root: made with ``useradd``, removed afterwards.

The name of a test user holds the process id of its maker, so that users of a run that was killed are recognised and removed by the next.
"""

from __future__ import annotations

import contextlib
import grp
import itertools
import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"^ut(\d+)n\d+$")
_LOCK_WAIT_S = 10.0
_counter = itertools.count()


@dataclass(frozen=True)
class TestUser:
    """An account: numeric ids, ``groups`` without the primary one, and a home directory that exists."""

    __test__ = False

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: Path

    def environ(self) -> dict[str, str]:
        """Return the environment of a fresh login."""
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(self.home),
            "USER": self.name,
            "LOGNAME": self.name,
            "SHELL": "/bin/bash",
            "LANG": "C.UTF-8",
        }


def _admin(*command: str) -> None:
    """Run useradd and its kin; a lock held by another one is waited for. Raises RuntimeError with its message."""
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        if "lock" not in done.stderr or time.monotonic() > deadline:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
        time.sleep(0.05)


def _is_stale(name: str) -> bool:
    found = _NAME.match(name)
    return found is not None and not Path("/proc", found.group(1)).exists()


def remove_stale_users() -> None:
    """Remove accounts and groups that a killed run left behind."""
    for user in [entry.pw_name for entry in pwd.getpwall() if _is_stale(entry.pw_name)]:
        with contextlib.suppress(RuntimeError):
            _admin("userdel", "-f", user)
    for group in [entry.gr_name for entry in grp.getgrall() if _is_stale(entry.gr_name)]:
        with contextlib.suppress(RuntimeError):
            _admin("groupdel", group)


@contextlib.contextmanager
def ordinary_user(base: Path, *, extra_group: bool = False) -> Iterator[TestUser]:
    """Make a user with a home in ``base`` (which everybody must be able to traverse), remove both at the end.

    With ``extra_group`` the user is also in a second group that has no other member. Raises RuntimeError when not root.
    """
    if os.geteuid() != 0 or shutil.which("useradd") is None:
        raise RuntimeError("making a test user needs root and useradd")
    remove_stale_users()
    name = f"ut{os.getpid()}n{next(_counter)}"
    group = f"ut{os.getpid()}n{next(_counter)}"
    home = base / name
    if extra_group:
        _admin("groupadd", group)
    try:
        groups = ["-G", group] if extra_group else []
        _admin("useradd", "-M", "-U", "-d", str(home), "-s", "/bin/bash", *groups, name)
        try:
            entry = pwd.getpwnam(name)
            home.mkdir(mode=0o755)
            os.chown(home, entry.pw_uid, entry.pw_gid)
            others = tuple(gid for gid in os.getgrouplist(name, entry.pw_gid) if gid != entry.pw_gid)
            yield TestUser(name, entry.pw_uid, entry.pw_gid, others, home)
        finally:
            shutil.rmtree(home, ignore_errors=True)
            _admin("userdel", "-f", name)
    finally:
        if extra_group:
            with contextlib.suppress(KeyError):  # userdel may have removed it with its only member
                grp.getgrnam(group)
                _admin("groupdel", group)
