"""Line charts as inline SVG: figures over releases. Pure; equal charts give equal text.

Colours come from the page's style sheet by class, so that a chart follows light and dark; each series also has a marker of its own shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from markupsafe import Markup

from uenvd.publish.catalogue.model import Chart, Point, Series, printable

WIDTH: Final = 420
HEIGHT: Final = 210
_LEFT: Final = 52
_RIGHT: Final = 16
_TOP: Final = 14
_BOTTOM: Final = 30
_TICKS: Final = 4
COLOURS: Final = 6
"""Classes ``s0`` ... of the style sheet; a seventh series begins again."""
_MAX_NAMES: Final = 7
_NEAR: Final = 0.5
"""A chart begins at zero where its values differ by more than this part of the largest."""
_SHAPES: Final = (
    '<circle cx="{x}" cy="{y}" r="4"/>',
    '<rect x="{x0}" y="{y0}" width="7" height="7"/>',
    '<path d="M{x} {up}l4.6 8h-9.2z"/>',
    '<path d="M{x} {up}l5 5l-5 5l-5 -5z"/>',
    '<path d="M{x} {down}l4.6 -8h-9.2z"/>',
    '<circle cx="{x}" cy="{y}" r="2.6"/>',
)


def plot(chart: Chart) -> Markup:
    """Draw a chart. What it shows is in its label too, for those who cannot see it."""
    low, high, step = _scale(chart.series)
    across = (WIDTH - _LEFT - _RIGHT) / max(len(chart.columns) - 1, 1)

    def x_of(column: int) -> float:
        return _LEFT + (across * column if len(chart.columns) > 1 else (WIDTH - _LEFT - _RIGHT) / 2)

    def y_of(value: float) -> float:
        return _TOP + (HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    parts = [
        Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            WIDTH, HEIGHT, summary(chart)
        )
    ]
    for number in range(round((high - low) / step) + 1):
        value = low + number * step
        y = _round(y_of(value))
        parts.append(
            Markup('<path class="grid" d="M{} {}H{}"/><text class="tick" x="{}" y="{}">{}</text>').format(
                _LEFT, y, WIDTH - _RIGHT + 8, _LEFT - 8, _round(y_of(value) + 4), number_text(value)
            )
        )
    parts += [_name(chart, column, x_of(column)) for column in _named(len(chart.columns))]
    if len(chart.series) == 1:
        parts.append(_bounds(chart.series[0], low, high, x_of, y_of))
    for index, series in enumerate(chart.series):
        places = [(x_of(point.column), y_of(point.figure.value)) for point in series.points]
        line = "M" + "L".join(f"{_round(x)} {_round(y)}" for x, y in places)
        parts.append(Markup('<g class="s{}"><path class="line" d="{}"/>').format(index % COLOURS, line))
        parts += [
            _marker(series, point, index, x, y) for point, (x, y) in zip(series.points, places, strict=True)
        ]
        parts.append(Markup("</g>"))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def legend_mark(index: int) -> Markup:
    """Draw the marker of a series for the legend."""
    shape = Markup(_shape(index, 8, 8))  # noqa: S704 - of `_SHAPES` and numbers
    return Markup('<svg class="mark s{}" viewBox="0 0 16 16" aria-hidden="true">{}</svg>').format(
        index % COLOURS, shape
    )


def summary(chart: Chart) -> str:
    """Say in words what a chart shows."""
    lines = [
        f"{one.name} from {number_text(one.points[0].figure.value)} to {number_text(one.points[-1].figure.value)} {chart.unit}"
        if len(one.points) > 1
        else f"{one.name} {number_text(one.points[0].figure.value)} {chart.unit}"
        for one in chart.series
    ]
    return printable(
        f"{chart.variable} of {chart.test} over {len(chart.columns)} releases: " + "; ".join(lines)
    )


def number_text(value: float) -> str:
    """Return a number with at most four digits that matter."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        digits = max(0, 3 - math.floor(math.log10(abs(value))))
        text = f"{value:.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.3g}"


def _marker(series: Series, point: Point, index: int, x: float, y: float) -> Markup:
    figure = point.figure
    tip = f"{series.name}, {point.release.version}:{point.release.tag}: {number_text(figure.value)} {figure.unit}".rstrip()
    shape = Markup(_shape(index, x, y))  # noqa: S704 - of `_SHAPES` and numbers
    return Markup("<g><title>{}</title>{}</g>").format(printable(tip), shape)


def _shape(index: int, x: float, y: float) -> str:
    return _SHAPES[index % COLOURS].format(
        x=_round(x), y=_round(y), x0=_round(x - 3.5), y0=_round(y - 3.5), up=_round(y - 5), down=_round(y + 5)
    )


def _bounds(
    series: Series, low: float, high: float, x_of: Callable[[int], float], y_of: Callable[[float], float]
) -> Markup:
    """Draw what the test of the newest release accepts."""
    newest = series.points[-1]
    bounds = [
        bound
        for bound in (newest.figure.lower, newest.figure.upper)
        if bound is not None and low <= bound <= high
    ]
    first, last = x_of(series.points[0].column), x_of(newest.column)
    if first == last:
        first, last = first - 20, last + 20
    return Markup("").join(
        Markup('<path class="bound" d="M{} {}H{}"><title>{}</title></path>').format(
            _round(first), _round(y_of(bound)), _round(last), f"accepted limit: {number_text(bound)}"
        )
        for bound in bounds
    )


def _name(chart: Chart, column: int, x: float) -> Markup:
    last = len(chart.columns) - 1
    anchor = "middle" if len(chart.columns) == 1 or 0 < column < last else ("start" if column == 0 else "end")
    shown = x + (-6 if anchor == "start" else 8 if anchor == "end" else 0)
    return Markup('<text class="name" text-anchor="{}" x="{}" y="{}">{}</text>').format(
        anchor, _round(shown), HEIGHT - 9, chart.columns[column].removesuffix(":")[:14]
    )


def _named(count: int) -> list[int]:
    """Return which columns get their name below: not so many that they touch."""
    if count <= _MAX_NAMES - 2:
        return list(range(count))
    every = math.ceil((count - 1) / (_MAX_NAMES - 3))
    return [column for column in range(0, count - 1, every) if count - 1 - column >= every] + [count - 1]


def _scale(series: Sequence[Series]) -> tuple[float, float, float]:
    """Return (lowest, highest, step) of the vertical axis: round numbers, and all values within."""
    figures = [point.figure for one in series for point in one.points]
    values = [figure.value for figure in figures]
    if len(series) == 1:
        newest = series[0].points[-1].figure
        near = max(abs(value) for value in values) * 3
        values += [
            bound for bound in (newest.lower, newest.upper) if bound is not None and abs(bound) <= near
        ]
    low, high = min(values), max(values)
    if low > 0 and high - low > _NEAR * high:
        low = 0.0
    if high - low <= abs(high) * 1e-9:
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(
        (factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999), 10 * power
    )
    return math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step, step


def _round(value: float) -> float | int:
    rounded = round(value, 1)
    return int(rounded) if rounded == int(rounded) else rounded
