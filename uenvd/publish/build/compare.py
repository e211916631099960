"""Two images, file by file: what a build that is not reproducible leaves behind to find out why."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Final, NamedTuple

from uenvd.publish.build.imagefile import MAX_CONTENT_BYTES, opened
from uenvd.squashfs import Image, Inode, Kind

MAX_SHOWN: Final = 40


class _Fact(NamedTuple):
    kind: str
    mode: int
    owner: tuple[int, int]
    time_s: int
    content: str


def differences(first: Path, second: Path) -> list[str]:
    """Return what differs, a line for each path, sorted; none if the trees are equal. Raises `UsageError`, `FormatError`."""
    with opened(first) as one, opened(second) as other:
        old, new = _facts(one), _facts(other)
    lines = []
    for path in sorted({*old, *new}):
        before, after = old.get(path), new.get(path)
        if before is None or after is None:
            lines.append(f"{path}: is only in the {'second' if before is None else 'first'} image")
        elif before != after:
            parts = [name for name in _Fact._fields if getattr(before, name) != getattr(after, name)]
            lines.append(f"{path}: other {', '.join(parts)}")
    return lines


def shown(lines: list[str]) -> str:
    """Return a text of at most `MAX_SHOWN` lines for an error message."""
    more = [f"  and {len(lines) - MAX_SHOWN} more"] if len(lines) > MAX_SHOWN else []
    return "\n".join([f"  {line}" for line in lines[:MAX_SHOWN]] + more)


def _facts(image: Image) -> dict[str, _Fact]:
    found: dict[str, _Fact] = {}
    waiting: list[tuple[str, Inode]] = [("", image.inode(image.root))]
    while waiting:
        path, inode = waiting.pop()
        content = ""
        if inode.kind is Kind.FILE:
            content = hashlib.sha256(image.read_file(inode, MAX_CONTENT_BYTES)).hexdigest()
        elif inode.kind is Kind.SYMLINK:
            content = os.fsdecode(image.symlink_target(inode))
        elif inode.kind is Kind.DIRECTORY:
            waiting += [
                (f"{path}/{os.fsdecode(entry.name)}".lstrip("/"), image.child(entry))
                for entry in image.entries(inode)
            ]
        found[path or "/"] = _Fact(
            inode.kind.name, inode.mode & 0o7777, (inode.uid, inode.gid), inode.mtime_s, content
        )
    return found
