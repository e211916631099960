"""Where a user's own images are, and what they are called: ``mine::name/version:tag``. Pure: texts in, texts out.

``uenvd-publish build DIR LABEL`` puts them there, `uenvctl` and the daemon (a source of this name, `uenvd.config`) find them there. The
names are those of a source: ``DIRECTORY/name/version/tag.squashfs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

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
    """Return the file of an own image; None for a label that is of another namespace, or says what no file can be asked for.

    ``directory`` is that of `images_directory`. The parts of a label hold no slash and do not begin with a dot.
    """
    if label.namespace != NAMESPACE or not directory or label.name is None or label.digest is not None:
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
