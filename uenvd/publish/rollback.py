"""``uenvd-publish rollback``: ``latest`` goes back to the release before."""

from __future__ import annotations

import argparse
from contextlib import closing

from uenvd.errors import DeployRefused, NotFound, UnknownLabel, UsageError
from uenvd.oci.index import LATEST
from uenvd.oci.manifest import squashfs_layer
from uenvd.oci.reference import repository_of
from uenvd.oci.remote import Remote
from uenvd.publish.console import say, show, show_json
from uenvd.publish.history import former, note_release
from uenvd.publish.options import (
    DEPLOY,
    add_registry_options,
    add_site_options,
    open_registry,
    parse_site_label,
)
from uenvd.publish.push import check_tag
from uenvd.publish.releases import refresh_repository


def roll_back(remote: Remote, repository: str, tag: str | None = None) -> tuple[str, str]:
    """Move ``latest`` of a repository to the release before, or to the one under ``tag``; return (digest now, digest before).

    May be repeated after a failure only with ``tag``: without one it goes back by one more release. Raises `UnknownLabel`,
    `DeployRefused`, and the remote's errors.
    """
    try:
        before = remote.resolve(repository, LATEST)
    except NotFound as error:
        raise UnknownLabel(f"{repository} has no {LATEST}: nothing was released there") from error
    if tag is not None:
        check_tag(tag)
    try:
        wanted = remote.resolve(repository, tag) if tag is not None else former(remote, repository, before)
        manifest = remote.manifest(repository, wanted)
    except NotFound as error:
        raise DeployRefused(f"the release to go back to is not there any more: {error.message}") from error
    squashfs_layer(manifest)
    if wanted == before:
        raise DeployRefused(f"{LATEST} is {wanted} already")
    note_release(remote, repository, wanted, action="rollback", tag=tag or LATEST, previous=before)
    remote.push_manifest(repository, LATEST, manifest.raw, manifest.media_type)
    refresh_repository(remote, repository, say, fresh=[wanted])
    return wanted, before


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "label", metavar="LABEL", help="[namespace::]name/version@system%%uarch; default namespace: deploy"
    )
    parser.add_argument("--to", metavar="TAG", help="the release to go back to; default: the one before")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    add_site_options(parser)
    add_registry_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Go back; the digest that ``latest`` has now goes to stdout."""
    label = parse_site_label(arguments, arguments.label)
    missing = [part for part in ("name", "version", "system", "uarch") if getattr(label, part) is None]
    if missing or label.digest is not None or label.tag not in {None, LATEST}:
        raise UsageError(
            f"{arguments.label!r} must say name, version, system and uarch, and nothing more",
            hint="a certain release: rollback name/version@system%uarch --to TAG",
        )
    repository = repository_of(
        label.namespace or DEPLOY,
        label.system or "",
        label.uarch or "",
        label.name or "",
        label.version or "",
    )
    with closing(open_registry(arguments)) as remote:
        digest, before = roll_back(remote, repository, arguments.to)
    say(f"{repository}:{LATEST} is {digest} again; it was {before}, which keeps its own tag")
    if arguments.json:
        show_json({"repository": repository, "digest": digest, "was": before})
    else:
        show(digest)
    return 0
