"""``uenvctl image ls``: what there is in the registry, and what of it is on this node."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from uenvd.ctl import output, own, records
from uenvd.ctl.arguments import FLAG, Arguments
from uenvd.errors import DaemonUnreachable, RegistryDenied, RegistryError, RegistryUnreachable, UsageError

HELP = """\
usage: uenvctl image ls [--here] [LABEL]

List the images that you can use, as 'image find' does, with a column 'here': whether this node has the image already.
One that it does not have is fetched when you use it. Also listed are your own images (mine::..., see uenvd-publish
build), and what this node still has although its tag is gone from the registry. Every field of the label may be left
out; the name need only begin as given.

  --here         only what is on this node; the registry is not asked
  --json         {"records": [...]}, see docs/json.md
  --no-header    only the rows
  --refresh      ask the registry, even if it was asked a moment ago
  --socket PATH  uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control

examples:
  uenvctl image ls prgenv
  uenvctl image ls --here --json
"""

OPTIONS = {**records.OPTIONS, "--here": FLAG}
TAKES = ("listed",)


def main(argv: Sequence[str]) -> int:
    """Handle the command; return the exit status."""
    arguments = records.parse_listing(argv, command="image ls", options=OPTIONS, help_text=HELP)
    if arguments is None:
        return 0
    if {"--here", "--refresh"} <= arguments.flags:
        raise UsageError(
            "--here does not ask the registry, and --refresh does", hint="leave out one of the two"
        )
    text = records.label_of(arguments)
    mine = records.checked(own.records(text, os.environ))
    found: list[dict[str, Any]] = []
    stored: list[dict[str, Any]] = []
    if not own.asks_only_for_own(text):
        try:
            found, stored = _of_daemon(arguments)
        except DaemonUnreachable as error:
            if not mine:
                raise
            output.note(f"{error.message}; listed are only your own images")
    nothing = (
        "no image on this node matches; in the registry: uenvctl image find"
        if "--here" in arguments.flags
        else "no image matches; all there is: uenvctl image ls @'*'"
    )
    return records.show(joined([*mine, *found], stored), arguments, here=True, nothing=nothing)


def _of_daemon(arguments: Arguments) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return what the registry has and what this node has; without an answer of the registry only the latter."""
    with records.connect(arguments) as client:
        stored = records.ask(client, "images", arguments)
        if "--here" in arguments.flags:
            return [], stored
        try:
            return records.ask(client, "find", arguments), stored
        except (RegistryUnreachable, RegistryDenied, RegistryError) as error:
            output.note(f"{error.message}; listed is only what is on this node")
            return [], stored


def joined(found: Sequence[dict[str, Any]], stored: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the registry's records and those that only the node has, each with ``pinned``, in the order of their labels."""
    pinned = {_key(one): bool(one.get("pinned")) for one in stored}
    rows = {_key(one): {**one, "pinned": pinned.get(_key(one), False)} for one in found}
    for one in stored:
        rows.setdefault(_key(one), one)
    return [rows[key] for key in sorted(rows)]


def _key(record: dict[str, Any]) -> tuple[str, ...]:
    names = ("namespace", "name", "version", "tag", "system", "uarch", "digest")
    return tuple(str(record.get(name) or "") for name in names)
