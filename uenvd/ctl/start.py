"""``uenvctl start``: a shell in the environment of one or more images."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from uenvd.ctl import lockfile
from uenvd.ctl.arguments import FLAG, VALUE, Arguments, parse

HELP = """\
usage: uenvctl start [--view VIEW[,VIEW...]] UENV[,UENV...]

Start your shell ($SHELL) with images mounted and their views applied; 'exit' ends the session. Commands can also be
piped in:  echo 'make -j8' | uenvctl start --view=default prgenv-gnu/23.11

UENV is a label, name/version:tag@system%uarch, or the path of a squashfs file (./x.squashfs), either followed by
:/mount/point if it shall not be mounted where the image wants to be. Files need no daemon.

  -v, --view VIEW    view or uenv:view, a comma list; else the image's default view, if it has one; none: no view
  --locked           the bytes that uenv.lock names, whatever the label means by now; see 'uenvctl lock --help'
  --lock-file PATH   this lock file instead of uenv.lock here or in a directory above
  --refresh          ask the registry what the label means, even if that was asked a moment ago
  --socket PATH      uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control

examples:
  uenvctl start --view=default prgenv-gnu/23.11
  uenvctl start ./my.squashfs:/user-environment
"""

OPTIONS = {"--view": VALUE, "--refresh": FLAG, **lockfile.OPTIONS}
TAKES = ("uenv",)


def main(argv: Sequence[str]) -> int:
    """Handle the command; returns only for ``--help``."""
    arguments = parse(argv, command="start", options=OPTIONS, words=(1, 1))
    if "--help" in arguments.flags:
        print(HELP, end="")
        return 0
    return _start(arguments)


def _start(arguments: Arguments) -> NoReturn:
    from uenvd.ctl.client import socket_path
    from uenvd.ctl.execute import LEASE_FD, execute, inherit
    from uenvd.ctl.output import note
    from uenvd.ctl.session import Plan, build, refuse_inside_session
    from uenvd.ctl.shells import choose, first_files, interactive

    plan = Plan.parse(lockfile.pinned_by(arguments, arguments.words[0]), arguments.values.get("--view"))
    refuse_inside_session("start a shell")
    shell, remark = choose(os.environ)
    if remark is not None:
        note(remark)
    at_terminal = _is_terminal(0)
    copies = first_files(shell, arguments.words[0]) if at_terminal else {}
    socket = socket_path(arguments.values.get("--socket"), os.environ)
    environ, lease = build(plan, socket, os.environ, refresh="--refresh" in arguments.flags, copies=copies)
    if lease is not None:
        inherit(lease.fileno(), LEASE_FD)
    if not at_terminal:
        execute([shell], environ)
    start = interactive(shell, environ["UENV_LABEL"], os.environ)
    execute(start.command, {**environ, **start.environ})


def _is_terminal(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor) and sys.stdin is not None
    except OSError:
        return False
