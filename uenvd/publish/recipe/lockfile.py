"""Lock files of a recipe: the exact inputs of a build, each with its SHA-256.

``interpreter.lock``     one Debian package a line:   name=version  architecture  sha256:<64 hex digits>
``toolchain.lock``       the same
``requirements.lock``    pip's format, one or more hashes for each:   name==version --hash=sha256:<64 hex digits>
``sources.lock``         one file a line, and where it may be had:   file  sha256:<64 hex digits>  https://...  debian:name=version

In all ``#`` begins a comment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from uenvd.errors import RecipeError

_PACKAGE: Final = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9+.-]+)=(?P<version>[A-Za-z0-9.+:~-]+)\s+(?P<architecture>[a-z0-9]+)\s+sha256:(?P<sha256>[0-9a-f]{64})"
)
_REQUIREMENT: Final = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.+!_-]+)(?P<hashes>(\s+--hash=\S+)+)"
)
_SOURCE: Final = re.compile(
    r"(?P<file>[A-Za-z0-9][A-Za-z0-9.+_~-]*)\s+sha256:(?P<sha256>[0-9a-f]{64})(?P<places>(\s+\S+)+)"
)
_PLACE: Final = re.compile(r"https?://[^\s@]+|file:///\S+|debian:[a-z0-9][a-z0-9+.-]+=[A-Za-z0-9.+:~-]+")
_HASH: Final = re.compile(r"--hash=sha256:([0-9a-f]{64})")


class Package(NamedTuple):
    """A pinned Debian package."""

    name: str
    version: str
    architecture: str
    """Debian's name: amd64, arm64, or all."""
    sha256: str
    """64 hexadecimal digits."""

    @property
    def file_name(self) -> str:
        """What apt calls the file: a colon of the version is escaped."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


class SourceFile(NamedTuple):
    """A pinned file of source code."""

    file: str
    sha256: str
    """64 hexadecimal digits."""
    places: tuple[str, ...]
    """Where it may be had, tried in this order: addresses, and ``debian:SOURCE=VERSION`` for a file of a Debian source package."""


def read_sources(path: Path) -> tuple[SourceFile, ...]:
    """Read the pinned source files. Raises `RecipeError`."""
    found: dict[str, SourceFile] = {}
    for line, text in _lines(path, r"(^|\s)#(\s.*|$)"):
        match = _SOURCE.fullmatch(text)
        places = tuple(match["places"].split()) if match else ()
        if match is None or not all(_PLACE.fullmatch(place) for place in places):
            raise RecipeError(
                f"{path}:{line}: {text.split()[0][:60]}: is no  file sha256:<64 digits> https://... or debian:name=version",
                hint="uenvd-publish lock RECIPE --source https://...  writes such a file",
            )
        if match["file"] in found:
            raise RecipeError(f"{path}:{line}: {match['file']}: is given twice")
        found[match["file"]] = SourceFile(match["file"], match["sha256"], places)
    return tuple(found.values())


def format_sources(files: Iterable[SourceFile], comment: str) -> str:
    """Return the text of a lock file of sources."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    lines += [f"{one.file} sha256:{one.sha256} {' '.join(one.places)}" for one in files]
    return "\n".join(lines) + "\n"


def read_interpreter_lock(path: Path) -> tuple[Package, ...]:
    """Read the pinned Debian packages. Raises `RecipeError`."""
    found: dict[str, Package] = {}
    for line, text in _lines(path):
        match = _PACKAGE.fullmatch(text)
        if match is None:
            raise RecipeError(
                f"{path}:{line}: {text.split('=')[0][:60]}: is no  name=version architecture sha256:<64 digits>",
                hint="uenvd-publish lock RECIPE writes such a file",
            )
        package = Package(match["name"], match["version"], match["architecture"], match["sha256"])
        if package.name in found:
            raise RecipeError(f"{path}:{line}: {package.name}: is given twice")
        found[package.name] = package
    if not found:
        raise RecipeError(f"{path}:1: there is no package in it")
    return tuple(found.values())


def format_interpreter_lock(packages: Iterable[Package], comment: str) -> str:
    """Return the text of a lock file."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    lines += [f"{p.name}={p.version} {p.architecture} sha256:{p.sha256}" for p in packages]
    return "\n".join(lines) + "\n"


def read_requirements(path: Path) -> dict[str, str]:
    """Return name (normalised) -> version of the pinned wheels. Raises `RecipeError`: also for a line without a hash."""
    found: dict[str, str] = {}
    for line, text in _requirement_lines(path):
        match = _REQUIREMENT.fullmatch(text)
        hashes = _HASH.findall(text)
        if match is None or len(hashes) != text.count("--hash="):
            raise RecipeError(
                f"{path}:{line}: {text.split()[0][:60]}: is no  name==version --hash=sha256:<64 digits>",
                hint="pip-compile --generate-hashes writes such a file",
            )
        name = re.sub(r"[-_.]+", "-", match["name"]).lower()
        if name in found:
            raise RecipeError(f"{path}:{line}: {name}: is given twice")
        found[name] = match["version"]
    return found


def requirement_hashes(path: Path) -> dict[str, frozenset[str]]:
    """Return ``name==version`` -> the SHA-256 digests that its wheel may have. For a file that `read_requirements` accepts."""
    return {text.split()[0]: frozenset(_HASH.findall(text)) for _line, text in _requirement_lines(path)}


def _requirement_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of logical lines: a backslash at the end continues one."""
    began, pending = 0, ""
    for line, text in _lines(path):
        began = began or line
        if text.endswith("\\"):
            pending += text[:-1] + " "
            continue
        yield began, (pending + text).strip()
        began, pending = 0, ""
    if pending:
        raise RecipeError(
            f"{path}:{began}: {pending.split()[0]}: the last line is continued, but there is no more"
        )


def _lines(path: Path, comment: str = r"(^|\s)#.*") -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file, and the recipe's builder needs it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    for number, raw in enumerate(text.splitlines(), 1):
        line = re.sub(comment, "", raw).strip()
        if line:
            yield number, line
