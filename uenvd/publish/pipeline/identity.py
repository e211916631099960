"""The content tag of an image: equal if and only if it would be built from equal inputs. By it what is there is found, and not built again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Final

from uenvd.errors import ConfigError
from uenvd.publish.build import builder_of, identity
from uenvd.publish.plan import Cell
from uenvd.publish.recipe import Recipe

BUILD_VARIABLE: Final = "UENV_CIBUILDV_"
"""Prefix of a target's variables that the build sees, without it. The name is that of existing pipelines."""
_DIGITS: Final = 32
_REFERENCE: Final = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")


def build_environment(cell: Cell) -> dict[str, str]:
    """Return the variables that the programs of this cell's build get; they can change the image."""
    return {
        name.removeprefix(BUILD_VARIABLE): value
        for name, value in cell.variables.items()
        if name.startswith(BUILD_VARIABLE) and name != BUILD_VARIABLE
    }


def expanded(environment: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return variables with ``$NAME`` replaced: secrets of the machine that builds, which no tag depends on. Raises `ConfigError`."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in environ:
            raise ConfigError(
                f"the plan's variables refer to ${name}, which is not set here",
                hint="it is a secret or a setting of the machine that builds: set it there",
            )
        return environ[name]

    return {name: _REFERENCE.sub(value, text) for name, text in environment.items()}


def content_tag(cell: Cell, recipe: Recipe) -> str:
    """Return ``content-<32 hex digits>`` for what a cell would build. Raises `ConfigError` if its mount point is not the recipe's."""
    if cell.mount != recipe.mount:
        raise ConfigError(
            f"{cell.label}: the plan says mount {cell.mount}, the recipe's config.yaml says store {recipe.mount}",
            hint="make them equal: the mount point is part of every file of the image",
        )
    return tag_of(
        recipe.fingerprint(),
        identity(builder_of(recipe)),
        recipe.mount,
        build_environment(cell),
        machine_of(cell, recipe),
    )


def machine_of(cell: Cell, recipe: Recipe) -> str:
    """Return the part of a cell that changes what is built: nothing where the recipe pins every byte itself."""
    return "" if builder_of(recipe).pins_machine(recipe) else f"{cell.system}/{cell.uarch}"


def tag_of(fingerprint: str, builder: str, mount: str, environment: Mapping[str, str], machine: str) -> str:
    """Return the tag for these inputs."""
    inputs = {
        "fingerprint": fingerprint,
        "builder": builder,
        "mount": mount,
        "environment": dict(environment),
        "machine": machine,
    }
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return f"content-{hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]}"
