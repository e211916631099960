"""The user's own images for `uenvctl`: ``mine::name/version`` is a file, and ``image ls`` lists those that there are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from uenvd.errors import UsageError
from uenvd.label import Description, Label, parse_namespaced_label
from uenvd.own import FACTS_SUFFIX, MAX_FACTS_BYTES, NAMESPACE, SUFFIX, images_directory, label_of
from uenvd.ownfiles import find

MAX_IMAGES = 10_000


def as_file(description: Description, environ: Mapping[str, str]) -> Description:
    """Return an own image as the file that it is, so that it needs no daemon; anything else as it is.

    Raises `UnknownLabel`, `AmbiguousLabel`, `LabelError`, `AccessDenied`, `StorageError`: `uenvd.ownfiles.find`.
    """
    if not is_own(description):
        return description
    assert description.label is not None
    found = find(images_directory(environ), description.label)
    return Description(None, found.path, description.mount)


def is_own(description: Description) -> bool:
    """Tell whether a description names an image of the user's own by its label."""
    return description.label is not None and description.label.namespace == NAMESPACE


def refuse_own(description: Description, why: str, hint: str = "") -> None:
    """Refuse an own image where only one of the registry has a meaning. Raises `UsageError`: what it is, and ``why``."""
    if is_own(description):
        raise UsageError(f"{description.label} is an image of your own: {why}", hint=hint)


def name_of(path: str, environ: Mapping[str, str]) -> str:
    """Return what a file is called: its label, if it is an own image, else its path."""
    label = label_of(images_directory(environ), path)
    return path if label is None else str(label)


def asks_only_for_own(text: str) -> bool:
    """Tell whether a label of a listing names the namespace of own images."""
    return parse_namespaced_label(text).namespace == NAMESPACE


def records(text: str, environ: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return records of the own images that a label of a listing means, in the form of the protocol's ``find``."""
    wanted = parse_namespaced_label(text)
    if wanted.namespace not in {None, NAMESPACE}:
        return []
    wanted = wanted._replace(namespace=None, system=None if wanted.system == "*" else wanted.system)
    found = []
    directory = images_directory(environ)
    for path in _files(directory):
        label = label_of(directory, path)
        if label is None:
            continue
        record = _record(path, label)
        full = Label(
            label.name, label.version, label.tag, record["system"], record["uarch"], record["digest"]
        )
        # What nobody noted of a file keeps it out of no list.
        unknown = {field: None for field in ("system", "uarch", "digest") if record[field] is None}
        asked = wanted._replace(**unknown)
        if asked.matches(full, name_prefix=True):
            found.append(record)
    return sorted(found, key=lambda one: (one["name"], one["version"], one["tag"] or ""))


def _files(directory: str) -> Iterator[str]:
    if not directory:
        return
    count = 0
    for where, directories, names in os.walk(directory):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in sorted(names):
            if name.endswith(SUFFIX) and count < MAX_IMAGES:
                count += 1
                yield f"{where}/{name}"


def _record(path: str, label: Label) -> dict[str, Any]:
    from datetime import UTC, datetime  # not for every session that begins

    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        status = None
    facts = _facts(path.removesuffix(SUFFIX) + FACTS_SUFFIX)
    date = datetime.fromtimestamp(status.st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if status else None
    return {
        "namespace": NAMESPACE,
        "name": label.name,
        "version": label.version,
        "tag": label.tag,
        "system": facts.get("system"),
        "uarch": facts.get("uarch"),
        "digest": facts.get("digest"),
        "size_bytes": status.st_size if status else None,
        "date": facts.get("date") or date,
        "cached": True,
    }


def _facts(path: str) -> dict[str, str]:
    import json

    try:
        with open(path, "rb") as file:  # noqa: PTH123
            body = json.loads(file.read(MAX_FACTS_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(body, dict):
        return {}
    return {key: value for key, value in body.items() if isinstance(value, str) and value.isprintable()}
