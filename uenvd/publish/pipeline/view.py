"""What a run shows: a table that is redrawn on a terminal, lines elsewhere, JSON events for programs; and the files that CI systems read."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TextIO
from xml.etree import ElementTree

from uenvd.oci.files import storage_errors, write_atomically
from uenvd.publish.console import clean, say
from uenvd.publish.pipeline.runner import Progress
from uenvd.publish.pipeline.tasks import StageResult, State

_REDRAW_S: Final = 0.5
_SIGNS: Final = {
    State.WAITING: "·",
    State.QUEUED: "…",
    State.RUNNING: "▶",
    State.PASSED: "✓",
    State.FAILED: "✗",
    State.SKIPPED: "–",
    State.CANCELLED: "■",
}
_COLOURS: Final = {State.PASSED: "32", State.FAILED: "31;1", State.RUNNING: "36", State.CANCELLED: "33"}
_URGENT: Final = (
    State.FAILED,
    State.RUNNING,
    State.CANCELLED,
    State.QUEUED,
    State.SKIPPED,
    State.WAITING,
    State.PASSED,
)


def seconds_text(seconds: float) -> str:
    """Return ``3 s``, ``2:05`` or ``1:02:05``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def line_of(one: Progress) -> str:
    """Return what is said of a change where nothing is redrawn."""
    words = [f"{one.task.name}: {one.state}"]
    if one.state.final and one.result is not None and one.result.reused and one.state is State.PASSED:
        words.append("(it was done before)")
    elif one.state.final and one.seconds:
        words.append(f"in {seconds_text(one.seconds)}")
    if one.state in (State.QUEUED, State.RUNNING) and one.job is not None:
        words.append(f"[{one.job}]")
    text = " ".join(words) + (f": {one.detail}" if one.detail else "")
    if one.state is State.FAILED and one.log:
        text += f" (log: {one.log})"
    return text


