"""``uenvd-publish validate``: check recipes, or a site's configuration with all its recipes, without building anything."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from uenvd.errors import UenvError, UsageError
from uenvd.publish.console import say, show_json, show_table
from uenvd.publish.options import refuse
from uenvd.publish.plan import Plan, Problem, load_plan
from uenvd.publish.plan.checks import check_recipe
from uenvd.publish.plan.show import problem_as_json, require_none, say_problems
from uenvd.publish.plan.stackconfig import StackConfig, ask_stack_config, find_stack_config
from uenvd.publish.recipe import Recipe, load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "recipes",
        metavar="RECIPE",
        type=Path,
        nargs="*",
        help="a recipe's directory; default: all that --config names",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a site's configuration: it is checked, with all its recipes",
    )
    parser.add_argument(
        "--recipes-dir",
        type=Path,
        metavar="DIR",
        help="where the configuration's recipes are; default: recipes beside it",
    )
    parser.add_argument(
        "--strict", action="store_true", help="end with an error where there are warnings, too"
    )
    parser.add_argument(
        "--stack-config",
        metavar="PROGRAM",
        help="Stackinator's, to check recipes of its format; default: stack-config, if installed",
    )
    parser.add_argument("--no-stack-config", action="store_true", help="do not ask Stackinator")
    parser.add_argument(
        "--cluster-config",
        type=Path,
        metavar="DIR",
        help="the clusters' configurations for Stackinator: DIR/CLUSTER",
    )
    parser.add_argument(
        "--json", action="store_true", help="print what the recipes say, and what is wrong, as JSON"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check all; the good ones go to stdout, each problem to stderr. Raises `RecipeError` at the end if there was one."""
    if not arguments.recipes and arguments.config is None:
        if not Path("config.yaml").is_file():
            raise UsageError("nothing to check was named", hint="say RECIPE... or --config FILE")
        arguments.config = Path("config.yaml")
    else:
        if arguments.config is None:
            refuse(arguments, ("recipes-dir", "cluster-config"), "is for --config")
    if arguments.no_stack_config:
        refuse(
            arguments,
            ("stack-config", "cluster-config"),
            "is for Stackinator, and --no-stack-config does not ask it",
            hint="leave out one of the two",
        )
    tool = _tool(arguments)
    if tool is None:
        refuse(
            arguments,
            ("cluster-config",),
            "is for Stackinator, which is not here",
            hint="name its program: --stack-config PROGRAM",
        )
    problems: list[Problem] = []
    plan: Plan | None = None
    if arguments.config is not None:
        plan = load_plan(arguments.config, recipes=arguments.recipes_dir)
        problems += plan.problems
    good: dict[Path, Recipe] = {}
    for directory in arguments.recipes:
        recipe, wrong = check_recipe(directory.absolute())
        problems += wrong
        if recipe is not None:
            good[recipe.directory] = recipe
    if tool is not None:
        problems += _ask(tool, good.values(), plan, arguments.cluster_config)
    if arguments.json:
        document: Any = [as_json(recipe) for recipe in good.values()]
        if plan is not None:
            document = {
                "recipes": document,
                "cells": [cell.id for cell in plan.cells],
                "problems": [problem_as_json(problem) for problem in problems],
            }
        show_json(document)
    elif good:
        show_table(
            ("recipe", "format", "environments", "views"),
            [
                (
                    recipe.label,
                    recipe.format,
                    ",".join(environment.name for environment in recipe.environments),
                    ",".join(view.name for view in recipe.views),
                )
                for recipe in good.values()
            ],
        )
    say_problems(problems)
    if plan is not None:
        say(
            f"{arguments.config}: {len(plan.cells)} cells, {sum(cell.deploy for cell in plan.cells)} of them deployed, "
            f"{len({cell.recipe for cell in plan.cells})} recipes"
        )
    require_none(problems, strict=arguments.strict)
    return 0


def _tool(arguments: argparse.Namespace) -> StackConfig | None:
    if arguments.no_stack_config:
        return None
    tool = find_stack_config(arguments.stack_config or "stack-config")
    if tool is None and arguments.stack_config:
        raise UsageError(f"{arguments.stack_config} is no stack-config that can be run")
    if tool is not None and tool.format == 0:
        say(f"stack-config {tool.version} is of no generation that is known here; it is not asked")
        return None
    return tool


def _ask(
    tool: StackConfig, named: Iterable[Recipe], plan: Plan | None, systems: Path | None
) -> list[Problem]:
    """Let Stackinator check the recipes that were named, and the good ones of a plan, each once for every cluster."""
    wishes: dict[tuple[Path, Path | None], tuple[Recipe, tuple[str, ...]]] = {
        (recipe.directory, None): (recipe, ()) for recipe in named
    }
    wrong = {subject for problem in (plan.errors if plan else ()) for subject in problem.about}
    for cell in plan.cells if plan else ():
        if cell.id in wrong:
            continue
        system = None if systems is None else systems / cell.system
        if system is not None and not system.is_dir():
            raise UsageError(
                f"{system} is no directory", hint="--cluster-config DIR has a directory for each cluster"
            )
        try:
            recipe, about = wishes.get((cell.recipe, system)) or (load_recipe(cell.recipe), ())
        except UenvError:
            continue
        wishes[cell.recipe, system] = (recipe, (*about, cell.id))
    asked = 0
    problems = []
    for (_, system), (recipe, about) in wishes.items():
        if tool.takes(recipe):
            asked += 1
            problem = ask_stack_config(tool, recipe, system=system, about=about)
            if problem is not None:
                problems.append(problem)
    if asked:
        say(f"stack-config {tool.version} was asked about {asked} recipes of its format")
    return list(dict.fromkeys(problems))


def as_json(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe says."""
    return {
        "name": recipe.name,
        "version": recipe.version,
        "builder": recipe.builder,
        "format": recipe.format,
        "mount": recipe.mount,
        "description": recipe.description,
        "default-view": recipe.default_view,
        "compilers": list(recipe.compilers),
        "environments": {
            environment.name: {
                "specs": list(environment.specs),
                "compilers": list(environment.compilers),
                "mpi": environment.mpi,
                "views": [view.name for view in environment.views],
            }
            for environment in recipe.environments
        },
        "tests": {
            environment.name: {"features": list(environment.features), "views": list(environment.views)}
            for environment in recipe.tests
        },
        "fingerprint": f"sha256:{recipe.fingerprint()}",
    }
