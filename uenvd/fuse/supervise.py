"""``python -m uenvd.fuse.supervise N``: become the supervisor of one image.

Waits on the socket N for its `Duty` (`uenvd.handover` is the contract), opens a user's own file with that user's rights, confines itself,
and then is a `uenvd.fuse.supervisor.Supervisor`. Started long before it is needed, with everything loaded that workers need: they share it.

A successor of processes that were all killed opens the very same file again or none: those who use it must never get other bytes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import mmap
import socket
import sys

from uenvd import mounts
from uenvd.errors import InternalError, ProtocolError, StorageError, UenvError
from uenvd.fuse.bounds import data_limit_bytes
from uenvd.fuse.confine import acting_as, confine
from uenvd.fuse.daemons import group
from uenvd.fuse.opening import LATE_MODULES, identity_of, open_again, open_image
from uenvd.fuse.protocol import Negotiated
from uenvd.fuse.seccomp import Policy
from uenvd.fuse.shared import SharedBlocks
from uenvd.fuse.slots import Slots
from uenvd.fuse.supervisor import Supervisor, slot_count
from uenvd.fuse.workforce import SHARED_FRACTION
from uenvd.handover import Duty, Message, WorkerReport, receive_message, send_message

_log = logging.getLogger("uenvd-fs")


def _begin(channel: socket.socket) -> Supervisor | None:
    """Wait for the duty and confine this process; None when there is nothing to do. Raises errors of the tree."""
    received = receive_message(channel)
    if received is None:
        return None
    message, descriptors = received
    named = group(message, descriptors)
    if message.op != "begin" or "fuse" not in named:
        raise ProtocolError("a supervisor begins with its duty and the fuse descriptor")
    duty = Duty.from_wire(message.fields.get("duty", {}))
    if "slots" not in named:
        named["slots"] = [Slots.new_memory(slot_count(duty.workers))]
    agreed = message.fields.get("negotiated")
    negotiated = None if agreed is None else Negotiated.from_wire(agreed)
    namespace = named.pop("mntns", [None])[0]
    known = message.fields.get("file")
    file = None if known is None else tuple(map(int, known))
    refused: UenvError | None = None
    if duty.path is not None:
        if namespace is not None:
            mounts.setns(namespace, mounts.CLONE_NEWNS)
            namespace = None
        try:
            image = _open_file(duty, file)
        except StorageError as error:
            if negotiated is None:
                raise
            _log.warning("%s: %s", duty.label, error)
            return None  # its users wait: the daemon starts another process, ever more seldom
        except UenvError as error:
            if negotiated is None:
                raise
            refused = error
        else:
            named["image"] = [image]
            file = identity_of(image)
    shared = SharedBlocks.create(max(int(duty.cache_bytes * SHARED_FRACTION), mmap.PAGESIZE))
    kept = {one for those in named.values() for one in those}
    confine(
        mount_namespace_fd=namespace,
        uid=duty.uid,
        gid=duty.gid,
        groups=duty.groups,
        keep=frozenset({channel.fileno(), shared.fd, *kept}),
        cache_bytes=duty.cache_bytes,
        data_bytes=data_limit_bytes(duty.cache_bytes),
        policy=Policy.SUPERVISOR,
    )
    channel.setblocking(False)
    lost = bool(message.fields.get("slots_lost"))
    return Supervisor(duty, named, negotiated, shared, channel, slots_lost=lost, file=file, refused=refused)


def _open_file(duty: Duty, known: tuple[int, ...] | None) -> int:
    """Open a user's own file with his rights; if it is ``known`` it has to be that one still. Raises errors of the tree."""
    assert duty.path is not None
    with contextlib.ExitStack() as stack:
        if duty.reader is not None:
            stack.enter_context(acting_as(*duty.reader))
        return open_image(duty.path) if known is None else open_again(duty.path, known)


def supervise(channel: socket.socket) -> int:
    """Be a supervisor; return the exit status."""
    for module in LATE_MODULES:
        with contextlib.suppress(ImportError):  # images that need it say so; the others do not
            importlib.import_module(module)
    gc.collect()
    gc.freeze()
    try:
        try:
            supervisor = _begin(channel)
        except UenvError:
            raise
        except OSError as error:
            raise StorageError(f"the supervisor cannot start: {error.strerror}") from error
        except Exception as error:
            _log.exception("the supervisor cannot start")
            raise InternalError(f"the supervisor cannot start: {type(error).__name__}: {error}") from error
    except UenvError as error:
        report = Message("report", {"report": json.loads(WorkerReport(error=error).encode())})
        with contextlib.suppress(OSError):
            send_message(channel, report)
        return 1
    if supervisor is not None:
        supervisor.run()
    return 0


def main(argv: list[str]) -> int:
    """``argv``: program, number of the socket."""
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    with socket.socket(fileno=int(argv[1])) as channel:
        return supervise(channel)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
