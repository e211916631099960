"""What the catalogue shows: environments, their releases, and what was measured of them. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from uenvd.oci.index import LATEST, Entry
from uenvd.oci.reference import split_repository
from uenvd.publish.performance import Change, Figure
from uenvd.publish.reframe.report import Verdict

MAX_CHARTS: Final = 60
"""Of one environment; the first ones by name."""
_FAR: Final = 400


@dataclass(frozen=True)
class Release:
    """One image as the registry knows it: its entry in the index, and what is attached to it."""

    entry: Entry
    description: str = ""
    architecture: str | None = None
    packages: tuple[tuple[str, str], ...] = ()
    """(name, version), sorted; the version may be empty."""
    tests: Verdict | None = None
    """Of the newest report; None where there is none that can be read."""
    tested: str | None = None
    """RFC 3339: when."""
    figures: tuple[Figure, ...] = ()
    evidence: tuple[str, ...] = ()
    """Types of what is attached, sorted."""

    @cached_property
    def _parts(self) -> tuple[str, str, str, str, str]:
        parts = split_repository(self.entry.repository)
        assert parts is not None  # an index holds no other entry
        return parts

    @property
    def namespace(self) -> str:
        """``deploy``, or another one."""
        return self._parts[0]

    @property
    def system(self) -> str:
        """The cluster."""
        return self._parts[1]

    @property
    def uarch(self) -> str:
        """The microarchitecture."""
        return self._parts[2]

    @property
    def name(self) -> str:
        """Of the environment."""
        return self._parts[3]

    @property
    def version(self) -> str:
        """Of the environment."""
        return self._parts[4]

    @property
    def target(self) -> str:
        """``system%uarch``."""
        return f"{self.system}%{self.uarch}"

    @property
    def tag(self) -> str:
        """The tag to name it by: one that stays, if it has one."""
        stays = sorted((tag for tag in self.entry.tags if tag != LATEST), key=natural)
        return stays[-1] if stays else next(iter(self.entry.tags), "")

    @property
    def is_latest(self) -> bool:
        """Whether it is what users get who name no tag."""
        return LATEST in self.entry.tags

    @property
    def label(self) -> str:
        """``name/version:tag``: what users of its system type."""
        return f"{self.name}/{self.version}" + (f":{self.tag}" if self.tag else f"@{self.entry.digest}")

    @property
    def views(self) -> tuple[tuple[str, str], ...]:
        """(name, description)."""
        return self.entry.views or ()

    @property
    def day(self) -> str:
        """``YYYY-MM-DD``, or nothing."""
        found = re.match(r"\d{4}-\d\d-\d\d", self.entry.date or "")
        return found[0] if found else ""

    @property
    def order(self) -> tuple[str, tuple[tuple[int, int, str], ...], tuple[tuple[int, int, str], ...]]:
        """Sorts releases by time."""
        return (self.day, natural(self.version), natural(self.tag))


@dataclass(frozen=True)
class Use:
    """Commands that a reader may copy: a heading and the lines."""

    title: str
    text: str


@dataclass(frozen=True)
class Environment:
    """All releases of one name."""

    name: str
    releases: tuple[Release, ...]
    """The newest first; never empty."""

    @cached_property
    def latest(self) -> Release:
        """The release to begin with: the newest that nobody warns of."""
        usable = [one for one in self.releases if not one.entry.deprecated and one.tag]
        return next((one for one in usable if one.is_latest), (usable or [*self.releases])[0])

    @property
    def versions(self) -> tuple[str, ...]:
        """The newest first."""
        return tuple(dict.fromkeys(one.version for one in self.releases))

    @property
    def targets(self) -> tuple[str, ...]:
        """``system%uarch``, sorted."""
        return tuple(sorted({one.target for one in self.releases}))

    @property
    def systems(self) -> tuple[str, ...]:
        """Sorted."""
        return tuple(sorted({one.system for one in self.releases}))

    @property
    def page(self) -> str:
        """Name of its file. Names of environments are path components of a registry: no other characters."""
        return f"{self.name}.html"

    @property
    def words(self) -> str:
        """What a search looks at."""
        texts: list[str] = [self.name, self.latest.description]
        for one in self.releases:
            texts += [one.version, one.system, one.uarch, *one.entry.tags]
            texts += [name for name, _text in one.views]
        return " ".join(dict.fromkeys(" ".join(texts).lower().split()))

    def uses(self) -> tuple[Use, ...]:
        """Return how to use the latest release. What the image says of itself is quoted for the shell."""
        one = self.latest
        view = one.entry.default_view or next((name for name, _text in one.views), None)
        option = f" --view={shlex.quote(view)}" if view else ""
        return (
            Use("A session on a login node", f"uenvctl start{option} {one.label}"),
            Use("One command", f"uenvctl run{option} {one.label} -- COMMAND"),
            Use("A step of a job", f"srun --uenv={one.label}{option} COMMAND"),
            Use(
                "A job script",
                "#!/bin/bash\n"
                f"#SBATCH --uenv={one.label}\n"
                + (f"#SBATCH --view={shlex.quote(view)}\n" if view else "")
                + "srun COMMAND",
            ),
            Use(
                "Pin these very bytes",
                f"uenvctl run{option} {one.name}/{one.version}@{one.entry.digest} -- COMMAND",
            ),
        )

    def package_table(
        self, columns: int = 4
    ) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[str | None, ...]], ...]]:
        """Return (versions, rows of (package, its version in each; None where it is not)); of the newest versions, the newest first."""
        newest: dict[str, dict[str, str]] = {}
        for one in self.releases:
            if one.packages and one.version not in newest and len(newest) < columns:
                newest[one.version] = dict(one.packages)
        names = sorted({name for packages in newest.values() for name in packages})
        rows = tuple((name, tuple(packages.get(name) for packages in newest.values())) for name in names)
        return tuple(newest), rows

    @cached_property
    def charts(self) -> tuple[Chart, ...]:
        """What was measured, over the releases."""
        return charts_of(self.releases)


@dataclass(frozen=True)
class Point:
    """A figure of a release; ``column`` counts the releases of the chart from 0, the oldest first."""

    column: int
    release: Release
    figure: Figure


@dataclass(frozen=True)
class Series:
    """One machine's points, in the order of the columns; never empty."""

    name: str
    points: tuple[Point, ...]

    @property
    def change(self) -> Change | None:
        """From the release before to the last one."""
        if len(self.points) < 2:
            return None
        return Change(self.points[-2].figure, self.points[-1].figure, _THRESHOLD)


