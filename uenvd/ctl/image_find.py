"""``uenvctl image find``: what there is in the registry."""

from __future__ import annotations

from collections.abc import Sequence

from uenvd.ctl.records import list_records

HELP = """\
usage: uenvctl image find [LABEL]

List the images of the registry. Every field of the label may be left out; the name need only begin as given.
The column 'here' tells whether the image is on this node already.

  --json         {"records": [{name, version, tag, system, uarch, namespace, digest, id, size_bytes, date, cached}]}
  --no-header    only the rows
  --refresh      ask the registry, even if it was asked a moment ago
  --socket PATH  uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control

examples:
  uenvctl image find prgenv
  uenvctl image find prgenv-gnu/23.11%gh200
  uenvctl image find @'*'            of all systems
  uenvctl image find build::         of another namespace
"""


def main(argv: Sequence[str]) -> int:
    """Handle the command; return the exit status."""
    return list_records(
        argv,
        command="image find",
        op="find",
        help_text=HELP,
        nothing="no image matches; all there is: uenvctl image find @'*'",
    )
