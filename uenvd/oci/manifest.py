"""Manifests, descriptors and our config blob: bytes in, checked values out. Pure.

Sources: OCI image specification 1.1 (``descriptor.md``, ``manifest.md``); the shape of a uenv in a registry is that of
``oras push --artifact-type application/x-squashfs REPO:TAG store.squashfs``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from uenvd.errors import DigestMismatch, ManifestError
from uenvd.oci.chunks import ChunkList
from uenvd.oci.reference import is_digest
from uenvd.views import ImageMeta

MAX_MANIFEST_BYTES: Final = 4 << 20
"""What registries accept (specification, "Pushing manifests")."""
MAX_CONFIG_BYTES: Final = 1 << 20
MAX_LAYERS: Final = 1000
MAX_ANNOTATIONS: Final = 1000

MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE: Final = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST_TYPE: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX_TYPE: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
EMPTY_TYPE: Final = "application/vnd.oci.empty.v1+json"
EMPTY_BLOB: Final = b"{}"
EMPTY_DIGEST: Final = "sha256:" + hashlib.sha256(EMPTY_BLOB).hexdigest()
SQUASHFS_TYPE: Final = "application/x-squashfs"
CONFIG_TYPE: Final = "application/vnd.uenvd.config.v1+json"
TITLE: Final = "org.opencontainers.image.title"
CREATED: Final = "org.opencontainers.image.created"
LAYER_TITLE: Final = "store.squashfs"

_NO_SQUASHFS_HINT = "a uenv is pushed with: uenvd-publish push FILE LABEL, or: oras push --artifact-type application/x-squashfs"
_LAYER_TYPES = {
    SQUASHFS_TYPE,
    "application/vnd.oci.image.layer.v1.tar",
    "application/octet-stream",
    "application/vnd.squashfs",
}


@dataclass(frozen=True)
class Descriptor:
    """A reference to bytes: their type, digest (``sha256:`` and 64 hexadecimal digits) and size."""

    media_type: str
    digest: str
    size_bytes: int
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)
    artifact_type: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of the specification."""
        body: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size_bytes}
        if self.artifact_type is not None:
            body["artifactType"] = self.artifact_type
        if self.annotations:
            body["annotations"] = dict(self.annotations)
        return body


@dataclass(frozen=True)
class Manifest:
    """An image manifest. ``raw`` are the bytes as served: `digest` is theirs, and they may be pushed elsewhere unchanged."""

    raw: bytes = field(repr=False)
    digest: str
    media_type: str
    artifact_type: str | None
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(hash=False)
    subject: Descriptor | None

    @property
    def descriptor(self) -> Descriptor:
        """The descriptor of this manifest."""
        return Descriptor(self.media_type, self.digest, len(self.raw), artifact_type=self.artifact_type)


@dataclass(frozen=True)
class ImageConfig:
    """Our config blob: what can be said of an image without its bytes."""

    meta: ImageMeta | None
    architecture: str | None
    """As ``uname -m`` says it: ``x86_64``, ``aarch64``; None if the image holds no programs."""
    created: str | None = None
    """RFC 3339."""
    image_digest: str | None = None
    """Digest of the squashfs file that `meta` was read from."""
    image_size_bytes: int | None = None
    chunks: ChunkList | None = None
    """What verifies parts of the squashfs file; None in images that were pushed without."""

    def encode(self) -> bytes:
        """Return the blob; equal values give equal bytes."""
        body: dict[str, Any] = {
            "schema": 1,
            "architecture": self.architecture,
            "meta": None if self.meta is None else self.meta.to_wire(),
        }
        if self.created is not None:
            body["created"] = self.created
        if self.image_digest is not None:
            body["image"] = {"digest": self.image_digest, "size": self.image_size_bytes}
        if self.chunks is not None:
            body["chunks"] = self.chunks.to_json()
        return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


EMPTY_DESCRIPTOR: Final = Descriptor(EMPTY_TYPE, EMPTY_DIGEST, len(EMPTY_BLOB))


