"""A squashfs file -> the tree that the audit looks at, through our own reader: nothing is mounted or unpacked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from uenvd.errors import FormatError, UsageError
from uenvd.publish.build.audit import Finding, Rules, audit
from uenvd.publish.build.tree import Entry, Tree
from uenvd.squashfs import Image, Inode, Kind
from uenvd.views import MAX_FILE_BYTES, read_image_meta

HOST_JSON: Final = "meta/host.json"
"""What the image says it takes from its host."""
MAX_CONTENT_BYTES: Final = 4 << 30
_KINDS: Final = {Kind.FILE: "file", Kind.SYMLINK: "link", Kind.DIRECTORY: "directory"}


@contextmanager
def opened(path: Path) -> Iterator[Image]:
    """Open an image. Raises `UsageError`, `FormatError`; also those of the work inside get the file's name."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    try:
        yield Image(lambda pos_bytes, size_bytes: os.pread(fd, size_bytes, pos_bytes), os.fstat(fd).st_size)
    except FormatError as error:
        raise FormatError(f"{path}: {error.message}", hint=error.hint) from error
    finally:
        os.close(fd)


def entries(image: Image) -> Iterator[Entry]:
    """Yield everything below the root."""
    waiting: list[tuple[str, Inode]] = [("", image.inode(image.root))]
    seen = {image.root}
    while waiting:
        parent, directory = waiting.pop()
        for item in image.entries(directory):
            inode = image.inode(item.ref)
            path = parent + os.fsdecode(item.name)
            kind = _KINDS.get(inode.kind, "other")
            target = os.fsdecode(image.symlink_target(inode)) if kind == "link" else ""
            yield Entry(
                path,
                kind,  # type: ignore[arg-type]  # the values of _KINDS are literals
                inode.mode & 0o7777,
                target,
                partial(image.read_file, inode, MAX_CONTENT_BYTES),
            )
            if kind == "directory":
                if item.ref in seen:
                    raise FormatError(f"the directory {path!r} of the squashfs image is in it twice")
                seen.add(item.ref)
                waiting.append((path + "/", inode))


def audit_image(path: Path, *, prefix: str | None, rules: Rules) -> list[Finding]:
    """Audit an image; ``prefix`` None: where it says it wants to be mounted. Raises `UsageError`, `FormatError`."""
    with opened(path) as image:

        def read_file(name: bytes) -> bytes | None:
            inode = image.find(name)
            if inode is None or inode.kind is not Kind.FILE or inode.size_bytes > MAX_FILE_BYTES:
                return None
            return image.read_file(inode, MAX_FILE_BYTES)

        if prefix is None:
            meta = read_image_meta(read_file)
            prefix = meta.mount if meta else None
        if prefix is None:
            raise UsageError(
                f"{path} does not say where it wants to be mounted", hint="say --prefix /user-environment"
            )
        declared = declared_libraries(read_file(HOST_JSON.encode()))
        rules = Rules((*rules.host_libraries, *declared), rules.build_paths, rules.loaders)
        return list(audit(Tree(entries(image), prefix), rules))


def declared_libraries(data: bytes | None) -> tuple[str, ...]:
    """Return the patterns of libraries that ``meta/host.json`` allows; none for a file that is missing or damaged."""
    try:
        found = json.loads(data or b"{}")["allowed"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()
    return tuple(item for item in found if isinstance(item, str)) if isinstance(found, list) else ()
