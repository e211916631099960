"""Releasing an image whose tests have passed: the gate, the copy, the tags, the index; and which image options mean."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from uenvd.errors import DeployRefused, NotFound, UnknownLabel, UsageError
from uenvd.oci.attach import WAIVER_TYPE, attach, json_content
from uenvd.oci.copy import copy
from uenvd.oci.index import LATEST
from uenvd.oci.manifest import squashfs_layer
from uenvd.oci.reference import is_digest, split_repository
from uenvd.oci.remote import Progress, Remote, no_progress
from uenvd.publish.comparison import performance_of
from uenvd.publish.console import say
from uenvd.publish.gate import check_tested
from uenvd.publish.history import note_release
from uenvd.publish.options import DEPLOY, parse_site_label, refuse, system_of
from uenvd.publish.push import MOVING_TAGS, Target, check_kept, check_tag, target_of
from uenvd.publish.releases import list_repositories, note_json, refresh_repository


@dataclass(frozen=True)
class Deployed:
    """What a deployment did."""

    repository: str
    tag: str
    digest: str
    """Of the manifest; the same as that of the build."""
    verdict: str
    remark: str
    attachments: int
    """How many were copied with it."""
    replaced: str | None
    """The digest that ``latest`` had before; None if it had none, did not move or was this one already."""
    notes: tuple[str, ...]


def deploy_image(
    remote: Remote,
    source: Target,
    tag: str,
    *,
    namespace: str = DEPLOY,
    waiver: str | None = None,
    move_latest: bool = True,
    progress: Progress = no_progress,
    say: Callable[[str], None] = say,
    action: str = "deploy",
    compare: bool = True,
) -> Deployed:
    """Release the image at ``source``: gate, copy with all attachments, immutable tag, ``latest``, index; in this order.

    ``action`` is noted (`uenvd.publish.history`), with what ``latest`` was before. ``compare``: `Deployed.notes` compare the performance
    with that.

    May be repeated after a failure: what was done is not done again. Raises `DeployRefused` for an image that may not pass or a tag that is
    another image's, `UnknownLabel`, and the remote's errors.
    """
    parts = split_repository(source.repository)
    if parts is None:
        raise UsageError(f"{source.repository} is no repository of images")
    check_tag(tag)
    if tag in MOVING_TAGS:
        raise DeployRefused(
            f"{tag!r} is a tag that moves: a release needs one that stays",
            hint=f"say --tag v1 (v2, ...); {LATEST} follows by itself",
        )
    target = "/".join((namespace, *parts[1:]))
    if target == source.repository:
        raise UsageError(
            f"the image is in {namespace!r} already", hint="another tag for it: uenvd-publish tag"
        )
    try:
        manifest = remote.manifest(source.repository, source.reference)
    except NotFound as error:
        raise UnknownLabel(
            f"there is no such image: {error.message}", hint="check the label and the registry"
        ) from error
    squashfs_layer(manifest)
    digest = manifest.digest
    gate = check_tested(remote, source.repository, digest, waiver)
    there = _resolve(remote, target, tag)
    if there not in {None, digest}:
        raise DeployRefused(
            f"{target}:{tag} is another image already ({there})",
            hint="released tags never change: choose the next one",
        )
    copied = copy(remote, source.repository, digest, remote, target, None, progress=progress)
    if gate.verdict == "waived" and waiver is not None:
        attach(remote, target, digest, WAIVER_TYPE, [json_content("waiver.json", note_json(waiver))])
    remote.push_manifest(target, tag, manifest.raw, manifest.media_type)
    try:
        check_kept(remote, target, tag, digest)
    except UsageError as error:
        raise DeployRefused(error.message, hint=error.hint) from error
    compared = performance_of(remote, source.repository, digest, namespace=namespace) if compare else None
    before = _resolve(remote, target, LATEST)
    if move_latest and before != digest:
        note_release(remote, target, digest, action=action, tag=tag, previous=before)
        remote.push_manifest(target, LATEST, manifest.raw, manifest.media_type)
    refresh_repository(remote, target, say, fresh=[digest])
    return Deployed(
        target,
        tag,
        digest,
        gate.verdict,
        gate.remark,
        len(copied.attachments),
        before if move_latest and before != digest else None,
        (*gate.notes, *(compared.lines() if compared is not None else ())),
    )


def _resolve(remote: Remote, repository: str, tag: str) -> str | None:
    try:
        return remote.resolve(repository, tag)
    except NotFound:
        return None


def find_digest(remote: Remote, namespace: str, system: str, digest: str) -> Target:
    """Return which repository has a digest, by the registry's list of repositories and their tags. Raises `UnknownLabel`."""
    for repository in list_repositories(remote, namespace, system):
        for tag in remote.tags(repository):
            if _resolve(remote, repository, tag) == digest:
                return Target(repository, digest)
    raise UnknownLabel(
        f"no repository of {namespace}/{system} has a tag on {digest}",
        hint="name the image: name/version@system%uarch@" + digest,
    )


def add_image(parser: argparse.ArgumentParser) -> None:
    """Add which image is released, and as what."""
    parser.add_argument(
        "label",
        metavar="LABEL|DIGEST",
        help="the image: name/version:PIPELINE@system%%uarch, …@sha256:…, or sha256:…",
    )
    parser.add_argument(
        "--tag", required=True, metavar="TAG", help="the tag to release it under, such as v1; it never moves"
    )


def source_of(arguments: argparse.Namespace, remote: Remote) -> tuple[Target, str]:
    """Return where the image is that the options name, and its digest. Raises `UsageError`, `UnknownLabel` and the remote's errors."""
    target = _source(arguments, remote)
    if is_digest(target.reference):
        return target, target.reference
    try:
        return target, remote.resolve(target.repository, target.reference)
    except NotFound as error:
        raise UnknownLabel(
            f"there is no such image: {error.message}", hint="check the label and the registry"
        ) from error


def _source(arguments: argparse.Namespace, remote: Remote) -> Target:
    if is_digest(arguments.label):
        system = system_of(arguments)
        if system is None:
            raise UsageError(
                "a digest alone does not say where to look",
                hint="say --system NAME, or name/version@system%uarch@sha256:…",
            )
        return find_digest(remote, arguments.source, system, arguments.label)
    label = parse_site_label(arguments, arguments.label)
    if label.namespace is not None and label.namespace != arguments.source:
        refuse(
            arguments, ("from=source",), f"and the label, which is of {label.namespace!r}, say two namespaces"
        )
    return target_of(
        str(label._replace(namespace=label.namespace or arguments.source)), None, digest_allowed=True
    )
