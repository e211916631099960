"""The builder ``python``, inside the sandbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from uenvd.errors import BuildFailed
from uenvd.publish.build import interpreter, metadata, packages
from uenvd.publish.build.relocate import relocate
from uenvd.publish.build.workshop import Workshop, step

NETWORK: Final = False


def make(shop: Workshop) -> dict[str, Any]:
    """Build; return the interpreter's version."""
    recipe, prefix = shop.recipe, shop.prefix
    assert recipe.python is not None
    step(f"unpacking {len(shop.order.debs)} Debian packages")
    python = interpreter.unpack(shop.order.debs, shop.workspace, prefix, recipe.python.leave_out, shop.run)
    _fix_run_paths(shop, python)
    for environment in recipe.environments:
        root = Path(metadata.view_root(recipe, environment))
        wheels = shop.order.wheels[environment.name]
        step(f"installing {len(wheels)} wheels into {root}")
        requirements = recipe.directory / environment.requirements
        packages.install(python, root, requirements, wheels, shop.workspace, shop.run)
    shop.hook(UENV_PYTHON=str(python.program))
    step("making run paths relative")
    _fix_run_paths(shop, python)
    for environment in recipe.environments:
        packages.renew_records(Path(metadata.view_root(recipe, environment)))
    step("writing metadata and byte code")
    shop.describe()
    _try_imports(shop, recipe.python.imports)
    packages.compile_bytecode(python, prefix, shop.environment)
    shop.squash()
    return {"python": python.version}


def _fix_run_paths(shop: Workshop, python: interpreter.Interpreter) -> None:
    """Make every object find its libraries in the image."""
    relocate(shop.prefix, python.root / "lib", python.library_directories, shop.rules, shop.run)


def _try_imports(shop: Workshop, modules: tuple[str, ...]) -> None:
    """Import what the recipe names, and look at what was really mapped. Raises `BuildFailed`."""
    if not modules:
        return
    step(f"importing {len(modules)} modules")
    root = metadata.view_root(shop.recipe, shop.recipe.environments[0])
    mapped = shop.run(f"{root}/bin/python3", "-I", "-B", "-c", _IMPORT, f"{shop.prefix}/", *modules)
    foreign = [path for path in json.loads(mapped) if not shop.rules.allows(Path(path).name)]
    if foreign:
        raise BuildFailed(
            "the image uses libraries of its host:\n" + "\n".join(f"  {path}" for path in foreign)
        )


_IMPORT: Final = """
import importlib, json, sys
prefix, modules = sys.argv[1], sys.argv[2:]
for module in modules:
    importlib.import_module(module)
mapped = {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if line.count("/")}
print(json.dumps(sorted(path for path in mapped if ".so" in path and not path.startswith(prefix))))
"""
"""Import modules; print what is mapped from outside the image."""
