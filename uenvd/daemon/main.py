"""The command line of uenvd."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from uenvd import __version__
from uenvd.config import DEFAULT_PATH, load
from uenvd.daemon.logs import set_up
from uenvd.errors import UenvError
from uenvd.oci.reference import parse_registry
from uenvd.yamlfile import size


def main(argv: list[str] | None = None) -> int:
    """Run the daemon, check its configuration, or tend the cache; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="uenvd",
        description="Serve scientific software stacks (uenvs) to the jobs and shells of this node.",
        epilog="docs/admin.md describes the configuration.",
    )
    parser.add_argument(
        "--config", type=Path, default=DEFAULT_PATH, metavar="FILE", help=f"default: {DEFAULT_PATH}"
    )
    parser.add_argument("--check", action="store_true", help="check the configuration and end")
    parser.add_argument("-v", "--verbose", action="store_true", help="log every connection")
    parser.add_argument("--version", action="version", version=f"uenvd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    collect = commands.add_parser(
        "gc",
        help="make room in the cache",
        description="Remove images that nobody uses, the least recently used first.",
    )
    collect.add_argument("--dry-run", action="store_true", help="only say what would go")
    collect.add_argument("--free", type=_size, default=0, metavar="SIZE", help="make this much room (20GiB)")
    scrub = commands.add_parser(
        "scrub",
        help="check the cache",
        description="Read every image of the cache and compare it with its digest.",
    )
    scrub.add_argument(
        "--rate", type=_size, metavar="SIZE", help="read at most this much per second (100MiB)"
    )
    args = parser.parse_args(argv)
    if args.check and args.command is not None:
        parser.error(f"--check does not go with {args.command}: it checks the configuration and ends")
    set_up("auto", verbose=args.verbose)
    try:
        config = load(args.config, parse_registry)
        if args.check:
            print(f"{args.config}: ok")
            return 0
        set_up(config.log_format, verbose=args.verbose)
        if args.command is not None:
            from uenvd.daemon import maintenance  # deferred, as below

            if args.command == "gc":
                return maintenance.run_gc(config, dry_run=args.dry_run, wanted_bytes=args.free)
            return maintenance.run_scrub(config, rate_bytes_per_s=args.rate)
        from uenvd.daemon.app import (
            run,
        )  # deferred: --check and --version need neither trio nor the registry client

        run(config)
    except UenvError as error:
        print(f"uenvd: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_status
    return 0


def _size(text: str) -> int:
    try:
        return size(yaml.ScalarNode("tag:yaml.org,2002:str", text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
