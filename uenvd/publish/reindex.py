"""``uenvd-publish reindex``: make the index of a system anew from the registry."""

from __future__ import annotations

import argparse
from contextlib import closing

from uenvd.oci.index import index_repository
from uenvd.publish.console import say
from uenvd.publish.options import DEPLOY, add_registry_options, add_system_option, need_system, open_registry
from uenvd.publish.releases import reindex


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--namespace", default=DEPLOY, metavar="NS", help=f"default {DEPLOY}")
    add_system_option(parser)
    add_registry_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Read everything, write the index."""
    system = need_system(arguments)
    with closing(open_registry(arguments)) as remote:
        index = reindex(remote, arguments.namespace, system, say)
    say(
        f"{index_repository(arguments.namespace, system)} lists {len(index.entries)} images in {len(index.repositories())} repositories"
    )
    return 0
