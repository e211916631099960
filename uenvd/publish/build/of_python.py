"""The builder ``python``, outside of the sandbox: an interpreter from pinned Debian packages, and pinned wheels."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Final

from uenvd.publish.build.inputs import check_machine, fetch_packages, fetch_wheels
from uenvd.publish.build.kinds import Inputs, Needs, Say, Site
from uenvd.publish.build.memory import shown
from uenvd.publish.build.tools import installed_bytes, version_of
from uenvd.publish.recipe import Recipe
from uenvd.publish.recipe.lockfile import read_interpreter_lock, requirement_hashes

_BYTECODE: Final = 1.4
"""Byte code, as a share of what is installed."""


class PythonBuilder:
    """See `uenvd.publish.build.kinds.Builder`."""

    name = "python"
    strict = True
    modules = ("inside_python", "interpreter", "packages", "venv_hook")

    def pins_machine(self, recipe: Recipe) -> bool:
        """Return True: no byte comes from the host."""
        return True

    def pinned(self, recipe: Recipe, site: Site) -> dict[str, str]:
        """Return packages and wheels."""
        assert recipe.python is not None
        found = {
            f"deb {one.name}={one.version} {one.architecture}": f"sha256:{one.sha256}"
            for one in read_interpreter_lock(recipe.directory / recipe.python.interpreter)
        }
        for environment in recipe.environments:
            wanted = requirement_hashes(recipe.directory / environment.requirements)
            found |= {
                f"wheel {name}": " ".join(sorted(f"sha256:{d}" for d in ds)) for name, ds in wanted.items()
            }
        return found

    def tools(self, recipe: Recipe, site: Site) -> dict[str, str]:
        """Return what changes objects and makes the image."""
        return {name: version_of(name) for name in ("mksquashfs", "patchelf")}

    def fetch(self, recipe: Recipe, site: Site, cache: Path, say: Say) -> Inputs:
        """Fetch packages, then wheels with the interpreter that they hold."""
        assert recipe.python is not None
        packages = read_interpreter_lock(recipe.directory / recipe.python.interpreter)
        check_machine(recipe, packages)
        debs = fetch_packages(packages, cache, say, recipe.directory)
        return Inputs(
            debs,
            {
                environment.name: fetch_wheels(recipe.directory / environment.requirements, cache, debs, say)
                for environment in recipe.environments
            },
        )

    def needs(self, recipe: Recipe, inputs: Inputs) -> Needs:
        """Return what unpacked packages, their copies and the wheels take."""
        assert recipe.python is not None
        debs = installed_bytes(inputs.debs)
        wheels = 0
        for some in inputs.wheels.values():
            for path in some:
                with zipfile.ZipFile(path) as archive:
                    wheels += sum(entry.file_size for entry in archive.infolist())
        installed = int((debs + wheels) * _BYTECODE)
        because = f"packages of {shown(debs)} unpacked and copied, wheels of {shown(wheels)}, byte code"
        return Needs(recipe.python.memory_bytes or debs + installed, installed // 3, because)
