"""The record of one image in the cache: one small JSON file for each manifest. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from uenvd.errors import ManifestError
from uenvd.oci.manifest import Descriptor, Manifest, parse_descriptor
from uenvd.oci.reference import is_digest, is_repository, is_tag


@dataclass(frozen=True)
class CachedImage:
    """One image of the cache, as it is known in one repository."""

    repository: str
    tags: tuple[str, ...]
    """Under which it was asked for, in the order in which they were seen; a tag that moved on is dropped."""
    manifest: Manifest
    layer: Descriptor
    """The squashfs blob."""
    pinned: bool
    complete: bool
    """The squashfs blob is here."""
    last_use_s: float
    """Seconds since the epoch; 0.0 unless complete."""

    def merged(self, other: CachedImage) -> CachedImage:
        """Return what two directories know of one image together."""
        return replace(
            self,
            tags=(*self.tags, *(tag for tag in other.tags if tag not in self.tags)),
            pinned=self.pinned or other.pinned,
            complete=self.complete or other.complete,
            last_use_s=max(self.last_use_s, other.last_use_s),
        )

    @property
    def manifest_digest(self) -> str:
        """Digest of the manifest."""
        return self.manifest.digest

    @property
    def layer_digest(self) -> str:
        """Digest of the squashfs blob."""
        return self.layer.digest

    @property
    def size_bytes(self) -> int:
        """Size of the squashfs blob."""
        return self.layer.size_bytes


@dataclass(frozen=True)
class Record:
    """What is kept of an image beside its blobs."""

    manifest_digest: str
    layer: Descriptor
    names: tuple[tuple[str, tuple[str, ...]], ...]
    """(repository, its tags), in the order in which they were seen."""
    pinned: bool = False
    listed: bool = False
    """The layer was here when the record was written, so that ``index.json`` lists the image."""

    def named(self, repository: str, tag: str | None) -> Record:
        """Return the record with one more name."""
        names = dict(self.names)
        tags = names.get(repository, ())
        names[repository] = tags if tag is None or tag in tags else (*tags, tag)
        return replace(self, names=tuple(names.items()))

    def without_tag(self, repository: str, tag: str) -> Record:
        """Return the record without a tag; the repository stays."""
        names = tuple(
            (name, tuple(kept for kept in tags if (name, kept) != (repository, tag)))
            for name, tags in self.names
        )
        return replace(self, names=names)

    def encode(self) -> bytes:
        """Return the file's content."""
        body = {
            "schema": 1,
            "manifest": self.manifest_digest,
            "layer": self.layer.to_json(),
            "names": [[name, list(tags)] for name, tags in self.names],
            "pinned": self.pinned,
            "listed": self.listed,
        }
        return json.dumps(body).encode()

    @classmethod
    def decode(cls, data: bytes) -> Record:
        """Parse the file's content. Raises `ManifestError` for anything that `encode` does not write."""
        try:
            body: dict[str, Any] = json.loads(data)
            names = tuple((str(name), tuple(str(tag) for tag in tags)) for name, tags in body["names"])
            record = cls(
                manifest_digest=str(body["manifest"]),
                layer=parse_descriptor(body["layer"], "the layer"),
                names=names,
                pinned=body["pinned"] is True,
                listed=body["listed"] is True,
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ManifestError(f"malformed record: {error}") from error
        if not is_digest(record.manifest_digest) or not all(
            is_repository(name) and all(map(is_tag, tags)) for name, tags in names
        ):
            raise ManifestError("malformed record: a name or digest is none")
        return record
