"""``uenvctl lock``: pin a project's labels to digests, and find out whether they still mean the same."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from uenvd.ctl import lockfile, output
from uenvd.ctl.arguments import FLAG, VALUE, Arguments, parse
from uenvd.ctl.client import REGISTRY_ANSWER_S, Client, socket_path
from uenvd.ctl.lockfile import FILE_NAME, Locked, LockFile
from uenvd.ctl.own import refuse_own
from uenvd.errors import AmbiguousLabel, LockError, ProtocolError, UenvError, UnknownLabel, UsageError
from uenvd.label import parse_descriptions

HELP = """\
usage: uenvctl lock [UENV[,UENV...]]
       uenvctl lock --check

Note in the file uenv.lock which bytes (digests) the labels mean today. 'uenvctl run --locked', 'start --locked' and
'image pull --locked' then use exactly these, whatever the tags say by then. Commit the file with your project. Labels
are added to a file that is there; without a label all of its labels are looked up anew.

--check changes nothing. It fails if a locked image is gone from the registry, or a label means other bytes by now.

  --check            compare the file with the registry
  --lock-file PATH   this file; else uenv.lock here or in a directory above, and a new one here
  --json             the images of the file; with --check also their 'state': same, moved or missing
  --socket PATH      uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control

examples:
  uenvctl lock prgenv-gnu/23.11
  uenvctl run --locked prgenv-gnu/23.11 -- make
  uenvctl lock --check
"""

OPTIONS = {"--check": FLAG, "--lock-file": VALUE, "--json": FLAG}
TAKES = ("registry",)


def main(argv: Sequence[str]) -> int:
    """Handle the command; return the exit status."""
    arguments = parse(argv, command="lock", options=OPTIONS, words=(0, 1))
    if "--help" in arguments.flags:
        print(HELP, end="")
        return 0
    if "--check" in arguments.flags:
        if arguments.words:
            raise UsageError("--check looks at the whole file", hint="uenvctl lock --check")
        return _check(arguments)
    return _lock(arguments)


def _lock(arguments: Arguments) -> int:
    if arguments.words:
        lock = _there_or_new(arguments)
        asked = []
        for one in parse_descriptions(arguments.words[0]):
            if one.label is None:
                raise UsageError(f"{one.path} is a file: only images of the registry can be locked")
            refuse_own(one, "only images of the registry can be locked")
            asked.append(str(one.label))
    else:
        lock = lockfile.chosen(arguments)
        asked = [one.asked for one in lock.images]
    with Client(socket_path(arguments.values.get("--socket"), os.environ)) as client:
        registry = client.call("status").frame.get("registry")
        fresh = [_look_up(client, text, registry if isinstance(registry, str) else None) for text in asked]
    before = {one.asked: one.digest for one in lock.images}
    # An image that is the same keeps its line, so that locking again shows no difference.
    kept = {one.asked: one for one in lock.images}
    fresh = [kept[one.asked] if before.get(one.asked) == one.digest else one for one in fresh]
    lock = LockFile(lock.path, lockfile.merged(lock.images, fresh))
    lockfile.write(lock)
    if "--json" in arguments.flags:
        output.data_json(_document(lock, [one._asdict() for one in lock.images]))
    else:
        output.data(output.table((), [(one.asked, one.label, one.digest) for one in fresh]))
        output.note(f"{lock.path} has {len(lock.images)} image{'s' if len(lock.images) != 1 else ''}")
    return 0


def _there_or_new(arguments: Arguments) -> LockFile:
    path = arguments.values.get("--lock-file") or lockfile.find(".") or FILE_NAME
    return lockfile.read(path) if os.path.lexists(path) else LockFile(path, ())


def _document(lock: LockFile, images: list[dict[str, Any]]) -> dict[str, Any]:
    return {"lock_file": os.path.abspath(lock.path), "images": images}  # noqa: PTH100


def _look_up(client: Client, asked: str, registry: str | None) -> Locked:
    frame = client.call("resolve", answer_s=REGISTRY_ANSWER_S, uenv=asked, refresh=True).frame
    _mention(frame)
    resolved, images = frame.get("resolved"), frame.get("images")
    if not isinstance(resolved, str) or not isinstance(images, list) or len(images) != 1:
        raise ProtocolError("uenvd's answer to 'resolve' is malformed")
    label = parse_descriptions(resolved)[0].label
    if label is None or label.digest is None:
        raise ProtocolError("uenvd's answer to 'resolve' names no digest")
    facts = client.call("inspect", answer_s=REGISTRY_ANSWER_S, uenv=str(label)).frame
    size, date = facts.get("size_bytes"), facts.get("date")
    return Locked(
        asked,
        str(label._replace(digest=None)),
        label.digest,
        size if isinstance(size, int) else None,
        registry,
        date if isinstance(date, str) else None,
        time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _mention(frame: Mapping[str, Any]) -> None:
    for text in frame.get("notes") or ():
        output.note(str(text))


def _check(arguments: Arguments) -> int:
    lock = lockfile.chosen(arguments)
    rows: list[dict[str, Any]] = []
    with Client(socket_path(arguments.values.get("--socket"), os.environ)) as client:
        for one in lock.images:
            state, now = _state(client, one)
            rows.append({**one._asdict(), "state": state, "now": now})
    if "--json" in arguments.flags:
        output.data_json(_document(lock, rows))
    else:
        output.data(output.table((), [(str(row["asked"]), row["state"], _remark(row)) for row in rows]))
    wrong = [f"{row['asked']} ({row['state']})" for row in rows if row["state"] != "same"]
    if wrong:
        raise LockError(
            f"{lock.path} and the registry differ: {', '.join(wrong)}",
            hint="images that moved still run with --locked; to follow the tags: uenvctl lock"
            if all(row["state"] != "missing" for row in rows)
            else "a missing image cannot be had any more: uenvctl image find lists what there is",
        )
    return 0


def _state(client: Client, one: Locked) -> tuple[str, str | None]:
    """Return (state, digest that the label means now)."""
    try:
        now: str | None = _digest(client, one.asked)
    except (UnknownLabel, AmbiguousLabel):
        now = None
    if now == one.digest:
        return "same", now
    try:
        _digest(client, str(one.pinned))
    except UnknownLabel:
        return "missing", now
    return "moved", now


def _digest(client: Client, text: str) -> str:
    """Return what a label means, asking the registry. Raises what the daemon says."""
    frame = client.call("resolve", answer_s=REGISTRY_ANSWER_S, uenv=text, refresh=True).frame
    for note in frame.get("notes") or ():
        if "using what it said" in str(note):
            raise UenvError(str(note), hint="a check needs the registry: try again later")
    images = frame.get("images")
    if not isinstance(images, list) or len(images) != 1 or not isinstance(images[0], dict):
        raise ProtocolError("uenvd's answer to 'resolve' is malformed")
    return str(images[0].get("digest"))


def _remark(row: Mapping[str, Any]) -> str:
    if row["state"] == "same":
        return str(row["digest"])
    if row["state"] == "moved":
        return f"locked {row['digest']}, now {row['now'] or 'no image is called so'}"
    return f"{row['digest']} is gone" + (f", now {row['now']}" if row["now"] else "")
