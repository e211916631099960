"""``uenvd-publish lock``: pin the Debian packages of a recipe to what the machine's apt offers now, and source files to what they are now."""

from __future__ import annotations

import argparse
import re
import subprocess
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from uenvd.errors import BuildFailed, RecipeError, ResourceMissing, UsageError
from uenvd.publish.build.downloads import NotThere, any_content, places_of_source
from uenvd.publish.build.inputs import FETCH_S, default_cache, keep_file, scratch_directory, sha256_of
from uenvd.publish.console import say, show
from uenvd.publish.options import refuse
from uenvd.publish.recipe.lockfile import (
    Package,
    SourceFile,
    format_interpreter_lock,
    format_sources,
    read_interpreter_lock,
    read_sources,
)

INTERPRETER: Final = "interpreter.lock"
TOOLCHAIN: Final = "toolchain.lock"
SOURCES: Final = "sources.lock"
_COMMENT: Final = """Debian packages of the interpreter and of the libraries that it and the wheels need.
Written by uenvd-publish lock; name=version, architecture, digest of the .deb."""
_CHAIN_COMMENT: Final = """Debian packages of the programs that compile, and all that they need.
Written by uenvd-publish lock; name=version, architecture, digest of the .deb.
Asked for: {roots}"""
_SOURCES_COMMENT: Final = """Source files: name, digest, and where they may be had.
Written by uenvd-publish lock --source."""
_ROOTS = re.compile(r"^# Asked for: (.*)$", re.MULTILINE)
_DSC_FILE: Final = re.compile(r"^ [0-9a-f]{64} \d+ (\S+)$", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="the recipe's directory")
    parser.add_argument(
        "--file",
        metavar="FILE",
        help=f"the lock file of packages in it; default {INTERPRETER}, or {TOOLCHAIN} with --toolchain or where only that exists",
    )
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="one more Debian package; may be repeated",
    )
    parser.add_argument(
        "--toolchain", action="store_true", help="pin also all that the packages depend on: they are a root of their own"
    )  # fmt: skip
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="PLACE",
        help=f"pin a source file in {SOURCES}: its address, or debian:NAME=VERSION for the files of a Debian source package (with /FILE for "
        "one of them); may be repeated",
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where downloads are kept")


def run(arguments: argparse.Namespace) -> int:
    """Write the lock files; what changed goes to stdout."""
    directory: Path = arguments.recipe
    if arguments.source and not arguments.add:
        refuse(
            arguments,
            ("file", "toolchain"),
            "is for packages, and only source files are pinned with --source alone",
            hint="say which packages, too: --add PACKAGE; or first the packages, then the sources",
        )
    if not directory.is_dir():
        raise UsageError(f"{directory} is no directory")
    cache: Path = (arguments.cache or default_cache()).absolute()
    if arguments.source:
        _lock_sources(directory / SOURCES, arguments.source, cache)
    chain = directory / TOOLCHAIN
    closure = arguments.toolchain or (chain.exists() and not (directory / INTERPRETER).exists())
    path = directory / (arguments.file or (TOOLCHAIN if closure else INTERPRETER))
    if arguments.source and not arguments.add:
        return 0
    old = {package.name: package for package in read_interpreter_lock(path)} if path.exists() else {}
    asked = _roots(path) if closure else list(old)
    names = list(dict.fromkeys([*asked, *arguments.add]))
    if not names:
        raise RecipeError(
            f"{path}: no such file", hint="name the packages of a new one: --add python3.11-minimal --add ..."
        )
    comment = _CHAIN_COMMENT.format(roots=" ".join(names)) if closure else _COMMENT
    if closure:
        names = with_dependencies(names)
    say(f"asking apt for {len(names)} packages")
    new = pin(names, cache)
    path.write_text(format_interpreter_lock(new, comment))
    for package in new:
        before = old.pop(package.name, None)
        if before is None:
            show(f"{package.name} {package.version} is new")
        elif before != package:
            show(f"{package.name} {before.version} -> {package.version}")
    for name in old:
        show(f"{name} is gone")
    return 0


def _roots(path: Path) -> list[str]:
    match = _ROOTS.search(path.read_text(errors="replace")) if path.exists() else None
    return match[1].split() if match else []


