"""``uenvctl run``: one command in the environment of one or more images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NoReturn

from uenvd.ctl import lockfile
from uenvd.ctl.arguments import FLAG, VALUE, Arguments, parse
from uenvd.errors import UsageError

HELP = """\
usage: uenvctl run [--view VIEW[,VIEW...]] UENV[,UENV...] [--] COMMAND [ARGUMENT...]

Run a command with images mounted and their views applied. The command takes the place of uenvctl: its exit status,
its signals and its input are its own. 127: not found, 126: cannot be run.

UENV is a label, name/version:tag@system%uarch, or the path of a squashfs file (./x.squashfs), either followed by
:/mount/point if it shall not be mounted where the image wants to be. Files need no daemon, nor do your own images
(mine::name/version, see uenvd-publish build).

  -v, --view VIEW     view or uenv:view, a comma list; else the image's default view, if it has one; none: no view
  --locked            the bytes that uenv.lock names, whatever the label means by now; see 'uenvctl lock --help'
  --lock-file PATH    this lock file instead of uenv.lock here or in a directory above
  --refresh           ask the registry what the label means, even if that was asked a moment ago
  --socket PATH       uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control

examples:
  uenvctl run --view=default prgenv-gnu/23.11 -- mpicc -o hello hello.c
  uenvctl run --locked prgenv-gnu/23.11 -- make
  uenvctl run ./my.squashfs python3 script.py
  uenvctl run ./a.squashfs:/user-environment,./b.squashfs:/user-tools -- ls /user-tools
"""

OPTIONS = {"--view": VALUE, "--refresh": FLAG, **lockfile.OPTIONS}
TAKES = ("uenv", "command")


def main(argv: Sequence[str]) -> int:
    """Handle the command; returns only for ``--help``."""
    arguments = parse(argv, command="run", options=OPTIONS, words=(1, 1), rest=True)
    if "--help" in arguments.flags:
        print(HELP, end="")
        return 0
    return _run(arguments)


def _run(arguments: Arguments) -> NoReturn:
    if not arguments.rest:
        raise UsageError("there is no command to run", hint="for a shell: uenvctl start UENV")
    from uenvd.ctl.client import socket_path
    from uenvd.ctl.execute import LEASE_FD, execute, inherit
    from uenvd.ctl.session import Plan, build, refuse_inside_session

    plan = Plan.parse(lockfile.pinned_by(arguments, arguments.words[0]), arguments.values.get("--view"))
    refuse_inside_session("run")
    socket = socket_path(arguments.values.get("--socket"), os.environ)
    environ, lease = build(plan, socket, os.environ, refresh="--refresh" in arguments.flags)
    if lease is not None:
        inherit(lease.fileno(), LEASE_FD)
    execute(arguments.rest, environ)
