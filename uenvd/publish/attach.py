"""``uenvd-publish attach``: attach files or a directory to an image."""

from __future__ import annotations

import argparse
import mimetypes
from contextlib import closing
from pathlib import Path

from uenvd.errors import UsageError
from uenvd.oci.attach import META_TYPE, REFRAME_TYPE, Content, attach, directory_content
from uenvd.publish.console import reporter, say, show
from uenvd.publish.options import add_registry_options, add_site_options, open_registry
from uenvd.publish.push import MOVING_TAGS
from uenvd.publish.source import add_label, find_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_label(parser)
    parser.add_argument(
        "paths", metavar="PATH", nargs="+", type=Path, help="a file, or a directory (packed as a whole)"
    )
    parser.add_argument(
        "--type", required=True, metavar="TYPE", help=f"what it is: {META_TYPE}, {REFRAME_TYPE}, ..."
    )
    parser.add_argument(
        "--annotation",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="note on the attachment; may be repeated",
    )
    add_site_options(parser)
    add_registry_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Attach; the digest of the attachment goes to stdout."""
    notes = dict(_pair(text) for text in arguments.annotation)
    contents = [_content(path) for path in arguments.paths]
    with closing(open_registry(arguments)) as remote:
        target = find_image(arguments, remote)
        digest = attach(
            remote,
            target.repository,
            target.digest,
            arguments.type,
            contents,
            notes,
            progress=reporter("pushing"),
        )
    if target.tag in MOVING_TAGS:
        say(f"note: {target.tag} moves; the attachment stays with {target.digest}")
    say(f"attached to {target.repository}@{target.digest}")
    show(digest)
    return 0


def _content(path: Path) -> Content:
    if path.is_dir():
        return directory_content(path)
    if not path.is_file():
        raise UsageError(f"{path} is neither a file nor a directory")
    return Content(path.name, path, mimetypes.guess_type(path.name)[0] or "application/octet-stream")


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise UsageError(f"--annotation {text!r} is not KEY=VALUE")
    return key, value
