"""``uenvd-publish deploy``: release an image whose tests have passed."""

from __future__ import annotations

import argparse
import time
from contextlib import closing

from uenvd.publish.console import reporter, say, show, show_json
from uenvd.publish.deploy import add_image, source_of
from uenvd.publish.options import add_registry_options, add_site_options, open_registry
from uenvd.publish.push import Target
from uenvd.publish.release import add_release_options, order_of, release


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_image(parser)
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    add_release_options(parser)
    add_site_options(parser)
    add_registry_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Deploy; the digest goes to stdout."""
    order = order_of(arguments, arguments.tag)
    with closing(open_registry(arguments)) as remote:
        started = time.monotonic()
        source, digest = source_of(arguments, remote)
        done = release(
            remote, Target(source.repository, digest), order, action="deploy", progress=reporter("copying")
        ).deployed
    assert done is not None
    say(f"{done.verdict}: {done.remark}")
    say(
        f"deployed {done.repository}:{done.tag} with {done.attachments} attachments ({time.monotonic() - started:.1f} s)"
    )
    if done.replaced is not None:
        say(f"latest was {done.replaced}; back to it: uenvd-publish rollback")
    if arguments.json:
        show_json({key: value for key, value in vars(done).items() if key != "notes"})
    else:
        show(done.digest)
    return 0
