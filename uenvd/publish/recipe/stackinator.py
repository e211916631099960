"""Recipes of Stackinator: the three formats of ``config.yaml``'s ``version:``, told apart and checked.

Format 1 is that of Stackinator 2 to 5 (early 2024: no ``version:``, a ``bootstrap`` compiler, ``mpi:``), 2 that of 6, 3 that of 7. Each
generation of the tool refuses the formats of the others, so a recipe that mixes them is refused here, before anything is built.
"""

from __future__ import annotations

import re
from typing import Final

import yaml

from uenvd import yamlfile as y
from uenvd.publish.recipe.environments import named, views
from uenvd.publish.recipe.model import Environment

TOOLS: Final = {1: "Stackinator 2-5", 2: "Stackinator 6", 3: "Stackinator 7"}
COMPILERS: Final = ("gcc", "nvhpc", "llvm", "llvm-amdgpu", "intel-oneapi-compilers")
"""Keys of compilers.yaml from format 2 on, and what an environment may name there."""
_SPEC = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]*([@+~%^=/ ].*)?")
_OLD_COMPILER = {
    "bootstrap": re.compile(r"gcc@\d+(\.\d+){0,2}"),
    "gcc": re.compile(r"gcc@\d+(\.\d+){0,2}"),
    "llvm": re.compile(r"(llvm@\d+(\.\d+){0,2}|nvhpc@\d+(\.\d+)?)"),
}


def refuse_others(config: y.Section) -> None:
    """Refuse the sections of other builders."""
    for key in ("python", "source"):
        if key in config:
            config.fail(key, f"is for the builder {key}", hint=f"add the line  builder: {key}")


def generation(config: y.Section, compilers_file: y.Section) -> int:
    """Return the recipe's format, 1..3, by ``version:`` and by the keys that only one has."""
    stated: int | None = config.take("version", _format, None)
    old = "bootstrap" in compilers_file or any(
        "specs" in compilers_file.section(key) for key in compilers_file if key in {"gcc", "llvm"}
    )
    if old and stated in {2, 3}:
        compilers_file.fail(
            "bootstrap" if "bootstrap" in compilers_file else "gcc",
            f"is of recipe format 1, but config.yaml says version: {stated}",
        )
    if not old and stated is None and "packages" in config.section("spack"):
        config.fail(
            "version",
            "is missing: spack.packages is of recipe format 2 or 3",
            hint="say  version: 2  or  version: 3",
        )
    if (
        not old
        and stated in {None, 1}
        and any("version" in compilers_file.section(key) for key in compilers_file)
    ):
        config.fail(
            "version",
            "compilers.yaml is of recipe format 2 or 3",
            hint="say  version: 2  or  version: 3, or write compilers.yaml with bootstrap, gcc.specs, llvm.specs",
        )
    return stated or 1


def describe(config: y.Section, generation: int, found: tuple[Environment, ...]) -> str:
    """Return the format for humans."""
    if generation > 1:
        return f"{TOOLS[generation]} (recipe version {generation})"
    if "version" in config or any(view.has_environment for env in found for view in env.views):
        return "Stackinator 5 (recipe version 1)"
    return "Stackinator 2-4 (recipe version 1, early 2024)"


def check_config(config: y.Section, generation: int) -> None:
    """Check the keys of config.yaml that are Stackinator's own."""
    spack = config.section("spack")
    spack.need("repo", y.text)
    spack.take("commit", _optional_text, None)
    if generation >= 2:
        if "packages" not in spack:
            spack.fail("packages", f"is missing (recipe format {generation})")
        _package_repositories(spack.section("packages"), generation)
    spack.end()
    config.take("modules", y.truth, None)
    if generation == 1:
        mirror = config.section("mirror")
        mirror.take("enable", y.truth, True)
        mirror.take("key", _optional_text, None)
        mirror.end()
        if "default-view" in config:
            config.fail("default-view", "is of recipe format 2", hint="remove it, or say  version: 2")
    if generation == 3:
        config.take("cleanup", _OneOf("none", "runtime", "build"), "none")
    config.end()


