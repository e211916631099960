"""``uenvctl venv``: a virtual environment of Python that knows which uenv it stands on.

What ``python -m venv`` makes has a link to the image's interpreter, which leads nowhere where the image is not mounted: ``source bin/activate``
then silently finds the machine's Python, programs say "bad interpreter". In its place goes a small script that becomes the interpreter where
that exists (Python finds its ``pyvenv.cfg`` by the name under which it was started), and else says what to start. Python's own files are not touched,
and a second run changes nothing. The Python of images of the builder ``python`` calls this by itself (`uenvd.publish.build.venv_hook`).
"""

# ruff: noqa: PTH110, PTH112, PTH114, PTH115, PTH123, PTH208 - pathlib is slow to import
from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence

from uenvd.ctl import output
from uenvd.ctl.arguments import parse
from uenvd.errors import SessionError, UsageError

HELP = """\
usage: uenvctl venv DIRECTORY [-- OPTION...]

Inside a session or a job: make a Python virtual environment on top of the image's Python, whose packages it sees
(python3 -m venv --system-site-packages), or take one that you have made. Used where the image is not mounted, it says
which environment to start. Packages are installed as ever: DIRECTORY/bin/pip install ... What follows -- are
options of Python's venv, when one is made.

  --socket PATH   not used here

examples:
  uenvctl start --view=default python-sci/2026.11
  uenvctl venv ~/venv
  ~/venv/bin/pip install tqdm
  uenvctl venv ~/small -- --without-pip
"""

OPTIONS: Mapping[str, bool] = {}
TAKES = ()

SHIM = """\
#!/bin/bash
# Written by uenvctl venv. This virtual environment stands on the Python of an image, which has to be mounted.
python={python}
if [ -x "$python" ]; then exec -a "$0" "$python" "$@"; fi
echo "${{0##*/}}: this virtual environment needs the uenv "{label}", which is not mounted here" >&2
echo "hint: "{hint} >&2
exit {status}
"""


def main(argv: Sequence[str]) -> int:
    """Handle the command; return the exit status."""
    arguments = parse(argv, command="venv", options=OPTIONS, words=(1, 1), rest=True)
    if "--help" in arguments.flags:
        print(HELP, end="")
        return 0
    from uenvd.ctl.session import mounted_images

    directory = os.path.abspath(arguments.words[0])  # noqa: PTH100
    mounts = {one.mount: one.source for one in mounted_images()}
    if not mounts:
        raise SessionError(
            "there is no image mounted here", hint="start a session first: uenvctl start --view=default UENV"
        )
    if not os.path.exists(f"{directory}/pyvenv.cfg"):
        _make(directory, mounts, arguments.rest)
    marked = mark(directory, mounts, os.environ)
    if marked:
        output.say(f"{directory} needs {marked}")
    return 0


def _make(directory: str, mounts: Mapping[str, str], options: Sequence[str]) -> None:
    if os.path.exists(directory) and (not os.path.isdir(directory) or os.listdir(directory)):
        raise UsageError(f"{directory} is there already, and no virtual environment")
    python = next(_found("python3", os.environ.get("PATH", "")), None)
    if python is None or _mount_of(os.path.realpath(python), mounts) is None:
        raise UsageError(
            f"the python3 of this session is {python or 'missing'}, which is not the image's",
            hint="start the session with the view that has Python: uenvctl start --view=VIEW UENV",
        )
    command = [python, "-m", "venv", "--system-site-packages", *options, directory]
    # without the variable by which the image's own venv knows that it has to call us (publish/build/venv_hook.py)
    environ = {name: value for name, value in os.environ.items() if name != "UENV_MOUNT_LIST"}
    status = os.spawnve(os.P_WAIT, python, command, environ)  # noqa: S606
    if status != 0:
        raise UsageError(f"{python} could not make {directory}", hint="what it said is above")


def mark(directory: str, mounts: Mapping[str, str], environ: Mapping[str, str]) -> str | None:
    """Put the script in the place of links that lead into an image; return the image's label, ``None`` when there was nothing to do.

    ``mounts`` maps mount points to sources, as the kernel tells them. Raises `UsageError` when it is no virtual environment of this session.
    """
    found = None
    try:
        names = sorted(os.listdir(f"{directory}/bin"))
    except OSError as error:
        raise UsageError(f"{directory} is no virtual environment: {error.strerror}") from error
    for name in names:
        path = f"{directory}/bin/{name}"
        if not name.startswith("python") or not os.path.islink(path):
            continue
        target = os.path.join(f"{directory}/bin", os.readlink(path))
        mount = _mount_of(os.path.normpath(target), mounts)
        if mount is not None:
            found = _label(mounts[mount], mount, environ)
            _replace(path, script(target, found, environ.get("UENV_VIEW", "")))
    if found is None and not any(_is_shim(f"{directory}/bin/{name}") for name in names):
        raise UsageError(
            f"the Python of {directory} is not that of an image of this session",
            hint="make it with the image's: python3 -m venv --system-site-packages DIRECTORY",
        )
    return found


def script(python: str, label: str, views: str) -> str:
    """Return the text of the script; ``views`` is of the form of ``UENV_VIEW``."""
    option = ",".join(view.partition(":")[2] for view in views.split(",") if view)
    start = f"uenvctl start {f'--view={option} ' if option else ''}{label}"
    return SHIM.format(
        python=shlex.quote(python),
        label=shlex.quote(label),
        hint=shlex.quote(f"start it: {start}"),
        status=SessionError.exit_status,
    )


def _label(source: str, mount: str, environ: Mapping[str, str]) -> str:
    """Return a description of the image that is mounted here; the variables only give the digest its name."""
    labels, digests = (environ.get(name, "").split(",") for name in ("UENV_LABEL", "UENV_DIGEST"))
    if not source.startswith("sha256:"):
        return f"{source}:{mount}"
    name = next((label for label, digest in zip(labels, digests, strict=False) if digest == source), "")
    return f"{name.partition('@sha256:')[0]}@{source}"


def _mount_of(path: str, mounts: Mapping[str, str]) -> str | None:
    return max((mount for mount in mounts if path.startswith(mount + "/")), key=len, default=None)


def _found(program: str, path: str) -> Iterator[str]:
    return (one for directory in path.split(":") if os.access(one := f"{directory}/{program}", os.X_OK))


def _is_shim(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return b"Written by uenvctl venv" in file.read(200)
    except OSError:
        return False


def _replace(path: str, text: str) -> None:
    fresh = f"{path}.new"
    with open(fresh, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
        os.fchmod(file.fileno(), 0o755)
    os.replace(fresh, path)  # noqa: PTH105
