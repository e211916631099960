"""Attachments: manifests with a ``subject``, found by whoever has the image.

Shapes are those of ``oras attach`` (oras 1.1 and later), so that it and CSCS's ``uenv`` read what is written here: an empty config, one layer a
file with its name in ``org.opencontainers.image.title``, a directory as one gzipped tar archive that is to be unpacked.

Where a registry has the referrers API it lists the manifest itself, and says so. Elsewhere the list is an image index under the tag
``sha256-<subject>`` (specification, "Referrers Tag Schema"), which every client reads, changes and writes back: two at once lose entries. Here
every attachment first gets **a tag of its own** (`uenvd.oci.reference.attachment_tag`); the index is then made of what it says *and* of these
tags, written, and read again until it has kept what it should. So a lost entry is put back by whoever writes next, and a clean-up of
untagged manifests deletes none of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from uenvd.errors import ManifestError, NotFound, RegistryError, UsageError
from uenvd.oci.fallback import entry_of, orphans, read_index
from uenvd.oci.files import hash_file
from uenvd.oci.manifest import (
    CREATED,
    EMPTY_BLOB,
    EMPTY_TYPE,
    INDEX_TYPE,
    TITLE,
    Descriptor,
    Manifest,
    build_artifact,
    build_index,
    digest_of,
    parse_manifest,
)
from uenvd.oci.metadata import (
    MAX_PACKED_BYTES,
    UNPACK,
    UNPACKED_DIGEST,
    pack_directory,
    read_packed_meta,
)
from uenvd.oci.optimistic import until_it_stays
from uenvd.oci.reference import attachment_tag, attachments_of, fallback_tag, is_digest, own_digits
from uenvd.oci.remote import Progress, Remote, no_progress
from uenvd.views import ImageMeta

META_TYPE: Final = "uenv/meta"
"""The directory ``meta`` of an image and what its build left: a gzipped tar archive."""
REFRAME_TYPE: Final = "uenv/reframe"
"""A report of ReFrame (JSON of ``--report-file``; CSCS attaches JUnit XML), passing or not."""
VERDICT: Final = "dev.uenvd.tested.verdict"
"""Annotation of a report: ``pass``, ``fail`` or ``waived``."""
WAIVER_TYPE: Final = "uenv/waiver"
"""Why an image was deployed without tests: JSON."""

TARBALL_TYPE: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
JSON_TYPE: Final = "application/json"

_MAX_METAS: Final = 4


@dataclass(frozen=True)
class Content:
    """One file of an attachment: its name, its bytes or the file that has them, its media type."""

    title: str
    data: bytes | Path
    media_type: str = "application/octet-stream"
    annotations: Mapping[str, str] = field(default_factory=dict)


def directory_content(directory: Path, title: str | None = None) -> Content:
    """Pack a directory as ``oras attach DIR`` does; equal trees give equal bytes. Raises `UsageError`."""
    title = title or directory.resolve().name
    packed, unpacked_digest = pack_directory(directory, title)
    return Content(title, packed, TARBALL_TYPE, {UNPACK: "true", UNPACKED_DIGEST: unpacked_digest})


def json_content(title: str, data: bytes | Path) -> Content:
    """Return a JSON document as content."""
    return Content(title, data, JSON_TYPE)


def attach(
    remote: Remote,
    repository: str,
    subject_digest: str,
    artifact_type: str,
    contents: Sequence[Content],
    annotations: Mapping[str, str] | None = None,
    *,
    created: str | None = None,
    progress: Progress = no_progress,
) -> str:
    """Attach files to the manifest ``subject_digest`` of a repository; return the digest of the attachment.

    When it returns, the attachment is found by the referrers API or by the tag schema, whatever others attach meanwhile. What is attached
    already (same type, bytes and annotations) is not attached again. ``created`` is RFC 3339; default: now.

    Raises `NotFound` for an unknown subject, `UsageError` for files that cannot be read, and the remote's errors.
    """
    if not is_digest(subject_digest):
        raise UsageError(
            f"{subject_digest!r} is no digest", hint="an attachment belongs to one digest, not to a tag"
        )
    raw_subject, subject_type = remote.manifest_bytes(repository, subject_digest)
    subject = Descriptor(subject_type, subject_digest, len(raw_subject))
    layers = [_describe(content) for content in contents]
    notes = dict(annotations or {})
    there = _same(remote, repository, subject_digest, artifact_type, layers, notes)
    if there is not None:
        return there
    for content, layer in zip(contents, layers, strict=True):
        if isinstance(content.data, Path):
            remote.push_blob(repository, content.data, layer, progress)
        else:
            remote.push_bytes(repository, content.data, layer.media_type)
    remote.push_bytes(repository, EMPTY_BLOB, EMPTY_TYPE)
    notes[CREATED] = created or now()
    raw = build_artifact(artifact_type, layers, notes, subject=subject)
    link(remote, repository, subject_digest, [raw])
    return digest_of(raw)


def link(remote: Remote, repository: str, subject_digest: str, raws: Sequence[bytes]) -> None:
    """Store manifests that have this subject (their blobs are there), each under a tag of its own, so that they are found.

    Raises `RegistryError` where others overwrite the list again and again, and the remote's errors.
    """
    unlisted = []
    for raw in raws:
        manifest = parse_manifest(raw, None)
        if manifest.subject is None or manifest.subject.digest != subject_digest:
            raise ManifestError(f"the manifest {manifest.digest} does not belong to {subject_digest}")
        tag = attachment_tag(subject_digest, manifest.digest)
        if not remote.push_attachment(repository, tag, raw, subject_digest, manifest.media_type):
            unlisted.append(entry_of(manifest))
    if unlisted:
        _list_under_tag(remote, repository, subject_digest, unlisted)


def attached_meta(remote: Remote, repository: str, digest: str) -> ImageMeta | None:
    """Return the metadata that a stock client attached (``uenv/meta``), the newest that can be read; None without.

    Unlike what is in a config blob it is not pinned by the image's digest: it says what whoever may write to the repository says.
    """
    for manifest in attachments(remote, repository, digest, META_TYPE)[:_MAX_METAS]:
        for layer in manifest.layers[:_MAX_METAS]:
            if layer.size_bytes > MAX_PACKED_BYTES:
                continue
            try:
                found = read_packed_meta(remote.small_blob(repository, layer, MAX_PACKED_BYTES))
            except (ManifestError, NotFound):
                continue
            if found is not None:
                return found
    return None


def _list_under_tag(remote: Remote, repository: str, subject: str, mine: Sequence[Descriptor]) -> None:
    """Put entries into the index under the fallback tag: write, wait, read again, until they stay."""
    tag = fallback_tag(subject)

    def step() -> bool:
        listed = {entry.digest: entry for entry in read_index(remote, repository, subject)}
        wanted = {entry.digest: entry for entry in mine}
        wanted |= {entry.digest: entry for entry in orphans(remote, repository, subject, listed | wanted)}
        if wanted.keys() <= listed.keys():
            return True
        remote.push_manifest(repository, tag, build_index([*(wanted | listed).values()]), INDEX_TYPE)
        return False

    if not until_it_stays(remote, f"{repository}:{tag}", step):
        raise RegistryError(
            f"the list of attachments of {subject} in {repository} is overwritten by others again and again",
            hint="the attachment is stored under a tag of its own; try again when fewer clients attach to this image",
        )


def protect(remote: Remote, repository: str, subject_digest: str) -> int:
    """Give the attachments of an image that have no tag of their own one each; return how many there were."""
    tagged = attachments_of(subject_digest, remote.every_tag(repository))
    bare = [
        one for one in attachments(remote, repository, subject_digest) if own_digits(one.digest) not in tagged
    ]
    if bare:
        link(remote, repository, subject_digest, [one.raw for one in bare])
    return len(bare)


def _describe(content: Content) -> Descriptor:
    notes = {TITLE: content.title, **content.annotations}
    if isinstance(content.data, bytes):
        return Descriptor(content.media_type, digest_of(content.data), len(content.data), notes)
    try:
        digest, size = hash_file(content.data)
    except OSError as error:
        raise UsageError(f"{content.data} cannot be read: {error.strerror}") from error
    return Descriptor(content.media_type, digest, size, notes)


def _same(
    remote: Remote,
    repository: str,
    subject: str,
    artifact_type: str,
    layers: Sequence[Descriptor],
    notes: Mapping[str, str],
) -> str | None:
    """Return the digest of an attachment that says exactly this already, whenever it was made."""
    for entry in remote.referrers(repository, subject, artifact_type):
        try:
            manifest = remote.manifest(repository, entry.digest)
        except (NotFound, ManifestError):
            continue
        others = {key: value for key, value in manifest.annotations.items() if key != CREATED}
        if list(manifest.layers) == list(layers) and others == dict(notes):
            return manifest.digest
    return None


def when(annotations: Mapping[str, str]) -> datetime:
    """Return when a manifest says it was made; the beginning of time where it does not say."""
    try:
        found = datetime.fromisoformat(annotations.get(CREATED, ""))
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def now() -> str:
    """Return the time as RFC 3339, with microseconds: of two attachments one is the newer."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def attachments(
    remote: Remote, repository: str, subject_digest: str, artifact_type: str | None = None
) -> list[Manifest]:
    """Return the manifests attached to a digest, the newest first.

    What is listed but says another subject, or is no image manifest, is left out: a list is only a hint.
    """
    found = []
    for entry in remote.referrers(repository, subject_digest, artifact_type):
        try:
            manifest = remote.manifest(repository, entry.digest)
        except (NotFound, ManifestError):
            continue
        if manifest.subject is not None and manifest.subject.digest == subject_digest:
            found.append(manifest)
    return sorted(found, key=lambda one: (when(one.annotations), one.digest), reverse=True)
