"""Mounts as descriptors, namespaces and id maps: the system calls that Python 3.11 lacks, typed.

Two layers. The *thin* functions are one system call each and raise `OSError` with the kernel's errno, ``filename`` being what the call
was about; callers that can say something better (a missing mount point) catch it. The *composite* functions (`fuse_mount`, `map_self`,
`write_id_maps`, `PrivateMounts`) raise `MountFailed` and nothing else. No call needs a kernel newer than 5.14, none blocks on a FUSE
server, and every descriptor returned here is close-on-exec and belongs to the caller.

Sources: fsopen(2), fsconfig(2), fsmount(2), open_tree(2), move_mount(2), mount_setattr(2), mount_namespaces(7), user_namespaces(7);
kernel fs/fuse/inode.c (mount options), fs/namespace.c (lock_mnt_tree: which flags a propagated mount gets locked).

No pathlib here: uenvctl imports this module on its fast path, and pathlib is a tenth of its start.

``unshare`` and ``setns`` of a mount namespace act on the calling *thread*: call them before any other thread exists.
"""

# ruff: noqa: PTH100, PTH102, PTH103, PTH106, PTH123
from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from uenvd.errors import MountFailed, ResourceMissing

CLONE_NEWNS = 0x0002_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
IMAGE_ATTRIBUTES = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
"""What every image is mounted with."""

FUSE_SUBTYPE = "uenvd"
"""The type of an image's mount reads ``fuse.uenvd`` in /proc/self/mountinfo."""

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_OPEN_TREE_CLONE = 1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 0x04
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_SLAVE, _MS_SHARED = 1 << 12, 1 << 14, 1 << 18, 1 << 19, 1 << 20

# Numbers from 424 on are the same on every architecture.
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT, _SYS_MOUNT_SETATTR = (
    428,
    429,
    430,
    431,
    432,
    442,
)

_ID_MAP_MAX_BYTES = 4095  # one write of less than a page (user_namespaces(7))
_ID_MAP_MAX_LINES = 340
_NAME_MAX_BYTES = 255

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

PathLike = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def _fail(what: str | bytes) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), what)


