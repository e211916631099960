"""System calls that a server of images has no use for, and a program planted by an image would: refused for good.

What is left to a worker that was taken over: to read what its uid may read, and to answer the kernel's questions wrongly. It cannot
create, change or remove a file, start a program or process, reach the network or another process, or make a namespace or mount.

The filter is a list of what is refused (EPERM), not of what is allowed: Python, trio and libfuse may use more calls tomorrow, and the
kernel asks for privileges, which a worker has none of, in the rest. On other processors than x86-64 and 64-bit ARM there is no filter.

Sources: seccomp(2), Linux Documentation/userspace-api/seccomp_filter.rst, include/uapi/linux/{filter,seccomp,audit}.h, the system call
tables of arch/x86 and of include/uapi/asm-generic/unistd.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Mapping

_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_RET_ALLOW = 0x7FFF_0000
_RET_ERRNO = 0x0005_0000
_LD_W_ABS, _JEQ_K, _JGE_K, _JSET_K, _RET_K = 0x20, 0x15, 0x35, 0x45, 0x06
_OFFSET_NR, _OFFSET_ARCH, _OFFSET_ARGS = 0, 4, 16  # struct seccomp_data; arguments of 8 bytes, low half first
_X32_BIT = 0x4000_0000
_CLONE_THREAD = 0x0001_0000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_ARCHITECTURES = {"x86_64": (0xC000_003E, 0), "aarch64": (0xC000_00B7, 1)}
"""Machine: AUDIT_ARCH_* and the column in the tables below."""

_OFTEN = {
    "read": (0, 63),
    "writev": (20, 66),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "pread64": (17, 67),
    "preadv2": (327, 286),
    "futex": (202, 98),
}
"""Looked at first, so that serving does not pass through the whole list."""

_FOR_READING_ONLY = {"open": ((2, None), 1), "openat": ((257, 56), 2)}
"""Numbers, and which argument holds the flags."""
_FOR_THREADS_ONLY = {"clone": (56, 220)}
_MISSING = {"clone3": (435, 435), "openat2": (437, 437)}
"""Answered with ENOSYS: their callers fall back to the older calls, whose arguments a filter can see."""

_REFUSED = {
    # programs and processes
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, None), "vfork": (58, None), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "process_madvise": (440, 440), "kcmp": (312, 272), "personality": (135, 92),
    # the network, and other means to talk
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242),
    "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    # changes of files
    "creat": (85, None), "unlink": (87, None), "unlinkat": (263, 35), "rmdir": (84, None), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None), "linkat": (265, 37), "symlink": (88, None),
    "symlinkat": (266, 36), "mkdir": (83, None), "mkdirat": (258, 34), "mknod": (133, None), "mknodat": (259, 33),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None),
    "fchownat": (260, 54), "truncate": (76, 45), "ftruncate": (77, 46), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "utime": (132, None),
    "utimes": (235, None), "utimensat": (280, 88), "futimesat": (261, None),
    # namespaces and mounts
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "setns": (308, 268), "unshare": (272, 97),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442),
    # parts of the kernel with a history
    "bpf": (321, 280), "perf_event_open": (298, 241), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "fanotify_init": (300, 262), "inotify_init1": (294, 26), "quotactl": (179, 60), "acct": (163, 89),
}  # fmt: skip

_Instruction = tuple[int, int, int, int]


def program(machine: str) -> bytes:
    """Return the filter for a machine (`os.uname`), as an array of ``struct sock_filter``; empty where there is none."""
    if machine not in _ARCHITECTURES:
        return b""
    audit, column = _ARCHITECTURES[machine]

    def numbers(table: Mapping[str, tuple[int, int | None]]) -> list[int]:
        return [found for pair in table.values() if (found := pair[column]) is not None]

    allow: _Instruction = (_RET_K, 0, 0, _RET_ALLOW)
    refuse: _Instruction = (_RET_K, 0, 0, _RET_ERRNO | errno.EPERM)
    code: list[_Instruction] = [
        (_LD_W_ABS, 0, 0, _OFFSET_ARCH),
        (_JEQ_K, 1, 0, audit),
        refuse,
        (_LD_W_ABS, 0, 0, _OFFSET_NR),
    ]
    for number in numbers(_OFTEN):
        code += [(_JEQ_K, 0, 1, number), allow]
    code += [(_JGE_K, 0, 1, _X32_BIT), refuse]
    for number in numbers(_REFUSED):
        code += [(_JEQ_K, 0, 1, number), refuse]
    for number in numbers(_MISSING):
        code += [(_JEQ_K, 0, 1, number), (_RET_K, 0, 0, _RET_ERRNO | errno.ENOSYS)]
    for pair, argument in _FOR_READING_ONLY.values():
        if (opening := pair[column]) is not None:
            code += [
                (_JEQ_K, 0, 4, opening),
                (_LD_W_ABS, 0, 0, _OFFSET_ARGS + 8 * argument),
                (_JSET_K, 0, 1, _WRITING),
                refuse,
                allow,
            ]
    for number in numbers(_FOR_THREADS_ONLY):
        code += [
            (_JEQ_K, 0, 4, number),
            (_LD_W_ABS, 0, 0, _OFFSET_ARGS),
            (_JSET_K, 1, 0, _CLONE_THREAD),
            refuse,
            allow,
        ]
    code.append(allow)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def restrict() -> bool:
    """Install the filter in the calling process, which has one thread and ``no_new_privs``; False where there is none for its processor.

    Raises `OSError`: EINVAL when the kernel was built without seccomp filters.
    """
    code = program(os.uname().machine)
    if not code:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = _Program(len(code) // 8, code)
    if libc.prctl(
        _PR_SET_SECCOMP,
        ctypes.c_ulong(_SECCOMP_MODE_FILTER),
        ctypes.byref(arguments),
        ctypes.c_ulong(0),
        ctypes.c_ulong(0),
    ):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "prctl PR_SET_SECCOMP")
    return True
