"""``uenvctl start``: a shell in the environment of one or more images."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from uenvd.ctl.arguments import FLAG, VALUE, Arguments, parse

HELP = """\
usage: uenvctl start [--view VIEW[,VIEW...]] UENV[,UENV...]

Start your shell ($SHELL) with images mounted and their views applied; 'exit' ends the session. Commands can also be
piped in:  echo 'make -j8' | uenvctl start --view=default prgenv-gnu/23.11

UENV is a label, name/version:tag@system%uarch, or the path of a squashfs file (./x.squashfs), either followed by
:/mount/point if it shall not be mounted where the image wants to be. Files need no daemon.

  -v, --view VIEW   view or uenv:view, a comma list; else the image's default view, if it has one
  --refresh         ask the registry what the label means, even if that was asked a moment ago
  --socket PATH     uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control

examples:
  uenvctl start --view=default prgenv-gnu/23.11
  uenvctl start ./my.squashfs:/user-environment
"""

OPTIONS = {"--view": VALUE, "--refresh": FLAG}


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
    from uenvd.ctl.session import Plan, build, refuse_inside_session

    plan = Plan.parse(arguments.words[0], arguments.values.get("--view"))
    refuse_inside_session("start a shell")
    shell = user_shell(os.environ)
    socket = socket_path(arguments.values.get("--socket"), os.environ)
    environ, lease = build(plan, socket, os.environ, refresh="--refresh" in arguments.flags)
    if lease is not None:
        inherit(lease.fileno(), LEASE_FD)
    command = [shell]
    if _is_terminal(0) and shell.rpartition("/")[2] == "bash":
        command += ["--rcfile", f"/dev/fd/{_bash_rc(environ['UENV_LABEL'])}", "-i"]
    execute(command, environ)


def user_shell(environ: Mapping[str, str]) -> str:
    """Return ``$SHELL``, else the user's shell in the system's database, else ``/bin/sh``."""
    shell = environ.get("SHELL", "")
    if not shell:
        import pwd  # hardly ever needed

        try:
            shell = pwd.getpwuid(os.getuid()).pw_shell
        except KeyError:
            shell = ""
    return shell or "/bin/sh"


def bash_rc(labels: str, descriptor: int) -> str:
    """Return what an interactive bash reads first: the files that it would read without us, then the session in the prompt.

    bash reads the text from `descriptor`, which is closed by its last line. `labels` is a comma list.
    """
    names = ",".join(_short(label) for label in labels.split(","))
    return (
        "if [ -r /etc/bash.bashrc ]; then . /etc/bash.bashrc; fi\n"
        'if [ -r "$HOME/.bashrc" ]; then . "$HOME/.bashrc"; fi\n'
        f"PS1='[{names}] '\"$PS1\"\n"
        f"exec {descriptor}<&-\n"
    )


def _short(label: str) -> str:
    """Return a label without tag, system and digest, or a file's name; only characters that a prompt shows as they are."""
    name = (
        label.rpartition("/")[2]
        if label.startswith(("/", "."))
        else label.partition(":")[0].partition("@")[0]
    )
    return "".join(c for c in name if c.isascii() and (c.isalnum() or c in "_-./"))


def _bash_rc(labels: str) -> int:
    from uenvd.ctl.execute import RC_FD, inherit

    with open(os.memfd_create("uenvctl-rc"), "w+b") as file:  # noqa: PTH123 - an anonymous file
        descriptor = inherit(file.fileno(), RC_FD)
        file.write(bash_rc(labels, descriptor).encode())
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _is_terminal(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor) and sys.stdin is not None
    except OSError:
        return False
