"""Conversions that the sections of several builders share. All raise ValueError."""

from __future__ import annotations

import datetime
import re
from typing import Final

import yaml

from uenvd import yamlfile as y
from uenvd.publish.recipe.model import EPOCH_S

_UNITS: Final = {"M": 20, "G": 30, "T": 40}


def file_name(node: yaml.Node) -> str:
    """Convert the name of a file of the recipe."""
    value = y.text(node)
    if value.startswith("/") or ".." in value.split("/"):
        raise ValueError(f"{value!r} is no file of the recipe")
    return value


def date(node: yaml.Node) -> int:
    """Convert a day to the time stamp of its beginning, seconds since the epoch."""
    try:
        day = datetime.date.fromisoformat(y.text(node))
    except ValueError:
        raise ValueError(f"{node.value!r} is no day (for example 2026-11-01)") from None
    seconds = datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp()
    if not EPOCH_S <= seconds < 1 << 32:
        raise ValueError(f"{node.value!r} cannot be a time stamp in an image (from 1980-01-02 to 2106-02-06)")
    return int(seconds)


def sonames(node: yaml.Node) -> tuple[str, ...]:
    """Convert a list of names of libraries, with ``*``."""
    found = y.texts(node)
    for soname in found:
        if not re.fullmatch(r"lib[A-Za-z0-9_+.*-]*\.so[A-Za-z0-9_.*-]*", soname):
            raise ValueError(f"{soname!r} is no name of a library (for example libibverbs.so.*)")
    return found


def size(node: yaml.Node) -> int:
    """Convert a size, such as 500M or 8G, to bytes."""
    return bytes_of(y.text(node))


def bytes_of(text: str) -> int:
    """Convert a size, such as 500M or 8G, to bytes."""
    match = re.fullmatch(r"([1-9]\d{0,5})([MGT])", text)
    if match is None:
        raise ValueError(f"{text!r} is no size (for example 500M, 8G)")
    return int(match[1]) << _UNITS[match[2]]
