"""``uenvd-publish validate``: check recipes without building them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from uenvd.errors import RecipeError, UenvError
from uenvd.publish.console import say, show_json, show_table
from uenvd.publish.recipe import Recipe, load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("recipes", metavar="RECIPE", type=Path, nargs="+", help="a recipe's directory")
    parser.add_argument("--json", action="store_true", help="print what the recipes say as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Check all; the good ones go to stdout, each error to stderr. The status is that of the first error."""
    good: list[Recipe] = []
    failed: list[UenvError] = []
    for directory in arguments.recipes:
        try:
            good.append(load_recipe(directory))
        except UenvError as error:
            failed.append(error)
    if arguments.json:
        show_json([as_json(recipe) for recipe in good])
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
                for recipe in good
            ],
        )
    for problem in failed[:-1]:
        say(problem.message)
        if problem.hint and problem.hint != RecipeError.default_hint:
            say(f"hint: {problem.hint}")
    if failed:
        raise failed[-1]
    return 0


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
