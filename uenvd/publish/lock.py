"""``uenvd-publish lock``: pin the Debian packages of a recipe's interpreter to what the machine's apt offers now."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from uenvd.errors import BuildFailed, RecipeError, ResourceMissing, UsageError
from uenvd.publish.build.inputs import FETCH_S, sha256_of
from uenvd.publish.console import say, show
from uenvd.publish.recipe.lockfile import Package, format_interpreter_lock, read_interpreter_lock

LOCK: Final = "interpreter.lock"
_COMMENT: Final = """Debian packages of the interpreter and of the libraries that it and the wheels need.
Written by uenvd-publish lock; name=version, architecture, digest of the .deb."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="the recipe's directory")
    parser.add_argument(
        "--file", metavar="FILE", default=LOCK, help="the lock file in it; default %(default)s"
    )
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="one more Debian package; may be repeated",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the lock file; what changed goes to stdout."""
    directory: Path = arguments.recipe
    if not directory.is_dir():
        raise UsageError(f"{directory} is no directory")
    path = directory / arguments.file
    old = {package.name: package for package in read_interpreter_lock(path)} if path.exists() else {}
    names = list(dict.fromkeys([*old, *arguments.add]))
    if not names:
        raise RecipeError(
            f"{path}: no such file", hint="name the packages of a new one: --add python3.11-minimal --add ..."
        )
    say(f"asking apt for {len(names)} packages")
    new = pin(names)
    path.write_text(format_interpreter_lock(new, _COMMENT))
    for package in new:
        before = old.get(package.name)
        if before is None:
            show(f"{package.name} {package.version} is new")
        elif before != package:
            show(f"{package.name} {before.version} -> {package.version}")
    return 0


def pin(names: list[str]) -> list[Package]:
    """Return the versions that apt offers, with their digests. Raises `BuildFailed`, `ResourceMissing`."""
    with tempfile.TemporaryDirectory(prefix="uenvd-lock-") as name:
        try:
            done = subprocess.run(
                ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *names],
                cwd=name, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=FETCH_S,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise ResourceMissing("apt-get is missing", hint="use a Debian machine") from error
        if done.returncode != 0:
            raise BuildFailed(f"apt cannot fetch the packages:\n{done.stderr.strip()}", hint="apt-get update")
        found = {}
        for deb in Path(name).glob("*.deb"):
            fields = subprocess.run(
                ["dpkg-deb", "--show", "--showformat", "${Package} ${Version} ${Architecture}", str(deb)],
                capture_output=True, text=True, check=True,
            ).stdout.split()  # fmt: skip
            found[fields[0]] = Package(fields[0], fields[1], fields[2], sha256_of(deb))
    return [found[name] for name in names]
