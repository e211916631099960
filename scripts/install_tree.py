"""Install what was built and tested in this checkout below ``DESTDIR``: ``make install`` calls it.

No network: the Python distributions are copied from .venv, which ``make test`` has tested, in exactly those versions.

::

    PREFIX/bin/{uenvd,uenvctl,uenvd-publish,uenvd-fs}   start programs of the tree they are in, wherever that was moved to
    PREFIX/lib/uenvd/                                   a virtual environment of /usr/bin/python3: the package and its dependencies
    PREFIX/share/doc/uenvd/
    PREFIX/share/man/man1/
    /usr/share/{bash-completion,zsh,fish}/...           completion of uenvctl (COMPLETIONS)
    /usr/lib/systemd/system/uenvd.{service,socket}      for PREFIX
    /usr/lib/tmpfiles.d/uenvd.conf, /usr/lib/sysusers.d/uenvd.conf
    /etc/profile.d/zz-uenvd.{sh,csh} and others         restore a view in login shells (SHELL_HOOKS)
    /etc/uenvd/config.yaml                              only if there is none yet
"""

from __future__ import annotations

import argparse
import compileall
import importlib.metadata
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from uenvd.ctl import completion

CHECKOUT = Path(__file__).resolve().parent.parent
PROJECT = "uenvd"
INTERPRETER = Path("/usr/bin/python3")
DEFAULT_PREFIX = "/opt/uenvd"
"""What the files below systemd/ name; replaced on installation."""

SHELL_HOOKS = {
    "zz-uenvd.sh": ("etc/profile.d",),
    # where Debian's, and where the other distributions' csh looks
    "zz-uenvd.csh": ("etc/profile.d", "etc/csh/login.d"),
    "zz-uenvd.fish": ("usr/share/fish/vendor_conf.d",),
}
"""What login shells read, and where: the last of its directory by name, because others before it reset PATH."""

COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/uenvctl",
    "zsh": "usr/share/zsh/vendor-completions/_uenvctl",
    "fish": "usr/share/fish/vendor_completions.d/uenvctl.fish",
}
"""Where each shell looks for completions of packages."""

WRAPPER = """\
#!/bin/sh
# Runs {name} with the interpreter of this tree, untouched by the caller's PYTHON* variables and directory.
self=$0
[ ! -L "$self" ] || self=$(readlink -f "$self")
tree=${{self%/*}}/../lib/uenvd
exec "$tree/bin/python3" -I "$tree/bin/{name}" "$@"
"""
PROGRAM = """\
import sys

from {module} import {function}

sys.exit({function}())
"""


class InstallError(Exception):
    """The tree cannot be installed; the message says why and what to do."""


def write(path: Path, content: str | bytes, mode: int) -> None:
    """Write a file; replaced in one step, so that a running program never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(content.encode() if isinstance(content, str) else content)
    fresh.chmod(mode)
    fresh.replace(path)


def runtime_distributions() -> Iterator[importlib.metadata.Distribution]:
    """Yield the distributions that the project needs at run time, itself excluded. Raises `InstallError`."""
    seen = {PROJECT}
    waiting = [Requirement(text) for text in importlib.metadata.requires(PROJECT) or ()]
    while waiting:
        requirement = waiting.pop()
        extras = requirement.extras or {""}
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name = requirement.name.lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise InstallError(f"{name} is not in this environment: run make setup") from error
        yield distribution
        waiting += [Requirement(text) for text in distribution.requires or ()]


def copy_distribution(distribution: importlib.metadata.Distribution, site: Path) -> None:
    """Copy the files of an installed distribution that lie in its site-packages: all but its programs and byte code."""
    for file in distribution.files or ():
        source = Path(str(distribution.locate_file(file)))
        if ".." in file.parts or file.suffix == ".pyc" or not source.is_file():
            continue
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def build_wheel(directory: Path) -> Path:
    """Build the project's wheel with the back end of this environment; return it. Raises `InstallError`."""
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(directory)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise InstallError(f"the wheel cannot be built:\n{done.stdout}{done.stderr}")
    (wheel,) = directory.glob("*.whl")
    return wheel


