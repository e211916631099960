"""``uenvd-publish promote``: release an image if the site's policy allows it, and say each reason where it does not."""

from __future__ import annotations

import argparse
from contextlib import closing

from uenvd.errors import UsageError
from uenvd.oci.index import LATEST
from uenvd.oci.signatures import signed_name
from uenvd.publish.console import reporter, say, show, show_json
from uenvd.publish.deploy import add_image, source_of
from uenvd.publish.options import add_registry_options, add_site_options, open_registry
from uenvd.publish.push import Target
from uenvd.publish.release import POLICY_VARIABLE, add_release_options, order_of, release


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_image(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="say what each check finds, and release nothing"
    )
    parser.add_argument("--json", action="store_true", help="print the checks and what was done as JSON")
    add_release_options(parser)
    add_site_options(parser)
    add_registry_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Promote; the digest goes to stdout."""
    order = order_of(arguments, arguments.tag)
    if order.policy is None:
        raise UsageError(
            "no policy was named", hint=f"say --policy FILE, or set {POLICY_VARIABLE}; deploy needs none"
        )
    with closing(open_registry(arguments)) as remote:
        source, digest = source_of(arguments, remote)
        done = release(
            remote,
            Target(source.repository, digest),
            order,
            action="promote",
            dry_run=arguments.dry_run,
            progress=reporter("copying"),
        )
    if done.deployed is None:
        say(f"it may be released: nothing was done to {signed_name(source.repository)}")
    else:
        latest = f", which is {LATEST}" if order.move_latest else ""
        say(f"released {done.deployed.repository}:{done.deployed.tag}{latest}")
    if arguments.json:
        checks = [vars(check) for check in done.checks]
        show_json({"digest": digest, "released": done.deployed is not None, "checks": checks})
    else:
        show(digest)
    return 0
