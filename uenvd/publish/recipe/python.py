"""The section ``python:`` of config.yaml."""

from __future__ import annotations

import datetime
import re
from typing import Final

import yaml

from uenvd import yamlfile as y
from uenvd.publish.recipe.environments import file_name
from uenvd.publish.recipe.model import EPOCH_S, PythonBuild

OUR_FORMAT: Final = "uenvd, builder python"


def python_build(config: y.Section) -> PythonBuild:
    """Read ``python:`` and refuse what belongs to other builders."""
    for key in ("spack", "modules", "mirror", "cleanup", "version"):
        if key in config:
            config.fail(key, "is for the builder stackinator", hint="remove it, or the line  builder: python")
    section = config.section("python")
    result = PythonBuild(
        interpreter=section.take("interpreter", file_name, PythonBuild.interpreter),
        date_s=section.take("date", _date, EPOCH_S),
        host_libraries=section.take("host-libraries", _sonames, ()),
        leave_out=section.take("leave-out", y.texts, ()),
        imports=section.take("imports", lambda node: y.each(node, _module), ()),
    )
    section.end()
    return result


def _date(node: yaml.Node) -> int:
    try:
        day = datetime.date.fromisoformat(y.text(node))
    except ValueError:
        raise ValueError(f"{node.value!r} is no day (for example 2026-11-01)") from None
    seconds = datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp()
    if not EPOCH_S <= seconds < 1 << 32:
        raise ValueError(f"{node.value!r} cannot be a time stamp in an image (from 1980-01-02 to 2106-02-06)")
    return int(seconds)


def _sonames(node: yaml.Node) -> tuple[str, ...]:
    found = y.texts(node)
    for soname in found:
        if not re.fullmatch(r"lib[A-Za-z0-9_+.*-]*\.so[A-Za-z0-9_.*-]*", soname):
            raise ValueError(f"{soname!r} is no name of a library (for example libibverbs.so.*)")
    return found


def _module(node: yaml.Node) -> str:
    value = y.text(node)
    if not all(part.isidentifier() for part in value.split(".")):
        raise ValueError(f"{value!r} is no name of a module")
    return value
