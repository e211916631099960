"""``uenvctl doctor``: what is wrong here, why, and what to do about it. ``--node`` is for Slurm's HealthCheckProgram."""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from uenvd import __version__, mounts
from uenvd.ctl import output
from uenvd.ctl.arguments import FLAG, parse
from uenvd.ctl.client import REGISTRY_ANSWER_S, Client, socket_path
from uenvd.ctl.session import mounted_images
from uenvd.errors import DaemonTimeout, RegistryDenied, RegistryUnreachable, UenvError

HELP = """\
usage: uenvctl doctor
       uenvctl doctor --node

Look at everything that a uenv needs and say what is wrong, why that matters and what to do. The exit status is 1 when
something is, else 0.

--node is for Slurm's HealthCheckProgram: whether this node can run jobs with a uenv. It writes one line, asks neither
the registry nor the users' files, and ends within 3 seconds, also when uenvd hangs.

  --node         one line about this node; exit status 0 or 1
  --json         {"ok": BOOL, "checks": [...]}, see docs/json.md
  --socket PATH  uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control

examples:
  uenvctl doctor
  uenvctl doctor --node || scontrol update nodename="$(hostname -s)" state=drain reason="uenvd"
"""

OPTIONS = {"--node": FLAG, "--json": FLAG}
TAKES = ()

NODE_LIMIT_S = 2.5
"""For everything that --node does."""
BASHRC_S = 10.0
DEFAULT_MOUNT_POINTS = ("/user-environment", "/user-tools")
_MARK = "/uenvctl-doctor/bin"
_ROOM_BYTES = 1_000_000
_GREEN, _YELLOW, _RED = 32, 33, 31


class Check(NamedTuple):
    """One finding. ``state`` is ``ok``, ``note`` (works, but should be known) or ``wrong``."""

    name: str
    state: str
    what: str
    why: str = ""
    do: str = ""


def main(argv: Sequence[str]) -> int:
    """Handle the command; return the exit status."""
    arguments = parse(argv, command="doctor", options=OPTIONS)
    if "--help" in arguments.flags:
        print(HELP, end="")
        return 0
    path = socket_path(arguments.values.get("--socket"), os.environ)
    is_node, is_json = "--node" in arguments.flags, "--json" in arguments.flags
    checks: list[Check] = []
    for check in node_checks(path) if is_node else user_checks(path, os.environ):
        checks.append(check)
        if not is_node and not is_json:
            _show(check)  # at once: the next one may take seconds
    wrong = [check for check in checks if check.state == "wrong"]
    if is_json:
        output.data_json({"ok": not wrong, "checks": [check._asdict() for check in checks]})
    elif is_node:
        output.data(node_line(checks))
    elif wrong:
        output.note(f"{len(wrong)} of {len(checks)} checks failed")
    return 1 if wrong else 0


def node_line(checks: Sequence[Check]) -> str:
    """Return what --node says: the first fault, or that there is none; one line."""
    wrong = [check for check in checks if check.state == "wrong"]
    if not wrong:
        return "uenvd ok: " + "; ".join(check.what for check in checks if check.name == "daemon")
    texts = [f"{check.what}: {check.do}" if check.do else check.what for check in wrong]
    return "uenvd FAIL: " + "; ".join(" ".join(text.split()) for text in texts)


def _show(check: Check) -> None:
    colour = {"ok": _GREEN, "note": _YELLOW, "wrong": _RED}[check.state]
    mark = f"{check.state:<5}"
    if output.coloured(sys.stdout):
        # Only our own sequence is unprintable; `output.data` would replace it.
        sys.stdout.write(f"\x1b[{colour}m{mark}\x1b[0m ")
        mark = ""
    else:
        mark += " "
    output.data(f"{mark}{check.name}: {check.what}")
    if check.state != "ok":
        for lead, text in (("why", check.why), ("do", check.do)):
            if text:
                output.data(f"      {lead}: {text}")
    sys.stdout.flush()


# --- what is looked at ----------------------------------------------------------------------------------------------


