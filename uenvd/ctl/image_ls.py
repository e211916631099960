"""``uenvctl image ls``: what is on this node already."""

from __future__ import annotations

from collections.abc import Sequence

from uenvd.ctl.records import list_records

HELP = """\
usage: uenvctl image ls [LABEL]

List the images in this node's cache: they start without a download. They are shared by all users; uenvd fetches and
removes them by itself. Every field of the label may be left out; the name need only begin as given.

  --json         {"records": [{name, version, tag, system, uarch, namespace, digest, id, size_bytes, date, cached}]}
  --no-header    only the rows
  --socket PATH  uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control
"""


def main(argv: Sequence[str]) -> int:
    """Handle the command; return the exit status."""
    return list_records(
        argv,
        command="image ls",
        op="images",
        help_text=HELP,
        nothing="no image on this node matches; in the registry: uenvctl image find",
    )
