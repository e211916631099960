"""What the commands of uenvd-publish show: progress and notes on stderr, data on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Final

from uenvd.oci.remote import Progress

_BAR_EVERY_S: Final = 0.2
_LINE_EVERY_S: Final = 10.0


def say(text: str) -> None:
    """Write a line to stderr, without characters that could drive the terminal."""
    try:
        print(clean(text), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return


def reporter(doing: str) -> Progress:
    """Return a progress callback: a line that is rewritten on a terminal, one every 10 s elsewhere."""
    live = sys.stderr.isatty()
    last = time.monotonic()

    def report(done_bytes: int, total_bytes: int) -> None:
        nonlocal last
        now = time.monotonic()
        complete = done_bytes >= total_bytes
        if not complete and now - last < (_BAR_EVERY_S if live else _LINE_EVERY_S):
            return
        last = now
        percent = 100 * done_bytes // total_bytes if total_bytes else 100
        text = f"{doing} {percent:3d} % of {total_bytes / 1e6:.1f} MB"
        if live:
            sys.stderr.write(f"\r{text}" + ("\n" if complete else ""))
            sys.stderr.flush()
        elif not complete:
            say(text)

    return report


def show(text: str) -> None:
    """Write data to stdout."""
    sys.stdout.write(clean(text) + "\n")


def show_json(value: object) -> None:
    """Write a JSON document to stdout."""
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=True) + "\n")


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write an aligned table to stdout."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        show("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def clean(text: str) -> str:
    """Return a text without characters that could drive a terminal."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)
