"""The console script ``uenvctl``: finds the command, loads only that, and maps every failure to text and exit status once."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from uenvd import __version__
from uenvd.ctl import output
from uenvd.errors import InternalError, UenvError, UsageError

COMMANDS = {
    "run": "run",
    "start": "start",
    "status": "status",
    "image find": "image_find",
    "image ls": "image_ls",
    "image inspect": "image_inspect",
    "image pull": "image_pull",
}
"""Name -> module of this package with ``HELP`` and ``main(argv) -> exit status``."""

HELP = """\
usage: uenvctl COMMAND ...

Scientific software environments for your shell.

  start UENV                   a shell with an environment
  run UENV [--] COMMAND        one command in an environment
  image find [LABEL]           what there is in the registry
  image ls [LABEL]             what is on this node already
  image inspect UENV           description, mount point and views of an image
  image pull UENV              fetch an image to this node before it is needed
  status                       the session that you are in, and the state of uenvd

  --help, --version            of uenvctl; 'uenvctl COMMAND --help' has more
  --socket PATH                uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    # No handler of our own has anything to clean up, so Ctrl-C ends us as it ends any program; ignored stays ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        status = _dispatch(list(sys.argv[1:] if argv is None else argv))
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
    name = words.pop(0)
    if name == "image" and words:
        if words[0] in ("--help", "-h"):
            output.data("\n".join(line for line in HELP.splitlines() if line.startswith("  image")))
            return 0
        name = f"image {words.pop(0)}"
    if name == "help":
        output.data(HELP.rstrip())
        return 0
    if name not in COMMANDS:
        import difflib  # only for an error

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean: uenvctl {near[0]}" if near else "see: uenvctl --help"
        raise UsageError(f"there is no command '{name}'", hint=hint)
    module = importlib.import_module(f"uenvd.ctl.{COMMANDS[name]}")
    status: int = module.main([*options, *words])
    return status


def _drop_stdout() -> None:
    """Make sure that the interpreter's last flush of stdout cannot fail."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        return


if __name__ == "__main__":
    sys.exit(main())
