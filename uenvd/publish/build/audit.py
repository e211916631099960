"""The audit of an image: what in it depends on the machine that built it, or on what its hosts may not have. Pure.

Each finding is of one kind, so that docs/recipes.md can say what to do about it.
"""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from uenvd.publish.build import elf
from uenvd.publish.build.tree import Entry, Tree

FindingKind = Literal[
    "interpreter", "run-path", "needed", "shebang", "link", "build-path", "permission", "special", "bytecode", "damaged", "run"
]  # fmt: skip

BUILD_DIRECTORY: Final = "/uenvd-build"
"""Where the builder works: a place that exists in its private namespace only, so a text that names it is wrong on every host."""

GLIBC: Final = (
    "ld-linux-*.so.*", "ld64.so.*", "libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0",
    "libutil.so.1", "libresolv.so.2", "libmvec.so.1",
)  # fmt: skip
"""The one thing that must be the host's: bound to its kernel, its loader and its name services."""
SHEBANGS_OF_HOSTS: Final = frozenset({"/bin/sh", "/bin/bash", "/usr/bin/sh", "/usr/bin/bash", "/usr/bin/env"})
_SHEBANG_MAX_BYTES: Final = 127
"""BINPRM_BUF_SIZE less one before Linux 5.1 (now 255): include/uapi/linux/binfmts.h."""
_UNCHECKED_HASH: Final = 0b01
"""Flags of a .pyc (PEP 552): hash-based, never compared with its source."""
_PATH_ENDS = re.compile(rb"[/\s\"':;,)\]}\0]")


class Finding(NamedTuple):
    """One thing that is wrong."""

    path: str
    kind: FindingKind
    detail: str

    def __str__(self) -> str:
        return f"{self.path}: {self.kind}: {self.detail}"


@dataclass(frozen=True)
class Rules:
    """What is allowed."""

    host_libraries: tuple[str, ...] = ()
    """Sonames beside glibc, with ``*``, that the image may take from its host."""
    build_paths: tuple[str, ...] = (BUILD_DIRECTORY,)
    """Paths of the machine that builds: no file may hold one."""
    loaders: dict[str, str] = field(default_factory=lambda: dict(elf.LOADERS))

    def allows(self, soname: str) -> bool:
        """Whether a library may be the host's."""
        return any(fnmatch.fnmatchcase(soname, pattern) for pattern in (*GLIBC, *self.host_libraries))


def audit(tree: Tree, rules: Rules) -> Iterator[Finding]:
    """Yield what is wrong, in the order of the paths."""
    sonames: dict[str, list[str]] = {}
    for path, entry in tree.entries.items():
        if entry.kind != "directory" and ".so" in posixpath.basename(path):
            sonames.setdefault(posixpath.basename(path), []).append(path)
    for path in sorted(tree.entries):
        entry = tree.entries[path]
        if entry.kind == "link":
            yield from _link(tree, entry)
            continue
        yield from _mode(entry)
        if entry.kind != "file":
            continue
        data = entry.read()
        try:
            facts = elf.parse(data)
        except ValueError as error:
            yield Finding(path, "damaged", str(error))
            continue
        if facts is not None:
            yield from _elf(tree, rules, entry, facts, sonames)
        elif data.startswith(b"#!") and entry.mode & 0o111:
            yield from _shebang(tree, path, data)
        elif path.endswith(".pyc"):
            yield from _bytecode(path, data)
        yield from _build_paths(rules, path, data)


def _link(tree: Tree, entry: Entry) -> Iterator[Finding]:
    target = entry.target
    found = tree.resolve(entry.path)
    if found == "outside":
        how = "is absolute and leaves the image" if target.startswith("/") else "leaves the image"
        yield Finding(entry.path, "link", f"the link to {target} {how}")
    elif found == "missing":
        yield Finding(entry.path, "link", f"the link to {target} leads nowhere")


def _mode(entry: Entry) -> Iterator[Finding]:
    if entry.kind == "other":
        yield Finding(
            entry.path,
            "special",
            "is no file, directory or link: devices, pipes and sockets do nothing in an image",
        )
        return
    if entry.mode & 0o6000:
        yield Finding(
            entry.path, "special", "is setuid or setgid: images are mounted nosuid, so it will not work"
        )
    wanted = 0o555 if entry.kind == "directory" else 0o444
    if entry.mode & wanted != wanted:
        yield Finding(entry.path, "permission", f"mode {entry.mode & 0o7777:04o}: not everybody can read it")


