"""A recipe's directory -> `Recipe`. Every error names file, line and key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, cast, get_args

import yaml

from uenvd import yamlfile as y
from uenvd.errors import ConfigError, RecipeError, UsageError
from uenvd.publish.recipe import environments, stackinator
from uenvd.publish.recipe.lockfile import read_interpreter_lock, read_requirements, read_sources
from uenvd.publish.recipe.model import (
    DEFAULT_MOUNT,
    Builder,
    Environment,
    PythonBuild,
    Recipe,
    SourceBuild,
)
from uenvd.publish.recipe.python import OUR_FORMAT, python_build
from uenvd.publish.recipe.source import SOURCE_FORMAT, for_source, source_build
from uenvd.publish.reframe.environments import TestEnvironment, parse_environments
from uenvd.views import clean_mount

DIALECT: Final = y.Dialect(RecipeError, "docs/recipes.md")
MAX_FILE_BYTES: Final = 1 << 20


def load_recipe(directory: Path, *, version: str | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        directory: the recipe's.
        version: of the image; None: the directory's name.

    Raises:
        UsageError: there is no recipe.
        RecipeError: for what is wrong in it.

    """
    directory = directory.absolute()
    if not directory.is_dir():
        raise UsageError(
            f"{directory} is no directory",
            hint="a recipe is a directory with config.yaml and environments.yaml",
        )
    for forbidden in ("mirrors.yaml",):
        if (directory / forbidden).exists():
            raise RecipeError(
                f"{directory / forbidden}:1: a recipe cannot bring its own mirrors; remove the file"
            )
    config = _document(directory, "config.yaml")
    builder: Builder = config.take("builder", _builder, "stackinator")
    name = config.need("name", y.word)
    version = version or _version(directory, name)
    mount = config.take("store", _mount, DEFAULT_MOUNT)
    description: str | None = config.take("description", _optional_text, None)
    default_view: str | None = config.take("default-view", _optional_text, None)
    python: PythonBuild | None = None
    source: SourceBuild | None = None
    compilers: tuple[str, ...] = ()
    if builder != "stackinator" and (directory / "compilers.yaml").exists():
        raise RecipeError(
            f"{directory / 'compilers.yaml'}:1: is for the builder 'stackinator', and config.yaml says 'builder: {builder}'",
            hint=f"remove the file, or the line  builder: {builder}  from config.yaml",
        )
    if builder == "python":
        python = python_build(config)
        config.end()
        recipe_format = OUR_FORMAT
        found = environments.for_python(_document(directory, "environments.yaml"))
        _check_locks(directory, python, found)
    elif builder == "source":
        source = source_build(config)
        config.end()
        recipe_format = SOURCE_FORMAT
        found = for_source(_document(directory, "environments.yaml"))
        _check_sources(directory, source, found)
    else:
        stackinator.refuse_others(config)
        compilers_file = _document(directory, "compilers.yaml")
        environments_file = _document(directory, "environments.yaml")
        generation = stackinator.generation(config, compilers_file)
        stackinator.check_config(config, generation)
        compilers = stackinator.compilers(compilers_file, generation)
        found = stackinator.environments(environments_file, generation, compilers)
        recipe_format = stackinator.describe(config, generation, found)
    _check_views(directory, found, default_view, config)
    tests = _tests(directory, found)
    return Recipe(
        directory, name, version, builder, recipe_format, mount, description or "", default_view, compilers, found, tests,
        python, source,
    )  # fmt: skip


