"""``uenvd-publish audit``: what in an image depends on the machine that built it, or on what its hosts may not have."""

from __future__ import annotations

import argparse
from pathlib import Path

from uenvd.errors import AuditFailed, UsageError
from uenvd.publish.build.audit import BUILD_DIRECTORY, Rules
from uenvd.publish.build.imagefile import audit_image
from uenvd.publish.console import say, show, show_json
from uenvd.publish.elsewhere import run_elsewhere


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("image", metavar="IMAGE", type=Path, help="the squashfs file")
    parser.add_argument(
        "--prefix", metavar="DIR", help="where it will be mounted; default: what its metadata says"
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="SONAME",
        help="a library that may be the host's, with * as in a shell, beside glibc and what meta/host.json names; may be repeated",
    )
    parser.add_argument(
        "--build-path",
        action="append",
        default=[],
        metavar="DIR",
        help=f"a directory that no file may name, beside {BUILD_DIRECTORY}; may be repeated",
    )
    parser.add_argument(
        "--run",
        dest="elsewhere",
        action="store_true",
        help="use the image, too: run its smoke tests as another user, where nothing but a shell, the usual tools and glibc is of this machine",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Audit; the findings go to stdout, one a line. Raises `AuditFailed` when there are any."""
    if arguments.prefix is not None and not arguments.prefix.startswith("/"):
        raise UsageError(f"--prefix {arguments.prefix} is no absolute path")
    findings = audit_image(
        arguments.image,
        prefix=arguments.prefix and arguments.prefix.rstrip("/"),
        rules=Rules(tuple(arguments.allow), (BUILD_DIRECTORY, *arguments.build_path)),
    )
    if arguments.elsewhere:
        findings += run_elsewhere(arguments.image, arguments.prefix and arguments.prefix.rstrip("/"))
    if arguments.json:
        show_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            show(str(finding))
    if findings:
        raise AuditFailed(f"{arguments.image}: {len(findings)} findings")
    say(f"{arguments.image}: nothing found")
    return 0
