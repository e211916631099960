"""Become the command: exit code, signals and stdin are then its own. A shell's conventions: 127 not found, 126 not executable."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Mapping, Sequence
from typing import NoReturn

from uenvd.ctl.output import note

NOT_FOUND = 127
NOT_EXECUTABLE = 126
LEASE_FD = 100
"""Lowest number of the inherited connection that is the lease: out of the way of scripts' redirections."""
_DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"


def inherit(descriptor: int, lowest: int) -> int:
    """Return a copy of a descriptor that survives exec, numbered from `lowest` on, or lower where the limit of open files demands it."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD, lowest)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EMFILE):
            raise
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD, 3)


def execute(command: Sequence[str], environ: Mapping[str, str], *, argv0: str | None = None) -> NoReturn:
    """Replace this process; a command without a slash is searched in the ``PATH`` of `environ`.

    Ends the process with a status as a shell's if that fails.
    """
    # the interpreter ignores these two; the command must not inherit that
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    name = command[0]
    arguments = [argv0 if argv0 is not None else name, *command[1:]]
    failure: OSError | None = None
    headless = False
    for path in _candidates(name, environ):
        try:
            _exec(path, arguments, environ)
        except OSError as error:
            if error.errno == errno.EACCES and "/" not in name and not os.path.lexists(path):
                continue  # a directory of PATH that is closed to the user
            headless = headless or (error.errno == errno.ENOENT and os.path.lexists(path))
            if error.errno not in (errno.ENOENT, errno.ENOTDIR) or failure is None:
                failure = error
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                break
    if failure is None or failure.errno in (errno.ENOENT, errno.ENOTDIR):
        note(
            f"{name}: cannot be run: its interpreter is missing" if headless else f"{name}: command not found"
        )
        raise SystemExit(NOT_EXECUTABLE if headless else NOT_FOUND)
    note(f"{name}: cannot be run: {failure.strerror}")
    raise SystemExit(NOT_EXECUTABLE)


def _candidates(name: str, environ: Mapping[str, str]) -> list[str]:
    if "/" in name:
        return [name]
    if not name:
        return []
    return [f"{directory or '.'}/{name}" for directory in environ.get("PATH", _DEFAULT_PATH).split(":")]


def _exec(path: str, arguments: list[str], environ: Mapping[str, str]) -> None:
    """Execute a file; one that is a script without ``#!`` is given to ``/bin/sh``, as execvp(3) does. Raises OSError."""
    try:
        os.execve(path, arguments, environ)  # noqa: S606 - the user's own command
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
    os.execve("/bin/sh", ["sh", path, *arguments[1:]], environ)  # noqa: S606
