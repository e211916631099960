"""The command line of uenvd."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from uenvd import __version__
from uenvd.config import DEFAULT_PATH, load
from uenvd.errors import UenvError
from uenvd.oci.reference import parse_registry


def main(argv: list[str] | None = None) -> int:
    """Run the daemon, or check its configuration; return the exit status."""
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
    args = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.INFO,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        config = load(args.config, parse_registry)
        if args.check:
            print(f"{args.config}: ok")
            return 0
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


if __name__ == "__main__":
    sys.exit(main())
