"""An image used by somebody else, somewhere else: as uid `UID`, without network, in a root that has nothing but a shell, the usual tools and glibc.

What an image takes from its builder's machine without saying so is missing there: libraries of the host that are loaded at run time, another
Python, programs, files below /opt, /home or /work. ``python -I -m uenvd.publish.elsewhere SPEC.json`` is the process that goes there; it is
started in the mount of the image.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from uenvd import mounts
from uenvd.errors import MountFailed, ResourceMissing, UenvError
from uenvd.publish import mountpoint
from uenvd.publish.build.audit import GLIBC, Finding
from uenvd.publish.build.imagefile import HOST_JSON, declared_libraries, opened
from uenvd.publish.smoke import OK, PROBLEM, SMOKE_FILE, SmokeTests, parse_smoke, scripts
from uenvd.squashfs import Kind
from uenvd.views import MAX_FILE_BYTES, read_image_meta

UID: Final = 65534
_PROGRAMS: Final = (
    "sh", "bash", "env", "ls", "cat", "cp", "mv", "rm", "ln", "mkdir", "chmod", "touch", "head", "tail", "tr", "cut", "od", "sed", "grep", "awk",
    "sort", "uniq", "wc", "find", "printf", "echo", "test", "true", "false", "expr", "sleep", "timeout", "date", "id", "uname", "mktemp",
    "dirname", "basename", "readlink", "tee", "ldd", "[",
)  # fmt: skip
"""What every host has: POSIX, more or less, and what the smoke tests use."""
_DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty")
_ROOT_BYTES: Final = 64 << 20
_LIMIT_S: Final = 900.0
_LDD_S: Final = 30.0
_ENVIRONMENT: Final = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "LANG": "C.UTF-8", "TZ": "UTC"}
_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")
_SHOWN_LINES: Final = 8


def run_elsewhere(image: Path, prefix: str | None) -> list[Finding]:
    """Run the smoke tests of an image's views there; return what is wrong, a finding of the kind ``run`` for each problem.

    Args:
        image: the squashfs file.
        prefix: where it is mounted; None: where it says.

    Raises:
        UsageError, FormatError: of the image.
        ConfigError: its ``extra/smoke.yaml`` is wrong.
        ResourceMissing: no user namespaces, or no /dev/fuse that may be used.

    """
    with opened(image) as squashfs:

        def read_file(name: bytes) -> bytes | None:
            inode = squashfs.find(name)
            if inode is None or inode.kind is not Kind.FILE or inode.size_bytes > MAX_FILE_BYTES:
                return None
            return squashfs.read_file(inode, MAX_FILE_BYTES)

        meta = read_image_meta(read_file)
        smoke = read_file(SMOKE_FILE.encode())
        declared = declared_libraries(read_file(HOST_JSON.encode()))
    tests = (
        SmokeTests()
        if smoke is None
        else parse_smoke(smoke.decode(errors="replace"), f"{image}: {SMOKE_FILE}")
    )
    tests = SmokeTests(tests.commands, (*tests.host_libraries, *declared))
    mount = prefix or (meta.mount if meta else None) or "/user-environment"
    wanted = [(one.view, one.text) for one in scripts(meta, mount, tests, _ENVIRONMENT)]
    with tempfile.TemporaryDirectory(prefix="uenv-elsewhere-", ignore_cleanup_errors=True) as name:
        work = Path(name)
        (work / "root").mkdir()
        (work / "image.squashfs").symlink_to(image.absolute())
        spec = {"root": str(work / "root"), "mount": mount, "scripts": wanted, "files": host_files()}
        (work / "spec.json").write_text(json.dumps(spec))
        words = [
            *mountpoint.words(mount, work / "mountpoint"), sys.executable, "-I", "-m", "uenvd.ctl.main", "run", f"./image.squashfs:{mount}",
            "--", sys.executable, "-I", "-m", "uenvd.publish.elsewhere", str(work / "spec.json"),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                words, cwd=work, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL, timeout=_LIMIT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return [Finding("/", "run", f"its smoke tests did not end within {_LIMIT_S:.0f} s")]
    try:
        answers = json.loads(done.stdout)
    except ValueError:
        last = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-_SHOWN_LINES:])
        raise ResourceMissing(
            f"the image cannot be used as another user on this machine:\n{last}",
            hint="are user namespaces and /dev/fuse allowed here?",
        ) from None
    return [finding for view, said in answers for finding in _findings(view, said)]


def _findings(view: str, said: str) -> list[Finding]:
    where = f"view {view}" if view else "no view"
    lines = said.splitlines()
    problems = [line.removeprefix(PROBLEM).strip() for line in lines if line.startswith(PROBLEM)]
    if not problems and not any(line.startswith(OK) for line in lines):
        problems = [" / ".join(lines[-_SHOWN_LINES:]) or "its smoke test ended without a word"]
    return [Finding(where, "run", problem) for problem in problems]


def host_files() -> list[str]:
    """Return the programs of a bare host and the libraries that they need: absolute paths of this machine."""
    found: dict[str, None] = {}
    for name in _PROGRAMS:
        path = next((f"{place}/{name}" for place in ("/usr/bin", "/bin") if Path(place, name).exists()), None)
        if path is not None:
            found[path] = None
    done = subprocess.run(
        ["ldd", *found], capture_output=True, text=True, errors="replace", check=False, timeout=_LDD_S, env={"PATH": os.defpath, "LC_ALL": "C"},
    )  # fmt: skip
    libraries = set(_LIBRARY.findall(done.stdout))
    for directory in {str(Path(path).parent) for path in libraries}:
        for pattern in (*GLIBC, "libnss_files.so.*", "libnss_dns.so.*"):
            libraries |= {str(path) for path in Path(directory).glob(pattern)}
    return [*found, *sorted(libraries)]


# --- the process there --------------------------------------------------------------------------------------------------------------


def enter(root: Path, mount: str, files: Iterable[str]) -> None:
    """Move this process, which must have one thread, to the bare root, where the mount is. Raises `ResourceMissing`, `MountFailed`."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        mounts.unshare(
            mounts.CLONE_NEWUSER
            | mounts.CLONE_NEWNS
            | mounts.CLONE_NEWNET
            | mounts.CLONE_NEWIPC
            | mounts.CLONE_NEWUTS
        )
    except OSError as error:
        raise ResourceMissing(f"cannot make a user namespace for another user: {error.strerror}") from error
    mounts.map_self(uid, gid, shown_uid=UID, shown_gid=UID)
    try:
        mounts.make_rslave("/")
        mounts.mount_tmpfs(root, size_bytes=_ROOT_BYTES, source="uenvd-bare", executable=True)
        for place in ("bin", "sbin", "lib", "lib64"):
            if Path(f"/{place}").is_symlink():
                (root / place).symlink_to(Path(f"/{place}").readlink())
        for file in files:
            _show(root, Path(file))
        for device in _DEVICES:
            if Path("/dev", device).exists():
                _show(root, Path("/dev", device))
        for path in ("/proc", mount):
            (root / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
            mounts.bind_recursive(path, f"{root}{path}")
        (root / "tmp").mkdir()
        (root / "etc").mkdir()
        (root / "etc/passwd").write_text(f"nobody:x:{UID}:{UID}:nobody:/nonexistent:/bin/sh\n")
        (root / ".old").mkdir()
        mounts.pivot_root(root, root / ".old")
        os.chdir("/tmp")  # noqa: S108  # of the bare root
        mounts.umount("/.old", detach=True)
        Path("/.old").rmdir()
    except OSError as error:
        about = f" ({os.fsdecode(error.filename)})" if error.filename else ""
        raise MountFailed(f"cannot make the bare root: {error.strerror}{about}") from error


def _show(root: Path, path: Path) -> None:
    """Bind one file of the machine; links are followed, so that one name is one file."""
    target = root / str(path.parent.resolve()).lstrip("/") / path.name
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.touch()
    mounts.bind_recursive(path.resolve(), target)


def main(arguments: Sequence[str]) -> int:
    """Run the scripts there; print what each said as JSON."""
    spec: dict[str, Any] = json.loads(Path(arguments[0]).read_text())
    try:
        enter(Path(spec["root"]), spec["mount"], spec["files"])
    except UenvError as error:
        print(error.message, file=sys.stderr)
        return 1
    answers = []
    for view, text in spec["scripts"]:
        done = subprocess.run(
            ["/bin/sh", "-s"], input=text, capture_output=True, text=True, errors="replace", check=False, env=_ENVIRONMENT,
        )  # fmt: skip
        answers.append((view, done.stdout + done.stderr))
    print(json.dumps(answers))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
