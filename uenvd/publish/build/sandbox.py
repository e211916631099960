"""A private place to build in: own user, mount, PID, IPC, UTS and (mostly) network namespaces, the final prefix in memory. No privilege needed.

The process gets a new root: a tmpfs in which every entry of the old root is bound, except the mount point, which is an empty tmpfs at
its final path whether or not the machine has such a directory, and `BUILD_DIRECTORY`, the same path for every build on every machine.
Nothing of it is visible to others, and all is gone with the last process inside.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

from uenvd import mounts
from uenvd.errors import MountFailed, ResourceMissing
from uenvd.publish.build.audit import BUILD_DIRECTORY

HOST_NAME: Final = "uenvd-build"
_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None)
_ROOT_BYTES: Final = 16 << 20
_OLD_ROOT: Final = ".old-root"
_NAMESPACES: Final = mounts.CLONE_NEWUSER | mounts.CLONE_NEWNS | mounts.CLONE_NEWIPC | mounts.CLONE_NEWUTS


def enter(prefix: str, new_root: Path, size_bytes: int, *, network: bool = False) -> None:
    """Move the calling process, which must have one thread, into the private place; its working directory becomes `BUILD_DIRECTORY`.

    Args:
        prefix: absolute, clean: where the image will be mounted; empty and writable afterwards.
        new_root: an empty directory of the user's, of no further use to anybody.
        size_bytes: how much memory prefix and build directory may take, each.
        network: whether the machine's is to be had; else there is none.

    Raises:
        ResourceMissing: the kernel gives ordinary users no user namespaces.
        MountFailed: anything else.

    """
    uid, gid = os.getuid(), os.getgid()
    try:
        mounts.unshare(_NAMESPACES | (0 if network else mounts.CLONE_NEWNET))
    except OSError as error:
        raise ResourceMissing(
            f"cannot make a private namespace to build in: {error.strerror}",
            hint="are user namespaces enabled (sysctl user.max_user_namespaces; AppArmor's restriction of them)?",
        ) from error
    mounts.map_self(uid, gid)
    try:
        mounts.make_rslave("/")
        mounts.mount_tmpfs(new_root, size_bytes=_ROOT_BYTES, source="uenvd-root", executable=True)
        _copy_root(str(new_root), prefix)
        for path in (prefix, BUILD_DIRECTORY):
            inside = f"{new_root}{path}"
            Path(inside).mkdir(mode=0o755, parents=True, exist_ok=True)
            mounts.mount_tmpfs(inside, size_bytes=size_bytes, source="uenvd-build", executable=True)
        old_root = new_root / _OLD_ROOT
        old_root.mkdir()
        # Not chroot(2): programs of a build make user namespaces of their own (bubblewrap), which a changed root forbids.
        mounts.pivot_root(new_root, old_root)
        os.chdir(BUILD_DIRECTORY)
        mounts.umount(f"/{_OLD_ROOT}", detach=True)
        Path(f"/{_OLD_ROOT}").rmdir()
        socket.sethostname(HOST_NAME)
    except OSError as error:
        about = f" ({os.fsdecode(error.filename)})" if error.filename else ""
        raise MountFailed(
            f"cannot make the private root to build in: {error.strerror}{about}",
            hint="may processes mount in user namespaces of their own here (AppArmor, seccomp of a container)?",
        ) from error


def alone() -> None:
    """Go on as the first process of a PID namespace: when it ends, however that happens, the kernel ends all that it started.

    Returns in the child only. The calling process waits, and ends as the child does. It must have one thread, and have called `enter`.
    """
    mounts.unshare(mounts.CLONE_NEWPID)
    child = os.fork()
    if child:
        _status_of(child)
    die_with_parent()
    with suppress(OSError):
        # Where it may not be, /proc goes on to show the outer namespace: programs use /proc/self, which is right in both.
        mounts.mount_proc("/proc")


def _status_of(child: int) -> NoReturn:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status)


def die_with_parent() -> None:
    """Let the kernel kill the calling process when its parent ends, however that ends (prctl(2), PR_SET_PDEATHSIG)."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _copy_root(new_root: str, prefix: str) -> None:
    """Bind all of the old root below the new one, leaving out the mount point and our own directory.

    Where the mount point lies deeper (/opt/site/env), the directories on the way to it are made anew, too, and filled in the same way.
    """
    left_out = [prefix.split("/")[1:], BUILD_DIRECTORY.split("/")[1:]]
    bind_all("", new_root, left_out)


def bind_all(path: str, new_root: str, left_out: list[list[str]]) -> None:
    """Bind the entries of the directory ``path`` (empty: the root) below a new root, but for those that ``left_out`` leads to.

    ``left_out`` holds the components of paths, relative to ``path``. Raises `OSError`.
    """
    try:
        sources = sorted(Path(path or "/").iterdir())
    except FileNotFoundError:
        return
    for source in sources:
        target = Path(f"{new_root}{path}/{source.name}")
        deeper = [rest[1:] for rest in left_out if rest[0] == source.name]
        if any(not rest for rest in deeper):
            continue
        if source.is_symlink():
            target.symlink_to(source.readlink())
        elif source.is_dir():
            target.mkdir(mode=0o755)
            if deeper:
                bind_all(str(source), new_root, deeper)
            else:
                mounts.bind_recursive(source, target)
        elif source.is_file():
            target.touch()
            mounts.bind_recursive(source, target)