class Lines:
    """Says each change of state in a line of its own, on stderr."""

    def changed(self, one: Progress) -> None:
        """Say a change."""
        say(line_of(one))

    def tick(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Table:
    """Redraws a table of all cells on a terminal: a line each, a column for each stage; as many as fit, those that matter first."""

    def __init__(
        self,
        everything: Callable[[], Sequence[Progress]],
        last_line: Callable[[Progress], str],
        stream: TextIO,
    ) -> None:
        self._everything = everything
        self._last_line = last_line
        self._stream = stream
        self._drawn = 0
        self._drawn_s = 0.0
        self._began_s = time.monotonic()

    def changed(self, one: Progress) -> None:
        """Redraw at once; a failure also stays above the table."""
        if one.state is State.FAILED:
            self._draw([line_of(one)])
        else:
            self._draw()

    def tick(self) -> None:
        """Redraw, a few times a second at most."""
        if time.monotonic() - self._drawn_s >= _REDRAW_S:
            self._draw()

    def close(self) -> None:
        """Leave the table as it is."""
        self._draw()
        self._drawn = 0

    def _draw(self, above: Sequence[str] = ()) -> None:
        size = _size(self._stream)
        lines = table(
            self._everything(), self._last_line, size.columns, size.lines - 1, time.monotonic(), self._began_s
        )
        text = f"\x1b[{self._drawn}A" if self._drawn else ""
        text += "".join(f"\r\x1b[2K{clean(line)}\n" for line in above)
        text += "".join(f"\r\x1b[2K{line}\n" for line in lines) + "\x1b[J"
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            return
        self._drawn, self._drawn_s = len(lines), time.monotonic()


def _size(stream: TextIO) -> os.terminal_size:
    try:
        size = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        return os.terminal_size((80, 24))
    return size if size.columns > 0 and size.lines > 0 else os.terminal_size((80, 24))


def table(
    everything: Sequence[Progress],
    last_line: Callable[[Progress], str],
    columns: int,
    rows: int,
    now_s: float,
    began_s: float,
) -> list[str]:
    """Return the lines of the table, at most ``rows`` of at most ``columns`` characters (escape sequences not counted)."""
    cells: dict[str, list[Progress]] = {}
    for one in everything:
        cells.setdefault(one.task.cell.id, []).append(one)
    counts = {
        state: number for state in State if (number := sum(one.state is state for one in everything)) > 0
    }
    summary = ", ".join(f"{number} {state}" for state, number in counts.items())
    head = f"{len(cells)} cells, {len(everything)} jobs: {summary} ({seconds_text(now_s - began_s)})"
    room = max(1, rows - 1)
    shown = list(cells)
    hidden = 0
    if len(shown) > room:
        urgency = {cell: min(_URGENT.index(one.state) for one in ones) for cell, ones in cells.items()}
        first = sorted(shown, key=lambda cell: urgency[cell])[: max(1, room - 1)]
        shown = [cell for cell in shown if cell in first]
        hidden = len(cells) - len(shown)
    width = min(max((len(cell) for cell in shown), default=0), max(10, columns // 2))
    lines = [head[:columns]]
    for cell in shown:
        lines.append(_row(cell, cells[cell], last_line, width, columns, now_s))
    if hidden:
        lines.append(f"… and {hidden} more cells"[:columns])
    return lines


def _row(
    name: str,
    ones: Sequence[Progress],
    last_line: Callable[[Progress], str],
    width: int,
    columns: int,
    now_s: float,
) -> str:
    plain, text = name[:width].ljust(width), clean(name[:width].ljust(width))
    note = ""
    for one in ones:
        running = one.state is State.RUNNING and one.began_s is not None
        seconds = now_s - one.began_s if running and one.began_s is not None else one.seconds
        time_text = seconds_text(seconds) if seconds >= 1 or running else ""
        word = f"  {_SIGNS[one.state]} {one.task.stage} {time_text:<6}"
        colour = _COLOURS.get(one.state)
        if len(plain) + len(word) > columns:
            break
        plain += word
        text += f"\x1b[{colour}m{word}\x1b[0m" if colour else word
        if one.state is State.FAILED or (not note and one.state is State.QUEUED):
            note = one.detail
        elif running:
            note = last_line(one)
        elif one.state is State.PASSED and one.detail:
            note = one.detail
    room = columns - len(plain) - 2
    if room >= 8 and note:
        note = clean(note.replace("\n", " "))
        text += "  " + (note if len(note) <= room else note[: room - 1] + "…")
    return text


class JsonEvents:
    """Writes a line of JSON to stdout for each change."""

    def changed(self, one: Progress) -> None:
        """Write a change."""
        result = one.result
        body = {
            "event": "stage",
            "time": round(time.time(), 3),
            "job": one.task.name,
            "cell": one.task.cell.id,
            "stage": one.task.stage,
            "state": one.state,
            "id": one.job,
            "seconds": round(one.seconds, 1),
            "digest": result.digest if result is not None else None,
            "reused": result.reused if result is not None else False,
            "detail": one.detail,
            "log": one.log or None,
        }
        print(json.dumps(body), flush=True)

    def finish(self, everything: Sequence[Progress], status: int) -> None:
        """Write the last line: what became of every cell."""
        cells = [
            {
                "cell": cell,
                "digest": digest,
                "stages": {one.task.stage: one.state for one in everything if one.task.cell.id == cell},
            }
            for cell, digest in digests(everything).items()
        ]
        print(json.dumps({"event": "end", "status": status, "cells": cells}), flush=True)


def digests(everything: Sequence[Progress]) -> dict[str, str | None]:
    """Return the digest of each cell's image, where there is one."""
    found: dict[str, str | None] = {}
    for one in everything:
        digest = one.result.digest if one.result is not None else None
        found[one.task.cell.id] = found.get(one.task.cell.id) or digest
    return found


def summary_rows(everything: Sequence[Progress]) -> list[list[str]]:
    """Return the rows of the closing table: cell, what became of each stage, digest."""
    rows = []
    for cell, digest in digests(everything).items():
        mine = [one for one in everything if one.task.cell.id == cell]
        rows.append([cell, *(_outcome(one) for one in mine), digest or "-"])
    return rows


def _outcome(one: Progress) -> str:
    if one.state is State.PASSED and one.result is not None and one.result.reused:
        return "there"
    text = str(one.state)
    return f"{text} {seconds_text(one.seconds)}" if one.seconds >= 1 else text


def write_junit(path: Path, results: Sequence[tuple[str, str, StageResult | None, str]]) -> None:
    """Write a JUnit report.

    ``results``: (job name, state, result, tail of the log) of each stage; one suite each, with a case for the stage and one for each test.
    Raises `StorageError`.
    """
    root = ElementTree.Element("testsuites", name="uenvd-publish")
    for name, state, result, tail in results:
        suite = ElementTree.SubElement(root, "testsuite", name=name)
        seconds = f"{result.seconds:.1f}" if result is not None else "0.0"
        cases = [(name, "pass" if state == State.PASSED else "fail" if state == State.FAILED else "skip", "")]
        failure = result.failure if result is not None else None
        if failure is not None:
            cases = [(name, "fail", failure.message)]
        cases += result.cases if result is not None else ()
        for number, (case, outcome, reason) in enumerate(cases):
            element = ElementTree.SubElement(
                suite,
                "testcase",
                name=_xml(case),
                classname=_xml(name),
                time=seconds if number == 0 else "0.0",
            )
            if outcome in ("fail", "fail_deps", "abort", "xpass"):
                failed = ElementTree.SubElement(
                    element, "failure", message=_xml(reason.splitlines()[0] if reason else outcome)
                )
                failed.text = _xml(reason + (f"\n\n{tail}" if number == 0 and tail else ""))
            elif outcome == "skip":
                ElementTree.SubElement(element, "skipped")
        failures = sum(1 for _ in suite.iter("failure"))
        skipped = sum(1 for _ in suite.iter("skipped"))
        suite.attrib.update(
            tests=str(len(cases)), failures=str(failures), errors="0", skipped=str(skipped), time=seconds
        )
    data = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    with storage_errors(path, "write"):
        write_atomically(path, data, durable=False)


def _xml(text: str) -> str:
    """Return a text without the characters that XML cannot have."""
    return "".join(
        char
        for char in text
        if char in "\t\n"
        or 0x20 <= ord(char) <= 0xD7FF
        or 0xE000 <= ord(char) <= 0xFFFD
        or ord(char) >= 0x10000
    )


def write_dotenv(path: Path, result: StageResult, label: str) -> None:
    """Write the image's digest for the next job, in GitLab's form. Raises `StorageError`."""
    lines = [
        f"UENV_LABEL={label}",
        f"UENV_REPOSITORY={result.repository}",
        f"UENV_TAG={result.tag}",
        f"UENV_DIGEST={result.digest or ''}",
    ]
    with storage_errors(path, "write"):
        write_atomically(path, ("\n".join(lines) + "\n").encode(), durable=False)


def is_terminal() -> bool:
    """Whether stderr can be redrawn."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
