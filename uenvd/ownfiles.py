"""Which file a label of a directory of own images means: the looking for `uenvd.own`. With the rights of whoever calls; blocking."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from uenvd.errors import AccessDenied, StorageError, UnknownLabel
from uenvd.label import Label
from uenvd.own import SUFFIX, OwnFile, choose, file_of, need_file_label

MAX_ENTRIES: Final = 10_000
"""Of all directories of one search; more are not looked at."""
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Found(NamedTuple):
    """A file, and what it is called: the label that was asked for with what it left out."""

    label: Label
    path: str


def find(directory: str, wanted: Label) -> Found:
    """Return the file that a label with a namespace means, below a directory of images.

    A file that is named exactly is only looked for, and one that cannot be looked at is left to whoever opens it. Otherwise directories are
    listed: at most the name's and those of its versions.

    Raises:
        LabelError: the label says what no file name can.
        UnknownLabel, AmbiguousLabel: no file, or several files of different images.
        AccessDenied, StorageError: a directory cannot be listed.

    """
    need_file_label(wanted)
    if not directory:
        raise UnknownLabel(
            f"there is no image '{wanted}': neither $XDG_DATA_HOME nor $HOME says where your own images are"
        )
    exact = file_of(directory, wanted)
    if exact is not None and _is_there(exact, unsure=wanted.version is not None):
        return Found(wanted, exact)
    left = itertools.repeat(None, MAX_ENTRIES)
    there = list(_of_name(f"{directory}/{wanted.name}", str(wanted.name), left))
    names = [] if there else [entry.name.removesuffix(SUFFIX) for entry in _entries(directory, left)]
    label = choose(wanted, there, names, directory)
    path = file_of(directory, label)
    assert path is not None
    return Found(label._replace(namespace=wanted.namespace), path)


def is_directory_missing(directory: str) -> bool:
    """Tell whether this machine has no such directory, as far as it can say."""
    return not _is_there(directory, unsure=True)


def _is_there(path: str, *, unsure: bool) -> bool:
    """Tell whether there is such a file; ``unsure`` where that cannot be said: no permission, a link that leads round, a server in trouble."""
    try:
        os.stat(path)  # noqa: PTH116 - pathlib is slow to import
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return unsure
    return True


def _of_name(directory: str, name: str, left: Iterator[None]) -> Iterator[OwnFile]:
    """Yield the images of one name: ``VERSION.squashfs`` and ``VERSION/TAG.squashfs``."""
    for entry in _entries(directory, left):
        if entry.name.endswith(SUFFIX):
            yield from _file(entry, Label(name, entry.name.removesuffix(SUFFIX)))
        elif _is_directory(entry):
            for file in _entries(entry.path, left):
                if file.name.endswith(SUFFIX):
                    yield from _file(file, Label(name, entry.name, file.name.removesuffix(SUFFIX)))


def _file(entry: os.DirEntry[str], label: Label) -> Iterator[OwnFile]:
    try:
        status = entry.stat()
    except OSError:  # a link that leads nowhere, or removed meanwhile
        return
    yield OwnFile(label, (status.st_dev, status.st_ino))


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _entries(directory: str, left: Iterator[None]) -> Iterator[os.DirEntry[str]]:
    """Yield what is in a directory and could be part of a label; nothing if there is no such directory. Raises `AccessDenied`, `StorageError`."""
    try:
        with os.scandir(directory) as found:
            for _, entry in zip(left, found, strict=False):
                if _PART.fullmatch(entry.name):
                    yield entry
    except (FileNotFoundError, NotADirectoryError):
        return
    except PermissionError as error:
        raise AccessDenied(f"cannot look into {directory}: {error.strerror}") from error
    except OSError as error:
        raise StorageError(f"cannot look into {directory}: {error.strerror}") from error
