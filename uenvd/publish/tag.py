"""``uenvd-publish tag``: give an image one more tag, or move one that may move."""

from __future__ import annotations

import argparse
from contextlib import closing

from uenvd.errors import NotFound, UnknownLabel
from uenvd.publish.console import say, show
from uenvd.publish.options import add_registry_options, add_site_options, open_registry, parse_site_label
from uenvd.publish.push import MOVING_TAGS, move_tag, target_of
from uenvd.publish.releases import refresh_repository


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "label",
        metavar="LABEL",
        help="the image: [namespace::]name/version:tag@system%%uarch, or …@sha256:… for :tag",
    )
    parser.add_argument("tag", metavar="TAG", help="the new tag")
    parser.add_argument("--namespace", metavar="NS", help="of the label, where it has none; default deploy")
    moving = ", ".join(sorted(MOVING_TAGS))
    parser.add_argument(
        "--force", action="store_true", help=f"take a tag other than {moving} from the image that has it"
    )
    add_site_options(parser)
    add_registry_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Tag; the digest goes to stdout."""
    label = str(parse_site_label(arguments, arguments.label))
    target = target_of(label, arguments.namespace, digest_allowed=True)
    with closing(open_registry(arguments)) as remote:
        try:
            digest = move_tag(remote, target, arguments.tag, force=arguments.force)
        except NotFound as error:
            raise UnknownLabel(
                f"there is no such image: {error.message}", hint="check the label and the registry"
            ) from error
        refresh_repository(remote, target.repository, say, create=False)
    say(f"{target.repository}:{arguments.tag} is now {digest}")
    show(digest)
    return 0
