"""A built image into a registry, with all that is known of its build: for ``run`` of a recipe, of a plan's cell, and a user's own build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from uenvd.oci.attach import META_TYPE, attach, directory_content
from uenvd.oci.remote import Progress, Remote
from uenvd.publish.build import Built
from uenvd.publish.provenance import attach_evidence
from uenvd.publish.push import attach_blocks, check_free, give_tag, prepare_image, upload_blobs

META_TITLE: Final = "meta"


@dataclass(frozen=True)
class Published:
    """What was published."""

    digest: str
    """Of the manifest."""
    size_bytes: int
    """Of the squashfs file."""
    notes: tuple[str, ...]
    """Lines for the user."""


def publish_built(
    remote: Remote,
    repository: str,
    built: Built,
    tags: Sequence[str],
    *,
    hashing: Progress,
    pushing: Progress,
) -> Published:
    """Push an image: blobs, manifest by its digest only, metadata, bill of materials, provenance, log, block list, and last the tags.

    So who finds a tag finds everything, whenever this is killed. May be repeated: what is there is not sent again, and a last tag that is
    there says that everything is. Raises what `prepare_image`, `check_free` and `attach_evidence` raise, and the remote's errors.
    """
    image = prepare_image(built.image, repository, hashing=hashing)
    for tag in tags:
        check_free(remote, repository, tag, image.digest, False)
    upload_blobs(remote, repository, image, pushing)
    remote.push_manifest(repository, None, image.raw)
    attach(remote, repository, image.digest, META_TYPE, [directory_content(built.meta_dir, META_TITLE)])
    attach_evidence(
        remote, repository, image.digest, image=built.image, meta_dir=built.meta_dir, log=built.log
    )
    attach_blocks(remote, repository, image)
    for tag in tags:
        give_tag(remote, repository, tag, image.raw)
    return Published(image.digest, image.layer.size_bytes, image.notes)