def _document(directory: Path, name: str) -> y.Section:
    path = directory / name
    return y.Section(str(path), "", y.compose(_read(path), str(path), DIALECT), 1, DIALECT)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise RecipeError(f"{path}:1: is longer than {MAX_FILE_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file, and a recipe needs one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error


def _builder(node: yaml.Node) -> Builder:
    value = y.text(node)
    for known in get_args(Builder):
        if value == known:
            return cast("Builder", known)
    raise ValueError(f"{value!r} is no builder; there are: {', '.join(sorted(get_args(Builder)))}")


def _mount(node: yaml.Node) -> str:
    mount = clean_mount(y.text(node))
    if mount is None:
        raise ValueError(f"{node.value!r} is no absolute path of a directory")
    return mount


def _optional_text(node: yaml.Node) -> str | None:
    return None if y.is_null(node) else y.text(node)


def _version(directory: Path, name: str) -> str:
    """Return the image's version: the directory's name, or its parent's in ``name/version/uarch``."""
    versioned = directory.parent if directory.parent.parent.name == name else directory
    version = versioned.name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", version):
        raise RecipeError(
            f"{directory}: the directory's name is the version of the image, and {version!r} cannot be one",
            hint="a recipe lies in NAME/VERSION or NAME/VERSION/UARCH",
        )
    return version


def _check_views(
    directory: Path, found: tuple[Environment, ...], default_view: str | None, config: y.Section
) -> None:
    path = directory / "environments.yaml"
    seen: dict[str, int] = {}
    for environment in found:
        for view in environment.views:
            if view.name in seen:
                raise RecipeError(
                    f"{path}:{view.line}: {environment.name}.views.{view.name}: "
                    f"there is a view of this name already (line {seen[view.name]})"
                )
            seen[view.name] = view.line
    if default_view is not None and default_view not in {*seen, "modules", "spack"}:
        config.fail("default-view", f"there is no view {default_view!r}", hint=f"views: {', '.join(seen)}")


def _check_locks(directory: Path, python: PythonBuild, found: tuple[Environment, ...]) -> None:
    """See that the lock files can be read and pin what the environments ask for."""
    read_interpreter_lock(directory / python.interpreter)
    for environment in found:
        pinned = read_requirements(directory / environment.requirements)
        for spec in environment.specs:
            name, _, version = spec.partition("==")
            there = pinned.get(_canonical(name))
            if there is None or (version and version != there):
                raise RecipeError(
                    f"{directory / 'environments.yaml'}:{environment.line}: {environment.name}.specs: {spec!r} is "
                    + ("not" if there is None else f"pinned to {there}")
                    + f" in {environment.requirements}",
                    hint="the lock file has every wheel, one  name==version --hash=sha256:...  a line",
                )


def _check_sources(directory: Path, source: SourceBuild, found: tuple[Environment, ...]) -> None:
    """See that the lock files can be read, and that what the packages name is there."""
    if source.toolchain is not None:
        read_interpreter_lock(directory / source.toolchain)
    pinned = {one.file for one in read_sources(directory / source.sources)}
    path = directory / "environments.yaml"
    for environment in found:
        for package in environment.packages:
            if package.source not in pinned:
                raise RecipeError(
                    f"{path}:{package.line}: {environment.name}: {package.name}: {package.source} is not in {source.sources}",
                    hint=f"uenvd-publish lock {directory} --source URL  adds it",
                )
            for file in (*package.patches, *([package.script] if package.script else [])):
                if not (directory / file).is_file():
                    raise RecipeError(
                        f"{path}:{package.line}: {environment.name}: {package.name}: the recipe has no file {file}"
                    )


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _tests(directory: Path, found: tuple[Environment, ...]) -> tuple[TestEnvironment, ...]:
    """Read ``extra/reframe.yaml``; the views that it names must exist."""
    path = directory / "extra" / "reframe.yaml"
    if not path.exists():
        return ()
    text = _read(path)
    try:
        environments = parse_environments(text, str(path))
    except ConfigError as error:
        raise RecipeError(error.message, hint=error.hint) from error
    known = {view.name for environment in found for view in environment.views}
    document = y.Section(str(path), "", y.compose(text, str(path), DIALECT), 1, DIALECT)

    def view(node: yaml.Node) -> str:
        value = y.text(node)
        if value.rpartition(":")[2] not in known | {"modules", "spack"}:
            raise ValueError(f"there is no view {value!r} (there are: {', '.join(sorted(known))})")
        return value

    for environment in environments:
        if environment.views:
            document.section(environment.name).take("views", lambda node: y.each(node, view), None)
    return environments
