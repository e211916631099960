"""``uenvd-publish catalogue``: write the web site of all environments."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from uenvd.errors import RegistryDenied, RegistryError, UsageError
from uenvd.publish.catalogue.model import environments_of
from uenvd.publish.catalogue.read import read_releases, systems_of
from uenvd.publish.catalogue.site import write_site
from uenvd.publish.console import say, show
from uenvd.publish.options import DEPLOY, add_registry_options, add_system_option, open_registry, system_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "out", type=Path, metavar="OUT_DIR", help="a new directory, or that of a former catalogue"
    )
    parser.add_argument("--namespace", default=DEPLOY, metavar="NS", help=f"default {DEPLOY}")
    parser.add_argument(
        "--title", default="Software environments", metavar="TEXT", help="heading of the pages"
    )
    add_system_option(parser)
    add_registry_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Read the registry, write the pages; the path of the first page goes to stdout."""
    with closing(open_registry(arguments)) as remote:
        system = system_of(arguments)
        try:
            systems = [system] if system else systems_of(remote, arguments.namespace)
        except (RegistryError, RegistryDenied) as error:
            raise UsageError(
                f"which systems there are is not known: {error.message}", hint="say --system NAME"
            ) from error
        releases = read_releases(remote, arguments.namespace, systems, say)
    environments = environments_of(releases)
    first = write_site(arguments.out, arguments.title, environments)
    say(f"{len(environments)} environments, {len(releases)} images of {', '.join(systems) or 'no system'}")
    show(str(first))
    return 0
