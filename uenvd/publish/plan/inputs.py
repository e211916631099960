"""Which files a recipe is made of, links that lead out of it followed: what a change must touch to change the image."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from uenvd.publish.recipe.model import NOT_PART_OF_A_RECIPE


def roots_of(recipe: Path) -> frozenset[Path]:
    """Return the directories and files of a recipe: itself, each symbolic link in it and what that link leads to, absolute; links that lead nowhere
    too, so that a file that vanished counts."""
    roots = {recipe, Path(os.path.realpath(recipe))}
    pending = [recipe]
    while pending:
        directory = pending.pop()
        for parent, names, files in os.walk(directory):
            names[:] = [name for name in names if name not in NOT_PART_OF_A_RECIPE]
            for name in (*names, *files):
                path = Path(parent, name)
                if path.is_symlink():
                    target = Path(os.path.realpath(path))
                    if target not in roots:
                        roots.add(target)
                        if target.is_dir():
                            pending.append(target)
    return frozenset(roots)


def touches(recipes: Iterable[Path], changed: Sequence[Path]) -> frozenset[Path]:
    """Return those of the recipes to which one of the changed files (absolute) belongs."""
    if not changed:
        return frozenset()
    found = set()
    for recipe in recipes:
        roots = roots_of(recipe)
        # A changed file above a recipe is a link on the way to it.
        if any(
            path in roots or path in recipe.parents or not roots.isdisjoint(path.parents) for path in changed
        ):
            found.add(recipe)
    return frozenset(found)
