"""``uenvd-publish deprecate``: mark an image as one that should not be used any more. Nothing is deleted: jobs that have its digest go on."""

from __future__ import annotations

import argparse
from contextlib import closing
from datetime import UTC, date, datetime

from uenvd.errors import UnknownLabel, UsageError
from uenvd.oci.attach import attach, json_content, now
from uenvd.oci.remote import Remote
from uenvd.publish.console import say, show
from uenvd.publish.options import add_registry_options, add_site_options, open_registry, parse_site_label
from uenvd.publish.releases import (
    DEPRECATION_TYPE,
    Deprecation,
    note_json,
    read_deprecation,
    refresh_repository,
)
from uenvd.publish.source import Source, add_label, find_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_label(parser)
    parser.add_argument("reason", nargs="?", metavar="REASON", help="what users are told")
    parser.add_argument(
        "--date",
        metavar="YYYY-MM-DD",
        help="how long it stays at least; `retire` does not touch it before that day",
    )
    parser.add_argument("--successor", metavar="LABEL", help="what to use instead; it must be there")
    parser.add_argument("--undo", action="store_true", help="it may be used again")
    add_site_options(parser)
    add_registry_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Attach the note and update the index; the digest of the image goes to stdout."""
    if bool(arguments.reason) == arguments.undo:
        raise UsageError(
            "say either a REASON or --undo", hint="uenvd-publish deprecate LABEL 'use v2: wrong BLAS'"
        )
    if arguments.undo and (arguments.date or arguments.successor):
        raise UsageError("--undo takes neither --date nor --successor")
    day = day_of(arguments.date) if arguments.date else None
    if day is not None and day < datetime.now(UTC).date():
        raise UsageError(
            f"--date {arguments.date} is over", hint="say a day to come: users need time to change"
        )
    with closing(open_registry(arguments)) as remote:
        source = find_image(arguments, remote)
        wanted = None
        if not arguments.undo:
            successor = _successor(arguments, remote, source) if arguments.successor else None
            wanted = Deprecation(arguments.reason, day.isoformat() if day else None, successor)
        if read_deprecation(remote, source.repository, source.digest) != wanted:
            # The time makes it a new attachment: what was said before and taken back may be said again.
            attach(
                remote,
                source.repository,
                source.digest,
                DEPRECATION_TYPE,
                [json_content("deprecation.json", wanted.encode() if wanted else note_json(None))],
                {"uenv.deprecation.since": now()},
            )
        refresh_repository(remote, source.repository, say, fresh=[source.digest])
    what = f"deprecated; users are told: {wanted}" if wanted else "not deprecated"
    say(f"{source.repository}@{source.digest} is {what}")
    show(source.digest)
    return 0


def day_of(text: str) -> date:
    """Return the day of ``YYYY-MM-DD``. Raises `UsageError`."""
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).date()
    except ValueError as error:
        raise UsageError(f"{text!r} is no day", hint="say YYYY-MM-DD, such as 2027-03-31") from error


def _successor(arguments: argparse.Namespace, remote: Remote, source: Source) -> str:
    """Return the label as users on the same system type it. Raises `UnknownLabel`, `UsageError` for the image itself."""
    found = find_image(arguments, remote, arguments.successor)
    if found == source or found.digest == source.digest:
        raise UsageError(f"{arguments.successor} is the deprecated image itself")
    if not remote.tags(found.repository):
        raise UnknownLabel(f"{arguments.successor} has no tag that a user could name")
    label = parse_site_label(arguments, arguments.successor)
    here = source.repository.split("/")
    return str(
        label._replace(
            namespace=None if label.namespace == here[0] else label.namespace,
            system=None if label.system == here[1] else label.system,
            uarch=None if label.uarch == here[2] else label.uarch,
        )
    )
