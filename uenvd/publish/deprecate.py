"""``uenvd-publish deprecate``: mark an image as one that should not be used any more. Nothing is deleted: jobs that have its digest go on."""

from __future__ import annotations

import argparse
from contextlib import closing

from uenvd.errors import UsageError
from uenvd.oci.attach import attach, json_content, now
from uenvd.publish.console import say, show
from uenvd.publish.options import add_registry_options, add_site_options, open_registry
from uenvd.publish.releases import DEPRECATION_TYPE, note_json, read_note, refresh_repository
from uenvd.publish.source import add_label, find_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_label(parser)
    parser.add_argument("reason", nargs="?", metavar="REASON", help="what users are told")
    parser.add_argument("--undo", action="store_true", help="it may be used again")
    add_site_options(parser)
    add_registry_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Attach the note and update the index; the digest of the image goes to stdout."""
    if bool(arguments.reason) == arguments.undo:
        raise UsageError(
            "say either a REASON or --undo", hint="uenvd-publish deprecate LABEL 'use v2: wrong BLAS'"
        )
    reason: str | None = arguments.reason or None
    with closing(open_registry(arguments)) as remote:
        source = find_image(arguments, remote)
        if read_note(remote, source.repository, source.digest, DEPRECATION_TYPE) != reason:
            # The time makes it a new attachment: what was said before and taken back may be said again.
            attach(
                remote,
                source.repository,
                source.digest,
                DEPRECATION_TYPE,
                [json_content("deprecation.json", note_json(reason))],
                {"uenv.deprecation.since": now()},
            )
        refresh_repository(remote, source.repository, say, fresh=[source.digest])
    say(f"{source.repository}@{source.digest} is {'deprecated' if reason else 'not deprecated'}")
    show(source.digest)
    return 0
