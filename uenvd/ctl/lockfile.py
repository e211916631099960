"""``uenv.lock``: which bytes a project's labels meant when it was locked. JSON, made to be committed beside the code (docs/json.md).

The file says nothing that has to be believed: a digest in it is checked wherever its bytes are fetched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from uenvd.ctl.arguments import FLAG, VALUE, Arguments
from uenvd.errors import LabelError, LockError
from uenvd.label import Description, Label, parse_descriptions, parse_namespaced_label
from uenvd.own import NAMESPACE

FILE_NAME = "uenv.lock"
VERSION = 1
MAX_BYTES = 1 << 20

OPTIONS: Mapping[str, bool] = {"--locked": FLAG, "--lock-file": VALUE}
"""Of every command that takes images by what the file says."""


class Locked(NamedTuple):
    """One image: what was ``asked`` for, the full ``label`` that this meant, and its bytes."""

    asked: str
    label: str
    digest: str
    size_bytes: int | None
    registry: str | None
    date: str | None
    """RFC 3339: when it was built."""
    locked: str | None
    """RFC 3339: when it was looked up."""

    @property
    def pinned(self) -> Label:
        """The label that means these bytes for ever."""
        return parse_namespaced_label(self.label)._replace(digest=self.digest)


class LockFile(NamedTuple):
    """A lock file's path and its images, in the order in which they were locked."""

    path: str
    images: tuple[Locked, ...]


def find(start: str) -> str | None:
    """Return the lock file of a directory or of the nearest one above it; None where there is none."""
    directory = os.path.abspath(start)  # noqa: PTH100 - pathlib is slow to import
    while True:
        path = os.path.join(directory, FILE_NAME)
        if os.path.isfile(path):  # noqa: PTH113
            return path
        parent = os.path.dirname(directory)  # noqa: PTH120
        if parent == directory:
            return None
        directory = parent


def read(path: str) -> LockFile:
    """Read and check a lock file. Raises `LockError`."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - pathlib is slow to import
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise LockError(f"there is no {path}") from None
    except OSError as error:
        raise LockError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from error
    try:
        document = json.loads(raw) if len(raw) <= MAX_BYTES else None
        return LockFile(path, tuple(_images(document)))
    except (ValueError, TypeError, KeyError, RecursionError, LabelError) as error:
        raise LockError(f"{path} is damaged: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]


def _images(document: Any) -> Iterable[Locked]:  # noqa: ANN401 - any JSON value
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise TypeError("it is no lock file")
    if document["version"] != VERSION:
        raise ValueError(f"it is of version {document['version']}, this uenvctl reads version {VERSION}")
    for raw in document["images"]:
        one = Locked(
            *(raw[name] for name in ("asked", "label", "digest")),
            *(raw.get(name) for name in ("size_bytes", "registry", "date", "locked")),
        )
        if not all(isinstance(text, str) for text in one[:3]):
            raise TypeError("an image has no texts 'asked', 'label' and 'digest'")
        if parse_namespaced_label(f"x@{one.digest}").digest != one.digest:
            raise ValueError(f"{one.digest} is no digest")
        if one.pinned.name is None or parse_namespaced_label(one.label).digest is not None:
            raise ValueError(f"{one.label} is no label")
        yield one


def write(lock: LockFile) -> None:
    """Write a lock file in one step; equal values give equal bytes. Raises `LockError`."""
    document = {"version": VERSION, "images": [one._asdict() for one in lock.images]}
    fresh = f"{lock.path}.{os.getpid()}"
    try:
        try:
            with open(fresh, "w", encoding="ascii") as file:  # noqa: PTH123 - pathlib is slow to import
                file.write(json.dumps(document, indent=2) + "\n")
            os.replace(fresh, lock.path)  # noqa: PTH105
        except BaseException:
            if os.path.lexists(fresh):
                os.unlink(fresh)  # noqa: PTH108
            raise
    except OSError as error:
        raise LockError(
            f"{lock.path} cannot be written: {error.strerror}",
            hint="name another place: --lock-file PATH",
        ) from error


def pin(text: str, lock: LockFile) -> str:
    """Return a description list in which every label has the digest that the file says; files, own images and mount points stay.

    A label is looked up as it was asked for, else as a description of what was locked. One that has a digest already keeps it.
    Raises `LockError` (it is not in the file, or could mean several), `LabelError`.
    """
    return ",".join(str(_pinned(one, lock)) for one in parse_descriptions(text))


def _pinned(one: Description, lock: LockFile) -> Description:
    label = one.label
    if label is None or label.digest is not None or label.namespace == NAMESPACE:
        return one
    found = [locked for locked in lock.images if locked.asked == str(label)] or [
        locked for locked in lock.images if label.matches(locked.pinned)
    ]
    if len({locked.digest for locked in found}) == 1:
        return one._replace(label=found[0].pinned)
    there = ", ".join(locked.asked for locked in lock.images) or "nothing"
    if found:
        raise LockError(
            f"'{label}' can mean several images of {lock.path}: {', '.join(locked.label for locked in found)}",
            hint="name it as it was locked",
        )
    raise LockError(
        f"'{label}' is not in {lock.path}, which has: {there}", hint=f"add it with: uenvctl lock {label}"
    )


def chosen(arguments: Arguments) -> LockFile:
    """Return the lock file of a command line: ``--lock-file``, else the nearest one. Raises `LockError`."""
    path = arguments.values.get("--lock-file")
    if path is None:
        path = find(".")
        if path is None:
            raise LockError(f"there is no {FILE_NAME} here or in a directory above")
    return read(path)


def pinned_by(arguments: Arguments, text: str) -> str:
    """Return what a command takes for images: the text, with ``--locked`` (or ``--lock-file``) as the lock file pins it."""
    if "--locked" not in arguments.flags and "--lock-file" not in arguments.values:
        return text
    return pin(text, chosen(arguments))


def merged(old: Sequence[Locked], new: Sequence[Locked]) -> tuple[Locked, ...]:
    """Return the images of a file with those that were locked again replaced in their places, and new ones at the end."""
    by_asked = {one.asked: one for one in new}
    kept = [by_asked.pop(one.asked, one) for one in old]
    return (*kept, *by_asked.values())
