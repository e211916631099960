"""Copies of images within and between registries, with what is attached to them.

Bytes of manifests do not change, so digests do not. Order: blobs, the manifest under its digest, what is attached to it, and last the tag: whoever
finds the tag finds the rest. Blobs are mounted where both repositories are of one registry and it lets us, else streamed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from uenvd.errors import ManifestError
from uenvd.oci.attach import attachments, link
from uenvd.oci.manifest import (
    DOCKER_INDEX_TYPE,
    EMPTY_BLOB,
    EMPTY_DIGEST,
    INDEX_TYPE,
    Descriptor,
    digest_of,
    parse_index,
    parse_manifest,
)
from uenvd.oci.remote import Progress, Remote, never, no_progress

MAX_DEPTH: Final = 6
"""How deep attachments of attachments are followed (a signature of a report, ...)."""
MAX_MANIFESTS: Final = 1000


@dataclass
class Copied:
    """What a copy did."""

    digest: str
    """Of the manifest."""
    attachments: list[str] = field(default_factory=list)
    """Digests of what is attached to it, directly or not."""
    mounted_bytes: int = 0
    streamed_bytes: int = 0


def copy(
    source: Remote,
    source_repository: str,
    reference: str,
    target: Remote,
    target_repository: str,
    tag: str | None,
    *,
    recursive: bool = True,
    progress: Progress = no_progress,
) -> Copied:
    """Copy what a tag or digest names; give it ``tag`` in the end, if there is one. ``recursive``: with all attachments.

    What is there already is not sent again. Raises `NotFound`, `ManifestError` and the errors of both remotes.
    """
    raw, media_type = source.manifest_bytes(source_repository, reference)
    job = _Job(
        source, source_repository, target, target_repository, recursive, progress, Copied(digest_of(raw))
    )
    job.manifest(raw, media_type, depth=0)
    if tag is not None:
        target.push_manifest(target_repository, tag, raw, media_type)
    return job.copied


@dataclass
class _Job:
    source: Remote
    source_repository: str
    target: Remote
    target_repository: str
    recursive: bool
    progress: Progress
    copied: Copied
    seen: set[str] = field(default_factory=set)

    def manifest(self, raw: bytes, media_type: str, depth: int) -> None:
        """Copy a manifest that has no subject, or whose subject does not matter here, with its blobs and attachments."""
        digest = digest_of(raw)
        if digest in self.seen:
            return
        self._see(digest, depth)
        if media_type in {INDEX_TYPE, DOCKER_INDEX_TYPE}:
            for entry in parse_index(raw):
                self.manifest(
                    *self.source.manifest_bytes(self.source_repository, entry.digest), depth=depth + 1
                )
        else:
            self._blobs(raw)
        self.target.push_manifest(self.target_repository, None, raw, media_type)
        if self.recursive:
            self._attachments(digest, depth)

    def _attachments(self, subject: str, depth: int) -> None:
        found = attachments(self.source, self.source_repository, subject)
        fresh = [one for one in found if one.digest not in self.seen]
        for one in fresh:
            self._see(one.digest, depth + 1)
            self._blobs(one.raw)
            self.copied.attachments.append(one.digest)
        if fresh:
            link(self.target, self.target_repository, subject, [one.raw for one in fresh])
        for one in fresh:
            self._attachments(one.digest, depth + 1)

    def _see(self, digest: str, depth: int) -> None:
        self.seen.add(digest)
        if depth > MAX_DEPTH or len(self.seen) > MAX_MANIFESTS:
            raise ManifestError(f"{digest} in {self.source_repository}: too many manifests hang together")

    def _blobs(self, raw: bytes) -> None:
        manifest = parse_manifest(raw, None)
        for blob in (*manifest.layers, manifest.config):
            self._blob(blob)

    def _blob(self, blob: Descriptor) -> None:
        if blob.digest == EMPTY_DIGEST:
            self.target.push_bytes(self.target_repository, EMPTY_BLOB, blob.media_type)
            return
        if self.source.address == self.target.address and self.target.mount_blob(
            self.target_repository, blob, self.source_repository
        ):
            self.copied.mounted_bytes += blob.size_bytes
            self.progress(blob.size_bytes, blob.size_bytes)
            return
        self.target.push_stream(
            self.target_repository,
            blob,
            lambda: self.source.stream_blob(self.source_repository, blob, 0, never),
            self.progress,
        )
        self.copied.streamed_bytes += blob.size_bytes
