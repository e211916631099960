"""The builder ``source``, outside of the sandbox: pinned source files, and a pinned tool chain that compiles them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from uenvd.publish.build.inputs import check_machine, fetch_packages, fetch_sources
from uenvd.publish.build.kinds import Inputs, Needs, Say, Site
from uenvd.publish.build.memory import shown
from uenvd.publish.build.tools import installed_bytes, version_of
from uenvd.publish.recipe import Recipe
from uenvd.publish.recipe.lockfile import read_interpreter_lock, read_sources

_UNPACKED: Final = 6
"""A tarball unpacked, as a multiple of it."""
_COMPILED: Final = 8
"""The same with objects, and once more installed."""
_JOB_BYTES: Final = 192 << 20
"""Of one compiler process."""
_HOST_TOOLS: Final = ("gcc", "g++", "gfortran", "ld", "make", "cmake", "meson", "ninja", "pkg-config")


class SourceBuilder:
    """See `uenvd.publish.build.kinds.Builder`."""

    name = "source"
    strict = True
    modules = ("inside_source", "toolchain", "unpack")

    def pins_machine(self, recipe: Recipe) -> bool:
        """Whether the tool chain is pinned, too."""
        assert recipe.source is not None
        return recipe.source.toolchain is not None

    def pinned(self, recipe: Recipe, site: Site) -> dict[str, str]:
        """Return source files and the packages of the tool chain."""
        assert recipe.source is not None
        found = {
            f"source {one.file}": f"sha256:{one.sha256}"
            for one in read_sources(recipe.directory / recipe.source.sources)
        }
        if recipe.source.toolchain is not None:
            for one in read_interpreter_lock(recipe.directory / recipe.source.toolchain):
                found[f"deb {one.name}={one.version} {one.architecture}"] = f"sha256:{one.sha256}"
        return found

    def tools(self, recipe: Recipe, site: Site) -> dict[str, str]:
        """Return what changes objects and makes the image; with the machine's own tool chain that as well."""
        assert recipe.source is not None
        names = ("mksquashfs", "patchelf", *(() if recipe.source.toolchain else _HOST_TOOLS))
        return {name: version_of(name) for name in names}

    def fetch(self, recipe: Recipe, site: Site, cache: Path, say: Say) -> Inputs:
        """Fetch the sources that the packages use, and the tool chain."""
        assert recipe.source is not None
        debs: tuple[Path, ...] = ()
        if recipe.source.toolchain is not None:
            packages = read_interpreter_lock(recipe.directory / recipe.source.toolchain)
            check_machine(recipe, packages)
            debs = fetch_packages(packages, cache, say, recipe.directory)
        return Inputs(
            debs, sources=fetch_sources(read_sources(recipe.directory / recipe.source.sources), cache, say)
        )

    def needs(self, recipe: Recipe, inputs: Inputs) -> Needs:
        """Return what tool chain, sources and objects take, and the compilers."""
        assert recipe.source is not None
        chain = installed_bytes(inputs.debs)
        packed = sum(path.stat().st_size for path in inputs.sources.values())
        jobs = len(os.sched_getaffinity(0))
        total = chain + packed * (_UNPACKED + _COMPILED) + jobs * _JOB_BYTES
        because = (
            f"tool chain {shown(chain)}, sources {shown(packed)} that unpacked and compiled become {_UNPACKED + _COMPILED} times as "
            f"much, {jobs} compilers of {shown(_JOB_BYTES)}"
        )
        return Needs(recipe.source.memory_bytes or total, packed * _UNPACKED, because)
