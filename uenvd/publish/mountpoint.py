"""Give a command a mount point that the machine has not: in a user and mount namespace of its own, without privilege.

``python -I -m uenvd.publish.mountpoint MOUNT EMPTY_DIRECTORY COMMAND...``: the root becomes a tmpfs in which everything of the old root is
bound, plus the empty directory MOUNT. On CI runners nobody makes ``/user-environment``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from uenvd import mounts
from uenvd.errors import MountFailed, ResourceMissing, UenvError
from uenvd.publish.build.sandbox import bind_all

_ROOT_BYTES: Final = 16 << 20
_OLD_ROOT: Final = ".old-root"
_FAILED: Final = 126


def words(mount: str, directory: Path) -> tuple[str, ...]:
    """Return the words to put before a command; none if the mount point is there. ``directory`` is made, of no further use."""
    if Path(mount).is_dir():
        return ()
    directory.mkdir()
    return (sys.executable, "-I", "-m", "uenvd.publish.mountpoint", mount, str(directory))


def enter(mount: str, new_root: str) -> None:
    """Move this process, which must have one thread, to where the mount point exists. Raises `ResourceMissing`, `MountFailed`."""
    uid, gid, here = os.geteuid(), os.getegid(), Path.cwd()
    try:
        mounts.unshare(mounts.CLONE_NEWUSER | mounts.CLONE_NEWNS)
    except OSError as error:
        raise ResourceMissing(
            f"there is no directory {mount} here, and no user namespace to make one in: {error.strerror}",
            hint=f"mkdir {mount}, or allow user namespaces: sysctl user.max_user_namespaces",
        ) from error
    mounts.map_self(uid, gid)
    try:
        mounts.make_rslave("/")
        mounts.mount_tmpfs(new_root, size_bytes=_ROOT_BYTES, source="uenvd-root", executable=True)
        bind_all("", new_root, [mount.split("/")[1:]])
        Path(new_root + mount).mkdir(mode=0o755, parents=True)
        old_root = Path(new_root, _OLD_ROOT)
        old_root.mkdir()
        mounts.pivot_root(new_root, old_root)
        os.chdir("/")
        mounts.umount(f"/{_OLD_ROOT}", detach=True)
        Path(f"/{_OLD_ROOT}").rmdir()
        os.chdir(here)
    except OSError as error:
        raise MountFailed(
            f"cannot make the mount point {mount} in a private root: {error.strerror}"
        ) from error


def main(arguments: Sequence[str]) -> NoReturn:
    """Become the command."""
    mount, new_root, *command = arguments
    try:
        enter(mount, new_root)
    except UenvError as error:
        print(f"{error.message}\nhint: {error.hint}" if error.hint else error.message, file=sys.stderr)
        raise SystemExit(_FAILED) from None
    os.execv(command[0], command)  # noqa: S606 - our own programs


if __name__ == "__main__":
    main(sys.argv[1:])