def with_dependencies(names: Sequence[str]) -> list[str]:
    """Return packages and all that they depend on, as apt would install them on an empty machine. Raises `BuildFailed`."""
    words = [
        "-qq", "--simulate", "-o", "Dir::State::status=/dev/null", "-o", "APT::Install-Recommends=false", "install", *names,
    ]  # fmt: skip
    # Inst libc6 (2.36-9+deb12u10 Debian:12.10/stable [amd64])
    lines = _apt(words, None).splitlines()
    return sorted({line.split()[1] for line in lines if line.startswith("Inst ")})


def pin(names: Sequence[str], cache: Path) -> list[Package]:
    """Return the versions that apt offers, with their digests; the packages are in the cache then.

    Raises `BuildFailed`, `ResourceMissing`.
    """
    with scratch_directory(cache) as scratch:
        _apt(["-qq", "-o", "APT::Sandbox::User=root", "download", *names], scratch)
        found = {}
        for deb in scratch.glob("*.deb"):
            fields = subprocess.run(
                ["dpkg-deb", "--show", "--showformat", "${Package} ${Version} ${Architecture}", str(deb)],
                capture_output=True, text=True, check=True,
            ).stdout.split()  # fmt: skip
            package = Package(fields[0], fields[1], fields[2], sha256_of(deb))
            found[package.name] = package
            if deb.name == package.file_name:
                keep_file(deb, package.sha256, cache / "debs")
    return [found[name] for name in names]


def _apt(words: Sequence[str], cwd: Path | None) -> str:
    try:
        done = subprocess.run(
            ["apt-get", *words], cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=FETCH_S,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise ResourceMissing("apt-get is missing", hint="use a Debian machine") from error
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"apt-get did not end within {FETCH_S:.0f} s") from error
    if done.returncode != 0:
        raise BuildFailed(f"apt cannot fetch the packages:\n{done.stderr.strip()}", hint="apt-get update")
    return done.stdout


def _lock_sources(path: Path, places: Sequence[str], cache: Path) -> None:
    found = {one.file: one for one in read_sources(path)} if path.exists() else {}
    for place in places:
        for file in _source_files(place, cache):
            before = found.get(file.file)
            kept = tuple(one for one in before.places if one not in file.places) if before else ()
            found[file.file] = file._replace(places=(*file.places, *kept))
            show(
                f"{file.file} sha256:{file.sha256}"
                + ("" if before is None or before.sha256 == file.sha256 else " (other bytes)")
            )
    path.write_text(format_sources(found.values(), _SOURCES_COMMENT))


def _source_files(place: str, cache: Path) -> list[SourceFile]:
    """Return what a place has, pinned to what it is now; the files are in the cache then. Raises `UsageError`, `BuildFailed`."""
    if not place.startswith("debian:"):
        name = Path(urllib.parse.unquote(urllib.parse.urlsplit(place).path)).name
        if not name or not place.startswith(("https://", "http://", "file:///")):
            raise UsageError(f"--source {place}: is no address of a file, and no debian:NAME=VERSION")
        return [_pinned(name, place, cache)]
    name, equals, version = place.removeprefix("debian:").partition("=")
    if not equals or not version:
        raise UsageError(f"--source {place}: says no version", hint=f"apt-cache showsrc {name} lists them")
    version, slash, one = version.partition("/")
    place = f"debian:{name}={version}"
    if slash:
        return [_pinned(one, place, cache)]
    bare = version.partition(":")[2] or version
    dsc = _pinned(f"{name}_{bare}.dsc", place, cache)
    text = (cache / "sources" / f"{dsc.sha256[:16]}-{dsc.file}").read_text(errors="replace")
    checksums = re.split(
        r"^(?=\S)", text.partition("Checksums-Sha256:\n")[2], maxsplit=1, flags=re.MULTILINE
    )[0]
    return [
        dsc,
        *(_pinned(file, place, cache) for file in _DSC_FILE.findall(checksums) if not file.endswith(".asc")),
    ]


def _pinned(file: str, place: str, cache: Path) -> SourceFile:
    wanted = SourceFile(file, "", (place,))
    say(f"fetching {file}")
    with scratch_directory(cache) as scratch:
        try:
            any_content(places_of_source(wanted), scratch / file)
        except NotThere as error:
            raise BuildFailed(f"{place} cannot be had:\n{error}", hint="is the network there?") from error
        sha256 = sha256_of(scratch / file)
        kept = scratch / f"{sha256[:16]}-{file}"
        (scratch / file).rename(kept)
        keep_file(kept, sha256, cache / "sources")
    return wanted._replace(sha256=sha256)
