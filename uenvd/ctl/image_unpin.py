"""``uenvctl image unpin``: take back `uenvd.ctl.image_pin`."""

from __future__ import annotations

from collections.abc import Sequence

from uenvd.ctl.image_pin import OPTIONS, TAKES, set_pin

__all__ = ["HELP", "OPTIONS", "TAKES", "main"]

HELP = """\
usage: uenvctl image unpin UENV

Let uenvd remove an image from this node's cache again, when nobody uses it and it needs the room. For root only.

  --json         {"label": TEXT, "pinned": BOOL}
  --socket PATH  uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control

examples:
  uenvctl image unpin prgenv-gnu/24.11:v1
"""


def main(argv: Sequence[str]) -> int:
    """Handle the command; return the exit status."""
    return set_pin(argv, command="image unpin", text=HELP, pin=False)