def make_environment(target: Path, final: str) -> None:
    """Make the virtual environment at ``target``, to be used at ``final``; an older one is replaced."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    with tempfile.TemporaryDirectory(prefix=".uenvd-", dir=target.parent) as work:
        tree = Path(work) / "tree"
        site = tree / "lib" / version / "site-packages"
        site.mkdir(parents=True)
        (tree / "bin").mkdir()
        for name in ("python3", version):
            (tree / "bin" / name).symlink_to(INTERPRETER if name == "python3" else "python3")
        (tree / "pyvenv.cfg").write_text(
            f"home = {INTERPRETER.parent}\ninclude-system-site-packages = false\n"
            f"version = {'.'.join(map(str, sys.version_info[:3]))}\n"
        )
        for distribution in runtime_distributions():
            copy_distribution(distribution, site)
        for entry in programs():
            program = PROGRAM.format(module=entry.module, function=entry.attr)
            (tree / "bin" / entry.name).write_text(program)
        with zipfile.ZipFile(build_wheel(Path(work))) as wheel:
            wheel.extractall(site)
        compileall.compile_dir(
            tree,
            quiet=2,
            workers=0,
            stripdir=str(tree),
            prependdir=final,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
        make_readable(tree)
        older = Path(work) / "older"
        if target.exists():
            target.rename(older)
        tree.rename(target)


def make_readable(tree: Path) -> None:
    """Let everybody read and traverse, and only the owner write."""
    for path in (tree, *tree.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


def programs() -> importlib.metadata.EntryPoints:
    """Return the project's programs."""
    return importlib.metadata.distribution(PROJECT).entry_points.select(group="console_scripts")


def install(destdir: Path, prefix: str) -> None:
    """Install everything but the Slurm plugin. Raises `InstallError`, `OSError`."""
    os.umask(0o022)
    home = destdir / prefix.lstrip("/")
    (home / "lib").mkdir(parents=True, exist_ok=True)
    make_environment(home / "lib/uenvd", f"{prefix}/lib/uenvd")
    for entry in programs():
        write(home / "bin" / entry.name, WRAPPER.format(name=entry.name), 0o755)

    def text(name: str) -> str:
        return (CHECKOUT / "systemd" / name).read_text().replace(DEFAULT_PREFIX, prefix)

    system = destdir / "usr/lib"
    for unit in ("uenvd.service", "uenvd.socket"):
        write(system / "systemd/system" / unit, text(unit), 0o644)
    write(system / "tmpfiles.d/uenvd.conf", text("uenvd.tmpfiles.conf"), 0o644)
    write(system / "sysusers.d/uenvd.conf", text("uenvd.sysusers.conf"), 0o644)
    for name, places in SHELL_HOOKS.items():
        for place in places:
            write(destdir / place / name, (CHECKOUT / "etc" / name).read_bytes(), 0o644)
    config = destdir / "etc/uenvd/config.yaml"
    write(config.with_suffix(".yaml.example"), text("config.yaml"), 0o644)
    if not config.exists():
        write(config, text("config.yaml"), 0o644)
    for page in (*CHECKOUT.glob("docs/*.md"), CHECKOUT / "README.md", CHECKOUT / "LICENSE"):
        write(home / "share/doc/uenvd" / page.name, page.read_bytes(), 0o644)
    for page in CHECKOUT.glob("man/*.1"):
        write(home / "share/man/man1" / page.name, page.read_bytes(), 0o644)
    for shell, place in COMPLETIONS.items():
        write(destdir / place, completion.SCRIPTS[shell], 0o644)


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(
        prog="make install", description="Install uenvd, all but the Slurm plugin."
    )
    parser.add_argument("--destdir", default="", help="prepended to every path, for packaging")
    parser.add_argument("--prefix", default=DEFAULT_PREFIX, help="default: %(default)s")
    options = parser.parse_args()
    try:
        if not options.prefix.startswith("/"):
            raise InstallError(f"PREFIX must be an absolute path, not {options.prefix!r}")
        install(Path(options.destdir or "/"), options.prefix.rstrip("/"))
    except (InstallError, OSError) as error:
        print(f"make install: {error}", file=sys.stderr)
        return 1
    print(f"installed below {options.destdir}{options.prefix}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
