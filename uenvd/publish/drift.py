"""``uenvd-publish drift``: what a site's configuration wants deployed, against what is in the registry."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from uenvd.errors import NotFound, RecipeError, RegistryDenied, RegistryError, UenvError
from uenvd.oci.index import LATEST
from uenvd.oci.reference import repository_of
from uenvd.oci.remote import Remote
from uenvd.publish.console import say, show_json, show_table
from uenvd.publish.options import (
    BUILD,
    DEPLOY,
    add_registry_options,
    add_site_options,
    open_registry,
    system_of,
    uarch_of,
)
from uenvd.publish.pipeline.stages import identify
from uenvd.publish.plan.cell import Cell
from uenvd.publish.plan.model import load_plan
from uenvd.publish.releases import list_repositories, read_all

State = Literal["same", "missing", "extra", "other", "unknown"]
DRIFTED: Final = 1
"""Exit status where something is not as the configuration says, as that of diff."""


@dataclass(frozen=True)
class Difference:
    """One image of the configuration or of the registry, and how the two agree on it."""

    repository: str
    state: State
    remark: str
    deployed: str | None = None
    """Digest of ``latest``, or of the newest tag where there is none."""
    built: str | None = None
    """Digest of what was built of the recipe as it is now."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--config", type=Path, default=Path("config.yaml"), metavar="FILE", help="default config.yaml"
    )
    parser.add_argument(
        "--recipes", type=Path, metavar="DIR", help="default: recipes beside the configuration"
    )
    parser.add_argument("--namespace", default=DEPLOY, metavar="NS", help=f"default {DEPLOY}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_site_options(parser)
    add_registry_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compare; the exit status is 1 where something differs."""
    plan = load_plan(arguments.config, recipes=arguments.recipes)
    plan = plan.select(system=system_of(arguments), uarch=uarch_of(arguments))
    if plan.errors:
        say(f"note: {len(plan.errors)} errors in the configuration; see: uenvd-publish validate")
    with closing(open_registry(arguments)) as remote:
        found = compare(remote, plan.cells, arguments.namespace)
    differing = [one for one in found if one.state in {"missing", "extra", "other"}]
    if arguments.json:
        show_json({"images": [{key: value for key, value in vars(one).items() if value} for one in found]})
    else:
        rows = [
            (one.state, one.repository, (one.deployed or "-").removeprefix("sha256:")[:12], one.remark)
            for one in found
            if one.state != "same"
        ]
        if rows:
            show_table(("state", "image", "deployed", "remark"), rows)
        say(f"{len(found) - len(differing)} of {len(found)} images are as the configuration says")
    return DRIFTED if differing else 0


def compare(
    remote: Remote,
    cells: Sequence[Cell],
    namespace: str,
    tag_of: Callable[[Cell], str] | None = None,
) -> list[Difference]:
    """Compare cells with a namespace of a registry, sorted by repository. ``tag_of``: the tag of a build by its content.

    Raises the remote's errors.
    """
    wanted = {
        repository_of(namespace, cell.system, cell.uarch, cell.name, cell.version): cell
        for cell in cells
        if cell.deploy
    }
    targets = {(cell.system, cell.uarch) for cell in cells}
    found = [_one(remote, place, cell, tag_of or content_tag_of) for place, cell in wanted.items()]
    for place in _deployed(remote, namespace, sorted({system for system, _uarch in targets})):
        _namespace, system, uarch, name, version = place.split("/")
        if place in wanted or (system, uarch) not in targets:
            continue
        digest = _current(remote, place)
        if digest is not None:
            known = any(
                (one.name, one.version, one.system, one.uarch) == (name, version, system, uarch)
                for one in cells
            )
            remark = (
                "the configuration does not list it under deploy"
                if known
                else "the configuration does not know it"
            )
            found.append(Difference(place, "extra", remark, digest))
    return sorted(found, key=lambda one: one.repository)


def content_tag_of(cell: Cell) -> str:
    """Return the tag that a build of the recipe as it is now has. Raises `RecipeError` and others of `UenvError`."""
    return identify(cell)[1]


def _one(remote: Remote, place: str, cell: Cell, tag_of: Callable[[Cell], str]) -> Difference:
    deployed = _current(remote, place)
    if deployed is None:
        return Difference(place, "missing", "it is to be deployed and is not there")
    try:
        tag = tag_of(cell)
    except (RecipeError, UenvError) as error:
        return Difference(
            place, "unknown", f"the recipe cannot be read: {error.message.splitlines()[0]}", deployed
        )
    built = _resolve(remote, place.replace(place.partition("/")[0], BUILD, 1), tag)
    if built is None:
        return Difference(
            place, "unknown", "the recipe as it is now was not built, or not by uenvd-publish run", deployed
        )
    if built != deployed:
        remark = f"the recipe as it is now gives {built.removeprefix('sha256:')[:12]}"
        return Difference(place, "other", remark, deployed, built)
    return Difference(place, "same", "", deployed, built)


def _deployed(remote: Remote, namespace: str, systems: Sequence[str]) -> list[str]:
    found: set[str] = set()
    for system in systems:
        try:
            found |= set(list_repositories(remote, namespace, system))
        except (RegistryError, RegistryDenied):
            found |= set(read_all(remote, namespace, system, say).repositories())
    return sorted(found)


def _current(remote: Remote, repository: str) -> str | None:
    """Return the digest of ``latest``, or else of the last tag; None without tags."""
    latest = _resolve(remote, repository, LATEST)
    if latest is not None:
        return latest
    tags = remote.tags(repository)
    return _resolve(remote, repository, tags[-1]) if tags else None


def _resolve(remote: Remote, repository: str, tag: str) -> str | None:
    try:
        return remote.resolve(repository, tag)
    except NotFound:
        return None
