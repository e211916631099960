"""What ``image find`` and ``image ls`` have in common: ask for records, show them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from uenvd.ctl import output
from uenvd.ctl.arguments import FLAG, parse
from uenvd.ctl.client import ANSWER_S, REGISTRY_ANSWER_S, Client, socket_path
from uenvd.errors import ProtocolError
from uenvd.label import parse_namespaced_label

HEADER = ("uenv", "arch", "system", "id", "size(MB)", "date", "here")
_SIZE_COLUMN = 4
ID_DIGITS = 16


def list_records(argv: Sequence[str], *, command: str, op: str, help_text: str, nothing: str) -> int:
    """Handle a listing command; return the exit status (0 also when nothing matches)."""
    options = {"--json": FLAG, "--no-header": FLAG, "--refresh": FLAG}
    arguments = parse(argv, command=command, options=options, words=(0, 1))
    if "--help" in arguments.flags:
        print(help_text, end="")
        return 0
    text = arguments.words[0] if arguments.words else ""
    parse_namespaced_label(text)  # a slip of the user's shows without the daemon
    path = socket_path(arguments.values.get("--socket"), os.environ)
    with Client(path) as client:
        frame = client.call(
            op,
            answer_s=REGISTRY_ANSWER_S if op == "find" else ANSWER_S,
            uenv=text,
            refresh="--refresh" in arguments.flags or None,
        ).frame
    records = _checked(frame.get("records"))
    for note in frame.get("notes") or ():
        output.note(str(note))
    if "--json" in arguments.flags:
        output.data_json({"records": records})
        return 0
    header = () if "--no-header" in arguments.flags else HEADER
    if records:
        rows = [_row(record) for record in records]
        output.data(output.table(header, rows, right=frozenset({_SIZE_COLUMN})))
    elif header:
        output.note(nothing)
    return 0


def _checked(records: object) -> list[dict[str, Any]]:
    """Return the records, each with its ``id`` added. Raises `ProtocolError`."""
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ProtocolError("uenvd's answer holds no list of records")
    return [{**record, "id": short_id(record.get("digest"))} for record in records]


def short_id(digest: object) -> str:
    """Return the first digits of a digest, as they are shown in tables."""
    return str(digest or "").removeprefix("sha256:")[:ID_DIGITS]


def _row(record: Mapping[str, Any]) -> tuple[str, ...]:
    def field(name: str, sign: str = "") -> str:
        value = record.get(name)
        return f"{sign}{value}" if value is not None else ""

    size = record.get("size_bytes")
    return (
        field("name") + field("version", "/") + field("tag", ":"),
        field("uarch"),
        field("system"),
        field("id"),
        output.megabytes(size) if isinstance(size, int) else "",
        field("date")[:10],
        "yes" if record.get("cached") else "-",
    )
