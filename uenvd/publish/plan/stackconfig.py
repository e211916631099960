"""The site's own ``stack-config`` (Stackinator), asked whether it takes a recipe; it checks more than is written down in any schema.

It works in a directory of its own, without network: in place of ``git`` it finds a program that makes empty repositories, as only `make` would need
what is in them. The system configuration is the site's, or the least that Stackinator takes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from uenvd.publish.plan.cell import Problem
from uenvd.publish.recipe import Recipe

TIMEOUT_S: Final = 120.0
SCRATCH: Final = Path("/var/tmp")  # noqa: S108  # a fresh directory in it; Stackinator refuses builds below /tmp and $HOME
_FORMATS: Final = {2: 1, 3: 1, 4: 1, 5: 1, 6: 2, 7: 3}
"""Stackinator's major version -> the recipe format that it takes."""
_FIRST_WITH_VARIABLES: Final = 5
"""The first that knows ``version:`` and views with ``uenv:``."""
_MAX_SAID: Final = 2000

_GIT: Final = """#!/bin/sh
# The last word of a clone is where to.
for word in "$@"; do last=$word; done
case " $* " in
*" clone "*)
    mkdir -p "$last/.git" "$last/lib/spack/spack" "$last/var/spack/repos/builtin/packages" "$last/bin" "$last/etc/spack/defaults"
    printf 'repo:\\n  namespace: builtin\\n' > "$last/var/spack/repos/builtin/repo.yaml"
    printf 'modules:\\n  default:\\n    roots: {}\\n' > "$last/etc/spack/defaults/modules.yaml" ;;
*" rev-parse "*) echo 0000000000000000000000000000000000000000 ;;
esac
exit 0
"""
_SYSTEM: Final = {
    "packages.yaml": "packages:\n  gcc:\n    buildable: false\n    externals:\n    - {spec: 'gcc@12.2.0', prefix: /usr, "
    "extra_attributes: {compilers: {c: /usr/bin/gcc, cxx: /usr/bin/g++}}}\n",
    "compilers.yaml": "compilers:\n- compiler:\n    spec: gcc@12.2.0\n    paths: {cc: /usr/bin/gcc, cxx: /usr/bin/g++, f77: /usr/bin/gfortran, "
    "fc: /usr/bin/gfortran}\n    operating_system: debian12\n    modules: []\n",
}


@dataclass(frozen=True)
class StackConfig:
    """An installed Stackinator."""

    program: str
    version: str
    """As it says itself, for example ``4.0``."""

    @property
    def major(self) -> int:
        """The first number of its version."""
        match = re.match(r"\d+", self.version)
        return int(match[0]) if match else 0

    @property
    def format(self) -> int:
        """The recipe format that it takes; 0 if that is not known, as with the branches of 6 and 7, which both say 7.0.0-dev."""
        if "dev" in self.version and self.major >= _FIRST_WITH_VARIABLES:
            return 0
        return _FORMATS.get(self.major, 0)

    def takes(self, recipe: Recipe) -> bool:
        """Whether a recipe is of its generation."""
        fit = self.format != 0 and self.format == format_of(recipe)
        return fit and (self.major >= _FIRST_WITH_VARIABLES or recipe.format.startswith("Stackinator 2-4"))


def find_stack_config(program: str = "stack-config") -> StackConfig | None:
    """Return the program of this name or path and its version; None if there is none."""
    found = shutil.which(program)
    if found is None:
        return None
    with tempfile.TemporaryDirectory(prefix="uenv-stack-config-", ignore_cleanup_errors=True) as cwd:
        return _version_of(str(Path(found).absolute()), cwd)


def _version_of(program: str, cwd: str) -> StackConfig | None:
    try:
        # It leaves a log where it is run.
        done = subprocess.run(
            [program, "--version"],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"(\d+(?:\.\d+)*\S*)\s*$", done.stdout)
    return StackConfig(program, match[1]) if done.returncode == 0 and match else None


def format_of(recipe: Recipe) -> int:
    """Return the recipe's format, 1 to 3; 0 for a recipe of another builder."""
    match = re.search(r"\(recipe version (\d)", recipe.format)
    return int(match[1]) if match and recipe.builder == "stackinator" else 0


def ask_stack_config(
    tool: StackConfig, recipe: Recipe, *, system: Path | None = None, about: tuple[str, ...] = ()
) -> Problem | None:
    """Return what Stackinator has against a recipe, None if nothing or if the recipe is of another format.

    Args:
        tool: from `find_stack_config`.
        recipe: it passed our own checks.
        system: the cluster's configuration directory.
        about: see `Problem`.

    """
    if not tool.takes(recipe):
        return None
    with tempfile.TemporaryDirectory(
        prefix="uenv-stack-config-", dir=SCRATCH, ignore_cleanup_errors=True
    ) as name:
        place = Path(name)
        for directory in ("bin", "system", "mount", "cwd"):
            (place / directory).mkdir()
        (place / "bin" / "git").write_text(_GIT, encoding="utf-8")
        (place / "bin" / "git").chmod(0o755)
        for file, text in _SYSTEM.items():
            (place / "system" / file).write_text(text, encoding="utf-8")
        words = [
            tool.program,
            *("--build", str(place / "build")),
            *("--recipe", str(recipe.directory)),
            *("--system", str(system or place / "system")),
            # It must exist, and the recipe's own need not where nothing is built.
            *("--mount", str(place / "mount")),
        ]
        try:
            done = subprocess.run(
                words,
                cwd=place / "cwd",
                env={**os.environ, "PATH": f"{place / 'bin'}:{os.environ.get('PATH', os.defpath)}"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return _problem(tool, recipe, f"did not finish within {TIMEOUT_S:.0f} s", about)
        except OSError as error:
            return _problem(tool, recipe, f"cannot be run: {error}", about)
    if done.returncode == 0:
        return None
    return _problem(tool, recipe, _said(done.stdout, place), about)


def _said(output: str, place: Path) -> str:
    """Return what matters of the tool's output: no header, no advice, no names of our directory."""
    skip = re.compile(
        r"Stackinator$|\s+(recipe path|build path|system|mount|build cache|develop)\s*:|see log"
    )
    output = re.sub(r"\x1b\[[0-9;]*m", "", output)
    lines = [line.strip() for line in output.splitlines() if line.strip() and not skip.match(line)]
    return " / ".join(lines).replace(f"{place}/", "")[-_MAX_SAID:] or "it failed without a word"


def _problem(tool: StackConfig, recipe: Recipe, text: str, about: tuple[str, ...]) -> Problem:
    return Problem(str(recipe.directory), 0, "", f"stack-config {tool.version}: {text}", about=about)
