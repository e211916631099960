"""Run paths of what is to become an image: every library that an object needs is found inside, through paths relative to the object.

`plan` is pure; `relocate` applies it with patchelf.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from uenvd.errors import BuildFailed
from uenvd.publish.build import elf
from uenvd.publish.build.audit import Rules

Run = Callable[..., str]


class Change(NamedTuple):
    """The run path that one object gets."""

    path: str
    run_path: tuple[str, ...]
    rpath: bool
    """Keep it a DT_RPATH."""


def plan(
    path: str, facts: elf.Elf, libraries: Mapping[str, tuple[str, ...]], directories: Iterable[str]
) -> Change | None:
    """Return the change that an object needs, or None.

    Args:
        path: of the object, absolute.
        facts: what the object says.
        libraries: soname -> absolute directories of the image that have it, most wanted first.
        directories: the prefixes that count as inside; run paths to anything else are dropped.

    """
    origin = posixpath.dirname(path)
    kept: list[str] = []
    reached: list[str] = []
    prefixes = tuple(directories)
    for written in facts.run_path:
        place = posixpath.normpath(written.replace("${ORIGIN}", "$ORIGIN").replace("$ORIGIN", origin))
        inside = any(place == prefix or place.startswith(prefix + "/") for prefix in prefixes)
        if written and inside and place not in reached:
            kept.append(written if written.startswith("$") else _relative(place, origin))
            reached.append(place)
    for soname in facts.needed:
        places = libraries.get(soname, ())
        if places and not any(place in reached for place in places):
            kept.append(_relative(places[0], origin))
            reached.append(places[0])
    if tuple(kept) == facts.run_path:
        return None
    return Change(path, tuple(kept), facts.has_rpath)


def _relative(place: str, origin: str) -> str:
    relative = posixpath.relpath(place, origin)
    return "$ORIGIN" if relative == "." else f"$ORIGIN/{relative}"


def objects(root: Path) -> dict[Path, elf.Elf]:
    """Return the ELF objects below a directory, sorted. Raises `BuildFailed` for a damaged one."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        with path.open("rb") as file:
            if file.read(4) != elf.MAGIC:
                continue
        try:
            facts = elf.parse(path.read_bytes())
        except ValueError as error:
            raise BuildFailed(f"{path} is {error}") from error
        if facts is not None:
            found[path] = facts
    return found


def relocate(prefix: Path, bundle_into: Path, sources: Iterable[Path], rules: Rules, run: Run) -> None:
    """Bundle what objects need from ``sources``, then make all run paths lead to it.

    Args:
        prefix: the root of the image, at its final path.
        bundle_into: the directory for libraries of the pinned packages.
        sources: directories of the unpacked packages that have libraries.
        rules: which libraries are the host's.
        run: runs a program.

    Raises:
        BuildFailed: an object needs a library that nothing provides.

    """
    available = {
        path.name: path for place in sources for path in sorted(place.iterdir()) if ".so" in path.name
    }
    known = objects(prefix)
    inside: dict[str, list[str]] = {}
    for path in sorted(prefix.rglob("*.so*")):
        if path.is_symlink() or path.is_file():
            inside.setdefault(path.name, []).append(str(path.parent))
    waiting = list(known.items())
    while waiting:
        path, facts = waiting.pop()
        for soname in facts.needed:
            if soname in inside or "/" in soname:
                continue
            if soname not in available:
                if rules.allows(soname):
                    continue
                raise BuildFailed(
                    f"{path} needs {soname}, which nothing that the recipe pins has",
                    hint="add the Debian package that has it to the lock file, or build it; if it must be the host's, add the soname "
                    "to  host-libraries:  in config.yaml",
                )
            if Rules().allows(soname):  # glibc: never from a package
                continue
            copied = bundle_into / soname
            copied.write_bytes(available[soname].read_bytes())
            copied.chmod(0o755)
            inside[soname] = [str(bundle_into)]
            library = elf.parse(copied.read_bytes())
            if library is not None:
                known[copied] = library
                waiting.append((copied, library))
    libraries = {
        soname: tuple(sorted(places, key=lambda place: (place != str(bundle_into), place)))
        for soname, places in inside.items()
    }
    for path in sorted(known):
        # Its own environment first: of several libraries of one name that is the one that was meant.
        change = plan(str(path), known[path], _nearest(libraries, str(path)), [str(prefix)])
        if change is not None:
            kind = ["--force-rpath"] if change.rpath else []
            mode = path.stat().st_mode
            path.chmod(mode | 0o200)
            if change.run_path:
                run("patchelf", *kind, "--set-rpath", ":".join(change.run_path), str(path))
            else:
                run("patchelf", "--remove-rpath", str(path))


def _nearest(libraries: Mapping[str, tuple[str, ...]], path: str) -> dict[str, tuple[str, ...]]:
    return {
        soname: places
        if len(places) == 1
        else tuple(sorted(places, key=lambda place: (-len(os.path.commonpath([place, path])), place)))
        for soname, places in libraries.items()
    }
