"""The system calls that processes which serve images may make: a list of what is allowed, for each kind; all else is refused for good.

A worker that was taken over by a hostile image can read the image, answer the kernel's questions wrongly, and end. It cannot open, create
or change a file, start a program or process, reach the network or another process, make code executable, or make a namespace or mount.

Refused is EPERM, not death: what a new libc tries and can do without (a cache of the processor's layout, the time zone) must not end the
mounts of a whole node. ``UENVD_SECCOMP=kill`` in the environment makes it death, for tests: so that a call which the list lacks is found.

A supervisor's filter holds in its workers too, which add theirs: the list of a supervisor includes that of a worker.

Sources: seccomp(2), seccomp_rule_add(3), seccomp_attr_set(3), clone(2), syscalls(2).
"""

from __future__ import annotations

import enum
import errno
import logging
import mmap
import os

_why_not = ""
try:
    import pyseccomp
except (ImportError, OSError, RuntimeError, AttributeError) as error:  # libseccomp is missing, or very old
    pyseccomp = None
    _why_not = str(error)

_log = logging.getLogger("uenvd-fs")


class Policy(enum.Enum):
    """Kinds of processes."""

    WORKER = "worker"
    """Serves through the channel: reads requests and an image that are open already."""
    SESSION = "session"
    """Serves through libfuse and trio."""
    SUPERVISOR = "supervisor"
    """Starts workers and ends them, speaks with the daemon."""


_RUNTIME = """
    read readv pread64 preadv preadv2 write writev close fstat lseek fadvise64 readahead
    munmap mremap madvise brk
    futex futex_waitv sched_yield nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time
    rt_sigaction rt_sigprocmask rt_sigreturn sigreturn sigaltstack restart_syscall
    getpid gettid getppid getuid geteuid getgid getegid getresuid getresgid getgroups getpgid getpgrp getsid
    sched_getaffinity getcpu getrandom getrusage sysinfo uname getrlimit
    exit exit_group set_robust_list rseq set_tid_address arch_prctl membarrier
    setitimer getitimer alarm
    poll ppoll select pselect6 fcntl
    sendto recvfrom"""
"""What Python and its threads need, and to use descriptors that are open. (Sockets: what one process has of a pair.)"""

_ALLOWED = {
    Policy.WORKER: _RUNTIME,
    Policy.SESSION: _RUNTIME
    + """
    epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd2 pipe2 socketpair
    sendmsg recvmsg getsockopt setsockopt getsockname shutdown
    splice vmsplice tee dup dup2 dup3 newfstatat stat lstat""",
    Policy.SUPERVISOR: _RUNTIME
    + """
    wait4 waitid pidfd_open pidfd_send_signal getpriority setpriority
    accept4 socketpair pipe2 sendmsg recvmsg getsockopt setsockopt getsockname getpeername shutdown
    newfstatat stat lstat getdents64 seccomp""",
}
_ABSENT = "clone3 openat2 statx faccessat2 close_range"
"""Answered with ENOSYS: their callers fall back to older calls, whose arguments a filter can see."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | (os.O_TMPFILE & ~os.O_DIRECTORY)
_CLONE_THREAD = 0x0001_0000
_CLONE_NEW_NAMESPACES = 0x7E02_0080
_IOCTLS = (0x5421, 0x5450, 0x5451, 0x5401)  # FIONBIO, FIONCLEX, FIOCLEX, TCGETS
_PRCTL_RUNTIME = (15, 0x5356_4D41)  # PR_SET_NAME, PR_SET_VMA
_PRCTL_SUPERVISOR = (1, 4, 22, 38)  # PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS
_AT_EMPTY_PATH = 0x1000
_UNKNOWN = -1
"""The number of a name that is in no table of libseccomp; calls that this processor does not have get others below zero."""


def restrict(policy: Policy = Policy.SESSION) -> bool:
    """Install the filter in the calling process, which must have one thread; the process gets ``no_new_privs`` too.

    Returns:
        Whether it is in force. If it is not (no libseccomp, a kernel without filters), or lacks a call, the log says so.

    """
    if pyseccomp is None:
        _log.warning("system calls are not restricted: %s", _why_not)
        return False
    try:
        _filter(policy).load()
    except OSError as error:
        _log.warning("system calls are not restricted: libseccomp: %s", error.strerror)
        return False
    return True


def _filter(policy: Policy) -> pyseccomp.SyscallFilter:
    """Return the filter for this processor, not yet in force. Raises `OSError`."""
    refuse, absent = pyseccomp.ERRNO(errno.EPERM), pyseccomp.ERRNO(errno.ENOSYS)
    deadly = os.environ.get("UENVD_SECCOMP") == "kill"
    made = pyseccomp.SyscallFilter(pyseccomp.KILL_PROCESS if deadly else refuse)
    made.set_attr(pyseccomp.Attr.ACT_BADARCH, refuse)
    unknown = []
    for action, names in ((pyseccomp.ALLOW, _ALLOWED[policy]), (absent, _ABSENT)):
        for name in names.split():
            number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
            if number == _UNKNOWN:
                unknown.append(name)
            else:
                made.add_rule(action, number)
    if deadly and policy is Policy.SESSION:
        made.add_rule(refuse, "openat")  # libfuse tries /dev/null, and does without
    _add_conditional(made, policy)
    if unknown:
        _log.warning("not allowed, because libseccomp is too old to know them: %s", ", ".join(unknown))
    return made


def _add_conditional(made: pyseccomp.SyscallFilter, policy: Policy) -> None:
    """Allow the calls that depend on their arguments."""

    def allow_masked(name: str, argument: int, mask: int, value: int) -> None:
        made.add_rule(pyseccomp.ALLOW, name, pyseccomp.Arg(argument, pyseccomp.MASKED_EQ, mask, value))

    clone_flags = (
        1 if os.uname().machine.startswith("s390") else 0
    )  # clone(2), "C library/kernel differences"
    allow_masked("clone", clone_flags, _CLONE_THREAD, _CLONE_THREAD)
    for name in ("mmap", "mprotect"):
        allow_masked(name, 2, mmap.PROT_EXEC, 0)
    made.add_rule(pyseccomp.ALLOW, "prlimit64", pyseccomp.Arg(2, pyseccomp.EQ, 0))
    for request in _IOCTLS:
        made.add_rule(pyseccomp.ALLOW, "ioctl", pyseccomp.Arg(1, pyseccomp.EQ, request))
    for option in _PRCTL_RUNTIME + (_PRCTL_SUPERVISOR if policy is Policy.SUPERVISOR else ()):
        made.add_rule(pyseccomp.ALLOW, "prctl", pyseccomp.Arg(0, pyseccomp.EQ, option))
    if policy is not Policy.SESSION:
        made.add_rule(pyseccomp.ALLOW, "sched_setaffinity", pyseccomp.Arg(0, pyseccomp.EQ, 0))  # its own
    if policy is Policy.WORKER:
        allow_masked("newfstatat", 3, _AT_EMPTY_PATH, _AT_EMPTY_PATH)  # fstat(3) of newer libcs
    if policy is Policy.SUPERVISOR:
        allow_masked("clone", clone_flags, _CLONE_THREAD | _CLONE_NEW_NAMESPACES, 0)
        allow_masked("openat", 2, _WRITING, 0)
        allow_masked("open", 1, _WRITING, 0)