def directories(entry_path: str, tree: Tree, facts: elf.Elf) -> Iterator[tuple[str, str | None]]:
    """Yield each run path as written, and where it leads relative to the root: None for what leaves the image."""
    origin = posixpath.dirname(posixpath.join(tree.prefix, entry_path))
    for written in facts.run_path:
        expanded = written.replace("${ORIGIN}", "$ORIGIN").replace("$ORIGIN", origin)
        if not expanded.startswith("/") or "$" in expanded:
            yield written, None
        else:
            yield written, tree.inside(expanded)


def _elf(
    tree: Tree, rules: Rules, entry: Entry, facts: elf.Elf, sonames: dict[str, list[str]]
) -> Iterator[Finding]:
    if facts.interpreter is not None and facts.interpreter != rules.loaders.get(facts.machine):
        inside = tree.inside(facts.interpreter)
        if inside is None or isinstance(tree.resolve(inside), str):
            yield Finding(
                entry.path,
                "interpreter",
                f"its loader {facts.interpreter} is neither in the image nor that of every {facts.machine} host",
            )
    search = []
    for written, inside in directories(entry.path, tree, facts):
        if inside is None:
            yield Finding(
                entry.path,
                "run-path",
                f"{written or 'an empty entry (the working directory)'} is outside the image",
            )
        else:
            search.append(inside)
    for soname in facts.needed:
        if "/" in soname:
            inside = tree.inside(soname)
            if inside is None or isinstance(tree.resolve(inside), str):
                yield Finding(entry.path, "needed", f"needs {soname}, a path outside the image")
        elif any(isinstance(tree.resolve(posixpath.join(place, soname)), Entry) for place in search):
            continue
        elif soname in sonames:
            yield Finding(
                entry.path,
                "needed",
                f"needs {soname}, which is in the image ({sonames[soname][0]}) but not on its run path",
            )
        elif not rules.allows(soname):
            yield Finding(entry.path, "needed", f"needs {soname} of the host")


def _shebang(tree: Tree, path: str, data: bytes) -> Iterator[Finding]:
    line = data[2:].partition(b"\n")[0]
    if len(line) + 2 > _SHEBANG_MAX_BYTES:
        yield Finding(
            path, "shebang", f"its first line is longer than the {_SHEBANG_MAX_BYTES} bytes that kernels read"
        )
    words = line.decode(errors="replace").split()
    program = words[0] if words else ""
    if program in SHEBANGS_OF_HOSTS:
        return
    inside = tree.inside(program) if program.startswith("/") else None
    if inside is None:
        yield Finding(path, "shebang", f"starts with {program or 'nothing'}, which is not in the image")
    elif isinstance(tree.resolve(inside), str):
        yield Finding(path, "shebang", f"starts with {program}, which does not exist")


def _bytecode(path: str, data: bytes) -> Iterator[Finding]:
    if len(data) < 16:
        yield Finding(path, "damaged", "a damaged .pyc file")
    elif int.from_bytes(data[4:8], "little") != _UNCHECKED_HASH:
        yield Finding(
            path,
            "bytecode",
            "holds a time stamp or is checked against its source: compile with unchecked-hash",
        )


def _build_paths(rules: Rules, path: str, data: bytes) -> Iterator[Finding]:
    for text in rules.build_paths:
        needle = text.encode()
        position = data.find(needle)
        while position >= 0:
            after = data[position + len(needle) : position + len(needle) + 1]
            if not after or _PATH_ENDS.match(after):
                yield Finding(
                    path,
                    "build-path",
                    f"holds {text} (at byte {position}), a directory of the machine that built it",
                )
                break
            position = data.find(needle, position + 1)


def summary(findings: Sequence[Finding]) -> str:
    """Return a text of at most 20 findings for an error message."""
    shown = [f"  {finding}" for finding in findings[:20]]
    if len(findings) > 20:
        shown.append(f"  and {len(findings) - 20} more")
    return "\n".join(shown)
