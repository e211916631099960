"""Whose rights the cache's files are touched with.

On many clusters the shared file system's server takes root for nobody ("root squash"), so the daemon does all I/O on the cache as an ordinary
user (``cache.user``). The ids for file access belong to the *thread* (setfsuid(2), setfsgid(2); setgroups(2) as a bare system call, because
the C library's applies to all threads), so other threads of the daemon keep root's, and no helper process is needed. While they are another
user's the kernel takes the capabilities that override permissions (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER, ...) away from the
thread: what works here works without them.

An open file keeps the rights it was opened with, so reads and writes of descriptors need none of this; names do, and changes of a file's
times and mode. Each thread enters for itself, also one that was started inside: leaving makes a thread root again.
"""

from __future__ import annotations

import ctypes
import os
import platform
import pwd
import threading
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Concatenate, Final, ParamSpec, Protocol, TypeVar

from uenvd.errors import ConfigError, StorageError

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="HasUser")

_SETGROUPS: Final = {"x86_64": 116, "aarch64": 159}
"""Number of setgroups(2), arch/*/entry/syscalls and include/uapi/asm-generic/unistd.h."""
_NOBODY_CHANGES: Final = -1
"""An id that setfsuid(2) refuses: the call then only returns the present one."""

_libc = ctypes.CDLL(None, use_errno=True)
_depth = threading.local()


class CacheUser:
    """The user for whom files of a cache are touched; without one, the process's own.

    Use as a context manager around the I/O; it may be entered again inside, also by several threads at once. Raises `StorageError` when
    the process may not act for the user.
    """

    def __init__(self, uid: int | None = None, gid: int = 0, groups: tuple[int, ...] = ()) -> None:
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self._own = uid is None or (uid == os.geteuid() and gid == os.getegid())

    @classmethod
    def named(cls, name: str | None) -> CacheUser:
        """Look a user up (blocking); None is the process's own. Raises `ConfigError`."""
        if name is None:
            return cls()
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            raise ConfigError(
                f"cache.user: there is no user {name!r}",
                hint="name an account that the nodes and the file server know",
            ) from None
        return cls(entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(name, entry.pw_gid)))

    def __enter__(self) -> CacheUser:
        if self._own:
            return self
        depth = getattr(_depth, "value", 0)
        if depth == 0:
            assert self.uid is not None
            _become(self.uid, self.gid, self.groups)
        _depth.value = depth + 1
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._own:
            return
        _depth.value -= 1
        if _depth.value == 0:
            # The process's groups as they are for its other threads: nobody changes them after the start.
            _become(os.geteuid(), os.getegid(), _PROCESS_GROUPS)

    def give(self, path: str | os.PathLike[str]) -> None:
        """Make the user the owner of a new file or directory that the process made with its own rights. Raises OSError."""
        if not self._own and self.uid is not None:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)


class HasUser(Protocol):
    """What `as_user` needs."""

    user: CacheUser


def as_user(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Make a method act as ``self.user``. Not for generators."""

    @wraps(method)
    def acting(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.user:
            return method(self, *args, **kwargs)

    return acting


def _become(uid: int, gid: int, groups: tuple[int, ...]) -> None:
    _set(uid, gid, groups)
    if _current() != (uid, gid):
        _set(os.geteuid(), os.getegid(), _PROCESS_GROUPS)  # one of them may have succeeded
        raise StorageError(
            f"this process may not act as uid {uid} on the cache",
            hint="uenvd needs CAP_SETUID and CAP_SETGID, or to run as cache.user",
        )


def _set(uid: int, gid: int, groups: tuple[int, ...]) -> None:
    number = _SETGROUPS.get(platform.machine())
    if number is not None:
        array = (ctypes.c_uint32 * len(groups))(*groups)
        _libc.syscall(ctypes.c_long(number), ctypes.c_size_t(len(groups)), array)
    _libc.setfsgid(ctypes.c_uint32(gid))
    _libc.setfsuid(ctypes.c_uint32(uid))


def _current() -> tuple[int, int]:
    """Return the thread's (fsuid, fsgid)."""
    mask = 2**32 - 1
    return _libc.setfsuid(_NOBODY_CHANGES) & mask, _libc.setfsgid(_NOBODY_CHANGES) & mask


_PROCESS_GROUPS: Final = tuple(os.getgroups())
