"""``uenvctl image pull``: fetch an image to this node before it is needed."""

from __future__ import annotations

import os
from collections.abc import Sequence

from uenvd.ctl import lockfile, output
from uenvd.ctl.arguments import FLAG, Arguments, parse
from uenvd.ctl.client import REGISTRY_ANSWER_S, Client, socket_path
from uenvd.ctl.own import refuse_own
from uenvd.errors import UsageError
from uenvd.label import parse_descriptions

HELP = """\
usage: uenvctl image pull UENV[,UENV...]
       uenvctl image pull --locked [UENV[,UENV...]]

Fetch images into this node's cache, with progress on stderr. Nobody has to: an image that is asked for is fetched by
itself. The images' digests are printed.

  --locked           the bytes that uenv.lock names; without UENV, all of them
  --lock-file PATH   this lock file instead of uenv.lock here or in a directory above
  --json             {"images": [...]}, see docs/json.md
  --refresh          ask the registry what the label means, even if that was asked a moment ago
  --socket PATH      uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control

examples:
  uenvctl image pull prgenv-gnu/23.11
  srun --ntasks-per-node=1 uenvctl image pull --locked
"""

OPTIONS = {"--json": FLAG, "--refresh": FLAG, **lockfile.OPTIONS}
TAKES = ("registry",)


def main(argv: Sequence[str]) -> int:
    """Handle the command; return the exit status."""
    arguments = parse(argv, command="image pull", options=OPTIONS, words=(0, 1))
    if "--help" in arguments.flags:
        print(HELP, end="")
        return 0
    wanted = _wanted(arguments)
    for one in parse_descriptions(wanted):
        if one.path is not None:
            raise UsageError(f"{one.path} is a file: there is nothing to pull")
        refuse_own(one, "there is nothing to pull")
    path = socket_path(arguments.values.get("--socket"), os.environ)
    with Client(path) as client, output.Progress() as progress:
        frame = client.call(
            "pull",
            answer_s=REGISTRY_ANSWER_S,
            uenv=wanted,
            refresh="--refresh" in arguments.flags or None,
            on_event=progress,
        ).frame
    for note in frame.get("notes") or ():
        output.note(str(note))
    images = [image for image in frame.get("images") or () if isinstance(image, dict)]
    if "--json" in arguments.flags:
        output.data_json({"images": images})
    elif images:
        output.data(output.table((), [(str(one.get("label")), str(one.get("digest"))) for one in images]))
    return 0


def _wanted(arguments: Arguments) -> str:
    if arguments.words:
        return lockfile.pinned_by(arguments, arguments.words[0])
    if "--locked" not in arguments.flags and "--lock-file" not in arguments.values:
        raise UsageError("too few arguments", hint="see: uenvctl image pull --help")
    return ",".join(str(one.pinned) for one in lockfile.chosen(arguments).images)
