"""``uenvctl image pin``: keep an image in this node's cache, however long nobody uses it."""

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
usage: uenvctl image pin UENV

Keep an image that is in this node's cache there: uenvd does not remove it when it makes room. For root only. 'uenvctl
image pull' fetches an image, 'uenvctl image ls --here' shows which are pinned, 'uenvctl image unpin' lets it go again.

  --json         {"label": TEXT, "pinned": BOOL}
  --socket PATH  uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control

examples:
  uenvctl image pin prgenv-gnu/24.11:v1
"""

OPTIONS = {"--json": FLAG}
TAKES = ("cached",)


def main(argv: Sequence[str]) -> int:
    """Handle the command; return the exit status."""
    return set_pin(argv, command="image pin", text=HELP, pin=True)


def set_pin(argv: Sequence[str], *, command: str, text: str, pin: bool) -> int:
    """Handle ``command``, whose help is ``text``; return the exit status."""
    arguments = parse(argv, command=command, options=OPTIONS, words=(1, 1))
    if "--help" in arguments.flags:
        print(text, end="")
        return 0
    description = parse_description(arguments.words[0])
    refuse_own(description, "it is not in the cache", "such images are not evicted")
    if description.label is None:
        raise UsageError(
            f"{description.path} is a file, not an image of the cache", hint="files are not evicted"
        )
    label = str(description.label)
    with Client(socket_path(arguments.values.get("--socket"), os.environ)) as client:
        client.call("pin", answer_s=REGISTRY_ANSWER_S, uenv=label, pin=pin)
    if "--json" in arguments.flags:
        output.data_json({"label": label, "pinned": pin})
    else:
        output.note(f"{label} stays in the cache" if pin else f"{label} may be evicted again")
    return 0
