"""The process that builds, inside its private namespaces: ``python -m uenvd.publish.build.inside``, started by `builder`.

Reads one JSON object from stdin (`Order`), writes JSON lines to stdout: ``{"step": text}`` as it goes, at the end ``{"done": {...}}`` or
``{"error": {code, message, hint}}``. Its stderr is the build log; so is that of every program that it runs.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Final, NamedTuple

from uenvd.errors import BuildFailed, InternalError, ResourceMissing, StorageFull, UenvError
from uenvd.publish.build import interpreter, metadata, packages
from uenvd.publish.build.audit import BUILD_DIRECTORY, Rules
from uenvd.publish.build.relocate import objects, relocate
from uenvd.publish.build.sandbox import die_with_parent, enter
from uenvd.publish.recipe import Recipe, load_recipe

ZSTD_LEVEL: Final = 9
_PROGRAM_S: Final = 3600.0
_BASE_ENVIRONMENT: Final = {
    "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    "HOME": f"{BUILD_DIRECTORY}/home",
    "TMPDIR": f"{BUILD_DIRECTORY}/temporary",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONNOUSERSITE": "1",
    "PIP_CONFIG_FILE": "/dev/null",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INPUT": "1",
}
"""What the programs of a build see: nothing of who builds, where and when."""


class Order(NamedTuple):
    """What is to be built; the paths are the machine's."""

    recipe: str
    image: str
    """Where to write the image."""
    new_root: str
    """An empty directory."""
    size_bytes: int
    debs: list[str]
    wheels: dict[str, list[str]]
    environment: dict[str, str]
    """More variables for the programs of the build."""


