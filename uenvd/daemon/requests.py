"""What a request names: descriptions turned into images, mount points and views. No I/O but that of the catalogue and of `ownfiles`."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from uenvd.config import Config
from uenvd.daemon import ownfiles
from uenvd.daemon.catalogue import Catalogue
from uenvd.daemon.question import Image, Question
from uenvd.errors import MountConflict, NoMetadata, UsageError, WrongArchitecture
from uenvd.label import Description, Label, ViewName, parse_descriptions, parse_views
from uenvd.views import EnvOp, ImageMeta, applied_key, select_views, view_ops, with_restore

NO_VIEWS: Final = "none"
"""The view list that opts out of default views. A view of this name has to be named with its image: ``uenv:none``."""


@dataclass(frozen=True)
class Wanted:
    """One image of a request: of the registry (``image``), or a file of the user's own (``path``)."""

    description: Description
    image: Image | None
    path: str | None

    @property
    def label(self) -> str:
        """What the user calls it: the full label, or the path."""
        return str(self.image.found.label._replace(namespace=None)) if self.image else str(self.path)

    @property
    def digest(self) -> str | None:
        """Digest of the manifest; None for a file."""
        return self.image.found.digest if self.image else None

    @property
    def meta(self) -> ImageMeta | None:
        """The metadata, as far as the registry tells."""
        return self.pinned_meta or (self.image.attached if self.image else None)

    @property
    def pinned_meta(self) -> ImageMeta | None:
        """The metadata that the digest vouches for."""
        return self.image.config.meta if self.image and self.image.config else None

    @property
    def mount(self) -> str | None:
        """Where it goes, as far as that is known."""
        return self.description.mount or (self.meta.mount if self.meta else None)

    @property
    def pinned(self) -> Description:
        """A description that means the same image for ever."""
        if self.image is None:
            # A label of a user's own source is kept: its path may hold what a description cannot.
            return Description(
                self.description.label, None if self.description.label else self.path, self.mount
            )
        found = self.image.found
        return Description(found.label._replace(digest=found.digest), None, self.mount)

    @property
    def view_label(self) -> Label | None:
        """The label that a ``uenv:view`` is compared with."""
        return self.image.found.label if self.image else self.description.label


async def look_up(
    catalogue: Catalogue, text: str, cwd: str | None, question: Question, *, for_elsewhere: bool = False
) -> list[Wanted]:
    """Find out what a description list means. ``for_elsewhere``: to other nodes, which may have directories that this one lacks.

    Raises what `Catalogue.resolve` and `ownfiles.find` raise, `LabelError`, `MountConflict`.
    """
    found = []
    for description in parse_descriptions(text):
        label = description.label
        if description.path is not None:
            found.append(Wanted(description, None, _absolute(description.path, cwd)))
        elif label is not None and label.namespace is not None and label.namespace in catalogue.sources:
            own = await ownfiles.find(
                catalogue.sources[label.namespace], label, question, elsewhere=for_elsewhere
            )
            found.append(Wanted(description._replace(label=own.label), None, _normal(own.path)))
        else:
            assert description.label is not None
            found.append(Wanted(description, await catalogue.resolve(description.label, question), None))
    _refuse_twins(found)
    return found


def _absolute(path: str, cwd: str | None) -> str:
    if not os.path.isabs(path) and (cwd is None or not os.path.isabs(cwd)):
        raise UsageError(
            f"'{path}' is relative, and the request does not say to what", hint="give an absolute path"
        )
    return _normal(os.path.join(cwd or "/", path))


def _normal(path: str) -> str:
    normal = os.path.normpath(path)
    return "/" + normal.lstrip("/") if normal.startswith("/") else normal  # normpath keeps "//x"


def _refuse_twins(images: Sequence[Wanted]) -> None:
    seen: dict[str, str] = {}
    for image in images:
        key = image.digest or image.label
        if key in seen:
            raise MountConflict(f"'{image.label}' and '{seen[key]}' are the same image", hint="name it once")
        seen[key] = image.label


def refuse_foreign(config: Config, images: Sequence[Wanted]) -> None:
    """Refuse images for another processor than this node's. Raises `WrongArchitecture`."""
    for wanted in images:
        if wanted.image is None:
            continue
        uarch = wanted.image.found.repository.label.uarch
        told = wanted.image.config.architecture if wanted.image.config else None
        architecture = told or config.architecture_of(uarch)
        if architecture is not None and architecture != config.machine:
            raise WrongArchitecture(
                f"'{wanted.label}' is built for {architecture} processors, this node has {config.machine}",
                hint="name an image for this node's processors (%uarch), or run on other nodes",
            )


def mount_points(
    images: Sequence[Wanted], metas: Sequence[ImageMeta | None], provisional: str | None
) -> list[str]:
    """Return where each image goes: as the user said, else as its metadata says, else ``provisional``.

    Raises `NoMetadata` when nothing says so, `MountConflict` for two images at one place.
    """
    points: list[str] = []
    for wanted, meta in zip(images, metas, strict=True):
        point = wanted.description.mount or (meta.mount if meta else None) or provisional
        if point is None:
            raise NoMetadata(f"'{wanted.label}' does not say where it is to be mounted")
        point = _normal(point)
        if point == "/" or not os.path.isabs(point):
            raise MountConflict(
                f"'{wanted.label}' cannot be mounted at '{point}'",
                hint="name an absolute directory other than /",
            )
        if point in points:
            raise MountConflict(
                f"'{wanted.label}' and '{images[points.index(point)].label}' both go to {point}",
                hint="name another mount point for one of them: LABEL:/mount/point",
            )
        points.append(point)
    return points


def is_listed(config: Config, mount_point: str) -> bool:
    """Tell whether the site allows every user to mount here: a listed directory, or one inside."""
    return any(mount_point == point or mount_point.startswith(point + "/") for point in config.mount_points)


def wanted_views(text: str | None) -> tuple[ViewName, ...] | None:
    """Parse the request's view list: empty where none is named, None for "not even default views". Raises `LabelError`."""
    if text is not None and text.strip() == NO_VIEWS:
        return None
    return parse_views(text) if text and text.strip() else ()


def environment(
    images: Sequence[Wanted], metas: Sequence[ImageMeta | None], views: Sequence[ViewName] | None
) -> tuple[list[EnvOp], str]:
    """Return the operations of the views (see `wanted_views`), and their key. Raises `UnknownView`."""
    labelled = [(wanted.view_label, meta) for wanted, meta in zip(images, metas, strict=True)]
    selected = [] if views is None else select_views(labelled, views, use_default=True)
    return with_restore(view_ops(selected)), applied_key(
        [wanted.digest or wanted.label for wanted in images], selected
    )
