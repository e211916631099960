"""Where a user's own images are, and what they are called: ``mine::name/version:tag``. Pure: texts in, texts out.

``uenvd-publish build DIR LABEL`` puts them there, `uenvctl` and the daemon (a source of this name, `uenvd.config`) find them there. The
names are those of a source: ``DIRECTORY/name/version/tag.squashfs``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from uenvd.errors import AmbiguousLabel, LabelError, UnknownLabel
from uenvd.label import Label

NAMESPACE: Final = "mine"
_HOME_SHARE: Final = ".local/share"
_STORE: Final = "uenv"
_IMAGES: Final = "images"
SOURCE: Final = f"%h/{_HOME_SHARE}/{_STORE}/{_IMAGES}"
"""The directory of images, as the daemon knows it: it sees nobody's environment."""
SUFFIX: Final = ".squashfs"
FACTS_SUFFIX: Final = ".json"
"""Beside an image: what the build knows of it (`Facts`), as JSON."""
MAX_FACTS_BYTES: Final = 64 << 10
_SHOWN: Final = 8


class Facts(NamedTuple):
    """What is known of an own image beside its bytes; None where it is not known."""

    digest: str | None = None
    """Of the manifest."""
    system: str | None = None
    uarch: str | None = None
    date: str | None = None
    """When it was built, RFC 3339."""
    verdict: str | None = None
    """``passed`` or ``untested``."""
    remark: str | None = None


def store_directory(environ: Mapping[str, str]) -> str:
    """Return the user's directory of own images with all that belongs to them, by ``$XDG_DATA_HOME`` or ``$HOME``; empty without both."""
    share = environ.get("XDG_DATA_HOME", "")
    if not share.startswith("/"):  # the specification: relative ones are ignored
        home = environ.get("HOME", "")
        share = f"{home.rstrip('/')}/{_HOME_SHARE}" if home.startswith("/") else ""
    return f"{share.rstrip('/')}/{_STORE}" if share else ""


def images_directory(environ: Mapping[str, str]) -> str:
    """Return the directory of the images' files; empty where there can be none."""
    store = store_directory(environ)
    return f"{store}/{_IMAGES}" if store else ""


def image_path(directory: str, label: Label) -> str | None:
    """Return the file that an own image has; None for a label that is of another namespace, or that names no file.

    ``directory`` is that of `images_directory`. The parts of a label hold no slash and do not begin with a dot.
    """
    if label.namespace != NAMESPACE:
        return None
    return file_of(directory, label)


def file_of(directory: str, label: Label) -> str | None:
    """Return the file below a source's directory that a label names; None for one that names no file, but may mean some."""
    if not directory or label.name is None or label.digest is not None:
        return None
    if label.version is None and label.tag is not None:
        return None
    parts = [part for part in (label.name, label.version, label.tag) if part is not None]
    return "/".join((directory, *parts)) + SUFFIX


def label_of(directory: str, path: str) -> Label | None:
    """Return the label of an image file below ``directory``; None for what is no such file."""
    begin = f"{directory}/"
    if not path.startswith(begin) or not path.endswith(SUFFIX):
        return None
    parts = path[len(begin) : -len(SUFFIX)].split("/")
    if not 2 <= len(parts) <= 3 or not all(parts) or any(part.startswith(".") for part in parts):
        return None
    return Label(parts[0], parts[1], parts[2] if len(parts) == 3 else None, namespace=NAMESPACE)


class OwnFile(NamedTuple):
    """An image file that there is. ``label`` is without a namespace."""

    label: Label
    identity: tuple[int, int]
    """Device and inode: a file may have several names."""


def need_file_label(wanted: Label) -> None:
    """Refuse a label that says what no file name can. Raises `LabelError`."""
    if wanted.name is None or wanted.system or wanted.uarch or wanted.digest:
        raise LabelError(
            f"'{wanted}' names no file of the source '{wanted.namespace}'",
            hint=f"name it {wanted.namespace}::NAME, NAME/VERSION or NAME/VERSION:TAG",
        )


def choose(wanted: Label, there: Sequence[OwnFile], names: Sequence[str], directory: str) -> Label:
    """Return the label of the one file that a label means, by the rule for labels of a registry.

    A version without a tag is its file without a tag, where there is one; else the only image of those that match.

    Args:
        wanted: as the user wrote it.
        there: the files of that name.
        names: which names there are, for the hint.
        directory: in which they are, for the message.

    Raises:
        UnknownLabel, AmbiguousLabel: none matches, or several images do.

    """
    asked = wanted._replace(namespace=None)
    found = [one for one in there if asked.matches(one.label)]
    if wanted.tag is None:
        plain = {one.label.version for one in found if one.label.tag is None}
        found = [one for one in found if one.label.tag is None or one.label.version not in plain]
    if not found:
        raise UnknownLabel(
            f"there is no {'own ' if wanted.namespace == NAMESPACE else ''}image {asked} in {directory}",
            hint=_suggestion(wanted, there, names),
        )
    if len({one.identity for one in found}) > 1:
        listed = "\n".join(f"  {one.label._replace(namespace=wanted.namespace)}" for one in sorted(found))
        raise AmbiguousLabel(
            f"'{wanted}' can mean {len(found)} images of {directory}:\n{listed}",
            hint="add the version or the :tag of the one you want",
        )
    return min(found, key=lambda one: (one.label.tag is not None, one.label)).label


def _suggestion(wanted: Label, there: Sequence[OwnFile], names: Sequence[str]) -> str:
    space = wanted.namespace
    same = sorted(str(one.label._replace(namespace=space)) for one in there)
    if same:
        first = f"there is: {', '.join(same[:_SHOWN])}{', ...' if len(same) > _SHOWN else ''}"
    else:
        import difflib  # only for an error

        near = difflib.get_close_matches(wanted.name or "", names, n=3)
        first = f"did you mean {' or '.join(f'{space}::{name}' for name in near)}?" if near else ""
    if space != NAMESPACE:
        return first
    known = wanted.version is not None
    build = f"build it: uenvd-publish build RECIPE {wanted._replace(namespace=None) if known else f'{wanted.name}/VERSION'}"
    return "; ".join(filter(None, [first, f"list them: uenvctl image ls {NAMESPACE}::", build]))
