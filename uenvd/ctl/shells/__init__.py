"""How each shell is started so that it shows its session.

The scripts beside this file are read by the shells themselves; nothing here is generated but the text that goes into the prompt, which holds
only characters that no shell treats specially (`short_names`).
"""

# ruff: noqa: PTH120, PTH123 - pathlib is slow to import
from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

DIRECTORY = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100
CSH_START = "/etc/csh.cshrc"
"""The one file that every csh and tcsh reads before the user's."""
UNUSABLE = frozenset({"nologin", "false", "true"})
LAST_RESORT = ("/bin/bash", "/bin/sh")


class Start(NamedTuple):
    """How a shell is started: its command line, and additions to its environment."""

    command: list[str]
    environ: dict[str, str]


def choose(environ: Mapping[str, str]) -> tuple[str, str | None]:
    """Return the user's shell, and what to tell him if it is not ``$SHELL``.

    ``$SHELL``, else the shell of the user database, else bash, else sh: the first that can be run and lets somebody in.
    """
    wanted = environ.get("SHELL", "")
    if usable(wanted):
        return wanted, None
    for shell in (_registered(), *LAST_RESORT):
        if usable(shell):
            return (
                shell,
                f"$SHELL is {wanted}, which is no shell that can be run; this is {shell}" if wanted else None,
            )
    return "/bin/sh", None


def usable(shell: str) -> bool:
    """Tell whether this is an absolute path of a program, and none that only turns people away."""
    return (
        shell.startswith("/")
        and shell.rpartition("/")[2] not in UNUSABLE
        and os.access(shell, os.X_OK)
        and not os.path.isdir(shell)  # noqa: PTH112
    )


def _registered() -> str:
    import pwd  # hardly ever needed

    try:
        return pwd.getpwuid(os.getuid()).pw_shell
    except KeyError:
        return ""


def interactive(shell: str, labels: str, environ: Mapping[str, str]) -> Start:
    """Return how to start this shell at a terminal so that its prompt shows the session; `labels` is a comma list."""
    prompt = _prompt(labels)
    name = shell.rpartition("/")[2]
    if name == "bash":
        # bash prints nothing of its own of an rc file, so the prompt's text can be set on the way
        return Start([shell, "--rcfile", f"{DIRECTORY}/bash.sh", "-i"], {"_uenvd_prompt": prompt})
    if name == "zsh":
        added = {"ZDOTDIR": f"{DIRECTORY}/zsh", "UENVCTL_PROMPT": prompt}
        if "ZDOTDIR" in environ:
            added["UENVCTL_ZDOTDIR"] = environ["ZDOTDIR"]
        return Start([shell, "-i"], added)
    if name == "fish":
        init = f"set -g _uenvd_prompt '{prompt}'; source {_fish_quoted(DIRECTORY + '/session.fish')}"
        return Start([shell, "--init-command", init, "-i"], {})
    if name in ("sh", "dash", "ash", "ksh", "ksh93", "mksh"):
        return Start([shell, "-i"], {"PS1": prompt + environ.get("PS1", "$ ")})
    return Start([shell], {})


def first_files(shell: str, labels: str) -> dict[str, bytes]:
    """Return files that the session shall see changed for this shell's sake: path and content.

    csh and tcsh can be told nothing on their command line. The file that they read first gets one line more: before the first prompt, after
    all of the user's files, the prompt is completed.
    """
    if shell.rpartition("/")[2] not in ("csh", "tcsh"):
        return {}
    try:
        with open(CSH_START, "rb") as file:
            text = file.read()
    except OSError:
        return {}
    line = f"if ($?prompt) alias precmd 'set prompt = \"{_prompt(labels)}$prompt:q\"; unalias precmd'\n"
    return {CSH_START: text.rstrip(b"\n") + b"\n" + line.encode()}


def _prompt(labels: str) -> str:
    return f"[{','.join(short_name(label) for label in labels.split(','))}] "


def short_name(label: str) -> str:
    """Return a label without tag, system and digest, or a file's name; only characters that a prompt shows as they are."""
    name = (
        label.rpartition("/")[2]
        if label.startswith(("/", "."))
        else label.partition(":")[0].partition("@")[0].partition("%")[0]
    )
    return "".join(c for c in name if c.isascii() and (c.isalnum() or c in "_-./"))


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
