"""Why an image is built: which of its inputs are others than those of the image that is there, in a directory or in the registry."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from uenvd.errors import ManifestError, NotFound, UenvError
from uenvd.oci.attach import META_TYPE, attachments
from uenvd.oci.metadata import MAX_PACKED_BYTES, packed_texts
from uenvd.oci.remote import Remote
from uenvd.publish.build import Site, builder_of
from uenvd.publish.build.builder import LOCK
from uenvd.publish.build.inputlock import MAX_LOCK_BYTES, changes, inputs_of, parse_lock, read_lock
from uenvd.publish.recipe import Recipe

_MAX_ATTACHMENTS: Final = 4
_MAX_LINES: Final = 12
_MAX_IMAGES: Final = 8


def against_directory(
    recipe: Recipe, out_dir: Path, *, site: Site, environment: Mapping[str, str] | None = None
) -> list[str]:
    """Return why a build into a directory would make an image, a line for each reason; none if the image there would do.

    Raises `ResourceMissing`, where the builder's own program is not there.
    """
    now = inputs_of(recipe, builder_of(recipe), site, environment or {})
    old = read_lock(out_dir / f"{recipe.name}-{recipe.version}.meta" / LOCK)
    if old is None:
        return [f"{out_dir} has no image of {recipe.label} that says what it was built from"]
    if not (out_dir / f"{recipe.name}-{recipe.version}.squashfs").is_file():
        return [f"{out_dir} has only the metadata of an image of {recipe.label}"]
    return changes(old, now)


def against_image(
    recipe: Recipe,
    remote: Remote,
    repository: str,
    digest: str,
    *,
    site: Site,
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """Return why the image of a recipe would not be the one with this digest. Raises the registry's errors, `ResourceMissing`."""
    old = attached_lock(remote, repository, digest)
    if old is None:
        return [f"{repository}@{digest} does not say what it was built from"]
    return changes(old, inputs_of(recipe, builder_of(recipe), site, environment or {}))


def attached_lock(remote: Remote, repository: str, digest: str) -> dict[str, Any] | None:
    """Return the inputs of an image, from the metadata attached to it; None where it has none."""
    for manifest in attachments(remote, repository, digest, META_TYPE)[:_MAX_ATTACHMENTS]:
        for layer in manifest.layers[:_MAX_ATTACHMENTS]:
            if layer.size_bytes > MAX_PACKED_BYTES:
                continue
            try:
                packed = remote.small_blob(repository, layer, MAX_PACKED_BYTES)
                texts = packed_texts(packed, "meta/", MAX_LOCK_BYTES)
            except (ManifestError, NotFound):
                continue
            found = parse_lock(texts.get(LOCK, "").encode())
            if found is not None:
                return found
    return None


def why_not_there(
    recipe: Recipe, remote: Remote, repository: str, *, environment: Mapping[str, str] | None = None
) -> list[str]:
    """Return, for a pipeline's log, why none of a repository's images will do: how the nearest one differs. Never fails."""
    try:
        now = inputs_of(recipe, builder_of(recipe), Site.of(os.environ), environment or {})
        tags = [tag for tag in remote.tags(repository) if tag.startswith("content-")]
        locks = [
            attached_lock(remote, repository, remote.resolve(repository, tag)) for tag in tags[-_MAX_IMAGES:]
        ]
    except (NotFound, UenvError):
        return []
    found = [changes(lock, now) for lock in locks if lock is not None]
    if not found:
        return []
    nearest = min(found, key=len)
    more = [f"and {len(nearest) - _MAX_LINES} more"] if len(nearest) > _MAX_LINES else []
    return [*nearest[:_MAX_LINES], *more]
