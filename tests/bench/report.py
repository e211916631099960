"""From the figures of all rounds to medians, ratios, pass or miss; as JSON, as a Markdown table, as a plot."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import ROWS, Row

OURS = ("channel-2", "channel-1", "pyfuse3")
"""The first of these that was measured is judged."""

Results = dict[str, dict[str, list[float]]]
"""Server -> row -> one figure for each round."""


@dataclass(frozen=True)
class Verdict:
    """One limit of one row."""

    row: Row
    against: str
    """A server's name, or empty for a limit in the row's own unit."""
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the limit is kept."""
        return self.value <= self.limit

    def __str__(self) -> str:
        what = f"{self.value:.2f}x {self.against}" if self.against else f"{self.value:.0f} {self.row.unit}"
        limit = f"{self.limit:g}x" if self.against else f"{self.limit:g}"
        return f"{'pass' if self.passed else 'MISS'}  {self.row.name}: {what.strip()}, limit {limit}"


def median(results: Results, server: str, row: str) -> float | None:
    """Return the median over the rounds, None when there is no figure."""
    figures = results.get(server, {}).get(row)
    return statistics.median(figures) if figures else None


def ratio(results: Results, server: str, other: str, row: str) -> float | None:
    """Return the median of the ratios of each round: what slows a round down slows both."""
    ours, theirs = results.get(server, {}).get(row), results.get(other, {}).get(row)
    if not ours or not theirs:
        return None
    ratios = [a / b for a, b in zip(ours, theirs, strict=True) if b > 0]
    return statistics.median(ratios) if ratios else None


def verdicts(results: Results) -> list[Verdict]:
    """Judge every limit for which there are figures."""
    server = next((name for name in OURS if name in results), None)
    found: list[Verdict] = []
    if server is None:
        return found
    for row in ROWS:
        for other, limit in (("kernel", row.against_kernel), ("squashfuse_ll", row.against_squashfuse)):
            value = ratio(results, server, other, row.name)
            if limit is not None and value is not None:
                found.append(Verdict(row, other, value, limit))
        value = median(results, server, row.name)
        if row.limit is not None and value is not None:
            found.append(Verdict(row, "", value, row.limit))
    return found


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def table(results: Results, servers: dict[str, str | None]) -> str:
    """Return the Markdown table; ``servers``: name -> why it is not there, or None."""
    lines = ["| |" + "".join(f" {name} |" for name in servers) + " ratios, limits |"]
    lines.append("|---|" + "---|" * (len(servers) + 1))
    judged = verdicts(results)
    for row in ROWS:
        if not any(row.name in figures for figures in results.values()):
            continue
        unit = f", {row.unit}" if row.unit else ""
        cells = [
            "not there" if why is not None else _cell(median(results, name, row.name))
            for name, why in servers.items()
        ]
        notes = [
            f"{'' if verdict.passed else '**'}{_short(verdict)}{'' if verdict.passed else ' MISS**'}"
            for verdict in judged
            if verdict.row is row
        ]
        lines.append(f"| {row.name}{unit} | " + " | ".join(cells) + f" | {'; '.join(notes)} |")
    return "\n".join(lines) + "\n"


def _short(verdict: Verdict) -> str:
    if not verdict.against:
        return f"<= {verdict.limit:g}"
    return f"{verdict.value:.2f} of {verdict.against} (<= {verdict.limit:g})"


def spread(results: Results) -> str:
    """Return one line for each server and row: lowest, median, highest."""
    lines = []
    for row in ROWS:
        for server, figures in results.items():
            if values := figures.get(row.name):
                low, high = min(values), max(values)
                lines.append(
                    f"{row.name:34}{server:>16}{low:11.3f}{statistics.median(values):11.3f}{high:11.3f}"
                )
    return "\n".join(lines)


class OtherMeasureError(Exception):
    """Results that were measured of another image, or on another machine."""


def merged(directory: Path, results: Results, about: dict[str, Any]) -> tuple[Results, dict[str, Any]]:
    """Return ``results`` and ``about`` with the rows that only `write` has left in the directory. Raises `OtherMeasureError`.

    Rows may be measured in several runs: what is compared lies within one row.
    """
    try:
        former = json.loads((directory / "serving.json").read_text())
    except FileNotFoundError:
        return results, about
    for fact in ("image", "kernel", "cores", "python"):
        if former["about"].get(fact) != about.get(fact):
            raise OtherMeasureError(
                f"{directory} holds results of another {fact}: {former['about'].get(fact)}"
            )
    measured = {row for figures in results.values() for row in figures}
    found: Results = {}
    for server in dict.fromkeys([*former["figures"], *results]):
        figures = former["figures"].get(server, {})
        found[server] = {row: values for row, values in figures.items() if row not in measured}
        found[server].update(results.get(server, {}))
    rounds = min((len(values) for figures in found.values() for values in figures.values()), default=0)
    return found, {**former["about"], **about, "rounds": rounds}


def write(directory: Path, results: Results, about: dict[str, Any], servers: dict[str, str | None]) -> None:
    """Write ``serving.json``, ``serving.md`` and, where matplotlib is installed, ``serving.svg``."""
    directory.mkdir(parents=True, exist_ok=True)
    judged = verdicts(results)
    data = {
        "about": about,
        "figures": results,
        "medians": {
            server: {row: statistics.median(values) for row, values in figures.items() if values}
            for server, figures in results.items()
        },
        "verdicts": [
            {
                "row": verdict.row.name,
                "against": verdict.against or None,
                "value": verdict.value,
                "limit": verdict.limit,
                "passed": verdict.passed,
            }
            for verdict in judged
        ],
    }
    (directory / "serving.json").write_text(json.dumps(data, indent=1) + "\n")
    facts = "".join(f"- {key}: {value}\n" for key, value in about.items())
    passed = sum(verdict.passed for verdict in judged)
    text = f"# Serving an image\n\nMedians; smaller is better. `docs/performance.md` explains the rows.\n\n{facts}\n"
    text += table(results, servers) + f"\n{passed} of {len(judged)} limits kept.\n"
    (directory / "serving.md").write_text(text)
    plot(directory / "serving.svg", results)


def plot(file: Path, results: Results) -> bool:
    """Draw, for each row, every server's time as a multiple of the kernel's squashfs. Return False without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "uenvd"
    from matplotlib import pyplot

    rows = [row for row in ROWS if ratio(results, "kernel", "kernel", row.name) is not None]
    if not rows:
        return False
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(rows) + 1.6))
    places = range(len(rows))
    for number, server in enumerate(name for name in results if name != "kernel"):
        values = [ratio(results, server, "kernel", row.name) or math.nan for row in rows]
        axes.plot(values, places, "osD^v"[number % 5], label=server, markersize=6, alpha=0.85)
    for place, row in enumerate(rows):
        if row.against_kernel is not None:
            axes.plot([row.against_kernel] * 2, [place - 0.3, place + 0.3], color="black", linewidth=2)
    axes.plot([], [], color="black", linewidth=2, label="limit")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(list(places), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("time as a multiple of kernel squashfs (left is faster)")
    axes.grid(axis="x", which="both", linewidth=0.3)
    axes.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    return True
