"""``meta/`` of an image: env.json, the recipe, what it takes from its host. Only what is the same in every build of the same inputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from uenvd.publish.build.audit import Rules
from uenvd.publish.build.elf import Elf
from uenvd.publish.recipe import Environment, Recipe, View

DEFAULT_SCALARS: Final[dict[str, str | None]] = {"PYTHONHOME": None}
"""What every view of an image with a Python of its own does beside its own."""


def env_json(recipe: Recipe, existing: Mapping[str, bool] | None = None) -> dict[str, Any]:
    """Return the document of version 1.

    ``existing`` maps absolute directories of ``prefix_paths`` to whether they are in the image; None takes all as there.
    """
    views = {}
    for environment in recipe.environments:
        root = view_root(recipe, environment)
        for view in environment.views:
            views[view.name] = {
                "activate": f"{recipe.mount}/env/{view.name}/activate.sh",
                "description": view.description,
                "root": root,
                "env": {"version": 1, "type": "augment", "values": _values(recipe, view, root, existing)},
            }
    document: dict[str, Any] = {
        "name": recipe.name,
        "description": recipe.description,
        "mount": recipe.mount,
        "modules": None,
        "views": views,
    }
    if recipe.default_view:
        document["default-view"] = recipe.default_view
    return document


def view_root(recipe: Recipe, environment: Environment) -> str:
    """Return where an environment is installed: ``env/`` and the name of its first view. Further views only set variables."""
    return f"{recipe.mount}/env/{environment.views[0].name}"


def prefix_directories(recipe: Recipe) -> set[str]:
    """Return the directories that the views put into variables where they exist."""
    programs = {f"{view_root(recipe, environment)}/bin" for environment in recipe.environments}
    return programs | {
        _below(view_root(recipe, environment), part)
        for environment in recipe.environments
        for view in environment.views
        for _variable, parts in view.prefix_paths
        for part in parts
    }


def _below(root: str, part: str) -> str:
    return root if part in {".", ""} else f"{root}/{part.strip('/')}"


def _values(recipe: Recipe, view: View, root: str, existing: Mapping[str, bool] | None) -> dict[str, Any]:
    lists: dict[str, list[dict[str, Any]]] = {}

    def substitute(text: str) -> str:
        return (
            text.replace("$@mount@", recipe.mount)
            .replace("$@view_path@", root)
            .replace("$@view_name@", view.name)
        )

    def add(variable: str, operation: str, values: list[str]) -> None:
        if values:
            lists.setdefault(variable, []).append({"op": operation, "value": values})

    if existing is None or existing.get(f"{root}/bin"):
        add("PATH", "prepend", [f"{root}/bin"])
    for variable, parts in view.prefix_paths:
        places = [_below(root, part) for part in parts]
        add(variable, "prepend", [place for place in places if existing is None or existing.get(place)])
    for variable, value in view.prepend:
        add(variable, "prepend", [substitute(value)])
    for variable, value in view.append:
        add(variable, "append", [substitute(value)])
    scalars = dict(DEFAULT_SCALARS) if recipe.builder == "python" else {}
    for variable, scalar in view.set:
        scalars[variable] = None if scalar is None else substitute(scalar)
    return {"list": lists, "scalar": scalars}


def activation_script(view: Mapping[str, Any]) -> str:
    """Return the shell form of a view of env.json, for users of stock tools."""
    lines = [f"# {view['description']}".rstrip()]
    values = view["env"]["values"]
    for name, operations in values["list"].items():
        for operation in operations:
            added = ":".join(operation["value"])
            if operation["op"] == "append":
                lines.append(f"export {name}=${{{name}:+${name}:}}{added}")
            else:
                lines.append(f"export {name}={added}${{{name}:+:${name}}}")
    for name, value in values["scalar"].items():
        lines.append(
            f"unset {name}" if value is None else f"export {name}='" + value.replace("'", "'\\''") + "'"
        )
    return "\n".join(lines) + "\n"


def host_json(recipe: Recipe, objects: Iterable[Elf], provided: set[str], rules: Rules) -> dict[str, Any]:
    """Return what the image takes from its host: libraries, loader, the oldest glibc that will do."""
    facts = list(objects)
    needed = {
        soname for elf in facts for soname in elf.needed if soname not in provided and "/" not in soname
    }
    glibc = max((elf.glibc for elf in facts if elf.glibc), default=None)
    return {
        "version": 1,
        "machine": sorted({elf.machine for elf in facts}),
        "loader": sorted({elf.interpreter for elf in facts if elf.interpreter}),
        "glibc": None if glibc is None else f"{glibc[0]}.{glibc[1]}",
        "libraries": sorted(soname for soname in needed if rules.allows(soname)),
        "allowed": list(rules.host_libraries),
    }


def write(recipe: Recipe, recipe_copy: Path, prefix: Path, host: Mapping[str, Any]) -> None:
    """Write ``meta/`` and the activation scripts below the prefix."""
    meta = prefix / "meta"
    meta.mkdir()
    document = env_json(recipe, {place: Path(place).is_dir() for place in prefix_directories(recipe)})
    _dump(meta / "env.json", document)
    _dump(meta / "host.json", host)
    for view in document["views"].values():
        script = Path(view["activate"])
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(activation_script(view))
    for relative in recipe.files():
        target = meta / "recipe" / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(recipe_copy / relative, target)
        if relative.parts[0] == "extra":
            target = meta / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(recipe_copy / relative, target)


def _dump(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")
