"""Who is at the other end of a control connection, from the kernel alone."""

from __future__ import annotations

import os
import pwd
import socket
import struct
from dataclasses import dataclass
from typing import Final, Protocol

from uenvd.errors import AccessDenied

SO_PEERGROUPS: Final = 59  # include/uapi/asm-generic/socket.h
_UCRED: Final = struct.Struct("iII")  # struct ucred of unix(7): pid, uid, gid
_MAX_GROUPS: Final = 65536  # NGROUPS_MAX, include/uapi/linux/limits.h


@dataclass(frozen=True, slots=True)
class Identity:
    """Credentials of a user: those of the peer, or of the job's user when root speaks for him."""

    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that connected."""

    pid: int
    identity: Identity

    @property
    def is_root(self) -> bool:
        """Whether the peer may speak for others."""
        return self.identity.uid == 0


class _Socket(Protocol):
    def getsockopt(self, level: int, option: int, size: int, /) -> bytes: ...


def peer_of(sock: _Socket) -> Peer:
    """Ask the kernel who connected. Raises OSError."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 4 * 256)
    if len(raw) == 4 * 256:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 4 * _MAX_GROUPS)
    groups = struct.unpack(f"={len(raw) // 4}I", raw)
    return Peer(pid, Identity(uid, gid, groups))


def identity_of(uid: int) -> Identity:
    """Look a user up in the system's database (blocking: may ask LDAP). Raises `AccessDenied` for an unknown uid."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        raise AccessDenied(f"this node knows no user with uid {uid}") from None
    return Identity(uid, entry.pw_gid, tuple(os.getgrouplist(entry.pw_name, entry.pw_gid)))
