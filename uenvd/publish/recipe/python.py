"""The section ``python:`` of config.yaml."""

from __future__ import annotations

from typing import Final

import yaml

from uenvd import yamlfile as y
from uenvd.publish.recipe.common import date, file_name, size, sonames
from uenvd.publish.recipe.model import EPOCH_S, PythonBuild

OUR_FORMAT: Final = "uenvd, builder python"


def python_build(config: y.Section) -> PythonBuild:
    """Read ``python:`` and refuse what belongs to other builders."""
    for key in ("spack", "modules", "mirror", "cleanup", "version", "source"):
        if key in config:
            owner = "source" if key == "source" else "stackinator"
            config.fail(key, f"is for the builder {owner}", hint="remove it, or the line  builder: python")
    section = config.section("python")
    result = PythonBuild(
        interpreter=section.take("interpreter", file_name, PythonBuild.interpreter),
        date_s=section.take("date", date, EPOCH_S),
        host_libraries=section.take("host-libraries", sonames, ()),
        leave_out=section.take("leave-out", y.texts, ()),
        imports=section.take("imports", lambda node: y.each(node, _module), ()),
        memory_bytes=section.take("memory", size, 0),
    )
    section.end()
    return result


def _module(node: yaml.Node) -> str:
    value = y.text(node)
    if not all(part.isidentifier() for part in value.split(".")):
        raise ValueError(f"{value!r} is no name of a module")
    return value
