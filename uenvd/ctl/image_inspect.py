"""``uenvctl image inspect``: what an image says of itself. A file is read by this process, as the user; no daemon is needed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from uenvd.ctl import output
from uenvd.ctl.arguments import FLAG, parse
from uenvd.ctl.client import REGISTRY_ANSWER_S, Client, socket_path
from uenvd.ctl.own import as_file, name_of
from uenvd.errors import AccessDenied, FormatError, ProtocolError, StorageError, UsageError
from uenvd.label import parse_description

HELP = """\
usage: uenvctl image inspect UENV

Show what an image is: description, mount point, views, size, test results, date, whether it is deprecated. Nothing is
downloaded for that. UENV is a label (mine::... for one of your own images) or the path of a squashfs file.

  --json         see docs/json.md
  --refresh      ask the registry what the label means, even if that was asked a moment ago
  --socket PATH  uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control

examples:
  uenvctl image inspect prgenv-gnu/23.11
  uenvctl image inspect ./my.squashfs --json
"""

OPTIONS = {"--json": FLAG, "--refresh": FLAG}
TAKES = ("uenv",)


def main(argv: Sequence[str]) -> int:
    """Handle the command; return the exit status."""
    arguments = parse(argv, command="image inspect", options=OPTIONS, words=(1, 1))
    if "--help" in arguments.flags:
        print(HELP, end="")
        return 0
    asked = parse_description(arguments.words[0])
    output.mention_files([asked])
    description = as_file(asked, os.environ)
    if description.path is not None:
        facts = inspect_file(description.path, name_of(description.path, os.environ))
    else:
        path = socket_path(arguments.values.get("--socket"), os.environ)
        with Client(path) as client:
            facts = client.call(
                "inspect",
                answer_s=REGISTRY_ANSWER_S,
                uenv=str(description.label),
                refresh="--refresh" in arguments.flags or None,
            ).frame
        facts.pop("ok")
        for note in facts.pop("notes", None) or ():
            output.note(str(note))
    if "--json" in arguments.flags:
        output.data_json(facts)
    else:
        output.data(_shown(facts))
    return 0


def inspect_file(path: str, label: str | None = None) -> dict[str, Any]:
    """Return what a squashfs file says of itself, in the form of the protocol's ``inspect``; ``label`` if it has one.

    Raises `UsageError`, `AccessDenied`, `StorageError`, `FormatError`.
    """
    from uenvd.views import read_image_meta

    with open_image(path) as read_file:
        meta = read_image_meta(read_file)
        size_bytes = os.stat(path).st_size  # noqa: PTH116 - pathlib is slow to import
    return {
        "label": label or path,
        "digest": None,
        "size_bytes": size_bytes,
        "cached": True,
        "date": None,
        "mount": meta.mount if meta else None,
        "description": meta.description if meta else None,
        "default_view": meta.default_view if meta else None,
        "views": [{"name": view.name, "description": view.description} for view in meta.views]
        if meta
        else None,
        "architecture": None,
        "tests": None,
        "deprecated": None,
        "tags": None,
        "annotations": {},
    }


@contextmanager
def open_image(path: str) -> Iterator[Callable[[bytes], bytes | None]]:
    """Open a squashfs file as the user; yield a reader of its small regular files (None for what is no such file).

    Raises `UsageError`, `AccessDenied`, `StorageError`, `FormatError`, also for what is met inside the ``with`` block.
    """
    from uenvd.squashfs import Image, Kind  # a codec's worth of imports, for files only
    from uenvd.views import MAX_FILE_BYTES

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(
            f"cannot open {path}: {error.strerror}", hint="check the path of the image"
        ) from error
    except PermissionError as error:
        raise AccessDenied(f"cannot open {path}: {error.strerror}") from error
    except OSError as error:
        raise StorageError(f"cannot open {path}: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{path} is not a regular file", hint="give the path of a squashfs image")
        try:
            image = Image(lambda pos, size: os.pread(descriptor, size, pos), status.st_size)

            def read_file(name: bytes) -> bytes | None:
                inode = image.find(name)
                if inode is None or inode.kind is not Kind.FILE or inode.size_bytes > MAX_FILE_BYTES:
                    return None
                return image.read_file(inode, MAX_FILE_BYTES)

            yield read_file
        except FormatError as error:
            raise FormatError(f"{path}: {error.message}", hint=error.hint) from error
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _size(size_bytes: int) -> str:
    return f"{output.megabytes(size_bytes)} MB" if size_bytes >= 100_000 else f"{size_bytes} bytes"


def _tags(tags: object) -> str | None:
    return ", ".join(map(str, tags)) if isinstance(tags, list) and tags else None


def tests_text(tests: object) -> str | None:
    """Return the answer's ``tests`` for a human; None where nothing is known."""
    if not isinstance(tests, dict):
        return None
    remark = tests.get("remark")
    return f"{tests.get('verdict')}{f': {remark}' if remark else ''}"


def _shown(facts: dict[str, Any]) -> str:
    size = facts.get("size_bytes")
    cached = facts.get("cached")
    rows = [
        ("uenv:", facts.get("label")),
        ("deprecated:", facts.get("deprecated")),
        ("description:", facts.get("description")),
        ("mount:", facts.get("mount")),
        ("digest:", facts.get("digest")),
        ("size:", _size(size) if isinstance(size, int) else None),
        ("date:", facts.get("date")),
        ("tags:", _tags(facts.get("tags"))),
        ("tests:", tests_text(facts.get("tests"))),
        ("architecture:", facts.get("architecture")),
        (
            "here:",
            None
            if facts.get("digest") is None
            else "yes"
            if cached
            else "no, will be fetched when it is used",
        ),
    ]
    views = facts.get("views")
    if views is None:
        rows.append(("views:", "none" if cached else "not known before the image is here"))
    elif not isinstance(views, list) or not all(isinstance(view, dict) for view in views):
        raise ProtocolError("uenvd's answer holds no list of views")
    elif not views:
        rows.append(("views:", "none"))
    lines = [output.table((), [(name, str(value)) for name, value in rows if value])]
    if views:
        default = facts.get("default_view")
        lines.append("views:")
        names = [
            f"  {view.get('name')}{' (default)' if view.get('name') == default else ''}" for view in views
        ]
        texts = [str(view.get("description") or "") for view in views]
        lines.append(output.table((), list(zip(names, texts, strict=True))))
    return "\n".join(lines)
