"""The FUSE kernel protocol for a read-only tree: bytes in, values and bytes out, no I/O.

`negotiate` answers INIT, `request` parses what the kernel asks, `reply` builds what it gets; `Source` is where image bytes come from and
`Missing` what a source says of bytes that are not there yet.

Source: Linux include/uapi/linux/fuse.h (protocol 7.34 to 7.45) for the layouts, fs/fuse/dev.c for what the kernel refuses.
"""

from uenvd.fuse.protocol.init import Negotiated, is_init, negotiate
from uenvd.fuse.protocol.reply import root_attributes_reply
from uenvd.fuse.protocol.request import Opcode
from uenvd.fuse.protocol.source import Missing, Source

__all__ = ["Missing", "Negotiated", "Opcode", "Source", "is_init", "negotiate", "root_attributes_reply"]
