"""Put an image into a registry under a label, and move tags. The library behind ``uenvd-publish push`` and ``tag``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from uenvd.config import ARCHITECTURES
from uenvd.errors import FormatError, NotFound, UsageError, WrongArchitecture
from uenvd.label import Label, parse_namespaced_label
from uenvd.oci.attach import Content, attach
from uenvd.oci.blocks import BLOCKS_TYPE, LEAST_BYTES
from uenvd.oci.manifest import (
    CONFIG_TYPE,
    LAYER_TITLE,
    MANIFEST_TYPE,
    MAX_CONFIG_BYTES,
    SQUASHFS_TYPE,
    TITLE,
    Descriptor,
    ImageConfig,
    build_manifest,
    digest_of,
    squashfs_layer,
)
from uenvd.oci.reference import is_fallback_tag, is_tag, repository_of
from uenvd.oci.remote import Progress, Remote
from uenvd.publish.contents import read_blocks, read_chunks, read_contents
from uenvd.publish.options import BUILD, DEPLOY

FIXED_DATE: Final = "1970-01-01T00:00:00Z"
"""Of what follows from an image alone: pushed again it is the same."""
DEFAULT_NAMESPACE: Final = DEPLOY
MOVING_TAGS: Final = frozenset({"latest"})
"""Tags that are meant to move; any other keeps the image that it was first given, unless forced."""
_HASH_BYTES: Final = 1 << 20
_LABEL_HINT = (
    "a label names all five parts: name/version:tag@system%uarch, for example prgenv-gnu/24.11:v1@daint%gh200"
)


@dataclass(frozen=True)
class Target:
    """Where a label leads: a repository and a tag or digest in it."""

    repository: str
    reference: str


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    digest: str
    """Of the manifest."""
    notes: tuple[str, ...]
    """Lines for the user."""


def target_of(text: str, namespace: str | None, *, digest_allowed: bool = False) -> Target:
    """Parse a label that names one place in the registry. Raises `LabelError`, `UsageError`."""
    label = parse_namespaced_label(text)
    if namespace is not None and label.namespace not in {None, namespace}:
        raise UsageError(f"the label says namespace {label.namespace!r}, the option says {namespace!r}")
    if label.digest is not None and not digest_allowed:
        raise UsageError(f"{text!r} names a digest; an image is pushed to a tag", hint=_LABEL_HINT)
    needed = (
        ("name", "version", "system", "uarch")
        if label.digest
        else ("name", "version", "tag", "system", "uarch")
    )
    missing = [part for part in needed if getattr(label, part) is None]
    if missing or label.system == "*":
        raise UsageError(
            f"the label {text!r} does not say: {', '.join(missing or ['which system'])}", hint=_LABEL_HINT
        )
    reference = label.digest or label.tag or ""
    if label.digest is None:
        check_tag(reference)
    return Target(_repository(label, namespace), reference)


def _repository(label: Label, namespace: str | None) -> str:
    parts = (
        label.namespace or namespace or DEFAULT_NAMESPACE,
        label.system,
        label.uarch,
        label.name,
        label.version,
    )
    return repository_of(*(part or "" for part in parts))


def check_tag(tag: str) -> None:
    """Refuse what no registry takes as a tag, and the tags of the referrers schema. Raises `UsageError`."""
    if not is_tag(tag) or is_fallback_tag(tag):
        raise UsageError(
            f"{tag!r} is no valid tag",
            hint="a tag has up to 128 letters, digits, _ . - and begins with none of . -",
        )


@dataclass(frozen=True)
class Prepared:
    """What a squashfs file becomes in a registry; it depends on the file only."""

    path: Path
    layer: Descriptor
    config: bytes
    raw: bytes
    """The manifest."""
    notes: tuple[str, ...]
    """Lines for the user."""

    @property
    def digest(self) -> str:
        """Of the manifest."""
        return digest_of(self.raw)


def prepare_image(
    path: Path, repository: str, *, architecture: str | None = None, hashing: Progress
) -> Prepared:
    """Hash a squashfs file, and make the config blob and manifest that it gets in ``repository``. No registry is asked.

    Raises `FormatError` for what is no squashfs, `WrongArchitecture` if the programs in it are not for the repository's
    microarchitecture, `UsageError` for a file that cannot be read.
    """
    contents = read_contents(path)
    architecture = architecture or contents.architecture
    _check_architecture(repository, architecture)
    layer = describe(path, hashing)
    config = ImageConfig(
        contents.meta, architecture, contents.created, layer.digest, layer.size_bytes, read_chunks(path)
    ).encode()
    if len(config) > MAX_CONFIG_BYTES:
        raise FormatError(
            f"{path}: its metadata and chunk list need {len(config)} bytes, more than the {MAX_CONFIG_BYTES} of a config blob",
            hint="has meta/env.json views with very long lists?",
        )
    config_descriptor = Descriptor(CONFIG_TYPE, digest_of(config), len(config))
    annotations = {"org.opencontainers.image.title": contents.meta.name} if contents.meta else {}
    raw = build_manifest(layer, config_descriptor, annotations, created=contents.created)
    notes = []
    if contents.meta is None:
        notes.append(
            "the image has no usable meta/env.json: its users must name a mount point, and it has no views"
        )
    elif contents.meta.mount is None:
        notes.append("the image does not say where it wants to be mounted: its users must name a mount point")
    if architecture is None:
        notes.append("no programs were found in the image: it can be used on any architecture")
    return Prepared(path, layer, config, raw, tuple(notes))


def upload_blobs(remote: Remote, repository: str, image: Prepared, progress: Progress) -> None:
    """Upload what the manifest names. Nobody sees an image before a manifest is pushed."""
    remote.push_blob(repository, image.path, image.layer, progress)
    remote.push_bytes(repository, image.config, CONFIG_TYPE)


def give_tag(
    remote: Remote,
    repository: str,
    tag: str,
    raw: bytes,
    media_type: str = MANIFEST_TYPE,
    *,
    force: bool = False,
) -> str:
    """Push a manifest under a tag that is free, its own or one that moves; return its digest. Raises `UsageError` for another image's."""
    check_free(remote, repository, tag, digest_of(raw), force)
    digest = remote.push_manifest(repository, tag, raw, media_type)
    check_kept(remote, repository, tag, digest)
    return digest


