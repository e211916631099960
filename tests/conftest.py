"""Fixtures that every tier shares. What a test cannot have, it says; what it made, it removes."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# A tmpfs, which /tmp may be, does not say whether a read would wait (RWF_NOWAIT); the disk does, as the cache of a real node.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/var/tmp")


@pytest.fixture
def public_dir() -> Iterator[Path]:
    """A temporary directory that every user can traverse (pytest's own are closed to others)."""
    path = Path(tempfile.mkdtemp(prefix="uenvd-test-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def node() -> None:
    """A machine on which uenvd can run: root, /dev/fuse for everybody, the mount point /user-environment."""
    if os.geteuid() != 0:
        pytest.skip("needs root: uenvd makes mounts for other users")
    device = Path("/dev/fuse")
    if not device.exists():
        pytest.skip("needs /dev/fuse: modprobe fuse")
    if stat.S_IMODE(device.stat().st_mode) != 0o666:
        device.chmod(0o666)  # what udev's rules do on every ordinary system
    # What systemd-tmpfiles does from systemd/uenvd.tmpfiles. It stays: another run may be using it.
    for mount_point in ("/user-environment", "/user-tools"):
        Path(mount_point).mkdir(mode=0o755, exist_ok=True)
