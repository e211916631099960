"""A second build of what was just built: is it the same image?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from uenvd.errors import BuildFailed
from uenvd.publish.build import Built, Site, build
from uenvd.publish.build.compare import differences, shown
from uenvd.publish.console import say
from uenvd.publish.recipe import Recipe


def require_same(
    recipe: Recipe, built: Built, *, cache: Path, tell: Callable[[str], None], site: Site
) -> None:
    """Build once more, in another directory, and compare; nothing of it stays. Raises `BuildFailed` with the files that differ."""
    say("building it once more, in another directory")
    with tempfile.TemporaryDirectory(prefix=".check-", dir=built.image.parent) as name:
        second = build(recipe, Path(name), cache=cache, say=tell, again=True, site=site)
        if second.digest == built.digest:
            say(f"the same image: {built.digest}")
            return
        lines = differences(built.image, second.image)
    raise BuildFailed(
        f"two builds of {recipe.label} made two images: {built.digest} and {second.digest}\n"
        + (shown(lines) if lines else "  all files are equal: the squashfs file itself differs"),
        hint="docs/recipes.md says what usually differs, and what to do about it",
    )
