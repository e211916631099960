"""`load_plan`: a site's configuration and its recipes -> `Plan`, the one model that is validated, run here or elsewhere, and written out for CI."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from uenvd.errors import RecipeError, UsageError
from uenvd.publish.plan.cell import Cell, Problem
from uenvd.publish.plan.checks import check_recipes, find_recipe, targets_of
from uenvd.publish.plan.inputs import touches
from uenvd.publish.plan.siteconfig import SiteConfig, parse_site_config

MAX_CONFIG_BYTES: Final = 8 << 20


@dataclass(frozen=True)
class Plan:
    """The cells, in the order of the configuration, and all that is wrong with it and its recipes."""

    cells: tuple[Cell, ...]
    problems: tuple[Problem, ...]
    config: Path
    """The configuration's file, absolute."""

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that are no mere warnings."""
        return tuple(problem for problem in self.problems if problem.severity == "error")

    def cell(self, cell_id: str) -> Cell:
        """Return the cell of an id. Raises `UsageError` if there is none."""
        for cell in self.cells:
            if cell.id == cell_id:
                return cell
        raise UsageError(
            f"{self.config} has no cell {cell_id!r}",
            hint="uenvd-publish plan lists them: NAME/VERSION-SYSTEM/UARCH",
        )

    def select(
        self,
        patterns: Sequence[str] = (),
        *,
        system: str | None = None,
        uarch: str | None = None,
        changed: Sequence[Path] | None = None,
    ) -> Plan:
        """Return the plan of some cells, with the problems that concern them.

        Args:
            patterns: any of them must match; with ``*`` and ``?``: ``name``, ``name/version`` (or ``name:version``),
                ``name/version@system%uarch`` in parts, or a cell's id. None: all.
            system: the cluster.
            uarch: the microarchitecture.
            changed: files; a cell is selected if one of them belongs to its recipe, or is the configuration itself (`uenvd.publish.plan.changes`
                compares configurations by entry).

        """
        chosen = [
            cell
            for cell in self.cells
            if (system is None or cell.system == system)
            and (uarch is None or cell.uarch == uarch)
            and (not patterns or any(matches(cell, pattern) for pattern in patterns))
        ]
        if changed is not None and self.config not in {path.absolute() for path in changed}:
            touched = touches({cell.recipe for cell in chosen}, [path.absolute() for path in changed])
            chosen = [cell for cell in chosen if cell.recipe in touched]
        return self.narrowed(chosen, patterns)

    def narrowed(self, cells: Iterable[Cell], patterns: Sequence[str] = ()) -> Plan:
        """Return the plan of these cells only; problems of other cells, and of recipes that nobody uses, are left behind."""
        kept = tuple(cells)
        if len(kept) == len(self.cells) and kept == self.cells:
            return self
        ids = {cell.id for cell in kept} | {cell.uenv for cell in kept}
        problems = tuple(
            problem
            for problem in self.problems
            if not problem.about
            or any(subject in ids or _named(subject, patterns) for subject in problem.about)
        )
        return replace(self, cells=kept, problems=problems)


def load_plan(config: Path, *, recipes: Path | None = None) -> Plan:
    """Read a site's configuration and check it against its recipes.

    Args:
        config: the file, in the form of alps-uenv's ``config.yaml``.
        recipes: the directory of the recipes; default: ``recipes`` beside the file.

    Raises `UsageError` if there is no such file. What is wrong in the file is in `Plan.problems`.

    """
    config = config.absolute()
    try:
        if config.stat().st_size > MAX_CONFIG_BYTES:
            raise RecipeError(f"{config}:1: is longer than {MAX_CONFIG_BYTES} bytes")
        text = config.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            f"{config}: no such file",
            hint="say --config FILE: the site's clusters and uenvs (docs/pipelines.md)",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{config}: cannot be read: {error}") from error
    site = parse_site_config(text, str(config))
    base = (recipes or config.parent / "recipes").absolute()
    cells = cells_of(site, base)
    return Plan(cells, (*site.problems, *check_recipes(site, base, cells)), config)


def cells_of(site: SiteConfig, recipes: Path) -> tuple[Cell, ...]:
    """Return the cells: each version on each target that it has a recipe for."""
    return tuple(
        Cell(
            entry.name,
            entry.version,
            cluster.name,
            target.uarch,
            find_recipe(recipes, entry.name, entry.recipes[target.uarch].text),
            entry.mount.text,
            any(place.text == target.uarch for place in entry.deploy.get(cluster.name, ())),
            target.partition,
            target.variables,
            cluster.no_bwrap,
            cluster.runner,
        )
        for entry in site.entries
        for cluster, target in targets_of(site, entry)
    )


def matches(cell: Cell, pattern: str) -> bool:
    """Tell whether a pattern (see `Plan.select`) means a cell."""
    if fnmatchcase(cell.id, pattern):
        return True
    rest, _, uarch = pattern.partition("%")
    rest, _, system = rest.partition("@")
    name, _, version = rest.replace(":", "/", 1).partition("/")
    return (
        fnmatchcase(cell.name, name or "*")
        and fnmatchcase(cell.version, version or "*")
        and fnmatchcase(cell.system, system or "*")
        and fnmatchcase(cell.uarch, uarch or "*")
    )


def _named(subject: str, patterns: Sequence[str]) -> bool:
    """Tell whether patterns ask for a ``name`` or ``name/version`` that has no cell."""
    name, _, version = subject.partition("/")
    for pattern in patterns:
        wanted, _, wanted_version = (
            pattern.partition("@")[0].partition("%")[0].replace(":", "/", 1).partition("/")
        )
        if fnmatchcase(name, wanted or "*") and fnmatchcase(version, wanted_version or "*"):
            return True
    return False
