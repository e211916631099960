"""The cloner: a process that copies the daemon's mounts with their flags locked.

A detached mount whose flags are not locked can be made read-write, suid and dev again by whoever attaches it in a user namespace of his
own. The kernel locks the flags of a mount that *propagates* into a namespace of another user namespace (fs/namespace.c, lock_mnt_tree),
and a clone made there keeps them locked. So the daemon mounts below a shared directory in its namespace (`uenvd.mounts.PrivateMounts`),
this process lives in a user and mount namespace of its own below that, and all clones that are handed out are made here.

``python -m uenvd.daemon.cloner FD DIRECTORY`` speaks on the ``SOCK_SEQPACKET`` socket FD: first it says ``ready`` or ``E<errno>``; then
each datagram it gets is a name below DIRECTORY and is answered with ``ok`` and a descriptor, or ``E<errno>``. It ends at EOF.
It has no uid map and so no identity, no capability outside its namespace, and never touches a file below a mount.
"""

from __future__ import annotations

import array
import errno
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING

from uenvd import mounts
from uenvd.errors import MountFailed

if TYPE_CHECKING:
    import subprocess

_MAX_MESSAGE_BYTES = 256
START_DEADLINE_S = 10.0
CLONE_DEADLINE_S = 5.0


def serve(channel: socket.socket, directory: bytes) -> None:
    """Answer requests until EOF."""
    while name := channel.recv(_MAX_MESSAGE_BYTES):
        try:
            if not mounts.valid_name(name):
                raise OSError(errno.EINVAL, "no name")
            clone = mounts.open_tree_clone(directory + b"/" + name)
        except OSError as error:
            channel.send(b"E%d" % (error.errno or errno.EIO))
            continue
        try:
            socket.send_fds(channel, [b"ok"], [clone])
        finally:
            os.close(clone)


def main(argv: list[str]) -> int:
    """Enter the namespaces and serve. ``argv``: program, descriptor, directory."""
    # The daemon's shutdown, not a Ctrl-C at its terminal, ends the cloner: through EOF.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(argv[1])) as channel:
        try:
            try:
                mounts.unshare(mounts.CLONE_NEWUSER | mounts.CLONE_NEWNS)
                os.chdir("/")
            except OSError as error:
                channel.send(b"E%d" % (error.errno or errno.EIO))
                return 1
            channel.send(b"ready")
            serve(channel, os.fsencode(argv[2]))
        except (BrokenPipeError, ConnectionResetError):
            pass  # the daemon went away in the middle of an exchange
    return 0


# -- the daemon's side ----------------------------------------------------------------------------------------------------------------


def start_cloner(directory: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a cloner of the mounts below ``directory`` in the caller's mount namespace; return it and the daemon's end.

    Blocks until the cloner is ready, at most `START_DEADLINE_S`. Closing the socket ends the process, which the caller reaps.
    Raises `MountFailed`.
    """
    import subprocess  # the cloner itself does without

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process: subprocess.Popen[bytes] | None = None
    try:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "uenvd.daemon.cloner", str(theirs.fileno()), directory],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        ours.settimeout(START_DEADLINE_S)
        answer = ours.recv(_MAX_MESSAGE_BYTES)
        if answer != b"ready":
            raise MountFailed(
                f"the cloner cannot start: {_reason(answer)}",
                hint="are user namespaces enabled (user.max_user_namespaces)?",
            )
    except BaseException as error:
        ours.close()
        if process is not None:
            process.kill()
            process.wait()
        if isinstance(error, OSError):
            raise MountFailed(f"the cloner cannot start: {error.strerror or 'it does not answer'}") from error
        raise
    return process, ours


def request_clone(channel: socket.socket, name: str) -> int:
    """Return a descriptor of a new detached, locked clone of the mount ``name``; blocks at most `CLONE_DEADLINE_S`.

    One exchange at a time on a channel (after an error other than the cloner's own answer the channel is closed: an answer that comes
    late must not be taken for that of the next request). Raises `MountFailed`.
    """
    try:
        channel.settimeout(CLONE_DEADLINE_S)
        channel.send(os.fsencode(name))
        answer, descriptors = _receive(channel)
    except OSError as error:
        channel.close()
        raise MountFailed(f"the cloner does not answer: {error.strerror or 'timed out'}") from error
    if answer == b"ok" and len(descriptors) == 1:
        return descriptors[0]
    for descriptor in descriptors:
        os.close(descriptor)
    raise MountFailed(f"cannot clone the mount {name}: {_reason(answer)}")


def _receive(channel: socket.socket) -> tuple[bytes, list[int]]:
    """Return a datagram and the descriptors that came with it, close-on-exec (`socket.recv_fds` drops the flag that says so)."""
    descriptors = array.array("i")
    answer, control, _flags, _address = channel.recvmsg(
        _MAX_MESSAGE_BYTES, socket.CMSG_LEN(descriptors.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    return answer, descriptors.tolist()


def _reason(answer: bytes) -> str:
    if not answer:
        return "it ended"
    if answer == b"ok":
        return "its answer came without a descriptor (too many open files?)"
    text = answer.decode(errors="replace")
    return os.strerror(int(text[1:])) if text[:1] == "E" and text[1:].isdecimal() else "it talks nonsense"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