def compilers(document: y.Section, generation: int) -> tuple[str, ...]:
    """Check compilers.yaml; return the compilers as environments may name them."""
    if generation == 1:
        return _old_compilers(document)
    found = []
    for key in COMPILERS:
        node = document.node(key)
        if node is None or y.is_null(node):
            continue
        section = document.section(key)
        section.need("version", _version_text)
        if generation == 3:
            section.take("spec", _optional_text, None)
        section.end()
        found.append(key)
    if "gcc" not in found:
        document.fail("gcc", "is missing")
    document.end()
    return tuple(found)


def _old_compilers(document: y.Section) -> tuple[str, ...]:
    bootstrap = document.section("bootstrap")
    if "bootstrap" not in document:
        document.fail("bootstrap", "is missing (recipe format 1)")
    specs = [bootstrap.need("spec", _Matching("bootstrap"))]
    bootstrap.end()
    if "gcc" not in document:
        document.fail("gcc", "is missing")
    gcc = document.section("gcc")
    specs += gcc.need("specs", lambda node: y.each(node, _Matching("gcc")))
    gcc.end()
    node = document.node("llvm")
    if node is not None and not y.is_null(node):
        llvm = document.section("llvm")
        requires = llvm.need("requires", _Matching("gcc"))
        if not any(_satisfies(spec, requires) for spec in specs[1:]):
            llvm.fail("requires", f"{requires} is not among gcc.specs")
        specs += llvm.need("specs", lambda node: y.each(node, _Matching("llvm")))
        llvm.end()
    document.end()
    return tuple(dict.fromkeys(specs))


def environments(document: y.Section, generation: int, known: tuple[str, ...]) -> tuple[Environment, ...]:
    """Check environments.yaml against the compilers that there are."""
    result = []
    for name in document:
        section = named(document, name)
        used = _environment_compilers(section, generation, known)
        specs = section.need("specs", lambda node: y.each(node, _spec))
        mpi = _mpi(section) if generation == 1 else _network(section)
        section.take("unify", _unify, "true")
        section.take("deprecated", y.truth, False)
        section.take("variants", y.texts, None)
        if generation <= 2:
            section.take("packages", y.texts, None)
        if generation >= 2:
            section.take("prefer", _texts_or_null, None)
            duplicates = section.section("duplicates")
            duplicates.take("strategy", _OneOf("minimal", "full", "none"), "minimal")
            duplicates.end()
        result.append(
            Environment(
                name=name,
                line=document.line_of(name),
                specs=specs,
                compilers=used,
                mpi=mpi,
                views=views(section),
            )
        )
        section.end()
    if not result:
        document.fail("NAME", "is missing: there is no environment")
    return tuple(result)


def _environment_compilers(section: y.Section, generation: int, known: tuple[str, ...]) -> tuple[str, ...]:
    node = section.node("compiler")
    if node is None:
        section.fail("compiler", "is missing")
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        section.fail("compiler", "must be a list of at least one compiler")
    used = []
    for item in node.value:
        line = y.line_of(item)
        if generation >= 2:
            if not isinstance(item, yaml.ScalarNode) or item.value not in known:
                section.fail(
                    "compiler",
                    f"{item.value!r} is not in compilers.yaml",
                    line=line,
                    hint=f"there are: {', '.join(known)}",
                )
            used.append(str(item.value))
            continue
        entry = (
            {str(key.value): str(value.value) for key, value in item.value}
            if isinstance(item, yaml.MappingNode)
            else {}
        )
        if entry.keys() != {"toolchain", "spec"} or entry["toolchain"] not in {"gcc", "llvm"}:
            section.fail(
                "compiler", "must be a list of  - {toolchain: gcc or llvm, spec: NAME@VERSION}", line=line,
                hint="both llvm and nvhpc are of the toolchain llvm",
            )  # fmt: skip
        if not any(_satisfies(spec, entry["spec"]) for spec in known):
            section.fail(
                "compiler",
                f"{entry['spec']} is not in compilers.yaml",
                line=line,
                hint=f"there are: {', '.join(known)}",
            )
        used.append(entry["spec"])
    return tuple(used)


