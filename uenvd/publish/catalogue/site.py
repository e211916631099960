"""The pages of the catalogue, from the templates in ``templates/``.

Everything that a registry says is hostile text: the templates escape it, characters that are not printable are dropped, commands quote it, and
each page forbids by its content security policy every script and style but the two that we wrote, by their hashes, and every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

import jinja2
from markupsafe import Markup

from uenvd.errors import StorageError, UsageError
from uenvd.oci.files import write_atomically
from uenvd.publish.catalogue.model import Environment, printable
from uenvd.publish.catalogue.plots import legend_mark, number_text, plot
from uenvd.publish.performance import Change

INDEX: Final = "index.html"
LISTING: Final = "catalogue.json"
"""Names every page: what a later run may delete."""
_PAGE = re.compile(r"[a-z0-9][a-z0-9._-]*\.html")
_PACKAGES_SHOWN: Final = 25
_SEARCHED_PACKAGES: Final = 400


@dataclass(frozen=True)
class _Inline:
    """A script or style as it stands in each page, and its hash for the policy."""

    text: str

    @property
    def source(self) -> str:
        digest = hashlib.sha256(self.text.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"


def write_site(out: Path, title: str, environments: Sequence[Environment]) -> Path:
    """Write all pages into a directory; return the first one's path. Equal environments give equal files.

    Pages of a former catalogue that are not written again are deleted. Raises `UsageError` for a directory that holds something else,
    `StorageError`.
    """
    pages = render_site(title, environments)
    try:
        out.mkdir(parents=True, exist_ok=True)
        former = _former(out)
        for name, text in pages.items():
            write_atomically(out / name, text.encode())
            (out / name).chmod(0o644)
        for name in former - pages.keys():
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{out} cannot be written: {error.strerror}", hint="name another directory"
        ) from error
    return out / INDEX


def render_site(title: str, environments: Sequence[Environment]) -> dict[str, str]:
    """Return file name -> content of all pages. An environment called ``index`` would take the first page's name: it gets another."""
    jinja = _jinja()
    names = {one.name: one.page if one.page != INDEX else "index-.html" for one in environments}
    jinja.globals["page_of"] = names.get
    common = {"title": printable(title), "environments": environments}
    pages = {INDEX: jinja.get_template("index.html.j2").render(common, here="")}
    for one in environments:
        pages[names[one.name]] = jinja.get_template("environment.html.j2").render(
            common, env=one, here=one.name
        )
    listing = {"pages": sorted(pages), "environments": [_facts(one, names[one.name]) for one in environments]}
    pages[LISTING] = json.dumps(listing, indent=1, sort_keys=True) + "\n"
    return pages


def _facts(one: Environment, page: str) -> dict[str, Any]:
    releases = [
        {"label": release.label, "target": release.target, "digest": release.entry.digest}
        for release in one.releases
    ]
    return {"name": one.name, "page": page, "releases": releases}


def _former(out: Path) -> set[str]:
    """Return the pages of the catalogue that is in a directory. Raises `UsageError` if something else is."""
    if not any(out.iterdir()):
        return set()
    try:
        listed = json.loads((out / LISTING).read_bytes())["pages"]
        return {name for name in listed if isinstance(name, str) and _PAGE.fullmatch(name)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{out} is not empty and holds no catalogue",
            hint="name a new directory: its pages are overwritten and deleted",
        ) from error


def _jinja() -> jinja2.Environment:
    jinja = jinja2.Environment(
        loader=jinja2.PackageLoader("uenvd.publish.catalogue"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
    )
    files = resources.files("uenvd.publish.catalogue") / "templates"
    jinja.globals |= {
        "style": _Inline((files / "style.css").read_text()),
        "script": _Inline((files / "search.js").read_text()),
        "plot": plot,
        "legend_mark": legend_mark,
        "packages_shown": _PACKAGES_SHOWN,
        "change_of": change_of,
        "search_packages": search_packages,
    }
    jinja.filters |= {"number": number_text, "size": size_text, "short": short_digest}
    return jinja


def search_packages(environment: Environment) -> str:
    """Return the packages of the latest release for the search, ``name version|name version``."""
    listed = environment.latest.packages[:_SEARCHED_PACKAGES]
    return "|".join(f"{name} {version}".strip().replace("|", "/") for name, version in listed)


def change_of(change: Change | None) -> tuple[str, str]:
    """Return (class, words) for what became of a figure."""
    if change is None or change.before.value == 0:
        return ("", "")
    percent = (change.ratio - 1) * 100
    words = f"{percent:+.1f} %"
    better = change.after.better
    if abs(percent) < 1 or better == "unknown":
        return ("same", words)
    if (percent > 0) == (better == "higher"):
        return ("good", f"{words}, better")
    return ("bad", f"{words}, much worse") if change.worse else ("same", f"{words}, worse")


def size_text(size_bytes: int) -> str:
    """Return a size for people: decimal units, as disks and networks count."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def short_digest(digest: str) -> str:
    """Return the first twelve digits of a digest."""
    return digest.removeprefix("sha256:")[:12]