class Build:
    """One build; methods are called in order by `everything`."""

    def __init__(self, order: Order, recipe: Recipe) -> None:
        assert recipe.python is not None
        self.order = order
        self.recipe = recipe
        self.python = recipe.python
        self.prefix = Path(recipe.mount)
        self.workspace = Path(BUILD_DIRECTORY)
        self.rules = Rules(recipe.python.host_libraries)
        self.environment = {
            **_BASE_ENVIRONMENT,
            "SOURCE_DATE_EPOCH": str(recipe.python.date_s),
            **order.environment,
        }

    def run(self, *command: str, **variables: str) -> str:
        """Run a program; its output goes to the log, stdout is returned. Raises `BuildFailed`, `ResourceMissing`."""
        print(f"+ {shlex.join(command)[:300]}", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, errors="replace",
                env={**self.environment, **variables}, timeout=_PROGRAM_S, preexec_fn=die_with_parent,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise ResourceMissing(
                f"{command[0]} is missing", hint="the builder needs dpkg, patchelf and squashfs-tools"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise BuildFailed(f"{command[0]} did not end within {_PROGRAM_S:.0f} s") from error
        sys.stderr.write(done.stdout[-100_000:] + done.stderr[-100_000:])
        if done.returncode != 0:
            words = shlex.join(command)
            last = "\n".join(f"  {line}" for line in (done.stdout + done.stderr).strip().splitlines()[-12:])
            raise BuildFailed(
                f"{words if len(words) < 200 else words[:200] + ' ...'} failed with status {done.returncode}:\n{last}"
            )
        return done.stdout

    def everything(self) -> dict[str, Any]:
        """Build; return what the parent wants to know."""
        for name in ("home", "temporary"):
            (self.workspace / name).mkdir()
        recipe_copy = self.recipe.directory
        step(f"unpacking {len(self.order.debs)} Debian packages")
        python = interpreter.unpack(
            self.order.debs, self.workspace, self.prefix, self.python.leave_out, self.run
        )
        self.fix_run_paths(python)
        for environment in self.recipe.environments:
            root = Path(metadata.view_root(self.recipe, environment))
            wheels = self.order.wheels[environment.name]
            step(f"installing {len(wheels)} wheels into {root}")
            packages.install(
                python,
                root,
                self.recipe.directory / environment.requirements,
                wheels,
                self.workspace,
                self.run,
            )
        self.hook(python)
        step("making run paths relative")
        self.fix_run_paths(python)
        for environment in self.recipe.environments:
            packages.renew_records(Path(metadata.view_root(self.recipe, environment)))
        step("writing metadata and byte code")
        found = list(objects(self.prefix).values())
        provided = {path.name for path in self.prefix.rglob("*.so*")}
        metadata.write(
            self.recipe,
            recipe_copy,
            self.prefix,
            metadata.host_json(self.recipe, found, provided, self.rules),
        )
        self.try_imports()
        packages.compile_bytecode(python, self.prefix, self.environment)
        step("squashing")
        version = self.squash()
        return {
            "python": python.version,
            "squashfs_tools": version,
        }

    def fix_run_paths(self, python: interpreter.Interpreter) -> None:
        """Make every object find its libraries in the image."""
        relocate(self.prefix, python.root / "lib", python.library_directories, self.rules, self.run)

    def hook(self, python: interpreter.Interpreter) -> None:
        """Run the recipe's ``post-install``, if it has one."""
        script = self.recipe.directory / "post-install"
        if not script.is_file():
            return
        step("running post-install")
        copy = self.workspace / "post-install"
        shutil.copyfile(script, copy)
        copy.chmod(0o755)
        environment = self.recipe.environments[0]
        self.run(
            str(copy),
            UENV_MOUNT=str(self.prefix),
            UENV_PYTHON=str(python.program),
            UENV_ROOT=metadata.view_root(self.recipe, environment),
        )

    def try_imports(self) -> None:
        """Import what the recipe names, and look at what was really mapped. Raises `BuildFailed`."""
        if not self.python.imports:
            return
        step(f"importing {len(self.python.imports)} modules")
        root = metadata.view_root(self.recipe, self.recipe.environments[0])
        mapped = self.run(
            f"{root}/bin/python3", "-I", "-B", "-c", _IMPORT, f"{self.prefix}/", *self.python.imports
        )
        foreign = [path for path in json.loads(mapped) if not self.rules.allows(Path(path).name)]
        if foreign:
            raise BuildFailed(
                "the image uses libraries of its host:\n" + "\n".join(f"  {path}" for path in foreign)
            )

    def squash(self) -> str:
        """Write the image; return the version of the tool."""
        self.run("chmod", "-R", "u+rwX,go=rX", str(self.prefix))
        date = str(self.python.date_s)
        # Without fragments two versions of an image share nearly all their blocks. The variable: mksquashfs refuses it together with
        # explicit times.
        self.environment.pop("SOURCE_DATE_EPOCH", None)
        self.run(
            "mksquashfs", str(self.prefix), self.order.image, "-quiet", "-no-progress", "-comp", "zstd",
            "-Xcompression-level", str(ZSTD_LEVEL), "-b", "131072", "-no-fragments", "-no-xattrs", "-all-root",
            "-all-time", date, "-mkfs-time", date, "-noappend",
        )  # fmt: skip
        return self.run("mksquashfs", "-version").splitlines()[0]


_IMPORT: Final = """
import importlib, json, sys
prefix, modules = sys.argv[1], sys.argv[2:]
for module in modules:
    importlib.import_module(module)
mapped = {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if line.count("/")}
print(json.dumps(sorted(path for path in mapped if ".so" in path and not path.startswith(prefix))))
"""
"""Import modules; print what is mapped from outside the image."""


def step(text: str) -> None:
    """Tell the parent, and the log, what begins."""
    print(f"== {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
    _tell({"step": text})


def _tell(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Return the exit status: 0 when "done" was said, else 1."""
    die_with_parent()
    os.umask(0o022)
    try:
        order = Order(**json.load(sys.stdin))
        recipe = load_recipe(Path(order.recipe))
        enter(recipe.mount, Path(order.new_root), order.size_bytes)
        _tell({"done": Build(order, recipe).everything()})
    except UenvError as error:
        print(f"{type(error).__name__}: {error.message}", file=sys.stderr)
        _tell({"error": {"code": error.code, "message": error.message, "hint": error.hint}})
    except OSError as error:
        traceback.print_exc()
        full = error.errno in {28, 122}
        kind: type[UenvError] = StorageFull if full else BuildFailed
        hint = "the image is built in memory, and there is not enough of it" if full else ""
        _tell({"error": {"code": kind.code, "message": f"the build failed: {error}", "hint": hint}})
    except Exception as error:  # noqa: BLE001  # the edge of this process: the parent reports it
        traceback.print_exc()
        message = f"unexpected fault in the build: {type(error).__name__}: {error}"
        _tell(
            {
                "error": {
                    "code": InternalError.code,
                    "message": message,
                    "hint": "the build log has the details",
                }
            }
        )
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
