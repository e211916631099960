"""``uenvd-fs IMAGE MOUNTPOINT``: mount and serve an image without daemon, a drop-in for ``squashfuse_ll``.

As root the mount is made directly, as an ordinary user through fusermount3; libfuse does either. The image is shown as it is (device nodes
and setuid bits too: whether they work is decided by the mount's ``dev`` and ``suid``, which are off unless root asks).
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from uenvd import __version__, mounts
from uenvd.errors import InternalError, MountPointError, ResourceMissing, UenvError, UsageError, WorkerFailed
from uenvd.fuse import crew
from uenvd.fuse.confine import capability_sets
from uenvd.fuse.opening import open_image, open_tree
from uenvd.fuse.shared import SharedBlocks
from uenvd.mounts import FUSE_SUBTYPE

USAGE = """\
usage: uenvd-fs IMAGE MOUNTPOINT [-f] [-o OPTION[,OPTION]...]

Serve a squashfs image at a directory. Ends when it is unmounted: fusermount3 -u MOUNTPOINT

  -f            stay in the foreground; SIGINT, SIGTERM and SIGHUP unmount
  -o OPTION     allow_other    other users may enter, as the permission bits say
                offset=BYTES   where in the file the image begins
                cache=MIB      bound of decoded blocks kept in memory (default 64)
                transport=channel|pyfuse3    how to speak with the kernel (default: channel where one may mount)
                workers=N      processes that serve (channel only; default: one a core, at most 2)
                dev, suid      device nodes and setuid bits take effect (root only)
                nodev, nosuid, exec, noexec, fsname=NAME    as for mount(8)
                ro, default_permissions    always so
  -h, --help    this text
  -V, --version