def digest_of(data: bytes) -> str:
    """Return ``sha256:<hex>`` of ``data``."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def check_digest(data: bytes, expected: str, what: str) -> None:
    """Raise `DigestMismatch` unless ``data`` has this digest."""
    found = digest_of(data)
    if found != expected:
        raise DigestMismatch(f"{what} has the digest {found} where {expected} was asked for")


def parse_manifest(raw: bytes, expected_digest: str | None) -> Manifest:
    """Parse and check an image manifest of at most 4 MiB.

    Raises `DigestMismatch` if the bytes do not have ``expected_digest``, `ManifestError` for anything that is no image
    manifest, an image index among it.
    """
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ManifestError(
            f"the manifest has {len(raw)} bytes, more than the {MAX_MANIFEST_BYTES} that are allowed"
        )
    if expected_digest is not None:
        check_digest(raw, expected_digest, "the manifest")
    body = load_object(raw, "the manifest")
    media_type = _text(body, "mediaType", "the manifest") or MANIFEST_TYPE
    if media_type in {INDEX_TYPE, DOCKER_INDEX_TYPE} or ("manifests" in body and "layers" not in body):
        raise ManifestError(
            "this is an image index (a list of manifests), not the manifest of one image",
            hint="name one image by its digest",
        )
    if media_type not in {MANIFEST_TYPE, DOCKER_MANIFEST_TYPE}:
        raise ManifestError(f"the manifest has the unknown media type {media_type[:100]!r}")
    if body.get("schemaVersion") != 2:
        raise ManifestError("the manifest has no schemaVersion 2")
    layers = body.get("layers")
    if not isinstance(layers, list) or len(layers) > MAX_LAYERS:
        raise ManifestError(f"the manifest has no list of at most {MAX_LAYERS} layers")
    subject = body.get("subject")
    return Manifest(
        raw=raw,
        digest=digest_of(raw),
        media_type=media_type,
        artifact_type=_text(body, "artifactType", "the manifest"),
        config=parse_descriptor(body.get("config"), "the config"),
        layers=tuple(parse_descriptor(layer, f"layer {number}") for number, layer in enumerate(layers)),
        annotations=_annotations(body, "the manifest"),
        subject=None if subject is None else parse_descriptor(subject, "the subject"),
    )


def parse_index(raw: bytes) -> list[Descriptor]:
    """Parse an image index (referrers answer, fallback tag, ``index.json``). Raises `ManifestError`."""
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ManifestError(
            f"the index has {len(raw)} bytes, more than the {MAX_MANIFEST_BYTES} that are allowed"
        )
    body = load_object(raw, "the index")
    entries = body.get("manifests")
    if not isinstance(entries, list) or "layers" in body:
        raise ManifestError("the index has no list of manifests")
    return [parse_descriptor(entry, f"entry {number} of the index") for number, entry in enumerate(entries)]


def parse_descriptor(body: object, what: str) -> Descriptor:
    """Check one descriptor. Raises `ManifestError` that begins with ``what``."""
    if not isinstance(body, dict):
        raise ManifestError(f"{what} is no descriptor")
    digest = body.get("digest")
    if not isinstance(digest, str) or not is_digest(digest):
        raise ManifestError(f"{what} has no sha256 digest", hint="only sha256 is supported")
    size = body.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 63:
        raise ManifestError(f"{what} has no valid size")
    return Descriptor(
        media_type=_text(body, "mediaType", what) or "application/octet-stream",
        digest=digest,
        size_bytes=size,
        annotations=_annotations(body, what),
        artifact_type=_text(body, "artifactType", what),
    )


def squashfs_layer(manifest: Manifest) -> Descriptor:
    """Return the one layer that is the squashfs image.

    It is the only layer, of a type that says squashfs or says nothing (``oras push`` without a type writes that of a tar
    archive), in an artifact that says squashfs; or the only layer that says squashfs by its type or its title. Raises
    `ManifestError`.
    """
    named = [layer for layer in manifest.layers if _says_squashfs(layer)]
    if len(named) == 1:
        return named[0]
    if len(named) > 1:
        raise ManifestError(
            f"the artifact has {len(named)} squashfs layers where one is expected", hint=_NO_SQUASHFS_HINT
        )
    artifact_types = {manifest.artifact_type, manifest.config.media_type}
    if (
        SQUASHFS_TYPE in artifact_types
        and len(manifest.layers) == 1
        and manifest.layers[0].media_type in _LAYER_TYPES
    ):
        return manifest.layers[0]
    kinds = ", ".join(sorted({layer.media_type[:80] for layer in manifest.layers})) or "no layers at all"
    raise ManifestError(f"the artifact holds no squashfs image (it has {kinds})", hint=_NO_SQUASHFS_HINT)


def _says_squashfs(layer: Descriptor) -> bool:
    if layer.media_type in {SQUASHFS_TYPE, "application/vnd.squashfs"}:
        return True
    title = layer.annotations.get(TITLE, "")
    return layer.media_type in _LAYER_TYPES and title.endswith((".squashfs", ".sqfs", ".sqsh"))


def parse_config(raw: bytes) -> ImageConfig | None:
    """Parse our config blob; None for one of another kind (the empty one of ``oras push``). Raises `ManifestError`."""
    if len(raw) > MAX_CONFIG_BYTES:
        raise ManifestError(
            f"the config blob has {len(raw)} bytes, more than the {MAX_CONFIG_BYTES} that are allowed"
        )
    body = load_object(raw, "the config blob")
    if "schema" not in body:
        return None
    if body["schema"] != 1:
        raise ManifestError(
            "the config blob was written by a newer uenvd", hint="update uenvd on this machine"
        )
    image = body.get("image")
    if image is not None:
        image = parse_descriptor(
            {"mediaType": SQUASHFS_TYPE, **image} if isinstance(image, dict) else image, "the image"
        )
    chunks = None
    if body.get("chunks") is not None and image is not None:
        chunks = ChunkList.from_json(body["chunks"], image.size_bytes)
    meta = body.get("meta")
    try:
        parsed = None if meta is None else ImageMeta.from_wire(meta)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ManifestError(
            f"the metadata in the config blob is malformed: {type(error).__name__}: {error}"[:300]
        ) from error
    return ImageConfig(
        meta=parsed,
        architecture=_text(body, "architecture", "the config blob"),
        created=_text(body, "created", "the config blob"),
        image_digest=None if image is None else image.digest,
        image_size_bytes=None if image is None else image.size_bytes,
        chunks=chunks,
    )


def build_manifest(
    layer: Descriptor,
    config: Descriptor,
    annotations: Mapping[str, str],
    artifact_type: str = SQUASHFS_TYPE,
    created: str | None = None,
) -> bytes:
    """Return the bytes of a manifest; equal arguments give equal bytes. ``created`` is RFC 3339."""
    notes = dict(annotations)
    if created is not None:
        notes[CREATED] = created
    body: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": artifact_type,
        "config": config.to_json(),
        "layers": [layer.to_json()],
    }
    if notes:
        body["annotations"] = dict(sorted(notes.items()))
    return json.dumps(body, separators=(",", ":")).encode()


def build_artifact(
    artifact_type: str,
    layers: Sequence[Descriptor],
    annotations: Mapping[str, str],
    *,
    subject: Descriptor | None = None,
) -> bytes:
    """Return the bytes of a manifest without a config of its own, such as an attachment; equal arguments give equal bytes."""
    body: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": artifact_type,
        "config": EMPTY_DESCRIPTOR.to_json(),
        "layers": [layer.to_json() for layer in layers],
    }
    if subject is not None:
        body["subject"] = replace(subject, annotations={}, artifact_type=None).to_json()
    if annotations:
        body["annotations"] = dict(sorted(annotations.items()))
    return json.dumps(body, separators=(",", ":")).encode()


def build_index(entries: Sequence[Descriptor]) -> bytes:
    """Return the bytes of an image index; equal entries give equal bytes, whatever their order."""
    listed = [entry.to_json() for entry in sorted(entries, key=lambda entry: entry.digest)]
    body = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": listed}
    return json.dumps(body, separators=(",", ":")).encode()


def media_type_of(raw: bytes, announced: str = "") -> str:
    """Return the media type of a manifest or an index: what it says itself, else what was announced, else by its fields."""
    body = load_object(raw, "the manifest")
    found = _text(body, "mediaType", "the manifest") or announced.partition(";")[0].strip()
    if found:
        return found
    return INDEX_TYPE if "manifests" in body else MANIFEST_TYPE


def load_object(raw: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object. Raises `ManifestError` for anything else, nesting without bounds among it."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{what} is no JSON") from error
    if not isinstance(body, dict):
        raise ManifestError(f"{what} is no JSON object")
    return body


def _text(body: Mapping[str, Any], key: str, what: str) -> str | None:
    value = body.get(key)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ManifestError(f"{what} has a {key} that is no text")
    return value


def _annotations(body: Mapping[str, Any], what: str) -> dict[str, str]:
    found = body.get("annotations")
    if found is None:
        return {}
    if not isinstance(found, dict) or len(found) > MAX_ANNOTATIONS:
        raise ManifestError(f"{what} has annotations that are no object of at most {MAX_ANNOTATIONS} texts")
    for value in found.values():
        if not isinstance(value, str):
            raise ManifestError(f"{what} has an annotation that is no text")
    return found
