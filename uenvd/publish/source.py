"""The image that a command is about: from its label to its digest."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from uenvd.errors import NotFound, UnknownLabel
from uenvd.oci.reference import is_digest
from uenvd.oci.remote import Remote
from uenvd.publish.options import parse_site_label
from uenvd.publish.push import target_of


@dataclass(frozen=True)
class Source:
    """One image of the registry."""

    repository: str
    digest: str
    """Of the manifest."""
    tag: str | None
    """That it was named by; None for a digest."""


def add_label(parser: argparse.ArgumentParser) -> None:
    """Add the argument LABEL."""
    parser.add_argument(
        "label",
        metavar="LABEL",
        help="the image: [namespace::]name/version:tag@system%%uarch, or …@sha256:… for :tag; without a namespace: deploy",
    )


def find_image(arguments: argparse.Namespace, remote: Remote, text: str | None = None) -> Source:
    """Return the image that ``arguments.label`` (or ``text``) names. Raises `LabelError`, `UsageError`, `UnknownLabel`."""
    label = str(parse_site_label(arguments, text or arguments.label))
    target = target_of(label, None, digest_allowed=True)
    if is_digest(target.reference):
        return Source(target.repository, target.reference, None)
    try:
        digest = remote.resolve(target.repository, target.reference)
    except NotFound as error:
        raise UnknownLabel(
            f"there is no such image: {error.message}", hint="check the label, its namespace and the registry"
        ) from error
    return Source(target.repository, digest, target.reference)
