"""``uenvctl kernel install``: an environment as a kernel of Jupyter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence

from uenvd.ctl import lockfile, output
from uenvd.ctl.arguments import FLAG, VALUE, Arguments, parse
from uenvd.ctl.session import NO_VIEW, Plan, refuse_inside_session
from uenvd.errors import ResourceMissing, StorageError, UenvError, UsageError

HELP = """\
usage: uenvctl kernel install [--view VIEW[,VIEW...]] [--name NAME] UENV[,UENV...]

Add an environment to the kernels that your Jupyter offers. The kernel is the environment's own python3, started by
'uenvctl run', so a notebook sees what a shell in the environment sees. It must have the package ipykernel, which is
checked. To remove a kernel: jupyter kernelspec remove NAME

  -v, --view VIEW      view or uenv:view, a comma list; else the image's default view, if it has one; none: no view
  --name NAME          of the kernel: letters, digits, '-', '_', '.'; else made from the label
  --display-name TEXT  what Jupyter shows; else the label and the view
  --python PROGRAM     the interpreter; else python3
  --prefix DIR         install into DIR/share/jupyter; else into your own directory ($JUPYTER_DATA_DIR)
  --locked             the kernel always uses the bytes that uenv.lock names now
  --lock-file PATH     this lock file instead of uenv.lock here or in a directory above
  --json               {"name", "path", "argv"}, see docs/json.md
  --socket PATH        uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control

examples:
  uenvctl kernel install --view=default python-sci/2026.11
  uenvctl kernel install --view=default --name=paper --locked python-sci/2026.11
"""

OPTIONS = {
    "--view": VALUE,
    "--name": VALUE,
    "--display-name": VALUE,
    "--python": VALUE,
    "--prefix": VALUE,
    "--json": FLAG,
    **lockfile.OPTIONS,
}
TAKES = ("uenv",)

CHECK_S = 120.0
"""How long the environment's Python may take to import ipykernel; the image may have to be fetched before, which is not counted."""
_MODULE = "ipykernel_launcher"


def main(argv: Sequence[str]) -> int:
    """Handle the command; return the exit status."""
    arguments = parse(argv, command="kernel install", options=OPTIONS, words=(1, 1))
    if "--help" in arguments.flags:
        print(HELP, end="")
        return 0
    uenv, view = arguments.words[0], arguments.values.get("--view")
    name = kernel_name(arguments.values.get("--name") or default_name(uenv, view))
    refuse_inside_session("install a kernel")
    pinned = absolute(lockfile.pinned_by(arguments, uenv))
    Plan.parse(pinned, view)
    python = arguments.values.get("--python") or "python3"
    run = [*_uenvctl(arguments), "run", *([f"--view={view}"] if view else []), pinned, "--", python]
    _check(run, uenv)
    display = (
        arguments.values.get("--display-name") or f"{uenv}{f' ({view})' if view and view != NO_VIEW else ''}"
    )
    spec = {
        "argv": [*run, "-m", _MODULE, "-f", "{connection_file}"],
        "display_name": display,
        "language": "python",
        "metadata": {"debugger": True},
    }
    path = os.path.join(data_directory(arguments.values.get("--prefix"), os.environ), "kernels", name)
    _write(path, spec)
    if "--json" in arguments.flags:
        output.data_json({"name": name, "path": path, "argv": spec["argv"]})
    else:
        output.note(f"installed the kernel '{name}' ({display}) in {path}")
    return 0


def default_name(uenv: str, view: str | None) -> str:
    """Return a kernel's name made from what the user called the images."""
    text = uenv if view is None else f"{uenv}-{view}"
    kept = "".join(
        c if c.isascii() and (c.isalnum() or c in "._") else "-" for c in text.partition("@sha256:")[0]
    )
    return "-".join(part for part in kept.split("-") if part).strip("-.").lower()


def kernel_name(text: str) -> str:
    """Return a kernel's name, checked as Jupyter does (jupyter_client/kernelspec.py). Raises `UsageError`."""
    if not text or text.startswith(".") or not all(c.isascii() and (c.isalnum() or c in "._-") for c in text):
        raise UsageError(
            f"'{text}' cannot be the name of a kernel", hint="letters, digits, '-', '_' and '.': --name=NAME"
        )
    return text


def absolute(uenv: str) -> str:
    """Return a description list that means the same in every directory: a kernel is started in that of its notebook."""
    from uenvd.label import parse_descriptions

    return ",".join(
        str(one._replace(path=os.path.abspath(one.path)) if one.path is not None else one)  # noqa: PTH100
        for one in parse_descriptions(uenv)
    )


def data_directory(prefix: str | None, environ: Mapping[str, str]) -> str:
    """Return where kernels are looked for: below a prefix, else the user's data directory of Jupyter on Linux (jupyter_core/paths.py)."""
    if prefix is not None:
        return os.path.join(os.path.abspath(prefix), "share/jupyter")  # noqa: PTH100
    if environ.get("JUPYTER_DATA_DIR"):
        return environ["JUPYTER_DATA_DIR"]
    home = environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local/share")  # noqa: PTH111
    return os.path.join(home, "jupyter")


def _uenvctl(arguments: Arguments) -> list[str]:
    """Return the command by which Jupyter reaches this very program, whatever PATH it has."""
    program = shutil.which("uenvctl")
    command = [program] if program else [sys.executable, "-I", "-m", "uenvd.ctl.main"]
    socket = arguments.values.get("--socket")
    return command + ([f"--socket={socket}"] if socket else [])


def _check(run: Sequence[str], uenv: str) -> None:
    """Raise unless the environment's Python has ipykernel."""
    # "ready" tells a Python that lacks the module from a session that could not be made, which has said so itself.
    program = f"import sys, importlib.util as u; print('ready', sys.executable, u.find_spec({_MODULE!r}) is not None)"
    with subprocess.Popen(
        [*run, "-c", program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        try:
            said = process.communicate(timeout=CHECK_S)[0].split()
        except subprocess.TimeoutExpired:
            process.kill()
            raise ResourceMissing(f"the Python of {uenv} did not start within {CHECK_S:.0f} s") from None
    if said[:1] != ["ready"]:
        if process.returncode == 127:
            raise ResourceMissing(
                f"{uenv} has no such interpreter in its PATH: {run[-1]}",
                hint="name a view that has it (--view), or the interpreter (--python)",
            )
        if 64 <= process.returncode <= 113:
            raise SystemExit(process.returncode)  # the session could not be made, and that has been said
        raise UenvError(f"the Python of {uenv} does not start (exit status {process.returncode})", hint="")
    if said[-1] != "True":
        raise ResourceMissing(
            f"{said[1]}, the Python of {uenv}, has no ipykernel",
            hint="use an image that has it, or ask for it; --view and --python choose another interpreter",
        )


def _write(path: str, spec: Mapping[str, object]) -> None:
    """Write a kernel's directory; an older kernel of this name is replaced. Raises `StorageError`."""
    try:
        os.makedirs(path, exist_ok=True)  # noqa: PTH103
        fresh = os.path.join(path, f".kernel.json.{os.getpid()}")
        with open(fresh, "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(json.dumps(spec, indent=1, ensure_ascii=False) + "\n")
        os.replace(fresh, os.path.join(path, "kernel.json"))  # noqa: PTH105
    except OSError as error:
        raise StorageError(f"{error.filename} cannot be written: {error.strerror}") from error