def _satisfies(spec: str, wanted: str) -> bool:
    """Whether a compiler is the one that is wanted: ``gcc@12.3`` is ``gcc``, ``gcc@12`` and ``gcc@12.3``."""
    name, _, version = spec.partition("@")
    wanted_name, _, wanted_version = wanted.partition("@")
    return name == wanted_name and (not wanted_version or f"{version}.".startswith(f"{wanted_version}."))


def _mpi(section: y.Section) -> str | None:
    node = section.node("mpi")
    if node is None or y.is_null(node) or (isinstance(node, yaml.ScalarNode) and node.value == "false"):
        return None
    mpi = section.section("mpi")
    spec = mpi.need("spec", _spec)
    gpu = mpi.node("gpu")
    if gpu is not None and not y.is_null(gpu) and gpu.value not in {"cuda", "rocm", "false"}:
        mpi.fail("gpu", f"{gpu.value!r} is not one of: cuda, rocm, null")
    mpi.end()
    return spec


def _network(section: y.Section) -> str | None:
    if "mpi" in section:
        section.fail("mpi", "is of recipe format 1", hint="from format 2 on:  network: {mpi: cray-mpich}")
    network = section.section("network")
    mpi = network.take("mpi", _optional_text, None)
    network.take("specs", _texts_or_null, None)
    network.end()
    return mpi


def _package_repositories(section: y.Section, generation: int) -> None:
    one = {"repo", "commit", "path"}
    parts = (
        [section]
        if set(section) <= one and "repo" in section
        else [section.section(name) for name in section]
    )
    if parts == [section] or not parts:
        parts = [section]
    else:
        for name in section:
            if name in {"alps", "recipe"}:
                section.fail(name, "is a reserved name of a package repository")
    for part in parts:
        part.need("repo", y.text)
        commit = part.take("commit", _optional_text, None)
        if commit is None and generation == 2:
            part.fail("commit", "is missing (recipe format 2)")
        part.take("path", y.text, None)
        part.end()


def _unify(node: yaml.Node) -> str:
    return y.text(node) if getattr(node, "value", None) == "when_possible" else str(y.truth(node))


def _format(node: yaml.Node) -> int:
    value = y.text(node)
    if value not in {"1", "2", "3"}:
        raise ValueError(f"{value!r} is no recipe format; there are 1, 2 and 3")
    return int(value)


def _optional_text(node: yaml.Node) -> str | None:
    return None if y.is_null(node) else y.text(node)


def _texts_or_null(node: yaml.Node) -> tuple[str, ...]:
    return () if y.is_null(node) else y.texts(node)


def _version_text(node: yaml.Node) -> str:
    value = y.text(node)
    if isinstance(node, yaml.ScalarNode) and node.tag != "tag:yaml.org,2002:str":
        raise ValueError(f"{value} is a number in YAML and would lose zeros: put it in quotes")
    return value


def _spec(node: yaml.Node) -> str:
    value = y.text(node)
    if not _SPEC.fullmatch(value):
        raise ValueError(f"{value!r} is no Spack spec")
    return value


class _Matching:
    """A conversion for the compilers of format 1."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __call__(self, node: yaml.Node) -> str:
        value = y.text(node)
        if not _OLD_COMPILER[self._kind].fullmatch(value):
            example = "llvm@16 or nvhpc@22.11" if self._kind == "llvm" else "gcc@12.3"
            raise ValueError(f"{value!r} is no compiler of the form {example}")
        return value


class _OneOf:
    """A conversion for a word out of a list."""

    def __init__(self, *allowed: str) -> None:
        self._allowed = allowed

    def __call__(self, node: yaml.Node) -> str:
        value = y.text(node)
        if value not in self._allowed:
            raise ValueError(f"{value!r} is not one of: {', '.join(self._allowed)}")
        return value
