"""The console script ``uenvctl``: finds the command, loads only that, and maps every failure to text and exit status once."""

from __future__ import annotations

import sys

from uenvd import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "run": "run",
    "start": "start",
    "status": "status",
    "image find": "image_find",
    "image ls": "image_ls",
    "image inspect": "image_inspect",
    "image pull": "image_pull",
    "image evict": "image_evict",
    "image pin": "image_pin",
    "image unpin": "image_unpin",
    "diff": "diff",
    "lock": "lock",
    "job": "job",
    "kernel install": "kernel_install",
    "venv": "venv",
    "doctor": "doctor",
    "completion": "completion",
}
"""Name -> module of this package with ``HELP``, ``OPTIONS``, ``TAKES`` and ``main(argv) -> exit status``."""

GROUPS = ("image", "kernel")
"""First words of the commands that have two."""

HELP = """\
usage: uenvctl COMMAND ...

Scientific software environments for your shell.

  start UENV                   a shell with an environment
  run UENV [--] COMMAND        one command in an environment
  status                       the session that you are in, and the state of uenvd

  image find [LABEL]           what there is in the registry
  image ls [LABEL]             the same, and what is on this node
  image inspect UENV           description, views, size, tests of an image
  image pull UENV              fetch an image to this node before it is needed
  image evict UENV             remove an image from this node (root)
  image pin UENV               keep an image on this node though nobody uses it (root)
  image unpin UENV             let it go again when there is no room (root)
  diff UENV UENV               what is different between two images

  lock UENV                    note in uenv.lock which bytes a label means today
  job ID                       which images a Slurm job used
  kernel install UENV          an environment as a kernel of Jupyter
  venv DIRECTORY               a Python virtual environment on top of a session

  doctor                       find out what is wrong, and what to do about it
  completion SHELL             completion for bash, zsh or fish
  help [COMMAND]               how to use a command

  --help, --version            of uenvctl; 'uenvctl COMMAND --help' has more
  --socket PATH                uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control

examples:
  uenvctl image find prgenv
  uenvctl start --view=default prgenv-gnu/23.11
  uenvctl run --view=default prgenv-gnu/23.11 -- mpicc -o hello hello.c
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:  # asked by scripts and module files: nothing else is loaded
        try:
            sys.stdout.write(f"uenvctl {__version__}\n")
            sys.stdout.flush()
        except (OSError, AttributeError):
            return _edge(words)
        return 0
    return _edge(words)


def _edge(words: list[str]) -> int:
    """Run a command; whatever it raises becomes text on stderr and an exit status."""
    import os
    import signal

    from uenvd.ctl import output
    from uenvd.errors import InternalError, UenvError

    # No handler of our own has anything to clean up, so Ctrl-C ends us as it ends any program; ignored stays ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        status = _dispatch(words)
        if sys.stdout is not None:
            sys.stdout.flush()
    except UenvError as error:
        output.report(error)
        return error.exit_status
    except BrokenPipeError:
        _drop_stdout()
        return 128 + signal.SIGPIPE
    except OSError as error:
        _drop_stdout()
        output.note(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        return UenvError.exit_status
    except Exception as error:  # the one place where a fault of our own is reported
        if os.environ.get("UENVD_DEBUG"):
            raise
        output.report(
            InternalError(
                f"unexpected fault: {type(error).__name__}: {error}",
                hint="this is a bug in uenvctl; UENVD_DEBUG=1 in the environment shows where",
            )
        )
        return InternalError.exit_status
    return status


def _dispatch(words: list[str]) -> int:
    from uenvd.ctl import output
    from uenvd.errors import UsageError

    options: list[str] = []
    while words and words[0].startswith("-"):
        word = words.pop(0)
        if word in ("--help", "-h"):
            output.data(HELP.rstrip())
            return 0
        if word == "--version":
            output.data(f"uenvctl {__version__}")
            return 0
        if word == "--socket" and words:
            options += [word, words.pop(0)]
        elif word.startswith("--socket="):
            options.append(word)
        else:
            raise UsageError(f"unknown option {word}", hint="see: uenvctl --help")
    if not words:
        output.say(HELP.rstrip())
        return UsageError.exit_status
    if words[0] == "__complete":  # what the shells' completion scripts call
        return _run("complete", words[1:])
    if words[0] == "help":
        words = [*words[1:], "--help"]
        if len(words) == 1:
            output.data(HELP.rstrip())
            return 0
    name = words.pop(0)
    if name in GROUPS:
        if not words:
            raise UsageError(f"there is no command '{name}' alone", hint=f"see: uenvctl {name} --help")
        if words[0] in ("--help", "-h"):
            output.data("\n".join(line for line in HELP.splitlines() if line.startswith(f"  {name} ")))
            return 0
        name = f"{name} {words.pop(0)}"
    if name not in COMMANDS:
        import difflib  # only for an error

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean: uenvctl {near[0]}" if near else "see: uenvctl --help"
        raise UsageError(f"there is no command '{name}'", hint=hint)
    return _run(COMMANDS[name], [*options, *words])


def _run(name: str, argv: list[str]) -> int:
    import importlib

    status: int = importlib.import_module(f"uenvd.ctl.{name}").main(argv)
    return status


def _drop_stdout() -> None:
    """Make sure that the interpreter's last flush of stdout cannot fail."""
    import os

    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        return


if __name__ == "__main__":
    sys.exit(main())
