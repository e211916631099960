"""Figures of reports: what is read, which way is better, what counts as worse."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from support.reports import report
from uenvd.errors import ReportError
from uenvd.publish.performance import Figure, Thresholds, compare, figures


def measured(*cases: tuple[str, dict[str, Any]]) -> bytes:
    """Return a report in which these tests measured these ``perfvalues``."""
    document = json.loads(report([(name, "pass") for name, _values in cases]))
    for test, (_name, values) in zip(document["runs"][0]["testcases"], cases, strict=True):
        test["perfvalues"] = values
    return json.dumps(document).encode()


def figure(value: float, unit: str = "GB/s", **more: Any) -> Figure:
    return Figure("Stream", "demo:local", "triad", value, unit, **more)


def test_values_bounds_and_names_are_read() -> None:
    raw = measured(
        ("Stream %n=2", {"demo:local:triad": [90.0, 100, -0.1, None, "GB/s", "pass"]}), ("Plain", {})
    )
    (found,) = figures(raw)
    assert found == Figure(
        "Stream %n=2", "demo:local", "triad", 90.0, "GB/s", 100.0, 90.0, None, environment="builtin"
    )
    assert found.better == "higher"
    assert str(found) == "Stream %n=2 @demo:local+builtin: triad = 90 GB/s"


def test_a_negative_reference_keeps_its_bounds_in_order() -> None:
    (found,) = figures(measured(("E", {"demo:local:energy": [-101.0, -100.0, -0.02, 0.02, "Ha", "pass"]})))
    assert (found.lower, found.upper) == (-102.0, -98.0)


@pytest.mark.parametrize(
    "body",
    [None, [], [1, 2], ["fast", 1, None, None, "s", "pass"], [True, 1, None, None, "s", None], [10**400, 0, 0, 0, "s", None]],
)  # fmt: skip
def test_what_is_no_number_is_left_out(body: object) -> None:
    assert figures(measured(("T", {"demo:local:x": body}))) == []
    with pytest.raises(ReportError):
        figures(b"[]")


def test_the_last_run_of_a_test_counts() -> None:
    document = json.loads(measured(("S", {"d:l:x": [1, 0, None, None, "s", "fail"]})))
    again = json.loads(json.dumps(document["runs"][0]))
    again["run_index"] = 1
    again["testcases"][0]["perfvalues"]["d:l:x"][0] = 2
    document["runs"].append(again)
    assert [one.value for one in figures(json.dumps(document).encode())] == [2.0]


@pytest.mark.parametrize(
    ("unit", "bounds", "better"),
    [
        ("s", {}, "lower"), ("us", {}, "lower"), ("GB/s", {}, "higher"), ("Gflops", {}, "higher"), ("ns/day", {}, "higher"),
        ("iterations", {}, "unknown"), ("iterations", {"upper": 5.0}, "lower"), ("s", {"lower": 5.0}, "higher"),
    ],
)  # fmt: skip
def test_which_way_is_better(unit: str, bounds: dict[str, float], better: str) -> None:
    assert figure(1.0, unit, **bounds).better == better


def test_a_change_for_the_worse_beyond_the_threshold_is_a_regression() -> None:
    def worse(before: float, after: float, unit: str, **thresholds: Any) -> bool:
        return bool(compare([figure(before, unit)], [figure(after, unit)], Thresholds(**thresholds)).worse)

    assert not worse(100, 91, "GB/s")
    assert worse(100, 89, "GB/s")
    assert not worse(100, 200, "GB/s")
    assert worse(100, 111, "s")
    assert not worse(100, 50, "s")
    assert worse(0, 1, "s")
    assert not worse(0, 0, "s")
    assert not worse(100, 1, "iterations")
    assert not worse(100, 60, "GB/s", patterns={"Stream*:triad": 0.5})
    assert worse(100, 40, "GB/s", patterns={"Stream*:triad": 0.5, "*": 0.9})
    assert math.isinf(compare([figure(0, "s")], [figure(1, "s")]).changes[0].ratio)


def test_what_is_lost_is_told_and_what_is_new_is_not() -> None:
    found = compare(
        [figure(1.0, "s"), figure(1.0, "s", environment="x")],
        [figure(1.0, "ms"), figure(1.0, "s", environment="y")],
    )
    assert (len(found.changes), len(found.lost)) == (0, 2)
