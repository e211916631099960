"""What the user sees: data on stdout, everything else on stderr.

Texts that come from an image, a registry or the daemon go through `printable`, so that they cannot drive the terminal.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from uenvd.errors import UenvError
from uenvd.label import Description

PROGRAM = "uenvctl"
_RED, _CYAN = 31, 36
_BAR_WIDTH = 24
_FIRST_LINE_S = 1.0
_LINE_EVERY_S = 10.0
_BAR_EVERY_S = 0.1


def printable(text: str) -> str:
    """Return the text with everything but printable characters and newlines replaced by ``?``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def coloured(stream: Any) -> bool:  # noqa: ANN401 - a text stream
    """Tell whether to colour what goes to this stream (https://no-color.org). Colour is never the only sign of anything."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb":
        return False
    try:
        return bool(stream.isatty())
    except (ValueError, AttributeError):  # closed or absent
        return False


def say(text: str, *, lead: str = "", colour: int = 0) -> None:
    """Write one line to stderr; a stderr that is closed or full does not matter.

    `lead` stands before the text, coloured with the SGR number `colour` where colours are wanted.
    """
    if lead:
        lead = f"\x1b[{colour}m{lead}\x1b[0m " if colour and coloured(sys.stderr) else lead + " "
    try:
        sys.stderr.write(f"{lead}{printable(text)}\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        return


def note(text: str) -> None:
    """Tell the user something that is not an error."""
    say(text, lead=f"{PROGRAM}:")


def report(error: UenvError) -> None:
    """Write an error and its hint to stderr."""
    say(error.message, lead=f"{PROGRAM}:", colour=_RED)
    if error.hint:
        say(error.hint, lead="hint:", colour=_CYAN)


def mention_files(descriptions: Iterable[Description]) -> None:
    """Tell a user who named a file as if it were a label how to name the file."""
    for one in descriptions:
        if one.label is not None and str(one.label) == one.label.name and os.path.isfile(one.label.name):  # noqa: PTH113
            note(f"'{one.label.name}' is taken as a label; the file of this name is ./{one.label.name}")


def data(text: str) -> None:
    """Write data to stdout. Raises BrokenPipeError when nobody reads it, other OSErrors when it cannot be stored."""
    sys.stdout.write(printable(text) + "\n")


SCHEMA_VERSION = 1
"""Of all JSON that uenvctl writes (docs/json.md). Keys may be added; it changes when one goes or means something else."""


def data_json(fields: Mapping[str, Any]) -> None:
    """Write an object as indented JSON to stdout, with the version of the schema."""
    data(json.dumps({"schema_version": SCHEMA_VERSION, **fields}, indent=2))


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()
) -> str:
    """Align rows in columns two spaces apart; columns in `right` are right-aligned; an empty header is left out."""
    lines = [
        [printable(cell).replace("\n", " ") for cell in row] for row in ([header, *rows] if header else rows)
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def megabytes(size_bytes: int) -> str:
    """Return a size in MB (10^6 bytes), with one decimal when it is small."""
    size = size_bytes / 1e6
    return f"{size:.0f}" if size >= 10 else f"{size:.1f}"


class Progress:
    """Shows the daemon's progress events on stderr: a bar on a terminal, else a line after 1 s and every 10 s.

    Use as a context manager; leaving it clears the bar.
    """

    def __init__(self, *, clock: Any = time.monotonic, stream: Any = None) -> None:  # noqa: ANN401
        self._clock = clock
        self._stream = sys.stderr if stream is None else stream
        try:
            self._bar = bool(self._stream.isatty()) and os.environ.get("TERM") != "dumb"
        except (ValueError, AttributeError):  # closed or absent
            self._bar = False
        self._next = clock() + (0.2 if self._bar else _FIRST_LINE_S)
        self._drawn = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._drawn and self._bar:
            self._write("\r\x1b[K")
        self._drawn = False

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take one event of the protocol."""
        now = self._clock()
        if event.get("event") != "progress" or now < self._next:
            return
        text = self._text(event)
        if self._bar:
            self._next = now + _BAR_EVERY_S
            self._write("\r" + text[: self._columns() - 1] + "\x1b[K")
        else:
            self._next = now + _LINE_EVERY_S
            self._write(f"{PROGRAM}: {text}\n")
        self._drawn = True

    def _text(self, event: Mapping[str, Any]) -> str:
        done, total = (_count(event.get(key)) for key in ("done_bytes", "total_bytes"))
        message = printable(str(event.get("message") or event.get("phase") or "waiting")).replace("\n", " ")
        if total <= 0:
            return message
        share = min(1.0, done / total)
        what, _colon, numbers = message.partition(": ")
        if " MB" not in numbers:  # else they are shown better here
            what = message
        size = f"{megabytes(done)} of {megabytes(total)} MB"
        rate, left = (_count(event.get(key)) for key in ("rate_bytes_per_s", "eta_s"))
        if rate > 0:
            size += f", {megabytes(rate)} MB/s, {left // 60}:{left % 60:02} left"
        if not self._bar:
            return f"{what}: {size}"
        full = int(share * _BAR_WIDTH)
        return f"[{'#' * full}{'.' * (_BAR_WIDTH - full)}] {share:4.0%} {size}  {what}"

    def _columns(self) -> int:
        try:
            return max(20, os.get_terminal_size(self._stream.fileno()).columns)
        except (OSError, ValueError, AttributeError):
            return 80

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            return


def _count(value: object) -> int:
    return int(value) if isinstance(value, (int, float)) and 0 <= value < 2**63 else 0
