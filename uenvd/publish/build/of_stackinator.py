"""The builder ``stackinator``, outside of the sandbox: which Stackinator takes the recipe, and what the site gives it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from uenvd.errors import ResourceMissing, UsageError
from uenvd.publish.build.kinds import PROGRAMS_VARIABLE, SYSTEM_VARIABLE, Inputs, Needs, Say, Site
from uenvd.publish.build.tools import version_of
from uenvd.publish.plan.stackconfig import StackConfig, find_stack_config, format_of
from uenvd.publish.recipe import Recipe

_MEMORY_BYTES: Final = 8 << 30
"""Nobody can tell from specs what Spack will build; the site knows better (`MEMORY_VARIABLE`)."""
_IMAGE_BYTES: Final = 2 << 30
_STEM: Final = "stack-config"


class StackinatorBuilder:
    """See `uenvd.publish.build.kinds.Builder`."""

    name = "stackinator"
    strict = False
    modules = ("inside_stackinator",)

    def pins_machine(self, recipe: Recipe) -> bool:
        """Return False: compilers and externals are the system's."""
        return False

    def pinned(self, recipe: Recipe, site: Site) -> dict[str, str]:
        """Return the files of the system configuration and of the mirrors."""
        found = {}
        if site.system is not None:
            for relative, path in _files(site.system):
                found[f"system {relative}"] = _digest(path)
        if site.mirror is not None and site.mirror.is_file():
            found["mirror"] = _digest(site.mirror)
        return found

    def tools(self, recipe: Recipe, site: Site) -> dict[str, str]:
        """Return Stackinator's version, and what the image is made with."""
        tool, _format = choose(recipe, site)
        return {
            "stackinator": tool.version,
            **{name: version_of(name) for name in ("mksquashfs", "git", "make")},
        }

    def fetch(self, recipe: Recipe, site: Site, cache: Path, say: Say) -> Inputs:
        """Choose the program and check what the site gives it; Spack fetches its inputs itself."""
        tool, number = choose(recipe, site)
        if site.system is None:
            raise UsageError(
                f"{recipe.label} is a recipe for {recipe.format}: it needs the system's configuration (compilers, externals)",
                hint=f"say --system-config DIR, or set {SYSTEM_VARIABLE}",
            )
        for path, what in ((site.system, "directory"), (site.mirror, "file")):
            if path is not None and not (path.is_dir() if what == "directory" else path.is_file()):
                raise UsageError(f"{path} is no {what}")
        say(f"Stackinator {tool.version} ({tool.program})")
        return Inputs(
            settings={
                "program": tool.program,
                "major": tool.major,
                "format": number,
                "system": str(site.system.absolute()),
                "mirror": str(site.mirror.absolute()) if site.mirror else None,
            }
        )

    def needs(self, recipe: Recipe, inputs: Inputs) -> Needs:
        """Return what such builds usually take."""
        return Needs(_MEMORY_BYTES, _IMAGE_BYTES, "what a build of Spack takes at least")


def choose(recipe: Recipe, site: Site) -> tuple[StackConfig, int]:
    """Return the installed Stackinator that takes a recipe, and the recipe's format. Raises `ResourceMissing`."""
    wanted = format_of(recipe)
    seen = []
    for number, program in _candidates(site):
        tool = find_stack_config(program)
        if tool is None:
            seen.append(f"  {program}: cannot be run")
            continue
        if (number == wanted) if number else tool.takes(recipe):
            return tool, wanted
        shown = (
            f"takes format {number or tool.format}"
            if number or tool.format
            else "does not say which format it takes"
        )
        seen.append(f"  {program}: version {tool.version}, {shown}")
    listed = "\n".join(seen)
    raise ResourceMissing(
        f"{recipe.label} is a recipe for {recipe.format}, and no installed Stackinator takes it"
        + (f":\n{listed}" if seen else ": there is none"),
        hint=f"install that generation and name its program, {PROGRAMS_VARIABLE}={wanted}=/path/to/stack-config, or --stack-config",
    )


def _candidates(site: Site) -> Iterator[tuple[int, str]]:
    """Yield recipe format (0: as the program's version says) and program: those that the site names, else all on PATH."""
    for text in site.stack_configs:
        number, equals, program = text.partition("=")
        if equals and number in {"1", "2", "3"}:
            yield int(number), program
        else:
            yield 0, text
    if site.stack_configs:
        return
    for place in os.environ.get("PATH", os.defpath).split(os.pathsep):
        for path in sorted(Path(place or ".").glob(f"{_STEM}*")):
            if path.name == _STEM or path.name.removeprefix(f"{_STEM}-")[:1].isdigit():
                yield 0, str(path)


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        if path.is_file() and not any(
            part.startswith(".") or part == "__pycache__" for part in relative.parts
        ):
            yield relative.as_posix(), path


def _digest(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
