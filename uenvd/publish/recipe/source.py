"""The builder ``source``: the section ``source:`` of config.yaml, and environments whose packages are compiled."""

from __future__ import annotations

import re
from typing import Final

import yaml

from uenvd import yamlfile as y
from uenvd.publish.recipe.common import date, file_name, size, sonames
from uenvd.publish.recipe.environments import named, views
from uenvd.publish.recipe.model import EPOCH_S, Environment, SourceBuild, SourcePackage

SOURCE_FORMAT: Final = "uenvd, builder source"
HOST: Final = "host"
"""Word for the tool chain of the machine that builds."""
SYSTEMS: Final = ("configure", "cmake", "meson", "make", "script")
"""How a package may be built."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def source_build(config: y.Section) -> SourceBuild:
    """Read ``source:`` and refuse what belongs to other builders."""
    for key in ("spack", "modules", "mirror", "cleanup", "version", "python"):
        if key in config:
            config.fail(key, "is for another builder", hint="remove it, or the line  builder: source")
    section = config.section("source")
    toolchain = section.take("toolchain", file_name, "toolchain.lock")
    result = SourceBuild(
        toolchain=None if toolchain == HOST else toolchain,
        sources=section.take("sources", file_name, SourceBuild.sources),
        date_s=section.take("date", date, EPOCH_S),
        host_libraries=section.take("host-libraries", sonames, ()),
        strip=section.take("strip", y.truth, True),
        memory_bytes=section.take("memory", size, 0),
    )
    section.end()
    return result


def for_source(document: y.Section) -> tuple[Environment, ...]:
    """Read the environments of the builder ``source``: ``packages`` and ``views``."""
    result = []
    for name in document:
        section = named(document, name)
        found = views(section)
        if not found:
            section.fail("views", "is missing: without a view nobody can use the environment")
        packages = _packages(section)
        result.append(
            Environment(
                name=name,
                line=document.line_of(name),
                specs=tuple(f"{package.name}@{package.version}" for package in packages),
                views=found,
                packages=packages,
            )
        )
        section.end()
    if not result:
        document.fail("NAME", "is missing: there is no environment")
    return tuple(result)


def _packages(environment: y.Section) -> tuple[SourcePackage, ...]:
    node = environment.node("packages")
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        environment.fail(
            "packages", "must be a list of at least one package, in the order in which they are built"
        )
    result: list[SourcePackage] = []
    for number, item in enumerate(node.value):
        section = environment.part(f"packages[{number}]", item)
        package = _package(section)
        if package.name in {one.name for one in result}:
            section.fail("name", f"there is a package {package.name} already")
        result.append(package)
    return tuple(result)


def _package(section: y.Section) -> SourcePackage:
    package = SourcePackage(
        name=section.need("name", y.word),
        line=section.line,
        version=section.need("version", y.word),
        source=section.need("source", file_name),
        system=section.need("build", _system),
        directory=section.take("directory", file_name, "."),
        patches=section.take("patches", lambda node: y.each(node, file_name), ()),
        options=section.take("options", y.texts, ()),
        make=section.take("make", y.texts, ()),
        install=section.take("install", y.texts, ("install",)),
        check=section.take("check", y.texts, ()),
        environment=section.take("environment", _variables, ()),
        script=section.take("script", file_name, ""),
        jobs=section.take("jobs", _jobs, 0),
    )
    if (package.system == "script") != bool(package.script):
        section.fail(
            "script", "names the program of the recipe that builds, with  build: script  and only then"
        )
    if package.options and package.system in {"make", "script"}:
        section.fail("options", f"is for configure, cmake and meson, not for  build: {package.system}")
    section.end()
    return package


def _system(node: yaml.Node) -> str:
    value = y.text(node)
    if value not in SYSTEMS:
        raise ValueError(f"{value!r} is not one of: {', '.join(SYSTEMS)}")
    return value


def _variables(node: yaml.Node) -> tuple[tuple[str, str], ...]:
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("must be a mapping of variables to texts")  # noqa: TRY004  # of the document, not of our caller
    found = []
    for key, value in node.value:
        if not _VARIABLE.fullmatch(str(key.value)) or not isinstance(value, yaml.ScalarNode):
            raise ValueError(f"{key.value!r}: must be a variable and its text")
        found.append((str(key.value), str(value.value)))
    return tuple(found)


def _jobs(node: yaml.Node) -> int:
    value = y.text(node)
    if not value.isdigit() or not 1 <= int(value) <= 1024:
        raise ValueError(f"{value!r} is no number from 1 to 1024")
    return int(value)
