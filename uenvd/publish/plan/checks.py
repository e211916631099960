"""A site's configuration against its recipes: what one of them says and the other does not, and what is wrong in either."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from uenvd import yamlfile as y
from uenvd.errors import RecipeError, UenvError
from uenvd.publish.plan.cell import Cell, Problem, Severity
from uenvd.publish.plan.siteconfig import Cluster, Entry, SiteConfig, Target, problem_of
from uenvd.publish.recipe import Recipe, load_recipe
from uenvd.publish.recipe.model import DEFAULT_MOUNT, NOT_PART_OF_A_RECIPE
from uenvd.views import clean_mount

TESTS_FILE: Final = Path("extra") / "reframe.yaml"


def find_recipe(recipes: Path, name: str, path: str) -> Path:
    """Return the directory that a path of the configuration means: ``recipes/<name>/<path>``, else ``recipes/<path>``, else the former."""
    own = Path(os.path.normpath(recipes / name / path))
    shared = Path(os.path.normpath(recipes / path))
    return shared if not own.is_dir() and shared.is_dir() else own


def targets_of(site: SiteConfig, entry: Entry) -> Iterator[tuple[Cluster, Target]]:
    """Yield the targets for which a version has a recipe."""
    for cluster in site.clusters.values():
        for uarch, target in cluster.targets.items():
            if uarch in entry.recipes:
                yield cluster, target


def check_recipes(site: SiteConfig, recipes: Path, cells: Sequence[Cell]) -> tuple[Problem, ...]:
    """Return what is wrong between the configuration and the recipes, and in the recipes that it names."""
    found: list[Problem] = []
    users: dict[Path, list[tuple[Entry, str]]] = {}
    for entry in site.entries:
        found += _check_entry(site, entry)
        for uarch, place in entry.recipes.items():
            directory = find_recipe(recipes, entry.name, place.text)
            if directory.is_dir():
                users.setdefault(directory, []).append((entry, uarch))
            else:
                found.append(
                    Problem(
                        site.file,
                        place.line,
                        f"{entry.key}.recipes.{uarch}",
                        f"there is no recipe {place.text!r}: neither {recipes / entry.name / place.text} nor {recipes / place.text} is a directory",
                        about=(entry.uenv,),
                    )
                )
    ids: dict[tuple[Path, str], tuple[str, ...]] = {}
    for cell in cells:
        key = (cell.recipe, cell.uenv)
        ids[key] = (*ids.get(key, ()), cell.id)
    for directory, entries in users.items():
        about = tuple(
            dict.fromkeys(
                subject for entry, _ in entries for subject in ids.get((directory, entry.uenv), (entry.uenv,))
            )
        )
        found += check_recipe(directory, about)[1]
        found += _check_against_recipe(site, directory, entries, ids)
    if site.entries:
        found += _unused(recipes, users)
    return tuple(dict.fromkeys(found))


def _check_entry(site: SiteConfig, entry: Entry) -> Iterator[Problem]:
    def problem(line: int, key: str, text: str, severity: Severity = "error", hint: str = "") -> Problem:
        return Problem(site.file, line, f"{entry.key}.{key}", text, severity, hint, (entry.uenv,))

    uarchs = {uarch for cluster in site.clusters.values() for uarch in cluster.targets}
    if not entry.recipes:
        yield problem(entry.line, "recipes", "there is no recipe")
    for uarch, place in entry.recipes.items():
        if uarch not in uarchs:
            yield problem(place.line, f"recipes.{uarch}", "no cluster has this microarchitecture", "warning")
    for name, places in entry.deploy.items():
        cluster = site.clusters.get(name)
        if cluster is None:
            yield problem(
                places[0].line if places else entry.line,
                f"deploy.{name}",
                "there is no such cluster",
                hint=f"clusters: {', '.join(site.clusters)}",
            )
            continue
        seen: set[str] = set()
        for place in places:
            if place.text in seen:
                yield problem(place.line, f"deploy.{name}", f"{place.text} is there twice", "warning")
            seen.add(place.text)
            if place.text not in cluster.targets:
                yield problem(
                    place.line,
                    f"deploy.{name}",
                    f"the cluster has no {place.text}",
                    hint=f"it has: {', '.join(cluster.targets)}",
                )
            if place.text not in entry.recipes:
                yield problem(
                    place.line,
                    f"deploy.{name}",
                    f"there is no recipe for {place.text}",
                    hint=f"recipes: {', '.join(entry.recipes)}",
                )
    if not any(entry.deploy.values()):
        yield problem(entry.line, "deploy", "is deployed nowhere", "warning")


def check_recipe(directory: Path, about: tuple[str, ...] = ()) -> tuple[Recipe | None, list[Problem]]:
    """Return a recipe, None if it is wrong, and what is wrong in it: its first fault, further files that are no YAML, missing tests (a warning)."""
    found: list[Problem] = []
    recipe = None
    try:
        recipe = load_recipe(directory)
    except RecipeError as error:
        found.append(problem_of(error, file=str(directory), about=about))
    except UenvError as error:
        found.append(Problem(str(directory), 0, "", error.message, "error", error.hint or "", about))
    for path in sorted(directory.glob("*.yaml")):
        if path.name in {
            "config.yaml",
            "compilers.yaml",
            "environments.yaml",
            "packages.yaml",
            "modules.yaml",
        }:
            try:
                y.compose(
                    path.read_text(encoding="utf-8"), str(path), y.Dialect(RecipeError, "docs/recipes.md")
                )
            except RecipeError as error:
                found.append(problem_of(error, about=about))
            except (OSError, UnicodeDecodeError) as error:
                found.append(Problem(str(path), 0, "", f"cannot be read: {error}", about=about))
    if not (directory / TESTS_FILE).exists():
        found.append(
            Problem(
                str(directory / TESTS_FILE),
                0,
                "",
                "is missing: the image has no tests of its own",
                "warning",
                "docs/testing-images.md says how to write them",
                about,
            )
        )
    return recipe, list(dict.fromkeys(found))


def _check_against_recipe(
    site: SiteConfig,
    directory: Path,
    entries: Sequence[tuple[Entry, str]],
    ids: Mapping[tuple[Path, str], tuple[str, ...]],
) -> Iterator[Problem]:
    """Compare what the configuration says of a recipe with what its ``config.yaml`` says, whatever else may be wrong in the recipe."""
    path = directory / "config.yaml"
    dialect = y.Dialect(RecipeError)
    try:
        text = path.read_text(encoding="utf-8")
        document = y.Section(str(path), "", y.compose(text, str(path), dialect), 0, dialect)
        store = document.take("store", y.text, DEFAULT_MOUNT)
        name = document.need("name", y.text)
    except (OSError, UnicodeDecodeError, RecipeError):
        return
    mount = clean_mount(store) or store
    for entry in dict.fromkeys(entry for entry, _ in entries):
        about = ids.get((directory, entry.uenv), (entry.uenv,))
        if mount != entry.mount.text:
            stated = document.line_of("store")
            yield Problem(
                site.file,
                entry.mount.line,
                f"{entry.key}.mount",
                f"is {entry.mount.text}, but the recipe's store is {mount} ({path}"
                + (f":{stated})" if stated else ", by default)"),
                about=about,
            )
        if name != entry.name:
            yield Problem(
                str(path),
                document.line_of("name"),
                "name",
                f"is {name!r}, but {site.file}:{entry.line} lists the recipe under {entry.name!r}",
                "warning",
                about=about,
            )


def _unused(recipes: Path, users: dict[Path, list[tuple[Entry, str]]]) -> Iterator[Problem]:
    """Yield the recipes that nothing leads to: no version, and no link of a recipe that is used."""
    used = {Path(os.path.realpath(path)) for path in users}
    for directory in users:
        for path in directory.iterdir():
            if path.is_symlink():
                target = Path(os.path.realpath(path))
                used |= {target, target.parent}
    for parent, names, files in os.walk(recipes):
        names[:] = sorted(
            name for name in names if name not in NOT_PART_OF_A_RECIPE and not name.startswith(".")
        )
        if "config.yaml" in files:
            names[:] = []
            if Path(os.path.realpath(parent)) not in used:
                yield Problem(
                    str(Path(parent) / "config.yaml"),
                    1,
                    "",
                    "no version of the configuration uses this recipe",
                    hint="list it under uenvs, or remove the directory",
                    about=("unused",),
                )