def node_checks(path: str) -> Iterator[Check]:
    """Yield what matters to jobs on this node; all together takes at most `NODE_LIMIT_S`."""

    def too_late(_number: int, _frame: object) -> None:
        raise DaemonTimeout(f"uenvd did not answer within {NODE_LIMIT_S:.1f} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, NODE_LIMIT_S)
    points: Sequence[str] = DEFAULT_MOUNT_POINTS
    try:
        checks, status = _daemon(path)
        points = _mount_points(status)
    except DaemonTimeout as error:
        checks = [_failed("daemon", error)]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    yield from checks
    yield fuse_device(for_users=False)
    yield from mount_points(points)


def user_checks(path: str, environ: Mapping[str, str]) -> Iterator[Check]:
    """Yield everything that a session or a job of this user needs, the daemon first."""
    inside = mounted_images()
    if inside:
        what = ", ".join(f"{one.source} at {one.mount}" for one in inside)
        yield Check(
            "session", "note", f"you are in one: {what}", "some of the checks below see its namespace", ""
        )
    checks, status = _daemon(path)
    yield from checks
    if status is not None:
        yield _registry(path)
    yield _namespaces()
    yield fuse_device(for_users=True)
    yield from mount_points(_mount_points(status))
    shell = environ.get("SHELL", "").rpartition("/")[2]
    if shell == "bash":
        yield _bashrc(environ)
    yield from _slurm(environ)


def _failed(name: str, error: UenvError, why: str = "") -> Check:
    return Check(name, "wrong", error.message, why, error.hint)


def _daemon(path: str) -> tuple[list[Check], dict[str, Any] | None]:
    why = "without it no image of the registry can be used; image files can"
    try:
        with Client(path, connect_s=1.0) as client:
            status = client.call("status", answer_s=2.0).frame
    except UenvError as error:
        return [_failed("daemon", error, why)], None
    images, cache = status.get("images"), status.get("cache")
    facts = [f"uenvd {status.get('version')} answers"]
    if isinstance(images, list):
        facts.append(f"{len(images)} image{'' if len(images) == 1 else 's'} in use")
    checks = []
    if isinstance(cache, dict) and isinstance(cache.get("free_bytes"), int):
        facts.append(f"{output.megabytes(cache['free_bytes'])} MB free in {cache.get('path')}")
        if cache["free_bytes"] + _removable_bytes(cache, images) < _ROOM_BYTES:
            checks.append(
                Check(
                    "cache",
                    "wrong",
                    f"no room in {cache.get('path')}",
                    "images that are not on this node yet cannot be fetched",
                    "free space on its file system, or wait until images in use are not: uenvctl status",
                )
            )
    if status.get("version") != __version__:
        checks.append(
            Check(
                "version",
                "note",
                f"uenvctl is {__version__}, uenvd {status.get('version')}",
                "what only the newer one knows does not work",
                "restart uenvd after an update",
            )
        )
    return [Check("daemon", "ok", ", ".join(facts)), *checks], status


def _removable_bytes(cache: Mapping[str, Any], images: object) -> int:
    """Return how much of the cache uenvd can remove by itself when an image needs the room: all that nobody uses."""
    used = cache.get("used_bytes")
    in_use = [
        image.get("total_bytes")
        for image in (images if isinstance(images, list) else ())
        if isinstance(image, dict) and image.get("digest") and image.get("leases")
    ]
    held = sum(size for size in in_use if isinstance(size, int))
    return max(0, used - held) if isinstance(used, int) else 0


def _registry(path: str) -> Check:
    """Ask the registry something that nothing matches; an old answer in its stead is noted by the daemon."""
    why = "images that are here can be used, others cannot be fetched"
    try:
        with Client(path) as client:
            frame = client.call("find", answer_s=REGISTRY_ANSWER_S, uenv="uenvctl-doctor", refresh=True).frame
    except (RegistryUnreachable, RegistryDenied) as error:
        return _failed("registry", error, why)
    except UenvError as error:
        return _failed("registry", error)
    notes = frame.get("notes")
    if isinstance(notes, list) and notes:
        return Check(
            "registry", "wrong", str(notes[0]), why, "try again later; tell the site's administrators"
        )
    return Check("registry", "ok", "answers")


def _namespaces() -> Check:
    """Make a namespace in a child, which is thrown away."""
    flags = mounts.CLONE_NEWNS if os.geteuid() == 0 else mounts.CLONE_NEWUSER | mounts.CLONE_NEWNS
    pid = os.fork()
    if pid == 0:
        number = errno.EIO
        try:
            mounts.unshare(flags)
            number = 0
        except OSError as error:
            number = error.errno or errno.EIO
        finally:
            os._exit(number)
    number = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if number == 0:
        return Check("namespaces", "ok", "a session can be made")
    return Check(
        "namespaces",
        "wrong",
        f"cannot make a user namespace: {os.strerror(abs(number))}",
        "'uenvctl start' and 'run' need one; srun --uenv does not",
        "the site's administrators can allow them: sysctl user.max_user_namespaces (and, where it exists, "
        "kernel.unprivileged_userns_clone=1)",
    )


def fuse_device(*, for_users: bool, path: str = "/dev/fuse") -> Check:
    """Check that there is /dev/fuse and, ``for_users``, that this user may use it."""
    why = "without it nothing can be mounted"
    try:
        if not stat.S_ISCHR(os.stat(path).st_mode):  # noqa: PTH116 - pathlib is slow to import
            return Check("fuse", "wrong", f"{path} is no device", why, "udev makes it: modprobe fuse")
    except OSError as error:
        return Check(
            "fuse", "wrong", f"{path}: {error.strerror}", why, "load the kernel module: modprobe fuse"
        )
    if for_users and not os.access(path, os.R_OK | os.W_OK):
        return Check(
            "fuse",
            "wrong",
            f"you may not use {path}",
            "image files of your own cannot be mounted; images of the registry can",
            f"udev's mode is 0666: chmod 0666 {path} (root)",
        )
    return Check("fuse", "ok", f"{path} can be used")


def _mount_points(status: Mapping[str, Any] | None) -> Sequence[str]:
    points = status.get("mount_points") if status else None
    return points if isinstance(points, list) and points else DEFAULT_MOUNT_POINTS


def mount_points(points: Sequence[str]) -> Iterator[Check]:
    """Yield for each of the site's mount points whether it is there."""
    for point in points:
        try:
            is_there = stat.S_ISDIR(os.stat(point).st_mode)  # noqa: PTH116
            reason = "it is no directory"
        except OSError as error:
            is_there, reason = False, str(error.strerror)
        if is_there:
            yield Check("mount point", "ok", f"{point} is there")
        else:
            yield Check(
                "mount point",
                "wrong",
                f"{point}: {reason}",
                "images that want to be mounted there cannot be used",
                f"root makes it once, on each node: mkdir {point}",
            )


def _bashrc(environ: Mapping[str, str]) -> Check:
    """Run an interactive bash and see whether what a view put into PATH is still in front."""
    import subprocess  # slow to import, and for this check only

    marked = {**environ, "PATH": f"{_MARK}:{environ.get('PATH', '/usr/bin:/bin')}", "TERM": "dumb"}
    command = ["bash", "-i", "-c", r'printf "\n%s\n%s\n" "$PATH" "${LD_LIBRARY_PATH-}"']
    do = 'in ~/.bashrc put own directories behind: export PATH="$PATH:$HOME/bin"; load modules and conda by hand'
    try:
        done = subprocess.run(
            command,
            env=marked,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=BASHRC_S,
            check=False,
            start_new_session=True,  # it must not take the terminal
        )
    except subprocess.TimeoutExpired:
        return Check(
            "bashrc", "wrong", f"~/.bashrc takes longer than {BASHRC_S:.0f} s", "so does every session", do
        )
    except OSError as error:
        return Check("bashrc", "note", f"bash cannot be run: {error.strerror}")
    lines = done.stdout.decode(errors="replace").splitlines()
    path, libraries = lines[-2:] if len(lines) >= 2 else ("", "")
    parts = path.split(":")
    if _MARK not in parts:
        return Check("bashrc", "wrong", "~/.bashrc replaces PATH", "programs of a view are not found", do)
    if parts[0] != _MARK:
        shadows = ", ".join(parts[: parts.index(_MARK)][:4])
        return Check(
            "bashrc",
            "note",
            f"~/.bashrc puts before PATH: {shadows}",
            "programs there hide those of a view",
            do,
        )
    if libraries and not environ.get("LD_LIBRARY_PATH"):
        return Check(
            "bashrc",
            "note",
            f"~/.bashrc sets LD_LIBRARY_PATH: {libraries}",
            "programs of an image may load libraries that they were not built with",
            "remove it, or set it only for the programs that need it",
        )
    return Check("bashrc", "ok", "leaves PATH alone")


def _slurm(environ: Mapping[str, str]) -> Iterator[Check]:
    import shutil
    import subprocess

    srun = shutil.which("srun", path=environ.get("PATH"))
    if srun is None:
        return
    try:
        done = subprocess.run(
            [srun, "--help"], stdin=subprocess.DEVNULL, capture_output=True, timeout=BASHRC_S, check=False
        )
        has_option = b"--uenv" in done.stdout
    except (OSError, subprocess.TimeoutExpired):
        has_option = False
    if has_option:
        yield Check("slurm", "ok", "srun has the option --uenv")
    else:
        yield Check(
            "slurm",
            "note",
            "srun has no option --uenv",
            "jobs cannot ask for images; 'uenvctl run' works inside of them",
            "root names the plugin in plugstack.conf: see docs/slurm.md",
        )
