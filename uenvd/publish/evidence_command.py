"""``uenvd-publish evidence``: attach bill of materials, provenance and build log to a pushed image."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from uenvd.errors import UsageError
from uenvd.publish.console import say, show
from uenvd.publish.options import add_registry_options, add_site_options, open_registry
from uenvd.publish.provenance import attach_evidence
from uenvd.publish.source import add_label, find_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_label(parser)
    parser.add_argument(
        "--image", required=True, type=Path, metavar="FILE", help="the squashfs file that was pushed"
    )
    parser.add_argument(
        "--meta", type=Path, metavar="DIR", help="what the build left beside it (NAME-VERSION.meta)"
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="of the build")
    add_site_options(parser)
    add_registry_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Attach; type and digest of each attachment go to stdout."""
    if not arguments.image.is_file():
        raise UsageError(f"{arguments.image} is no file")
    with closing(open_registry(arguments)) as remote:
        source = find_image(arguments, remote)
        attached = attach_evidence(
            remote,
            source.repository,
            source.digest,
            image=arguments.image,
            meta_dir=arguments.meta,
            log=arguments.log,
        )
    say(f"attached to {source.repository}@{source.digest}")
    for kind, digest in attached.items():
        show(f"{kind}  {digest}")
    return 0
