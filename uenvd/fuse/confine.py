"""What a worker gives up before it looks at the first byte of an image.

The order matters: what needs privilege (entering the mount namespace, the bounding set, groups and uid) comes first, then the doors are
shut. A worker of an ordinary user has nothing of the former to give and shuts the same doors.

Sources: prctl(2), capabilities(7), setns(2), capset(2) (``_LINUX_CAPABILITY_VERSION_3``).
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from uenvd import mounts
from uenvd.errors import MountFailed, WorkerFailed
from uenvd.fuse.seccomp import Policy, restrict

_PR_SET_DUMPABLE = 4
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x2008_0522
_CAPABILITIES = 64  # more than any kernel has; EINVAL ends the list
_CAP_SETPCAP = 8

_MAX_DESCRIPTORS = 64
_ADDRESS_SPACE_BYTES = 3 << 30
"""Bound of a worker's address space beyond twice its cache: code, thread stacks and malloc's reservations; far less is ever touched."""
_OOM_SCORE = -500
"""A worker's death takes the mounts of many jobs with it, and its memory is bounded: let the kernel look elsewhere first."""

_IGNORED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGPIPE,
    signal.SIGQUIT,
    signal.SIGTSTP,
    signal.SIGTTOU,
)

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int = 0, third: int = 0) -> None:
    arguments = [ctypes.c_ulong(value) for value in (argument, third, 0, 0)]
    if _libc.prctl(ctypes.c_int(option), *arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"prctl {option}")


def confine(
    *,
    mount_namespace_fd: int | None = None,
    uid: int | None = None,
    gid: int | None = None,
    groups: tuple[int, ...] = (),
    keep: frozenset[int] = frozenset(),
    cache_bytes: int = 0,
    data_bytes: int | None = None,
    policy: Policy | None = Policy.SESSION,
) -> None:
    """Confine the calling process, which must have one thread only.

    Afterwards it is in the given mount namespace, has the given identity, no capability and no way to get one, no controlling terminal,
    ignores the signals that end jobs (its end is that of its mount), cannot be traced by others of its uid, and has no descriptors but
    0, 1, 2 and ``keep``. Where there is libseccomp it can make only the system calls that `uenvd.fuse.seccomp` allows; else the log says so.

    Args:
        mount_namespace_fd: the namespace to enter; None to stay.
        uid: the user to become; None keeps the process's credentials (but not its capabilities).
        gid: the group to become, needed with ``uid``.
        groups: supplementary groups, with ``uid``.
        keep: descriptors to keep open.
        cache_bytes: what the address space limit has to leave room for.
        data_bytes: the most memory of its own that it may have (`uenvd.fuse.bounds`); None for no such limit.
        policy: which system calls it may make; None leaves that to a later `restrict`.

    Raises:
        WorkerFailed: a step failed; the process is in no state to go on.

    """
    if uid is not None and gid is None:
        raise WorkerFailed("the worker was told a uid but no gid")
    step = "entering the mount namespace"
    try:
        if mount_namespace_fd is not None:
            mounts.setns(mount_namespace_fd, mounts.CLONE_NEWNS)
        os.chdir("/")
        step = "leaving the terminal"
        with suppress(
            PermissionError
        ):  # the leader of its group already: whoever started the process took care of it
            os.setsid()
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
        step = "closing descriptors"
        _close_all_but({0, 1, 2} | keep)
        step = "setting limits"
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_NOFILE, max(_MAX_DESCRIPTORS, max(keep, default=0) + 1))
        _limit(resource.RLIMIT_AS, _ADDRESS_SPACE_BYTES + 2 * cache_bytes)
        if data_bytes is not None:
            _limit(resource.RLIMIT_DATA, data_bytes)
        step = "dropping privileges"
        _drop_bounding_set()
        if uid is not None and gid is not None:
            _become(uid, gid, groups)
        _drop_capabilities()
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _prctl(_PR_SET_DUMPABLE, 0)
        if policy is not None:
            step = "restricting system calls"
            restrict(policy)  # where it cannot be, the rest holds
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise WorkerFailed(f"the worker could not be confined, {step}: {reason}") from error
    except MountFailed as error:
        raise WorkerFailed(f"the worker could not be confined, {step}: {error}") from error


@contextmanager
def acting_as(uid: int, gid: int, groups: tuple[int, ...]) -> Iterator[None]:
    """Have the rights of a user for a while, as root: his ids and groups are effective, no capability is.

    The real and saved ids stay root's, so the user can send this process no signal: it cannot be stopped while somebody waits for it.
    Raises `OSError`.
    """
    own_groups = os.getgroups()
    os.setgroups(groups)
    try:
        os.setegid(gid)
        os.seteuid(uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(own_groups)


def _close_all_but(keep: set[int]) -> None:
    first = 0
    for descriptor in sorted(keep):
        if first < descriptor:  # Python 3.11 takes an empty range for everything
            os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, 1 << 20)


def _limit(what: int, value: int) -> None:
    _soft, hard = resource.getrlimit(what)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def _drop_bounding_set() -> None:
    if not capability_sets()[0] >> _CAP_SETPCAP & 1:
        return  # not ours to change, and without no_new_privs' counterpart of no use
    for capability in range(_CAPABILITIES):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError:
            return


def _become(uid: int, gid: int, groups: tuple[int, ...]) -> None:
    if (uid, uid, uid) == os.getresuid() and (gid, gid, gid) == os.getresgid() and uid != 0:
        return
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def capability_sets() -> tuple[int, int, int]:
    """Return the effective, permitted and inheritable capabilities of this thread as bit sets. Raises `OSError`."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), 8)
    data = ctypes.create_string_buffer(24)
    if _libc.capget(header, data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "capget")
    low = struct.unpack_from("=III", data, 0)
    high = struct.unpack_from("=III", data, 12)
    effective, permitted, inheritable = (a | b << 32 for a, b in zip(low, high, strict=True))
    return effective, permitted, inheritable


def _drop_capabilities() -> None:
    with suppress(OSError):  # EINVAL before Linux 4.3; the next step empties the ambient set anyway
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), 8)
    if _libc.capset(header, ctypes.create_string_buffer(bytes(24), 24)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "capset")
