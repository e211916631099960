"""``uenvd-publish discover``: list what is attached to an image, and fetch files of it."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import Any

from uenvd.errors import StorageError
from uenvd.oci.attach import attachments
from uenvd.oci.files import write_atomically
from uenvd.oci.manifest import CREATED, TITLE, Manifest
from uenvd.oci.remote import Remote
from uenvd.publish.console import say, show_json, show_table
from uenvd.publish.options import add_registry_options, add_site_options, open_registry
from uenvd.publish.source import add_label, find_image

MAX_FETCHED_BYTES = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_label(parser)
    parser.add_argument("--type", metavar="TYPE", help="only attachments of this type, such as uenv/reframe")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="also fetch the files of the newest attachment listed into DIR, as they are",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_site_options(parser)
    add_registry_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """List; the table or JSON goes to stdout, the newest first."""
    with closing(open_registry(arguments)) as remote:
        source = find_image(arguments, remote)
        found = attachments(remote, source.repository, source.digest, arguments.type)
        if arguments.out is not None and found:
            _fetch(remote, source.repository, found[0], arguments.out)
    if arguments.json:
        show_json(
            {
                "repository": source.repository,
                "digest": source.digest,
                "attachments": [_record(manifest) for manifest in found],
            }
        )
    elif found:
        rows = [
            (
                manifest.artifact_type or manifest.config.media_type,
                manifest.annotations.get(CREATED, "-")[:19],
                f"{sum(layer.size_bytes for layer in manifest.layers)}",
                manifest.digest,
            )
            for manifest in found
        ]
        show_table(("type", "created", "bytes", "digest"), rows)
    else:
        say(f"nothing is attached to {source.repository}@{source.digest}")
    return 0


def _record(manifest: Manifest) -> dict[str, Any]:
    return {
        "digest": manifest.digest,
        "artifact_type": manifest.artifact_type or manifest.config.media_type,
        "annotations": dict(manifest.annotations),
        "files": [
            {"title": layer.annotations.get(TITLE), "digest": layer.digest, "size_bytes": layer.size_bytes}
            for layer in manifest.layers
        ],
    }


def _fetch(remote: Remote, repository: str, manifest: Manifest, directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for number, layer in enumerate(manifest.layers):
            # A title is whatever its author wrote: only the last part of it becomes a file name.
            name = Path(layer.annotations.get(TITLE, "")).name.strip(".") or f"file-{number}"
            if layer.media_type.endswith("tar+gzip"):
                name += ".tar.gz"
            write_atomically(directory / name, remote.small_blob(repository, layer, MAX_FETCHED_BYTES))
            say(f"fetched {directory / name}")
    except OSError as error:
        raise StorageError(f"{directory} cannot be written: {error.strerror}") from error
