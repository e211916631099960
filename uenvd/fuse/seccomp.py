"""System calls that a server of images has no use for, and a program planted by an image would: refused for good.

What is left to a worker that was taken over: to read what its uid may read, and to answer the kernel's questions wrongly. It cannot
create, change or remove a file, start a program or process, reach the network or another process, or make a namespace or mount.

The filter is a list of what is refused (EPERM), not of what is allowed: Python, trio and libfuse may use more calls tomorrow, and the
kernel asks for privileges, which a worker has none of, in the rest. libseccomp knows the numbers of the names on each processor, and
which calls a processor lacks; calls of another one's kind (32-bit ones, x32) are refused altogether.

Sources: seccomp(2), seccomp_rule_add(3), seccomp_attr_set(3), clone(2), syscalls(2).
"""

from __future__ import annotations

import errno
import logging
import os

_why_not = ""
try:
    import pyseccomp
except (ImportError, OSError, RuntimeError, AttributeError) as error:  # libseccomp is missing, or very old
    pyseccomp = None
    _why_not = str(error)

_log = logging.getLogger("uenvd-fs")

_REFUSED = {
    "programs and processes": """
        execve execveat fork vfork kill tkill tgkill pidfd_send_signal pidfd_open pidfd_getfd rt_sigqueueinfo rt_tgsigqueueinfo
        ptrace process_vm_readv process_vm_writev process_madvise kcmp personality""",
    "the network, and other means to talk": """
        socket connect bind listen accept accept4 shmget shmat msgget semget mq_open""",
    "changes of files": """
        creat unlink unlinkat rmdir rename renameat renameat2 link linkat symlink symlinkat mkdir mkdirat mknod mknodat
        chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat truncate ftruncate
        setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr utime utimes utimensat futimesat""",
    "namespaces and mounts": """
        mount umount2 pivot_root chroot setns unshare
        open_tree move_mount fsopen fsconfig fsmount fspick mount_setattr""",
    "parts of the kernel with a history": """
        bpf perf_event_open io_uring_setup io_uring_enter io_uring_register userfaultfd keyctl add_key request_key
        fanotify_init inotify_init1 quotactl acct""",
}
_MISSING = "clone3 openat2"
"""Answered with ENOSYS: their callers fall back to the older calls, whose arguments a filter can see."""

_FLAGS_ARGUMENT = {"open": 1, "openat": 2}
_WRITING = (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_APPEND)
_CLONE_THREAD = 0x0001_0000
_UNKNOWN = -1
"""The number of a name that is in no table of libseccomp; calls that this processor does not have get others below zero."""


def restrict() -> bool:
    """Install the filter in the calling process, which must have one thread; the process gets ``no_new_privs`` too.

    Returns:
        Whether it is in force. If it is not (no libseccomp, a kernel without filters), or lacks a call, the log says so.

    """
    if pyseccomp is None:
        _log.warning("system calls are not restricted: %s", _why_not)
        return False
    try:
        _filter().load()
    except OSError as error:
        _log.warning("system calls are not restricted: libseccomp: %s", error.strerror)
        return False
    return True


def _filter() -> pyseccomp.SyscallFilter:
    """Return the filter for this processor, not yet in force. Raises `OSError`."""
    refuse, missing = pyseccomp.ERRNO(errno.EPERM), pyseccomp.ERRNO(errno.ENOSYS)
    made = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    made.set_attr(pyseccomp.Attr.ACT_BADARCH, refuse)
    unknown = []
    for action, names in (*((refuse, names) for names in _REFUSED.values()), (missing, _MISSING)):
        for name in names.split():
            number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
            if number == _UNKNOWN:
                unknown.append(name)
            else:
                made.add_rule(action, number)
    for name, argument in _FLAGS_ARGUMENT.items():
        for flag in _WRITING:
            made.add_rule(refuse, name, pyseccomp.Arg(argument, pyseccomp.MASKED_EQ, flag, flag))
    clone_flags = (
        1 if os.uname().machine.startswith("s390") else 0
    )  # clone(2), "C library/kernel differences"
    made.add_rule(refuse, "clone", pyseccomp.Arg(clone_flags, pyseccomp.MASKED_EQ, _CLONE_THREAD, 0))
    if unknown:
        _log.warning("not refused, because libseccomp is too old to know them: %s", ", ".join(unknown))
    return made
