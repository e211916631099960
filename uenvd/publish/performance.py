"""Performance figures of test reports, and how those of two versions differ. Pure.

ReFrame writes ``perfvalues: {"system:partition:variable": [value, reference, lower, upper, unit, verdict]}`` into each test case; the bounds
are fractions of the reference, null where there is none (ReFrame 4, ``reframe/schemas/runreport.json``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final, Literal

from uenvd.publish.reframe.report import parse

Better = Literal["higher", "lower", "unknown"]

DEFAULT_THRESHOLD: Final = 0.10
"""A change for the worse beyond this fraction is a regression, where no policy says else."""
MAX_FIGURES: Final = 10_000
_TIME_UNITS: Final = frozenset({"s", "ms", "us", "µs", "ns", "min", "h", "sec", "seconds", "second"})
_RATE = re.compile(r"(/|\bper )\s*(s|sec|second|us|ms|ns|day|h)\b|bps\b|flops?\b|\bHz\b", re.IGNORECASE)


@dataclass(frozen=True)
class Figure:
    """One number that a test measured."""

    test: str
    """ReFrame's display name: with the parameters."""
    system: str
    """``system:partition``."""
    variable: str
    value: float
    unit: str
    """As the test says it; may be empty."""
    reference: float | None = None
    lower: float | None = None
    """The lowest value the test accepts, in ``unit``."""
    upper: float | None = None
    """The highest."""
    environment: str = ""
    """ReFrame's name of the environment."""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What stays the same from version to version: (test, system, environment, variable)."""
        return (self.test, self.system, self.environment, self.variable)

    @property
    def better(self) -> Better:
        """Which way is better: by the one bound that the test gives, else by the unit."""
        if (self.lower is None) != (self.upper is None):
            return "higher" if self.upper is None else "lower"
        if self.unit.strip().lower() in _TIME_UNITS:
            return "lower"
        return "higher" if _RATE.search(self.unit) else "unknown"

    def __str__(self) -> str:
        where = f"{self.system}+{self.environment}" if self.environment else self.system
        return f"{self.test} @{where}: {self.variable} = {self.value:.6g} {self.unit}".rstrip()


@dataclass(frozen=True)
class Change:
    """A figure and what it was in the version before."""

    before: Figure
    after: Figure
    threshold: float
    """A fraction."""

    @property
    def ratio(self) -> float:
        """After divided by before; infinite where it was zero and is not."""
        if self.before.value == 0:
            return 1.0 if self.after.value == 0 else math.inf
        return self.after.value / self.before.value

    @property
    def worse(self) -> bool:
        """Whether it is worse by more than the threshold. A figure of which nobody knows what is better never is."""
        if self.after.better == "lower":
            return self.ratio > 1 + self.threshold
        return self.after.better == "higher" and self.ratio < 1 - self.threshold

    def __str__(self) -> str:
        after = self.after
        return (
            f"{after.test} @{after.system}: {after.variable} {self.before.value:.6g} -> {after.value:.6g} {after.unit}".rstrip()
            + f" ({(self.ratio - 1) * 100:+.1f} %)"
        )


@dataclass(frozen=True)
class Thresholds:
    """How much worse a figure may become: a default, and ``TEST:VARIABLE`` patterns of which the first that matches counts."""

    default: float = DEFAULT_THRESHOLD
    patterns: Mapping[str, float] = field(default_factory=dict)

    def of(self, figure: Figure) -> float:
        """Return the fraction for a figure."""
        name = f"{figure.test}:{figure.variable}"
        return next(
            (value for pattern, value in self.patterns.items() if fnmatchcase(name, pattern)), self.default
        )


@dataclass(frozen=True)
class Comparison:
    """The figures of two reports."""

    changes: tuple[Change, ...]
    lost: tuple[Figure, ...]
    """Measured before and not any more."""

    @property
    def worse(self) -> tuple[Change, ...]:
        """The regressions."""
        return tuple(change for change in self.changes if change.worse)


def figures(report: bytes) -> list[Figure]:
    """Return what the tests of a report measured, in its order; of a test that ran again the last run.

    What is no finite number is left out; at most `MAX_FIGURES`. Raises `ReportError` for what is no report of ReFrame's.
    """
    found: dict[tuple[str, str, str, str], Figure] = {}
    for run in parse(report)["runs"]:
        for test in run["testcases"]:
            values = test.get("perfvalues")
            if not isinstance(values, dict):
                continue
            for key, body in values.items():
                figure = _figure(test, key, body)
                if figure is not None and len(found) < MAX_FIGURES:
                    found[figure.key] = figure
    return list(found.values())


def compare(
    before: Sequence[Figure], after: Sequence[Figure], thresholds: Thresholds | None = None
) -> Comparison:
    """Compare the figures of two versions; what is new is no change. A figure in another unit is another figure."""
    limits = thresholds or Thresholds()
    now = {figure.key: figure for figure in after}
    changes, lost = [], []
    for old in before:
        new = now.get(old.key)
        if new is None or new.unit != old.unit:
            lost.append(old)
        else:
            changes.append(Change(old, new, limits.of(new)))
    return Comparison(tuple(changes), tuple(lost))


def _figure(test: Mapping[str, Any], key: str, body: Any) -> Figure | None:  # noqa: ANN401 - any JSON value
    if not isinstance(body, list) or len(body) < 5:
        return None
    value, reference, lower, upper = (_number(item) for item in body[:4])
    if value is None:
        return None
    system, _, variable = key.rpartition(":")
    return Figure(
        test=_text(test.get("display_name") or test.get("name")),
        system=_text(system or f"{test.get('system')}:{test.get('partition')}"),
        variable=_text(variable),
        value=value,
        unit=_text(body[4]),
        reference=reference,
        lower=_bound(reference, lower),
        upper=_bound(reference, upper),
        environment=_text(test.get("environ")),
    )


def _bound(reference: float | None, fraction: float | None) -> float | None:
    """Return the bound in the figure's unit. A reference of 0 is ReFrame's way to say that there is none."""
    if not reference or fraction is None:
        return None
    return reference + abs(reference) * fraction


def _number(value: Any) -> float | None:  # noqa: ANN401
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _text(value: Any) -> str:  # noqa: ANN401
    return value[:300] if isinstance(value, str) else ""
