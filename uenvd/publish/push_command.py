"""``uenvd-publish push``: put a squashfs file into a registry under a label."""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from pathlib import Path

from uenvd.publish.console import reporter, say, show
from uenvd.publish.options import (
    BUILD,
    add_registry_options,
    add_site_options,
    open_registry,
    parse_site_label,
)
from uenvd.publish.push import MOVING_TAGS, push_image, target_of
from uenvd.publish.releases import refresh_repository


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("file", metavar="FILE", type=Path, help="the squashfs image")
    parser.add_argument("label", metavar="LABEL", help="[namespace::]name/version:tag@system%%uarch")
    parser.add_argument(
        "--also-tag",
        action="append",
        default=[],
        metavar="TAG",
        help="one more tag, such as latest; may be repeated",
    )
    parser.add_argument(
        "--architecture",
        metavar="ARCH",
        help="as uname -m says it; default: that of the programs in the image",
    )
    parser.add_argument("--namespace", metavar="NS", help="of the label, where it has none; default deploy")
    moving = ", ".join(sorted(MOVING_TAGS))
    parser.add_argument(
        "--force",
        action="store_true",
        help=f"take a tag other than {moving} from the image that has it; never in the namespace {BUILD}",
    )
    add_site_options(parser)
    add_registry_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Push; the digest goes to stdout."""
    target = target_of(str(parse_site_label(arguments, arguments.label)), arguments.namespace)
    with closing(open_registry(arguments)) as remote:
        started = time.monotonic()
        pushed = push_image(
            remote,
            arguments.file,
            target,
            also_tags=arguments.also_tag,
            architecture=arguments.architecture,
            force=arguments.force,
            hashing=reporter("hashing"),
            progress=reporter("pushing"),
        )
        refresh_repository(remote, target.repository, say, fresh=[pushed.digest], create=False)
    for note in pushed.notes:
        say(f"note: {note}")
    tags = ", ".join([target.reference, *arguments.also_tag])
    say(
        f"pushed {arguments.file} to {remote.address}, {target.repository}: {tags} ({time.monotonic() - started:.1f} s)"
    )
    show(pushed.digest)
    return 0
