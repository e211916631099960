"""What ``image find`` and ``image ls`` have in common: checking records, showing them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from uenvd.ctl import output
from uenvd.ctl.arguments import FLAG, Arguments, parse
from uenvd.ctl.client import REGISTRY_ANSWER_S, Client, socket_path
from uenvd.errors import ProtocolError
from uenvd.label import parse_namespaced_label
from uenvd.own import NAMESPACE

OPTIONS = {"--json": FLAG, "--no-header": FLAG, "--refresh": FLAG}
HEADER = ("uenv", "arch", "system", "id", "size(MB)", "date")
_SIZE_COLUMN = 4
ID_DIGITS = 16


def parse_listing(
    argv: Sequence[str], *, command: str, options: Mapping[str, bool], help_text: str
) -> Arguments | None:
    """Parse the command line of a listing; None when only its help was asked for. Raises `UsageError`, `LabelError`."""
    arguments = parse(argv, command=command, options=options, words=(0, 1))
    if "--help" in arguments.flags:
        print(help_text, end="")
        return None
    parse_namespaced_label(label_of(arguments))  # a slip of the user's shows without the daemon
    return arguments


def label_of(arguments: Arguments) -> str:
    """Return the label of a listing; empty means all."""
    return arguments.words[0] if arguments.words else ""


def connect(arguments: Arguments) -> Client:
    """Connect to uenvd."""
    return Client(socket_path(arguments.values.get("--socket"), os.environ))


def ask(client: Client, op: str, arguments: Arguments) -> list[dict[str, Any]]:
    """Return the records of a listing operation, checked; show its notes."""
    frame = client.call(
        op,
        answer_s=REGISTRY_ANSWER_S,
        uenv=label_of(arguments),
        refresh="--refresh" in arguments.flags or None,
    ).frame
    records = checked(frame.get("records"))
    for note in frame.get("notes") or ():
        output.note(str(note))
    return records


def show(records: Sequence[Mapping[str, Any]], arguments: Arguments, *, here: bool, nothing: str) -> int:
    """Show records as a table or as JSON; return the exit status (0 also when there are none)."""
    if "--json" in arguments.flags:
        output.data_json({"records": records})
        return 0
    header = () if "--no-header" in arguments.flags else HEADER + (("here",) if here else ())
    if records:
        rows = [_row(record, here=here) for record in records]
        output.data(output.table(header, rows, right=frozenset({_SIZE_COLUMN})))
    elif header:
        output.note(nothing)
    return 0


def checked(records: object) -> list[dict[str, Any]]:
    """Return the records, each with the keys added that ``uenv`` of CSCS has, too: ``id``, ``size``. Raises `ProtocolError`."""
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ProtocolError("uenvd's answer holds no list of records")
    return [
        {**record, "id": short_id(record.get("digest")), "size": record.get("size_bytes")}
        for record in records
    ]


def short_id(digest: object) -> str:
    """Return the first digits of a digest, as they are shown in tables."""
    return str(digest or "").removeprefix("sha256:")[:ID_DIGITS]


def _row(record: Mapping[str, Any], *, here: bool) -> tuple[str, ...]:
    def field(name: str, sign: str = "") -> str:
        value = record.get(name)
        return f"{sign}{value}" if value is not None else ""

    size = record.get("size_bytes")
    prefix = f"{NAMESPACE}::" if record.get("namespace") == NAMESPACE else ""
    row = (
        prefix + field("name") + field("version", "/") + field("tag", ":"),
        field("uarch"),
        field("system"),
        field("id"),
        output.megabytes(size) if isinstance(size, int) else "",
        field("date")[:10] + (" deprecated" if record.get("deprecated") else ""),
    )
    return (*row, "yes" if record.get("cached") else "-") if here else row
