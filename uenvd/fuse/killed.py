"""Requests of processes that are being killed, while what they ask for is still on its way.

Who waits for a page of a mapped file waits in the kernel for the reply to his request, and no signal ends that once the request has been read
(``request_wait_answer`` in fs/fuse/dev.c); until the bytes come, or the deadline of lazy starts, such a process cannot be ended, and Slurm may
drain the node. INTERRUPT says that *some* signal came; EINTR for a page fault is SIGBUS, so only a signal that kills may be answered. It is
seen in proc_pid_status(5): the kernel turns each fatal signal into a pending SIGKILL of every thread (``complete_signal`` in kernel/signal.c).

The supervisor answers, and so does the daemon, who also sees processes that are hidden from others (``hidepid``); that the worker answers
again later does no harm (`uenvd.fuse.channel`).
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from uenvd.fuse.protocol import reply as r
from uenvd.fuse.protocol.request import HEADER
from uenvd.fuse.slots import Slot

LOOK_S: Final = 0.5
_KILL: Final = 1 << (signal.SIGKILL - 1)
_PENDING: Final = ("SigPnd:", "ShdPnd:")


def is_being_killed(status: str) -> bool:
    """Tell from a thread's ``/proc/PID/status`` whether it will end as soon as it can."""
    pending = 0
    for line in status.splitlines():
        if line.startswith(_PENDING):
            with suppress(ValueError, IndexError):
                pending |= int(line.split()[1], 16)
    return bool(pending & _KILL)


def release_killed(slots: Iterable[Slot], fuse_fd: int) -> int:
    """Answer EINTR to the requests that wait for bytes and whose askers are being killed; return how many.

    A slot belongs to a worker: what is read of it counts only if it holds the same request afterwards.
    """
    released = 0
    for slot in slots:
        unique = slot.unique
        if not unique or not slot.parked:
            continue
        _length, _opcode, _unique, _node, _uid, _gid, pid, *_rest = HEADER.unpack_from(slot.buffer)
        with suppress(OSError):
            if is_being_killed(Path(f"/proc/{pid}/status").read_text()) and slot.unique == unique:
                os.write(fuse_fd, r.refusal(unique, errno.EINTR))
                released += 1
    return released
