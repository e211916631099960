"""``uenvctl image find``: what there is in the registry."""

from __future__ import annotations

from collections.abc import Sequence

from uenvd.ctl import own, records
from uenvd.errors import UsageError

HELP = """\
usage: uenvctl image find [LABEL]

List the images of the registry. Every field of the label may be left out; the name need only begin as given.

  --json         {"records": [...]}, see docs/json.md
  --no-header    only the rows
  --refresh      ask the registry, even if it was asked a moment ago
  --socket PATH  uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control

examples:
  uenvctl image find prgenv
  uenvctl image find prgenv-gnu/23.11%gh200
  uenvctl image find @'*'            of all systems
  uenvctl image find build::         of another namespace
"""

OPTIONS = records.OPTIONS
TAKES = ("label",)


def main(argv: Sequence[str]) -> int:
    """Handle the command; return the exit status."""
    arguments = records.parse_listing(argv, command="image find", options=OPTIONS, help_text=HELP)
    if arguments is None:
        return 0
    if own.asks_only_for_own(records.label_of(arguments)):
        raise UsageError(
            "your own images are not in the registry", hint=f"uenvctl image ls {records.label_of(arguments)}"
        )
    with records.connect(arguments) as client:
        found = records.ask(client, "find", arguments)
    nothing = "no image matches; all there is: uenvctl image find @'*'"
    return records.show(found, arguments, here=False, nothing=nothing)
