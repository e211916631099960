"""What a recipe says, as values. Lines are kept where a later step may have to complain about one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from uenvd.publish.reframe.environments import TestEnvironment

Builder = Literal["stackinator", "python", "source"]

DEFAULT_MOUNT: Final = "/user-environment"
EPOCH_S: Final = 315_576_060
"""1980-01-01T12:01:00Z, the fixed time of builds that name none: late enough for zip files in every time zone, and Stackinator's own."""

NOT_PART_OF_A_RECIPE: Final = frozenset({"__pycache__", ".git", ".reframe", "stage", "output"})


@dataclass(frozen=True)
class View:
    """One view of an environment: what a user gets with ``--view=NAME``.

    Values of `set`, `prepend` and `append` may hold ``$@mount@``, ``$@view_path@`` and ``$@view_name@``.
    """

    name: str
    line: int
    description: str = ""
    prefix_paths: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Variable -> directories below the view that are put in front of it where they exist."""
    set: tuple[tuple[str, str | None], ...] = ()
    """Variable -> value; None unsets it."""
    prepend: tuple[tuple[str, str], ...] = ()
    append: tuple[tuple[str, str], ...] = ()
    has_environment: bool = False
    """Whether the recipe has a ``uenv:`` block for it (Stackinator from 5 on, and ours)."""


@dataclass(frozen=True)
class SourcePackage:
    """One package that the builder ``source`` compiles."""

    name: str
    line: int
    version: str
    source: str
    """File of sources.lock: a tarball, or the ``.dsc`` of a Debian source package."""
    system: str
    """``configure``, ``cmake``, ``meson``, ``make`` or ``script``."""
    directory: str = "."
    """Where in the unpacked source."""
    patches: tuple[str, ...] = ()
    """Files of the recipe."""
    options: tuple[str, ...] = ()
    """For configure, cmake, meson."""
    make: tuple[str, ...] = ()
    """Targets and variables for what compiles."""
    install: tuple[str, ...] = ("install",)
    """The same for what installs."""
    check: tuple[str, ...] = ()
    """Targets that are run between the two; empty: none."""
    environment: tuple[tuple[str, str], ...] = ()
    script: str = ""
    """Program of the recipe, for ``script``."""
    jobs: int = 0
    """Processes at a time; 0: one for each processor."""


@dataclass(frozen=True)
class Environment:
    """A set of packages that are installed together, and the views of it."""

    name: str
    line: int
    specs: tuple[str, ...]
    compilers: tuple[str, ...] = ()
    """As the recipe names them: ``gcc@12.3``, ``nvhpc@22.11`` or, in later formats, ``gcc``."""
    mpi: str | None = None
    views: tuple[View, ...] = ()
    requirements: str = "requirements.lock"
    """File of pinned wheels, for the ``python`` builder."""
    packages: tuple[SourcePackage, ...] = ()
    """For the ``source`` builder, in the order in which they are built."""


@dataclass(frozen=True)
class PythonBuild:
    """The section ``python:`` of config.yaml."""

    interpreter: str = "interpreter.lock"
    """File of pinned Debian packages, relative to the recipe."""
    date_s: int = EPOCH_S
    """Time stamp of everything in the image, seconds since the epoch."""
    host_libraries: tuple[str, ...] = ()
    """Sonames, with ``*`` as in a shell, that the image may take from its host beside glibc."""
    leave_out: tuple[str, ...] = ()
    """Patterns of files below the interpreter that are not wanted in the image."""
    imports: tuple[str, ...] = ()
    """Modules that must be importable in the finished image."""
    memory_bytes: int = 0
    """What a build needs, where the recipe says it; 0: it is estimated."""


@dataclass(frozen=True)
class SourceBuild:
    """The section ``source:`` of config.yaml."""

    toolchain: str | None = "toolchain.lock"
    """File of pinned Debian packages: compilers and every other program of the build; None: those of the machine that builds."""
    sources: str = "sources.lock"
    date_s: int = EPOCH_S
    """Time stamp of everything in the image, seconds since the epoch."""
    host_libraries: tuple[str, ...] = ()
    """Sonames, with ``*`` as in a shell, that the image may take from its host beside glibc."""
    strip: bool = True
    """Whether debugging symbols are taken out."""
    memory_bytes: int = 0
    """What a build needs, where the recipe says it; 0: it is estimated."""


@dataclass(frozen=True)
class Recipe:
    """A recipe that passed all checks."""

    directory: Path
    name: str
    version: str
    """Of the image, from the directory's name; not the recipe format's."""
    builder: Builder
    format: str
    """For humans, for example ``Stackinator 2-4 (recipe version 1, early 2024)``."""
    mount: str
    description: str
    default_view: str | None
    compilers: tuple[str, ...]
    environments: tuple[Environment, ...]
    tests: tuple[TestEnvironment, ...]
    """``extra/reframe.yaml``; empty when there is none."""
    python: PythonBuild | None
    source: SourceBuild | None = None

    @property
    def date_s(self) -> int:
        """Return the time stamp of everything in the image, seconds since the epoch."""
        ours = self.python or self.source
        return ours.date_s if ours else EPOCH_S

    @property
    def host_libraries(self) -> tuple[str, ...]:
        """Return the libraries that the image may take from its host beside glibc."""
        ours = self.python or self.source
        return ours.host_libraries if ours else ()

    @property
    def label(self) -> str:
        """``name/version``."""
        return f"{self.name}/{self.version}"

    @property
    def views(self) -> tuple[View, ...]:
        """All views; their names are unique."""
        return tuple(view for environment in self.environments for view in environment.views)

    def files(self) -> Iterator[Path]:
        """Yield the regular files of the recipe, sorted, relative to its directory; nothing hidden, no left-overs of tools."""
        for path in sorted(self.directory.rglob("*")):
            relative = path.relative_to(self.directory)
            left_over = any(
                part in NOT_PART_OF_A_RECIPE or part.startswith(".") or part.endswith(("~", ".pyc"))
                for part in relative.parts
            )
            if not left_over and path.is_file():
                yield relative

    def fingerprint(self) -> str:
        """Return a hex SHA-256 over names, modes and contents of all files: equal for equal recipes, wherever they lie."""
        total = hashlib.sha256()
        for relative in self.files():
            path = self.directory / relative
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{relative.as_posix()}\0{path.stat().st_mode & 0o100:o}\0{content}\n".encode())
        return total.hexdigest()
