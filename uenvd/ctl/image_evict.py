"""``uenvctl image evict``: remove an image from this node's cache."""

from __future__ import annotations

import os
from collections.abc import Sequence

from uenvd.ctl import output
from uenvd.ctl.arguments import FLAG, parse
from uenvd.ctl.client import REGISTRY_ANSWER_S, Client, socket_path
from uenvd.ctl.own import refuse_own
from uenvd.errors import UsageError
from uenvd.label import parse_description

HELP = """\
usage: uenvctl image evict UENV

Remove an image from this node's cache; for root only. It is fetched again when somebody asks for it. An image that is
in use is not removed. Nobody has to do this: uenvd makes room by itself.

  --json         {"label": TEXT, "freed_bytes": N}
  --socket PATH  uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control

examples:
  uenvctl image evict prgenv-gnu/23.11:v1
"""

OPTIONS = {"--json": FLAG}
TAKES = ("cached",)


def main(argv: Sequence[str]) -> int:
    """Handle the command; return the exit status."""
    arguments = parse(argv, command="image evict", options=OPTIONS, words=(1, 1))
    if "--help" in arguments.flags:
        print(HELP, end="")
        return 0
    description = parse_description(arguments.words[0])
    refuse_own(description, "it is not in the cache", "remove its file with: rm")
    if description.label is None:
        raise UsageError(
            f"{description.path} is a file, not an image of the cache", hint="remove it with: rm"
        )
    with Client(socket_path(arguments.values.get("--socket"), os.environ)) as client:
        frame = client.call("evict", answer_s=REGISTRY_ANSWER_S, uenv=str(description.label)).frame
    freed = frame.get("freed_bytes")
    freed = freed if isinstance(freed, int) else 0
    if "--json" in arguments.flags:
        output.data_json({"label": str(description.label), "freed_bytes": freed})
    else:
        output.note(f"removed {description.label}: {output.megabytes(freed)} MB freed")
    return 0