def _syscall(what: str | bytes, number: int, *args: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    result: int = _libc.syscall(
        ctypes.c_long(number), *(ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args)
    )
    if result < 0:
        raise _fail(what)
    return result


def _mount(
    source: bytes | None, target: PathLike, kind: bytes | None, flags: int, data: bytes | None
) -> None:
    path = os.fsencode(target)
    if _libc.mount(source, path, kind, ctypes.c_ulong(flags), data) != 0:
        raise _fail(path)


# -- thin: mounts ---------------------------------------------------------------------------------------------------------------------


def open_tree_clone(path: PathLike) -> int:
    """Return a descriptor of a detached copy of the mount at ``path`` (not of mounts below it). Raises `OSError`."""
    encoded = os.fsencode(path)
    return _syscall(encoded, _SYS_OPEN_TREE, _AT_FDCWD, encoded, _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC)


def move_mount(mount_fd: int, target: PathLike | int) -> None:
    """Attach a detached mount at a directory: a path (a symbolic link as last component is not followed) or a descriptor of it.

    Raises `OSError`: ENOENT and ENOTDIR for the target, EPERM without CAP_SYS_ADMIN over the mount namespace, EINVAL when the mount is
    attached already in another namespace.
    """
    if isinstance(target, int):
        flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
        _syscall(f"/dev/fd/{target}", _SYS_MOVE_MOUNT, mount_fd, b"", target, b"", flags)
        return
    encoded = os.fsencode(target)
    _syscall(encoded, _SYS_MOVE_MOUNT, mount_fd, b"", _AT_FDCWD, encoded, _MOVE_MOUNT_F_EMPTY_PATH)


def umount(path: PathLike, *, detach: bool = False) -> None:
    """Unmount; with ``detach`` also when busy (it goes when its last user does). Raises `OSError`."""
    encoded = os.fsencode(path)
    if _libc.umount2(encoded, ctypes.c_int(UMOUNT_NOFOLLOW | (MNT_DETACH if detach else 0))) != 0:
        raise _fail(encoded)


def make_rslave(path: PathLike = "/") -> None:
    """Let mounts of the outer namespace come in below ``path``, and none go out. Raises `OSError`."""
    _mount(None, path, None, _MS_REC | _MS_SLAVE, None)


def make_shared(path: PathLike) -> None:
    """Make the one mount at ``path`` propagate to copies of it made from now on. Raises `OSError`."""
    _mount(None, path, None, _MS_SHARED, None)


def make_private(path: PathLike) -> None:
    """End all propagation of the one mount at ``path``. Raises `OSError`."""
    _mount(None, path, None, _MS_PRIVATE, None)


def mount_tmpfs(
    path: PathLike,
    *,
    mode: int = 0o755,
    size_bytes: int = 1 << 20,
    source: str = "uenvd",
    executable: bool = False,
) -> None:
    """Mount an empty tmpfs (nosuid, nodev, noexec unless ``executable``) of at most ``size_bytes`` at ``path``. Raises `OSError`."""
    data = f"mode={mode:o},size={size_bytes}".encode()
    flags = _MS_NOSUID | _MS_NODEV | (0 if executable else _MS_NOEXEC)
    _mount(source.encode(), path, b"tmpfs", flags, data)


def mount_proc(path: PathLike) -> None:
    """Mount the processes of this PID namespace at ``path``. Raises `OSError`: EPERM where parts of /proc are hidden, as in containers."""
    _mount(b"proc", path, b"proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, None)


def bind_recursive(source: PathLike, target: PathLike) -> None:
    """Show ``source``, with all mounts below it, also at ``target``, which is of the same kind (directory or not). Raises `OSError`."""
    _mount(os.fsencode(source), target, None, _MS_BIND | _MS_REC, None)


def pivot_root(new_root: PathLike, old_root: PathLike) -> None:
    """Make the mount ``new_root`` the root of this namespace and put the former one at ``old_root`` below it. Raises `OSError`.

    Unlike chroot(2) this leaves the process free to make user namespaces (user_namespaces(7)).
    """
    if _libc.pivot_root(os.fsencode(new_root), os.fsencode(old_root)) != 0:
        raise _fail(os.fsencode(new_root))


def mount_setattr(
    target: PathLike | int, *, set_bits: int = 0, clear_bits: int = 0, recursive: bool = False
) -> None:
    """Change MOUNT_ATTR_* of the mount at a path or descriptor. Raises `OSError`: EPERM when a bit to clear is locked."""
    attributes = struct.pack("=QQQQ", set_bits, clear_bits, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    dirfd, encoded = (target, b"") if isinstance(target, int) else (_AT_FDCWD, os.fsencode(target))
    if isinstance(target, int):
        flags |= _AT_EMPTY_PATH
    _syscall(
        encoded or f"/dev/fd/{dirfd}", _SYS_MOUNT_SETATTR, dirfd, encoded, flags, attributes, len(attributes)
    )


# -- thin: namespaces -----------------------------------------------------------------------------------------------------------------


def unshare(flags: int) -> None:
    """Leave namespaces for new ones (CLONE_NEWUSER, CLONE_NEWNS). Raises `OSError`."""
    if _libc.unshare(ctypes.c_int(flags)) != 0:
        raise _fail("unshare")


def setns(namespace_fd: int, flags: int) -> None:
    """Enter the namespace of a descriptor of /proc/PID/ns/*; ``flags`` is its kind (CLONE_NEWNS, ...), or 0. Raises `OSError`."""
    if _libc.setns(ctypes.c_int(namespace_fd), ctypes.c_int(flags)) != 0:
        raise _fail("setns")


def mount_namespace(pid: int | str = "self") -> int:
    """Return a descriptor of the mount namespace of a process. Raises `OSError`."""
    return os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)


# -- composite ------------------------------------------------------------------------------------------------------------------------


def open_fuse_device() -> int:
    """Open ``/dev/fuse``: in the user namespace in which the mount is to be made, the kernel insists. Raises `ResourceMissing`."""
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ResourceMissing(
            f"cannot open /dev/fuse: {error.strerror}",
            hint="it must exist, with mode 0666: modprobe fuse; chmod 0666 /dev/fuse",
        ) from error


@contextmanager
def _explained(what: str, hint: str = "") -> Iterator[None]:
    """Turn an `OSError` into `MountFailed`."""
    try:
        yield
    except OSError as error:
        about = f" ({os.fsdecode(error.filename)})" if error.filename else ""
        raise MountFailed(f"{what}: {error.strerror}{about}", hint=hint) from error


def fuse_mount(
    fuse_fd: int,
    *,
    source: str,
    uid: int = 0,
    gid: int = 0,
    allow_other: bool = True,
    attributes: int = IMAGE_ATTRIBUTES,
) -> int:
    """Make a detached read-only FUSE mount; return its descriptor.

    The mount has no path and is in no namespace: `move_mount` attaches it, closing the last descriptor ends the FUSE connection. The
    kernel queues its requests (INIT first) until somebody reads ``fuse_fd``; nothing here waits for that.

    Args:
        fuse_fd: what `open_fuse_device` returned, opened in the caller's present user namespace.
        source: what /proc/self/mountinfo shows as source, ``uenvd:<digest or path>``.
        uid: the owner of the mount, seen from the caller's user namespace.
        gid: likewise.
        allow_other: whether other users may enter, subject to the permission bits (``default_permissions`` is always on).
        attributes: MOUNT_ATTR_* bits.

    Raises:
        MountFailed: with the kernel's own words where it gives some.

    """
    context = -1
    try:
        with _explained(
            "cannot make a FUSE mount",
            "this needs root, or a user namespace of one's own: is the fuse module loaded, are user namespaces enabled?",
        ):
            context = _syscall("fsopen", _SYS_FSOPEN, b"fuse", _FSOPEN_CLOEXEC)
        options: tuple[tuple[str, str | None], ...] = (
            ("source", source),
            ("subtype", FUSE_SUBTYPE),
            ("fd", str(fuse_fd)),
            ("rootmode", "40000"),
            ("user_id", str(uid)),
            ("group_id", str(gid)),
            ("default_permissions", None),
            ("ro", None),
            *((("allow_other", None),) if allow_other else ()),
        )
        try:
            for key, value in options:
                command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
                encoded = None if value is None else os.fsencode(value)
                _syscall(key, _SYS_FSCONFIG, context, command, key.encode(), encoded, 0)
            _syscall("create", _SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
            return _syscall("fsmount", _SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)
        except OSError as error:
            detail = _context_log(context) or f"{error.strerror} ({error.filename})"
            raise MountFailed(f"cannot make a FUSE mount for {source}: {detail}") from error
    finally:
        if context >= 0:
            os.close(context)


def _context_log(context: int) -> str:
    """Return the kernel's messages about a file system context, joined; empty when there are none."""
    lines: list[str] = []
    with suppress(OSError):  # ENODATA ends the list
        while len(lines) < 8:
            lines.append(os.read(context, 1024).decode(errors="replace").strip())
    return "; ".join(line[2:] if line[1:2] == " " else line for line in lines if line)


def map_self(uid: int, gid: int, *, shown_uid: int | None = None, shown_gid: int | None = None) -> None:
    """Map one uid and one gid, identically or to what they are shown as, in the user namespace that this process has just made.

    ``uid`` and ``gid`` are those from before `unshare`. No privilege is needed. Other groups keep their rights but show as nobody.
    Raises `MountFailed`.
    """
    with _explained(
        "cannot map the user's ids",
        "are user namespaces restricted on this machine (user.max_user_namespaces, AppArmor)?",
    ):
        directory = os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            inner_uid, inner_gid = (
                (uid if shown_uid is None else shown_uid),
                (gid if shown_gid is None else shown_gid),
            )
            _write_maps(directory, f"{inner_uid} {uid} 1\n", f"{inner_gid} {gid} 1\n")
        finally:
            os.close(directory)


def open_process(pid: int) -> int:
    """Return a descriptor of /proc/PID, which stays that of *this* process when the pid is used again. Raises `OSError`."""
    return os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def write_id_maps(proc_fd: int, uid: int, gids: Iterable[int]) -> int:
    """Write the id maps of a process that has just made a user namespace: its uid and its groups, identically; setgroups denied.

    For root in the parent user namespace. The kernel takes at most 340 ranges and less than a page of text: put the primary group
    first, what does not fit stays unmapped.

    Args:
        proc_fd: what `open_process` returned, taken while the process was known to be the right one.
        uid: the one uid to map.
        gids: the groups to map, most important first; repetitions do no harm.

    Returns:
        How many groups were mapped.

    Raises:
        MountFailed: the process is gone, made no namespace, or has its maps already.

    """
    text, count = _gid_map(gids)
    with _explained("cannot write the session's id maps"):
        _write_maps(proc_fd, f"{uid} {uid} 1\n", text)
    return count


def _gid_map(gids: Iterable[int]) -> tuple[str, int]:
    """Return the text of a gid map, one range of neighbours a line, and the number of groups in it."""
    wanted = list(dict.fromkeys(gids))
    while True:
        lines: list[list[int]] = []
        for gid in sorted(wanted):
            if lines and lines[-1][0] + lines[-1][1] == gid:
                lines[-1][1] += 1
            else:
                lines.append([gid, 1])
        text = "".join(f"{first} {first} {length}\n" for first, length in lines)
        if len(lines) <= _ID_MAP_MAX_LINES and len(text) <= _ID_MAP_MAX_BYTES:
            return text, len(wanted)
        wanted.pop()


def _write_maps(proc_fd: int, uid_map: str, gid_map: str) -> None:
    for name, text in (("setgroups", "deny"), ("uid_map", uid_map), ("gid_map", gid_map)):
        fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc_fd)
        try:
            os.write(fd, text.encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror, name) from error
        finally:
            os.close(fd)


class PrivateMounts:
    """The daemon's mounts: a mount namespace of its own, in it one shared tmpfs, below that one directory for each image.

    Nothing of it shows in the node's mount table. A process in its own user and mount namespace below this one (the cloner) receives
    each mount by propagation, with read-only, nosuid and nodev *locked*; so do its clones. `remove`, or the end of the namespace, takes
    the mount back everywhere but in clones that are in use.

    Not safe for concurrent calls with one name; calls with different names may run in threads, none waits for a FUSE server.
    """

    def __init__(self, directory: str, outer_namespace_fd: int) -> None:
        self.directory = directory
        self.outer_namespace_fd = outer_namespace_fd
        """The namespace that was left: a worker enters it (`WorkerSetup`'s ``mntns``), else it would keep its own mount alive."""

    @classmethod
    def create(cls, directory: PathLike) -> PrivateMounts:
        """Enter a private mount namespace with an empty work directory (created, mode 0755, if missing).

        Call once, early, from the only thread of the process; needs CAP_SYS_ADMIN. Raises `MountFailed`.
        """
        path = os.path.abspath(os.fsdecode(directory))
        with _explained("cannot make a private mount namespace", "uenvd has to run as root"):
            outer = mount_namespace()
            try:
                unshare(CLONE_NEWNS)
                make_rslave("/")
                os.makedirs(path, mode=0o755, exist_ok=True)
                mount_tmpfs(path)
                make_shared(path)
            except BaseException:
                os.close(outer)
                raise
        return cls(path, outer)

    def path(self, name: str) -> str:
        """Return where the image of this name is mounted. ``name``: one path component, at most 255 bytes."""
        if not valid_name(os.fsencode(name)):
            raise MountFailed(f"no valid name for a mount: {name!r}")
        return f"{self.directory}/{name}"

    def add(
        self, name: str, fuse_fd: int, *, source: str, uid: int = 0, gid: int = 0, allow_other: bool = True
    ) -> None:
        """Make the FUSE mount of ``fuse_fd`` and attach it under ``name``. Raises `MountFailed`; then nothing is left behind."""
        mount_fd = fuse_mount(fuse_fd, source=source, uid=uid, gid=gid, allow_other=allow_other)
        try:
            self.attach(name, mount_fd)
        finally:
            os.close(mount_fd)

    def attach(self, name: str, mount_fd: int) -> None:
        """Attach a detached mount under ``name``; the descriptor stays the caller's. Raises `MountFailed`; then nothing is left behind."""
        path = self.path(name)
        with _explained(f"cannot attach the mount {name}"):
            os.mkdir(path, 0o755)
            try:
                move_mount(mount_fd, path)
            except OSError:
                os.rmdir(path)
                raise

    def spares(self, name: str, count: int) -> list[int]:
        """Return ``count`` detached copies of a mount, for daemons to come; the caller closes them. Raises `MountFailed`.

        Their flags are not locked: they are for root alone.
        """
        path = self.path(name)
        made: list[int] = []
        try:
            with _explained(f"cannot clone {name}"):
                for _ in range(count):
                    made.append(open_tree_clone(path))
        except MountFailed:
            for descriptor in made:
                os.close(descriptor)
            raise
        return made

    def set_readahead(self, name: str, size_bytes: int) -> None:
        """Set how far the kernel reads ahead in files of an image; its server is not asked for anything.

        To be called after INIT, which sets it too. Raises `MountFailed`.
        """
        path = os.fsencode(self.path(name))
        with _explained(f"cannot set the read-ahead of {name}"):
            with open("/proc/self/mountinfo", "rb") as table:
                device = next((line.split()[2] for line in table if line.split()[4] == path), None)
            if device is None:
                raise FileNotFoundError(errno.ENOENT, "it is not mounted")
            with open(f"/sys/class/bdi/{device.decode()}/read_ahead_kb", "w", encoding="ascii") as file:
                file.write(str(size_bytes >> 10))

    def remove(self, name: str) -> None:
        """Let go of a mount; clones in use go on. Raises `MountFailed`; a name that is not there is no error."""
        path = self.path(name)
        with _explained(f"cannot detach {name}"), suppress(FileNotFoundError):
            with suppress(OSError):  # EINVAL: the directory is there without its mount
                umount(path, detach=True)
            os.rmdir(path)

    def close(self) -> None:
        """Detach everything and close the descriptor of the outer namespace; the process stays in its namespace."""
        with suppress(OSError):
            umount(self.directory, detach=True)
        os.close(self.outer_namespace_fd)


def valid_name(name: bytes) -> bool:
    """Tell whether ``name`` is one ordinary path component."""
    return (
        0 < len(name) <= _NAME_MAX_BYTES
        and name not in (b".", b"..")
        and b"/" not in name
        and b"\0" not in name
    )