def push_image(
    remote: Remote,
    path: Path,
    target: Target,
    *,
    also_tags: Sequence[str] = (),
    architecture: str | None = None,
    force: bool = False,
    hashing: Progress,
    progress: Progress,
) -> Pushed:
    """Push a squashfs file: layer, config blob, manifest, and last the tags. Tags in ``build`` are never overwritten, not by ``force``.

    The manifest depends on the file only, so pushing one file twice changes nothing. Raises what `prepare_image` raises, `UsageError`
    if a tag belongs to another image (and not ``force``), and the remote's errors.
    """
    for tag in also_tags:
        check_tag(tag)
    image = prepare_image(path, target.repository, architecture=architecture, hashing=hashing)
    tags = dict.fromkeys([target.reference, *also_tags])
    for tag in tags:
        check_free(remote, target.repository, tag, image.digest, force)
    upload_blobs(remote, target.repository, image, progress)
    for tag in tags:
        remote.push_manifest(target.repository, tag, image.raw)
        check_kept(remote, target.repository, tag, image.digest)
    attach_blocks(remote, target.repository, image)
    return Pushed(image.digest, image.notes)


def attach_blocks(remote: Remote, repository: str, image: Prepared) -> None:
    """Attach the list of an image's blocks, by which nodes fetch only what an update changed; not to small ones, where that saves nothing."""
    if image.layer.size_bytes >= LEAST_BYTES:
        blocks = [Content("blocks", read_blocks(image.path).encode())]
        attach(remote, repository, image.digest, BLOCKS_TYPE, blocks, created=FIXED_DATE)


def move_tag(remote: Remote, target: Target, tag: str, *, force: bool = False) -> str:
    """Give the image at ``target`` one more tag, taking it from another image where that is allowed; return the digest."""
    check_tag(tag)
    manifest = remote.manifest(target.repository, target.reference)
    squashfs_layer(manifest)
    check_free(remote, target.repository, tag, manifest.digest, force)
    return remote.push_manifest(target.repository, tag, manifest.raw, manifest.media_type)


def describe(path: Path, progress: Progress) -> Descriptor:
    """Hash a file and return the descriptor of the layer that it becomes. Raises `UsageError`."""
    hasher, done = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            while piece := file.read(_HASH_BYTES):
                hasher.update(piece)
                done += len(piece)
                progress(done, size)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    return Descriptor(SQUASHFS_TYPE, f"sha256:{hasher.hexdigest()}", done, {TITLE: LAYER_TITLE})


def _check_architecture(repository: str, architecture: str | None) -> None:
    uarch = repository.split("/")[2]
    expected = ARCHITECTURES.get(uarch)
    if architecture is not None and expected is not None and architecture != expected:
        raise WrongArchitecture(
            f"the programs in the image are for {architecture}, but %{uarch} is {expected}",
            hint="correct the label, or say --architecture if most programs in the image are not its own",
        )


def check_free(remote: Remote, repository: str, tag: str, digest: str, force: bool) -> None:
    """Refuse a tag that is another image's. Raises `UsageError`."""
    if (force and namespace_of(repository) != BUILD) or tag in MOVING_TAGS:
        return
    try:
        there = remote.resolve(repository, tag)
    except NotFound:
        return
    if there != digest:
        raise UsageError(
            f"{repository}:{tag} is another image already ({there})",
            hint="a tag in build/ belongs to one pipeline for ever: choose a new one"
            if namespace_of(repository) == BUILD
            else "tags other than latest do not move: choose a new tag, or overwrite it with --force",
        )


def check_kept(remote: Remote, repository: str, tag: str, digest: str) -> None:
    """Raise `UsageError` if somebody else took the tag at the same moment: registries know no "only if it is free"."""
    if tag in MOVING_TAGS:
        return
    there = remote.resolve(repository, tag)
    if there != digest:
        raise UsageError(
            f"{repository}:{tag} was given to another image at the same moment ({there})",
            hint="somebody publishes under the same label; settle who is meant, and choose another tag",
        )


def namespace_of(repository: str) -> str:
    """Return the first part of a repository's name."""
    return repository.partition("/")[0]
