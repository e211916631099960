"""What a recipe says that an image holds: names and versions, out of the texts of ``meta/recipe``. Pure.

A recipe is of two kinds. Stackinator's ``environments.yaml`` lists what was asked for (``hdf5@1.14 +mpi``, often without a version); lock files
list what was installed (``numpy==2.4.6``), and go before it. Only what is needed of the formats is understood, line by line: the texts come
from whoever may write to the registry.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

MAX_PACKAGES = 10_000

_SPEC = re.compile(r"([A-Za-z0-9][\w.-]*)(?:@=?([\w.:,+-]+?))?(?=[\s%+~^/]|$)")
_PIP = re.compile(r"([A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?==([^\s;#]+)")
_DEB = re.compile(r"([a-z0-9][a-z0-9+.-]*)=([^\s=]\S*)\s+\S+\s+sha256:[0-9a-f]{64}\s*\Z")
_LISTS = frozenset({"specs", "packages"})


def packages_of(files: Mapping[str, str]) -> dict[str, str]:
    """Return name -> version ("" where the recipe does not say) from the files of a recipe."""
    asked: dict[str, str] = {}
    installed: dict[str, str] = {}
    for name in sorted(files):
        base = name.rpartition("/")[2]
        if base in ("environments.yaml", "compilers.yaml"):
            asked.update(_specs(files[name].splitlines()))
        elif base.endswith((".lock", ".txt")):
            installed.update(_locked(files[name].splitlines()))
    found = asked | installed
    return dict(sorted(found.items())[:MAX_PACKAGES])


def _locked(lines: Iterable[str]) -> Iterable[tuple[str, str]]:
    for line in lines:
        match = _PIP.match(line.strip()) or _DEB.match(line.strip())
        if match is not None:
            yield match[1].lower().replace("_", "-"), match[2]


def _specs(lines: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Yield what the lists ``specs:`` and ``packages:`` and the keys ``spec:`` of a YAML text hold."""
    depth: int | None = None  # of the key whose list is being read
    for raw in lines:
        line = raw.split(" #", 1)[0].rstrip()
        text = line.lstrip(" ")
        indent = len(line) - len(text)
        if not text or text.startswith("#"):
            continue
        if depth is not None and text.startswith("- ") and indent >= depth:
            yield from _spec(text[2:])
            continue
        depth = None
        key, colon, value = text.removeprefix("- ").partition(":")
        if not colon:
            continue
        if key in _LISTS and value.strip().startswith("["):
            for part in value.strip().strip("[]").split(","):
                yield from _spec(part)
        elif key in _LISTS and not value.strip():
            depth = indent
        elif key == "spec":
            yield from _spec(value)


def _spec(text: str) -> Iterable[tuple[str, str]]:
    text = text.strip().strip("'\"").strip()
    match = _PIP.match(text) or _SPEC.match(text)
    if match is not None:
        yield match[1].lower(), (match[2] or "").strip(",:")
