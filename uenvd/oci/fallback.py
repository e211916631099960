"""Referrers where a registry has no referrers API: the index under ``sha256-<subject>``, and the tags that attachments have of their own.

Sources: distribution specification 1.1, "Referrers Tag Schema"; `uenvd.oci.attach` says why there are tags of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from uenvd.errors import ManifestError, NotFound
from uenvd.oci.manifest import EMPTY_TYPE, INDEX_TYPE, Descriptor, Manifest, parse_index, parse_manifest
from uenvd.oci.reference import attachments_of, fallback_tag, own_digits
from uenvd.oci.remote import Remote


def read_index(remote: Remote, repository: str, subject: str) -> list[Descriptor]:
    """Return what the index under the fallback tag lists; [] without one.

    Some registries resolve that tag to the subject itself, which is no list.
    """
    try:
        raw, media_type = remote.manifest_bytes(repository, fallback_tag(subject))
        return parse_index(raw) if media_type == INDEX_TYPE else []
    except (NotFound, ManifestError):
        return []


def orphans(remote: Remote, repository: str, subject: str, known: Iterable[str]) -> list[Descriptor]:
    """Return the attachments that have a tag of their own and are not among ``known`` (digests)."""
    digits = {own_digits(digest) for digest in known}
    found = []
    for end, tag in attachments_of(subject, remote.every_tag(repository)).items():
        if end in digits:
            continue
        try:
            manifest = remote.manifest(repository, tag)
        except (NotFound, ManifestError):
            continue
        if manifest.subject is not None and manifest.subject.digest == subject:
            found.append(entry_of(manifest))
    return found


def by_tags(remote: Remote, repository: str, subject: str) -> list[Descriptor]:
    """Return the referrers by the index and by the tags of their own, so that an entry that others overwrote is not missed."""
    listed = read_index(remote, repository, subject)
    return [*listed, *orphans(remote, repository, subject, [entry.digest for entry in listed])]


def entry_of(manifest: Manifest) -> Descriptor:
    """Return a manifest's entry in a list of referrers (specification, "Listing Referrers": type, size and annotations)."""
    return replace(
        manifest.descriptor,
        annotations=manifest.annotations,
        artifact_type=manifest.artifact_type or manifest.config.media_type,
    )


def settled(
    remote: Remote, repository: str, found: Iterable[Descriptor], artifact_type: str | None
) -> list[Descriptor]:
    """Return each referrer once, those of one type if asked for.

    The type is taken from the manifest where the list has none or only that of an empty config.
    """
    unique = {entry.digest: entry for entry in found}
    typed = [_settle(remote, repository, entry) for entry in unique.values()]
    return [entry for entry in typed if artifact_type is None or entry.artifact_type == artifact_type]


def _settle(remote: Remote, repository: str, entry: Descriptor) -> Descriptor:
    if entry.artifact_type and entry.artifact_type != EMPTY_TYPE:
        return entry
    try:
        raw, _ = remote.manifest_bytes(repository, entry.digest)
        manifest = parse_manifest(raw, entry.digest)
    except (NotFound, ManifestError):
        return entry
    return replace(entry, artifact_type=manifest.artifact_type or manifest.config.media_type)
