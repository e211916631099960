"""Options that several commands of uenvd-publish have, and what they stand for.

A command is a module with two functions: ``add_arguments(parser)`` and ``run(arguments) -> int`` (the exit status; errors are raised).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from uenvd.errors import ConfigError, UsageError
from uenvd.label import Label, parse_namespaced_label
from uenvd.oci.credentials import read_token_file
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import Remote, open_remote

BUILD: Final = "build"
"""Namespace of images that wait for their tests; their tags are never overwritten."""
DEPLOY: Final = "deploy"
"""Namespace of images that are released."""
REGISTRY_OPTIONS: Final = ("registry", "auth-file", "username", "token-file", "ca-file")
SITE_OPTIONS: Final = ("system", "uarch")


def add_registry_options(parser: argparse.ArgumentParser) -> None:
    """Add where the registry is and how to be known to it."""
    group = parser.add_argument_group("registry")
    group.add_argument(
        "--registry", metavar="URL", help="https://HOST[/PREFIX] or oci-layout:DIR; default $UENVD_REGISTRY"
    )
    group.add_argument(
        "--auth-file",
        type=Path,
        metavar="FILE",
        help="credentials in docker's format; default: docker's places",
    )
    group.add_argument("--username", metavar="NAME", help="for --token-file; default $USER")
    group.add_argument(
        "--token-file", type=Path, metavar="FILE", help="a token or password in a file that only you can read"
    )
    group.add_argument(
        "--ca-file",
        type=Path,
        metavar="FILE",
        help="certificate authorities of the registry; default: the system's",
    )


def add_system_option(parser: argparse.ArgumentParser) -> None:
    """Add for which cluster: of a command that is about all of one."""
    group = parser.add_argument_group("machine")
    group.add_argument("--system", metavar="SYSTEM", help="the cluster; default $UENVD_SYSTEM")


def add_site_options(parser: argparse.ArgumentParser) -> None:
    """Add for which machine: the parts of a label that a site's commands have in common."""
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--system",
        metavar="SYSTEM",
        help="the cluster, where a label does not say @system; default $UENVD_SYSTEM",
    )
    group.add_argument(
        "--uarch",
        metavar="UARCH",
        help="the microarchitecture, where a label does not say %%uarch; default $UENVD_UARCH",
    )


def refuse(
    arguments: argparse.Namespace, options: Iterable[str], why: str, *, hint: str | None = None
) -> None:
    """Refuse options that were given and would have no effect. Raises `UsageError`: the first of them, and ``why``.

    ``options`` as they are written, without the dashes; where an option's value is kept under another name, ``option=name``. One that was given
    with the value that is its default is as good as left out.
    """
    for option in options:
        written, _, kept = option.partition("=")
        name = kept or written.replace("-", "_")
        if getattr(arguments, name) != arguments.default_of(name):
            raise UsageError(f"--{written} {why}", hint=hint)


def open_registry(arguments: argparse.Namespace, address: str | None = None) -> Remote:
    """Open the registry that the options name (or ``address``, with their credentials). Raises `ConfigError`, `UsageError`."""
    address = address or arguments.registry or os.environ.get("UENVD_REGISTRY")
    if not address:
        raise ConfigError(
            "no registry was named",
            hint="say --registry oci-layout:DIR or --registry https://HOST, or set UENVD_REGISTRY",
        )
    credential = None
    if arguments.token_file is not None:
        username = arguments.username or os.environ.get("USER") or os.environ.get("LOGNAME")
        if not username:
            raise UsageError("--token-file needs a user name", hint="say --username NAME")
        credential = read_token_file(arguments.token_file, username)
    elif arguments.username is not None:
        raise UsageError(
            "--username is for --token-file",
            hint="passwords are not taken from the command line: everybody can see it",
        )
    return open_remote(
        parse_registry(address),
        credential=credential,
        auth_file=arguments.auth_file,
        ca_file=arguments.ca_file,
    )


def system_of(arguments: argparse.Namespace) -> str | None:
    """Return the system of ``--system`` or ``$UENVD_SYSTEM``."""
    return arguments.system or os.environ.get("UENVD_SYSTEM") or None


def uarch_of(arguments: argparse.Namespace) -> str | None:
    """Return the microarchitecture of ``--uarch`` or ``$UENVD_UARCH``. There is no other default: a guess could be wrong."""
    return arguments.uarch or os.environ.get("UENVD_UARCH") or None


def need_system(arguments: argparse.Namespace) -> str:
    """Return `system_of`. Raises `UsageError` without one."""
    found = system_of(arguments)
    if found is None:
        raise UsageError("no system was named", hint="say --system NAME, or set UENVD_SYSTEM")
    return found


def need_uarch(arguments: argparse.Namespace) -> str:
    """Return `uarch_of`. Raises `UsageError` without one."""
    found = uarch_of(arguments)
    if found is None:
        raise UsageError(
            "no microarchitecture was named",
            hint="say --uarch NAME (zen2, zen3, gh200, a100 ...), or set UENVD_UARCH; "
            "it is not guessed: the machine that builds need not be the one that runs",
        )
    return found


def parse_site_label(arguments: argparse.Namespace, text: str) -> Label:
    """Parse a label; system and microarchitecture come from the options where it does not say them. Raises `LabelError`."""
    label = parse_namespaced_label(text)
    return label._replace(
        system=label.system or system_of(arguments), uarch=label.uarch or uarch_of(arguments)
    )
