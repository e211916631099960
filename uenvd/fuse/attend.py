"""What can be answered before the image is there: INIT, and what its root looks like; all else waits, in its slot.

So a job step may stand in a directory whose image is still being pulled (``srun -D /user-environment``). Who waits for more can be
killed: the request that the kernel interrupts is answered with EINTR (one that was read and is never answered makes its asker unkillable).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable

from uenvd.fuse.protocol import Opcode, root_attributes_reply
from uenvd.fuse.protocol import reply as r
from uenvd.fuse.protocol import request as q
from uenvd.fuse.slots import Slot
from uenvd.fuse.tree import ROOT_INO

_INTERRUPTED = struct.Struct("=Q")  # struct fuse_interrupt_in


def attend(slot: Slot, all_slots: Iterable[Slot]) -> list[bytes]:
    """Return the replies that the request in a slot gives rise to. The slot stays busy if the request has to wait, else it is cleared.

    ``all_slots`` are looked through for the request that an INTERRUPT is about; that one's slot is cleared too.
    """
    header = q.Header._make(q.HEADER.unpack_from(slot.buffer))
    replies: list[bytes] = []
    if header.opcode == Opcode.GETATTR and header.nodeid == ROOT_INO:
        replies = [root_attributes_reply(header.unique)]
    elif header.opcode == Opcode.INTERRUPT:
        unique = _INTERRUPTED.unpack_from(slot.buffer, q.HEADER_BYTES)[0]
        for other in all_slots:
            if other is not slot and other.unique == unique:
                replies.append(r.refusal(unique, errno.EINTR))
                other.clear()
    elif header.opcode == Opcode.DESTROY:
        replies = [r.answer(header.unique, b"")]
    elif header.opcode not in q.UNANSWERED:
        return []
    slot.clear()
    return replies
