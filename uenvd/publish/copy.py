"""``uenvd-publish copy``: copy an image within or between registries."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack, closing

from uenvd.oci.copy import copy
from uenvd.publish.console import reporter, say, show
from uenvd.publish.options import add_registry_options, add_site_options, open_registry, parse_site_label
from uenvd.publish.push import check_free, target_of
from uenvd.publish.releases import refresh_repository
from uenvd.publish.source import find_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "source", metavar="SOURCE", help="[namespace::]name/version:tag@system%%uarch, or …@sha256:… for :tag"
    )
    parser.add_argument("target", metavar="TARGET", help="[namespace::]name/version:tag@system%%uarch")
    parser.add_argument(
        "-r", "--recursive", action="store_true", help="with everything that is attached to it"
    )
    parser.add_argument("--to-registry", metavar="URL", help="another registry; default: the same one")
    parser.add_argument(
        "--force", action="store_true", help="take the tag from another image; never in the namespace build"
    )
    add_site_options(parser)
    add_registry_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Copy; the digest goes to stdout."""
    target = target_of(str(parse_site_label(arguments, arguments.target)), None)
    with ExitStack() as stack:
        here = stack.enter_context(closing(open_registry(arguments)))
        there = here
        if arguments.to_registry:
            there = stack.enter_context(closing(open_registry(arguments, arguments.to_registry)))
        source = find_image(arguments, here, arguments.source)
        check_free(there, target.repository, target.reference, source.digest, arguments.force)
        started = time.monotonic()
        done = copy(
            here,
            source.repository,
            source.digest,
            there,
            target.repository,
            target.reference,
            recursive=arguments.recursive,
            progress=reporter("copying"),
        )
        refresh_repository(there, target.repository, say, fresh=[done.digest], create=False)
    say(
        f"copied {source.repository} to {there.address}, {target.repository}:{target.reference}, with"
        f" {len(done.attachments)} attachments: {done.mounted_bytes / 1e6:.1f} MB mounted,"
        f" {done.streamed_bytes / 1e6:.1f} MB moved ({time.monotonic() - started:.1f} s)"
    )
    show(done.digest)
    return 0
