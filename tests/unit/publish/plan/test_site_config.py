"""No text makes the reader of a site's configuration fall over, and what it finds has a place."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.planning import SITE
from uenvd.publish.plan.model import cells_of
from uenvd.publish.plan.siteconfig import parse_site_config

TEXT = (SITE / "config.yaml").read_text()
LINES = TEXT.splitlines(keepends=True)
PIECES = [
    "",
    "x",
    ": ",
    "- ",
    "[",
    "]",
    "{}",
    "null",
    "'",
    '"',
    "\t",
    "  ",
    "&a ",
    "*a",
    "!!python/object ",
    "\x00",
    "ä",
    "<<: ",
    "1.10",
    "~",
]


def look(text: str) -> None:
    site = parse_site_config(text, "config.yaml")
    for problem in site.problems:
        assert problem.file == "config.yaml"
        assert problem.line >= 1, problem
        assert problem.text
    for cell in cells_of(site, SITE / "recipes"):
        assert cell.recipe.is_relative_to(SITE / "recipes"), cell
        assert cell.id.count("/") == 2


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_damaged_configurations(data: st.DataObject) -> None:
    lines = list(LINES)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines) - 1))
        kind = data.draw(st.sampled_from(["drop", "double", "piece", "indent", "cut"]))
        if kind == "drop":
            del lines[at]
        elif kind == "double":
            lines.insert(at, lines[at])
        elif kind == "indent":
            lines[at] = data.draw(st.sampled_from(["  ", "    ", "\t"])) + lines[at].lstrip()
        else:
            column = data.draw(st.integers(0, len(lines[at])))
            tail = "\n" if kind == "cut" else lines[at][column:]
            lines[at] = lines[at][:column] + data.draw(st.sampled_from(PIECES)) + tail
    look("".join(lines))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300))
def test_any_text(text: str) -> None:
    look(text)
    look(f"clusters: {{}}\nuenvs:\n  {text}")


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "x", "clusters:\nuenvs:\n", "clusters: []\nuenvs: 1", "[" * 2000, "a: &a [*a]", "clusters: &x {a: *x}\nuenvs: {}",
        "uenvs: {? [a]: {}}\nclusters: {}", "uenvs: {a: {1: {recipes: {z: {}}}}}\nclusters: {}", "uenvs: {a: []}\nclusters: {a: []}",
        "uenvs: {a: {b: {recipes: {z: a}, deploy: {c: {}}}}}\nclusters: {c: {targets: [1, [], {uarch: {}}]}}",
    ],
)  # fmt: skip
def test_odd_texts(text: str) -> None:
    look(text)
    assert parse_site_config(text, "config.yaml").problems or text.startswith("clusters:\n")
