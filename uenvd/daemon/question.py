"""What a request asks the catalogue for, and what it gets: a `Question` goes in, an `Image` comes out. No I/O."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from uenvd.daemon.access import Permit
from uenvd.daemon.peer import Identity
from uenvd.daemon.resolution import Found, Listed, Repository
from uenvd.errors import ManifestError, UenvError
from uenvd.oci.manifest import CREATED, Descriptor, ImageConfig, Manifest, parse_config, squashfs_layer
from uenvd.views import ImageMeta

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Image:
    """An image of the registry, known down to its layer."""

    found: Found
    manifest: Manifest
    layer: Descriptor
    raw_config: bytes | None
    """Our config blob as it was pushed; None for an image of a stock client."""
    config: ImageConfig | None
    attached: ImageMeta | None = None
    """Metadata that a stock client attached. Not pinned by the digest: what the image says itself goes before it."""


class Question:
    """One request's way through the catalogue: its deadline, whether it insists on fresh answers, what it must tell the user."""

    def __init__(self, deadline_s: float, refresh: bool) -> None:
        self.deadline_s = deadline_s
        """Absolute, on trio's clock."""
        self.refresh = refresh
        self.permit: Permit | None = None
        """What the user may do for whom it is asked; None: everything."""
        self.remembered_only = False
        """Answer from what is remembered, however old, or not at all; the registry is not asked."""
        self.oldest_s: float | None = None
        """Age of the oldest remembered answer that was used."""
        self._notes: list[str] = []
        self._stale: tuple[str, float] | None = None

    @property
    def owner(self) -> Identity | None:
        """For whom it is asked."""
        return self.permit.owner if self.permit is not None else None

    def permitted(self, repositories: Sequence[Repository]) -> list[Repository]:
        """Return the repositories that the user may use."""
        return [one for one in repositories if self.permit is None or self.permit.allows(one.label)]

    @property
    def notes(self) -> list[str]:
        """Lines for the user: at most one about the registry, however many of its answers were old ones."""
        if self._stale is None:
            return list(self._notes)
        why, age_s = self._stale
        return [*self._notes, f"{why}; using what it said {_ago(age_s)}"]

    def note(self, text: str) -> None:
        """Add a line for the user."""
        self._notes.append(text)

    def note_stale(self, error: UenvError, age_s: float) -> None:
        """Take note that an old answer was used, and why."""
        why, oldest_s = self._stale or (_first_line(error), age_s)
        self._stale = (why, max(oldest_s, age_s))


def make_image(found: Found, manifest: Manifest, raw_config: bytes | None) -> Image:
    """Put together what is known of an image. Raises `ManifestError` when it is no squashfs image."""
    config = None
    if raw_config is not None:
        try:
            config = _parsed_config(raw_config)
        except ManifestError as error:
            log.warning("the metadata of %s is unusable: %s", manifest.digest, error)
    return Image(found, manifest, squashfs_layer(manifest), raw_config, config)


@lru_cache(maxsize=64)
def _parsed_config(raw: bytes) -> ImageConfig | None:
    """Parse a config blob; a job's steps ask for the same one again and again, and it may hold thousands of digests."""
    return parse_config(raw)


def listed_image(image: Image) -> Listed:
    """Return what a list says of an image that is known down to its layer."""
    date = image.manifest.annotations.get(CREATED) or (image.config.created if image.config else None)
    return Listed(image.found, image.layer.digest, image.layer.size_bytes, date)


def _first_line(error: UenvError) -> str:
    return error.message.splitlines()[0] if error.message else error.code


def _ago(age_s: float) -> str:
    if age_s < 120:
        return f"{max(age_s, 0):.0f} s ago"
    if age_s < 7200:
        return f"{age_s / 60:.0f} min ago"
    return f"{age_s / 3600:.0f} h ago"
