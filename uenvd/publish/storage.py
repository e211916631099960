"""``uenvd-publish storage``: what each environment takes in the registry. A blob that several images have is counted once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from uenvd.errors import ManifestError, NotFound, RegistryDenied, RegistryError, UsageError
from uenvd.oci.manifest import INDEX_TYPE, media_type_of, parse_manifest
from uenvd.oci.reference import is_fallback_tag, split_repository
from uenvd.oci.remote import Remote
from uenvd.publish.console import say, show, show_json, show_table
from uenvd.publish.options import add_registry_options, add_system_option, open_registry, system_of

_THREADS: Final = 8


@dataclass(frozen=True)
class Held:
    """What one repository holds."""

    repository: str
    images: int
    blobs: dict[str, int]
    """Digest -> size in bytes: squashfs files, manifests, attachments."""


@dataclass(frozen=True)
class Usage:
    """What one environment takes."""

    name: str
    versions: int
    images: int
    """Digests, in all namespaces, systems and microarchitectures together."""
    total_bytes: int
    """Of all its blobs, each once."""
    own_bytes: int
    """Of the blobs that no other environment has: what would be freed without it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--namespace", metavar="NS", help="default: all that the registry lists")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_system_option(parser)
    add_registry_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Add up; the table goes to stdout, the largest first."""
    system = system_of(arguments)
    with closing(open_registry(arguments)) as remote:
        try:
            listed = remote.repositories(f"{arguments.namespace}/" if arguments.namespace else "")
        except (RegistryError, RegistryDenied) as error:
            raise UsageError(
                f"what there is is not known: {error.message}", hint="ask the registry's own interface"
            ) from error
        places = [name for name in listed if (parts := split_repository(name)) and system in {None, parts[1]}]
        with ThreadPoolExecutor(_THREADS) as pool:
            held = list(pool.map(lambda place: read_repository(remote, place, say), places))
    usages = usage_of(held)
    total = sum({digest: size for one in held for digest, size in one.blobs.items()}.values())
    if arguments.json:
        show_json({"environments": [vars(one) for one in usages], "total_bytes": total})
        return 0
    show_table(
        ("environment", "versions", "images", "MB", "only here, MB"),
        [
            (
                one.name,
                str(one.versions),
                str(one.images),
                f"{one.total_bytes / 1e6:.1f}",
                f"{one.own_bytes / 1e6:.1f}",
            )
            for one in usages
        ],
    )
    show(f"together {total / 1e6:.1f} MB in {len(places)} repositories; what several have is counted once")
    return 0


def read_repository(remote: Remote, repository: str, say: Callable[[str], None]) -> Held:
    """Return what a repository's tags lead to, attachments among it. What cannot be read is left out, with a word."""
    blobs: dict[str, int] = {}
    images = set()
    for tag in remote.every_tag(repository):
        try:
            raw, _type = remote.manifest_bytes(repository, tag)
            digest = remote.resolve(repository, tag)
            blobs[digest] = len(raw)
            if media_type_of(raw) == INDEX_TYPE:
                continue
            manifest = parse_manifest(raw, None)
        except (NotFound, ManifestError) as error:
            say(f"note: {repository}:{tag} is left out: {error.message}")
            continue
        blobs |= {blob.digest: blob.size_bytes for blob in (manifest.config, *manifest.layers)}
        if not is_fallback_tag(tag):
            images.add(digest)
    return Held(repository, len(images), blobs)


def usage_of(held: Iterable[Held]) -> list[Usage]:
    """Add up by environment; the largest first."""
    blobs: dict[str, dict[str, int]] = {}
    images: dict[str, int] = {}
    versions: dict[str, set[str]] = {}
    for one in held:
        _namespace, _system, _uarch, name, version = one.repository.split("/")
        blobs.setdefault(name, {}).update(one.blobs)
        images[name] = images.get(name, 0) + one.images
        versions.setdefault(name, set()).add(version)
    holders: dict[str, int] = {}
    for of_name in blobs.values():
        for digest in of_name:
            holders[digest] = holders.get(digest, 0) + 1
    usages = [
        Usage(
            name,
            len(versions[name]),
            images[name],
            sum(of_name.values()),
            sum(size for digest, size in of_name.items() if holders[digest] == 1),
        )
        for name, of_name in blobs.items()
    ]
    return sorted(usages, key=lambda one: (-one.total_bytes, one.name))
