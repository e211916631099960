"""What a branch changes: git's differing files and the configuration's differing entries -> the cells that have to be built again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

from uenvd.publish.plan import git
from uenvd.publish.plan.cell import Runner
from uenvd.publish.plan.checks import targets_of
from uenvd.publish.plan.inputs import touches
from uenvd.publish.plan.model import Plan
from uenvd.publish.plan.siteconfig import SiteConfig, parse_site_config


@dataclass(frozen=True)
class Changes:
    """What differs between the working tree and the commit where it left its base."""

    base: str
    """That commit, hex."""
    plan: Plan
    """Of the cells that are touched."""
    reasons: dict[str, str]
    """Cell id -> ``recipe``, ``entry`` or ``new``."""
    removed: tuple[str, ...]
    """Ids of cells that the base has and the working tree has not."""


def changes_since(plan: Plan, base: str) -> Changes:
    """Return what a branch changes.

    A cell is touched if a file of its recipe differs (links followed, untracked files too), or its part of the configuration: recipe, mount
    point, deployment, target or runner. Comments and order of the configuration do not matter. Raises `UsageError`.

    """
    directory = plan.config.parent
    commit = git.merge_base(directory, git.resolve(directory, base))
    files = git.changed_files(directory, commit)
    now = _statements(parse_site_config(plan.config.read_text(encoding="utf-8"), str(plan.config)))
    text = git.show(directory, commit, plan.config.name)
    then = {} if text is None else _statements(parse_site_config(text, f"{base}:{plan.config.name}"))
    touched = touches({cell.recipe for cell in plan.cells}, files)
    reasons: dict[str, str] = {}
    for cell in plan.cells:
        if cell.id not in then:
            reasons[cell.id] = "new"
        elif now[cell.id] != then[cell.id]:
            reasons[cell.id] = "entry"
        elif cell.recipe in touched or (
            # A recipe that is gone could have been in either of two places.
            not cell.recipe.is_dir() and any(f"/{now[cell.id].path}/" in str(path) for path in files)
        ):
            reasons[cell.id] = "recipe"
    chosen = [cell for cell in plan.cells if cell.id in reasons]
    narrowed = plan.narrowed(chosen)
    # What has no cell (an entry that cannot be read, a recipe that nobody uses) may be the very thing that the branch brings.
    ids = {cell.id for cell in plan.cells}
    brought = {str(path) for path in files}
    problems = tuple(
        problem
        for problem in plan.problems
        if problem in narrowed.problems
        or (ids.isdisjoint(problem.about) and os.path.realpath(problem.file) in brought)
    )
    return Changes(
        commit,
        Plan(narrowed.cells, problems, plan.config),
        reasons,
        tuple(cell_id for cell_id in then if cell_id not in now),
    )


class _Statement(NamedTuple):
    """What the configuration says of a cell."""

    path: str
    mount: str
    deploy: bool
    partition: str | None
    variables: tuple[tuple[str, str], ...]
    runner: Runner
    no_bwrap: bool


def _statements(site: SiteConfig) -> dict[str, _Statement]:
    """Return what the configuration says of each cell, by id."""
    return {
        f"{entry.uenv}-{cluster.name}/{target.uarch}": _Statement(
            entry.recipes[target.uarch].text,
            entry.mount.text,
            any(place.text == target.uarch for place in entry.deploy.get(cluster.name, ())),
            target.partition,
            tuple(sorted(target.variables.items())),
            cluster.runner,
            cluster.no_bwrap,
        )
        for entry in site.entries
        for cluster, target in targets_of(site, entry)
    }
