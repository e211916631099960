"""The builders, one object for each kind of recipe, and what each of them has to know how to do."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from uenvd import __version__
from uenvd.errors import UsageError
from uenvd.publish.recipe import Recipe
from uenvd.publish.recipe.common import bytes_of

Say = Callable[[str], None]

SYSTEM_VARIABLE: Final = "UENVD_STACK_SYSTEM"
MIRROR_VARIABLE: Final = "UENVD_STACK_MIRROR"
PROGRAMS_VARIABLE: Final = "UENVD_STACK_CONFIG"
MEMORY_VARIABLE: Final = "UENVD_BUILD_MEMORY"
_COMMON: Final = ("inside", "workshop", "metadata", "relocate", "elf", "audit", "tree", "sandbox")
"""Modules whose code shows in every image."""


@dataclass(frozen=True)
class Site:
    """What a machine that builds has for its builders; it is the site's, not the recipe's."""

    stack_configs: tuple[str, ...] = ()
    """Programs ``stack-config``, each perhaps with the recipe format that it takes in front: ``3=/opt/stackinator/7/bin/stack-config``."""
    system: Path | None = None
    """Stackinator's system (cluster) configuration."""
    mirror: Path | None = None
    """Stackinator's file of build caches and mirrors."""
    memory_bytes: int = 0
    """What a build needs, where the estimate is wrong; 0: the estimate."""

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Site:
        """Return what the environment says: `PROGRAMS_VARIABLE` and the others. Raises `UsageError` for a memory that is no size."""
        memory = environ.get(MEMORY_VARIABLE, "")
        try:
            memory_bytes = bytes_of(memory) if memory else 0
        except ValueError as error:
            raise UsageError(f"{MEMORY_VARIABLE}: {error}") from None
        return cls(
            tuple(part for part in environ.get(PROGRAMS_VARIABLE, "").split(os.pathsep) if part),
            Path(environ[SYSTEM_VARIABLE]) if environ.get(SYSTEM_VARIABLE) else None,
            Path(environ[MIRROR_VARIABLE]) if environ.get(MIRROR_VARIABLE) else None,
            memory_bytes,
        )


@dataclass(frozen=True)
class Inputs:
    """What was fetched: files of the cache, each with the digest that the recipe pins."""

    debs: tuple[Path, ...] = ()
    wheels: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    """By the environment's name."""
    sources: Mapping[str, Path] = field(default_factory=dict)
    """By the name in sources.lock."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """For the process inside; what JSON can hold."""

    def files(self) -> list[str]:
        """Return the names of all files, sorted."""
        wheels = (path for some in self.wheels.values() for path in some)
        return sorted({path.name for path in (*self.debs, *wheels, *self.sources.values())})


@dataclass(frozen=True)
class Needs:
    """What a build is thought to take, in bytes."""

    memory_bytes: int
    image_bytes: int
    """Of the file."""
    because: str
    """The figures that add up to the memory, for a refusal."""


class Builder(Protocol):
    """One kind of recipe. Its part inside the sandbox is the module ``uenvd.publish.build.inside_NAME``."""

    @property
    def name(self) -> str:
        """The word after ``builder:``."""
        ...

    @property
    def strict(self) -> bool:
        """Whether a finding of the audit stops the build; else findings are kept with the image's metadata."""
        ...

    @property
    def modules(self) -> tuple[str, ...]:
        """Whose code shows in its images, beside what all builders share."""
        ...

    def pins_machine(self, recipe: Recipe) -> bool:
        """Whether the recipe pins every byte itself, so that the machine that builds cannot matter."""
        ...

    def pinned(self, recipe: Recipe, site: Site) -> dict[str, str]:
        """Return the inputs beside the recipe's own files: name -> ``sha256:...``, or several. Nothing is fetched."""
        ...

    def tools(self, recipe: Recipe, site: Site) -> dict[str, str]:
        """Return the programs of this machine that make the image: name -> version."""
        ...

    def fetch(self, recipe: Recipe, site: Site, cache: Path, say: Say) -> Inputs:
        """Return the inputs, fetching what the cache lacks. Raises `BuildFailed`, `DigestMismatch`, `ResourceMissing`, `UsageError`."""
        ...

    def needs(self, recipe: Recipe, inputs: Inputs) -> Needs:
        """Return what the build will take."""
        ...


def builders() -> dict[str, Builder]:
    """Return all builders, by name."""
    from uenvd.publish.build.of_python import PythonBuilder
    from uenvd.publish.build.of_source import SourceBuilder
    from uenvd.publish.build.of_stackinator import StackinatorBuilder

    found: Sequence[Builder] = (PythonBuilder(), SourceBuilder(), StackinatorBuilder())
    return {builder.name: builder for builder in found}


def builder_of(recipe: Recipe) -> Builder:
    """Return who builds a recipe."""
    return builders()[recipe.builder]


def identity(builder: Builder) -> str:
    """Return the builder's name, version, and a digest of the code that shows in its images: when it changes, images may."""
    here = Path(__file__).parent
    total = hashlib.sha256()
    for name in sorted({*_COMMON, *builder.modules}):
        total.update((here / f"{name}.py").read_bytes())
    return f"uenvd {__version__} ({builder.name}, {total.hexdigest()[:12]})"