"""

MAX_WORKERS = 64
_CAP_SYS_ADMIN = 21
_FLAGS = frozenset({"allow_other", "dev", "nodev", "suid", "nosuid", "exec", "noexec"})
_IMPLIED = frozenset({"ro", "default_permissions"})
_UID_MAP = Path("/proc/self/uid_map")


@dataclass
class Command:
    """A parsed command line."""

    image: str
    mountpoint: str
    foreground: bool = False
    offset_bytes: int = 0
    cache_bytes: int = 64 << 20
    fsname: str | None = None
    transport: str = "auto"
    workers: int = 0
    """0: one a core, at most 2."""
    flags: set[str] = field(default_factory=set)


def parse(arguments: list[str]) -> Command:
    """Parse the command line. Raises `UsageError`."""
    words: list[str] = []
    options: list[str] = []
    foreground = False
    rest = iter(arguments)
    for word in rest:
        if word == "--":
            words.extend(rest)
        elif word == "-f":
            foreground = True
        elif word == "-o":
            value = next(rest, None)
            if value is None:
                raise UsageError("-o needs an option", hint="see: uenvd-fs --help")
            options.extend(value.split(","))
        elif word.startswith("-o"):
            options.extend(word[2:].split(","))
        elif word.startswith("-") and word != "-":
            raise UsageError(f"unknown option {word}", hint="see: uenvd-fs --help")
        else:
            words.append(word)
    if len(words) != 2:
        raise UsageError(
            f"an image and a mount point are needed, {len(words)} given", hint="see: uenvd-fs --help"
        )
    command = Command(words[0], words[1], foreground)
    for option in filter(None, options):
        _apply(command, option)
    if command.workers and command.transport == "pyfuse3":
        raise UsageError("workers= is for transport=channel", hint="leave one of them out")
    return command


def _apply(command: Command, option: str) -> None:
    key, equals, value = option.partition("=")
    if not equals and key in _FLAGS:
        # As for mount(8): of two that contradict each other the last counts.
        command.flags.discard(key.removeprefix("no") if key.startswith("no") else f"no{key}")
        command.flags.add(key)
    elif key in ("offset", "cache") and value.isascii() and value.isdecimal() and len(value) < 16:
        if key == "offset":
            command.offset_bytes = int(value)
        else:
            command.cache_bytes = int(value) << 20
    elif key == "transport" and value in ("auto", "channel", "pyfuse3"):
        command.transport = value
    elif key == "workers" and value in map(str, range(1, MAX_WORKERS + 1)):
        command.workers = int(value)
    elif key == "fsname" and value:
        command.fsname = value
    elif equals or key not in _IMPLIED:
        raise UsageError(f"unknown mount option {option!r}", hint="see: uenvd-fs --help")


def require_effect(command: Command) -> None:
    """Refuse options that would do nothing for who runs this. Raises `UsageError`."""
    if command.workers and command.transport == "auto" and not _may_mount():
        raise UsageError(
            "workers= needs transport=channel, and that the right to mount",
            hint="leave it out, or run as root or in a user namespace: unshare -rm",
        )
    for option in sorted(command.flags & {"dev", "suid"}):
        if os.geteuid() != 0:
            raise UsageError(f"{option} takes effect only for root", hint=f"leave it out: no{option} holds")
    # A file system that is mounted in another user namespace has no device nodes (SB_I_NODEV, fs/super.c).
    if "dev" in command.flags and _UID_MAP.read_text().split() != ["0", "0", "4294967295"]:
        raise UsageError(
            "dev takes effect only for root of the machine, not of a user namespace", hint="leave it out"
        )


def _check_mountpoint(path: str) -> None:
    try:
        if not Path(path).is_dir():
            kind = "is not a directory" if os.path.lexists(path) else "does not exist"
            raise MountPointError(f"the mount point {path} {kind}", hint="make an empty directory for it")
    except PermissionError as error:
        raise MountPointError(f"the mount point {path} cannot be reached: {error.strerror}") from error


def _check_fuse() -> None:
    if not Path("/dev/fuse").exists():
        raise ResourceMissing("there is no /dev/fuse", hint="load the kernel module: modprobe fuse")
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise ResourceMissing("fusermount3 is not installed", hint="install the package fuse3")


def _libfuse_options(command: Command) -> set[str]:
    name = command.fsname or os.path.abspath(command.image)  # noqa: PTH100 - what was typed, links and all
    shown = os.fsencode(name).decode("ascii", "backslashreplace").replace("\\", "\\\\").replace(",", "\\,")
    return {"ro", "default_permissions", f"subtype={FUSE_SUBTYPE}", f"fsname={shown}", *command.flags}


def run(arguments: list[str]) -> int:
    """Run the command; return the exit status. Errors go to stderr in the words of the error tree."""
    if arguments in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if arguments in (["-V"], ["--version"]):
        print(f"uenvd-fs {__version__}")
        return 0
    try:
        return _mount(parse(arguments))
    except UenvError as error:
        print(f"uenvd-fs: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_status


def _mount(command: Command) -> int:
    require_effect(command)
    _check_mountpoint(command.mountpoint)
    image = open_image(command.image)
    if command.transport == "channel" or (command.transport == "auto" and _may_mount()):
        return _serve_channel(command, image)
    _check_fuse()
    return _serve_pyfuse3(command, image)


def _may_mount() -> bool:
    """Tell whether this process has CAP_SYS_ADMIN."""
    return bool(capability_sets()[0] >> _CAP_SYS_ADMIN & 1)


def _attributes(flags: set[str]) -> int:
    """Return the MOUNT_ATTR_* bits for mount options."""
    bits = mounts.MOUNT_ATTR_RDONLY
    bits |= 0 if "suid" in flags else mounts.MOUNT_ATTR_NOSUID
    bits |= 0 if "dev" in flags else mounts.MOUNT_ATTR_NODEV
    return bits | (mounts.MOUNT_ATTR_NOEXEC if "noexec" in flags else 0)


def _serve_channel(command: Command, image: int) -> int:
    tree = open_tree(
        image,
        command.image,
        mask_privileged=False,
        cache_bytes=command.cache_bytes,
        offset_bytes=command.offset_bytes,
        shared=SharedBlocks.create(command.cache_bytes // 2),
    )
    plan = crew.Plan(
        mountpoint=os.path.abspath(command.mountpoint),  # noqa: PTH100 - the directory is left
        source=command.fsname or os.path.abspath(command.image),  # noqa: PTH100 - what was typed, links and all
        workers=command.workers or min(2, len(os.sched_getaffinity(0))),
        attributes=_attributes(command.flags),
        allow_other="allow_other" in command.flags,
    )
    fuse_fd, negotiated = crew.mount(plan)
    if not command.foreground:
        if os.fork() != 0:
            os._exit(0)
        _detach()
    crew.Crew(plan, tree, fuse_fd, negotiated).serve()
    return 0


def _serve_pyfuse3(command: Command, image: int) -> int:
    # With trio: a tenth of a second and some MiB, which the channel does without.
    import pyfuse3

    from uenvd.fuse.faults import Faults
    from uenvd.fuse.libfuse import serve_session, session
    from uenvd.fuse.pyfuse3_ops import Operations

    tree = open_tree(
        image,
        command.image,
        mask_privileged=False,
        cache_bytes=command.cache_bytes,
        offset_bytes=command.offset_bytes,
    )
    ready_read, ready_write = os.pipe()

    def serving() -> None:
        os.write(ready_write, b"+")
        os.close(ready_write)

    operations = Operations(tree, Faults(command.image), None if command.foreground else serving)
    session(operations, command.mountpoint, _libfuse_options(command))
    if command.foreground:
        os.close(ready_read)
        os.close(ready_write)
    elif os.fork() != 0:
        os.close(ready_write)
        served = os.read(ready_read, 1)
        os._exit(0 if served else WorkerFailed.exit_status)
    else:
        os.close(ready_read)
        _detach()
    try:
        serve_session(terminate_on_signal=True)
    except Exception as error:
        raise InternalError(f"serving {command.image} ended: {error}") from error
    finally:
        pyfuse3.close(unmount=True)
    return 0


def _detach() -> None:
    """Leave the terminal and the caller's directory, as a daemon does. stderr is kept until now for libfuse's words."""
    os.setsid()
    os.chdir("/")
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    if null > 2:
        os.close(null)
