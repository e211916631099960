"""A tree of files as the audit sees it, wherever it lies: paths, links and contents. Pure."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable
from typing import Final, Literal, NamedTuple

Kind = Literal["file", "link", "directory", "other"]
_MAX_LINKS: Final = 40


class Entry(NamedTuple):
    """One object of the tree."""

    path: str
    """Relative to the root, no leading slash; the root itself is not listed."""
    kind: Kind
    mode: int
    """Permission bits with setuid, setgid and sticky."""
    target: str
    """Of a link, else empty."""
    read: Callable[[], bytes]
    """Return the content of a file; whole."""


class Tree:
    """Entries by path, and where links lead."""

    def __init__(self, entries: Iterable[Entry], prefix: str) -> None:
        self.prefix = prefix
        """Where the root is mounted."""
        self.entries = {entry.path: entry for entry in entries}

    def inside(self, absolute: str) -> str | None:
        """Return the path relative to the root, or None for what is not below the prefix."""
        clean = posixpath.normpath(absolute)
        if clean == self.prefix:
            return ""
        return clean[len(self.prefix) + 1 :] if clean.startswith(self.prefix + "/") else None

    def resolve(self, path: str) -> Entry | Literal["", "outside", "missing"]:
        """Follow all links of a relative path.

        Returns the entry, ``""`` for the root itself, "outside" when a link leaves the tree, "missing" when nothing is there.
        """
        waiting = [part for part in path.split("/") if part]
        done: list[str] = []
        links = 0
        while waiting:
            part = waiting.pop(0)
            if part == "..":
                if not done:
                    return "outside"
                done.pop()
                continue
            if part == ".":
                continue
            entry = self.entries.get("/".join([*done, part]))
            if entry is None:
                return "missing"
            if entry.kind != "link":
                done.append(part)
                continue
            links += 1
            if links > _MAX_LINKS:
                return "missing"
            target = entry.target
            if target.startswith("/"):
                inside = self.inside(target)
                if inside is None:
                    return "outside"
                done, target = [], inside
            waiting = [part for part in target.split("/") if part] + waiting
        return self.entries["/".join(done)] if done else ""
