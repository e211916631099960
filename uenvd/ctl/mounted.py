"""Two mounted images compared file by file. Each is mounted by a child process in namespaces of its own, where it wants to be.

Concurrency: one child for each image; a conversation over a socket pair, one JSON value a line. A child ends when its parent does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from uenvd.ctl import output
from uenvd.ctl.diff import Changes, compare
from uenvd.ctl.session import NO_VIEW, Plan, build, mounted_images, refuse_inside_session
from uenvd.errors import MountFailed, StorageError, UenvError, by_code

_BATCH = 500
_READ_BYTES = 1 << 20
_MAX_DATABASE_BYTES = 256 << 20
_SPACK_DATABASE = ".spack-db/index.json"
_DIST_INFO = re.compile(r"([A-Za-z0-9][\w.]*)-([^-/]+)\.dist-info\Z")


def compare_mounted(texts: Sequence[str], socket_path: str) -> tuple[Changes, list[dict[str, str] | None]]:
    """Mount two images and compare them.

    Args:
        texts: two descriptions, as `uenvctl run` takes them.
        socket_path: the daemon's.

    Returns:
        The differences of their files (kind, permissions, size, target of a link, content; times and owners do not count), and for each
        image the packages that are installed in it, name -> version, None where nothing says so.

    Raises:
        UenvError: what a session of one of them raises.

    """
    refuse_inside_session("mount images to compare them")
    children: list[_Child] = []
    try:
        for text in texts:
            children.append(_Child(text, socket_path))
        first, second = children
        changes = compare(first.files, second.files)
        same = sorted(
            path
            for path in first.files.keys() & second.files.keys()
            if first.files[path] == second.files[path] and first.files[path].startswith("file ")
        )
        changed = [*changes.changed, *_different(first, second, same)]
        return changes._replace(changed=tuple(sorted(changed))), [child.packages for child in children]
    finally:
        for child in children:
            child.close()


def _different(first: _Child, second: _Child, paths: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield the files whose contents differ; both images are read at the same time."""
    with output.Progress() as progress:
        for start in range(0, len(paths), _BATCH):
            batch = paths[start : start + _BATCH]
            message = f"comparing: {start} of {len(paths)} files"
            progress({"event": "progress", "done_bytes": 0, "total_bytes": 0, "message": message})
            for child in (first, second):
                child.send(batch)
            for path, old, new in zip(batch, first.receive(), second.receive(), strict=True):
                if old != new:
                    yield path, old, new


class _Child:
    """A process that has an image mounted and answers questions about its files."""

    def __init__(self, text: str, socket_path: str) -> None:
        ours, theirs = socket.socketpair()
        self._name = text
        self._pid = os.fork()
        if self._pid == 0:
            ours.close()
            _serve(text, socket_path, theirs)
        theirs.close()
        with ours:
            self._file = ours.makefile("rwb")
        try:
            told = self.receive()
            if "error" in told:
                error = told["error"]
                raise by_code(error["code"])(error["message"], hint=error["hint"])
        except BaseException:
            self.close()
            raise
        self.files: dict[str, str] = told["files"]
        self.packages: dict[str, str] | None = told["packages"]

    def send(self, value: Any) -> None:  # noqa: ANN401 - any JSON value
        try:
            self._file.write(json.dumps(value).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise MountFailed(f"the process that has {self._name} mounted has ended") from error

    def receive(self) -> Any:  # noqa: ANN401 - any JSON value
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise MountFailed(f"the process that has {self._name} mounted has ended")
        return json.loads(line)

    def close(self) -> None:
        """End the process; with it go its namespaces and the mount."""
        with contextlib.suppress(OSError):  # what was still to be sent to a dead child
            self._file.close()
        os.kill(self._pid, signal.SIGKILL)  # not reaped yet: the number is still its own
        os.waitpid(self._pid, 0)


def _serve(text: str, socket_path: str, channel: socket.socket) -> NoReturn:
    """Be the child. Never returns."""
    status = 1
    try:
        with channel, channel.makefile("rwb") as file:
            try:
                told, root = _describe(text, socket_path)
            except UenvError as error:
                told, root = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}, ""
            file.write(json.dumps(told).encode() + b"\n")
            file.flush()
            for line in file:
                file.write(
                    json.dumps([_digest(f"{root}/{path}") for path in json.loads(line)]).encode() + b"\n"
                )
                file.flush()
        status = 0
    except OSError:  # the parent is gone
        pass
    finally:
        os._exit(status)


def _describe(text: str, socket_path: str) -> tuple[dict[str, Any], str]:
    # The lease is not kept in a variable of this frame alone: the mount holds the image by itself, and the process lives as long as it.
    _environ, _lease = build(Plan.parse(text, NO_VIEW), socket_path, os.environ)
    (mounted,) = mounted_images()
    root = mounted.mount
    try:
        files = dict(_walk(root))
        packages = {**_python_packages(files), **_spack_packages(root)}
    except OSError as error:
        raise StorageError(f"{error.filename} cannot be read: {error.strerror}") from error
    return {"files": files, "packages": packages or None}, root


def _walk(root: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path below the root, description) of everything in an image. Two equal descriptions differ at most in their content."""
    with os.scandir(f"{root}/{prefix}") as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = prefix + entry.name
        status = entry.stat(follow_symlinks=False)
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        if stat.S_ISLNK(status.st_mode):
            yield path, f"link to {os.readlink(entry.path)}"  # noqa: PTH115 - text
        elif stat.S_ISDIR(status.st_mode):
            yield path + "/", f"directory {mode}"
            yield from _walk(root, path + "/")
        elif stat.S_ISREG(status.st_mode):
            yield path, f"file {mode} {status.st_size} bytes"
        else:
            yield path, f"special {status.st_mode:06o}"


def _digest(path: str) -> str:
    """Return the short digest of a file, or why it cannot be read."""
    found = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - pathlib is slow to import
            while data := file.read(_READ_BYTES):
                found.update(data)
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return f"content {found.hexdigest()[:16]}"


def _python_packages(files: Iterable[str]) -> dict[str, str]:
    """Return what Python's metadata directories say."""
    names = (path.rstrip("/").rpartition("/")[2] for path in files if path.endswith(".dist-info/"))
    matches = (match for name in names if (match := _DIST_INFO.match(name)) is not None)
    return {match[1].lower().replace("_", "-"): match[2] for match in matches}


def _spack_packages(root: str) -> dict[str, str]:
    """Return what the database of Spack's installation tree says; of several installations of one package all versions."""
    try:
        with open(f"{root}/{_SPACK_DATABASE}", "rb") as file:  # noqa: PTH123 - pathlib is slow to import
            document = json.loads(file.read(_MAX_DATABASE_BYTES))
        installs: Mapping[str, Any] = document["database"]["installs"]
        found: dict[str, set[str]] = {}
        for install in installs.values():
            spec = install["spec"]
            if install.get("installed", True):
                found.setdefault(str(spec["name"]), set()).add(str(spec.get("version", "")))
    except (
        FileNotFoundError,
        NotADirectoryError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    ):
        return {}
    return {name: ", ".join(sorted(versions)) for name, versions in found.items()}