_THRESHOLD: Final = 0.10


@dataclass(frozen=True)
class Chart:
    """One variable of one test on all machines."""

    test: str
    variable: str
    unit: str
    columns: tuple[str, ...]
    """``version:tag``, the oldest first."""
    series: tuple[Series, ...]

    @property
    def better(self) -> str:
        """``higher is better``, ``lower is better``, or nothing."""
        found = self.series[0].points[-1].figure.better
        return "" if found == "unknown" else f"{found} is better"


def printable(value: object) -> str:
    """Return a text without characters that are not printable, those that change the direction of writing among them."""
    return "".join(
        char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in str(value)
    )


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """Return what sorts ``v10`` behind ``v9``."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    return tuple(
        (0, int(part), "") if part.isdecimal() and len(part) < _FAR else (1, 0, part) for part in parts
    )


def environments_of(releases: Iterable[Release]) -> tuple[Environment, ...]:
    """Group releases by name; names sorted, releases the newest first."""
    by_name: dict[str, list[Release]] = {}
    for one in releases:
        by_name.setdefault(one.name, []).append(one)
    return tuple(
        Environment(name, tuple(_newest_first(found)))
        for name, found in sorted(by_name.items(), key=lambda pair: pair[0])
    )


def _newest_first(releases: Iterable[Release]) -> list[Release]:
    by_place = sorted(releases, key=lambda one: (one.namespace, one.target, one.entry.digest))
    return sorted(by_place, key=lambda one: one.order, reverse=True)


def charts_of(releases: Sequence[Release]) -> tuple[Chart, ...]:
    """Arrange the figures of releases (the newest first) by test, variable and unit."""
    oldest_first = list(reversed(releases))
    found: dict[tuple[str, str, str], list[tuple[Release, Figure]]] = {}
    for one in oldest_first:
        for figure in filter(_drawable, one.figures):
            found.setdefault((figure.test, figure.variable, figure.unit), []).append((one, figure))
    return tuple(_chart(key, found[key]) for key in sorted(found)[:MAX_CHARTS])


def _drawable(figure: Figure) -> bool:
    """Tell whether a figure and its bounds are far from where arithmetic overflows."""
    numbers = (figure.value, figure.lower or 0.0, figure.upper or 0.0)
    return all(number == 0 or 1e-100 < abs(number) < 1e100 for number in numbers)


def _chart(key: tuple[str, str, str], measured: Sequence[tuple[Release, Figure]]) -> Chart:
    columns = tuple(dict.fromkeys(f"{one.version}:{one.tag}" for one, _figure in measured))
    several = {
        target: len({(figure.system, figure.environment) for one, figure in measured if one.target == target})
        > 1
        for target in {one.target for one, _figure in measured}
    }
    lines: dict[str, dict[int, Point]] = {}
    for one, figure in measured:
        # ReFrame's environment is named after the image, which has another name in each version: it tells lines apart only where it must.
        name = f"{one.target} {figure.system}" if several[one.target] else one.target
        column = columns.index(f"{one.version}:{one.tag}")
        lines.setdefault(name, {}).setdefault(column, Point(column, one, figure))
    return Chart(
        *key,
        columns,
        tuple(
            Series(name, tuple(points[at] for at in sorted(points))) for name, points in sorted(lines.items())
        ),
    )
