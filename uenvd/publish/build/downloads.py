"""Pinned files from the network: source code, and Debian packages that the mirrors have dropped.

Whatever a server says, a file counts only if its SHA-256 is the pinned one. Interface of the archive of everything that Debian ever published:
https://salsa.debian.org/snapshot-team/snapshot/raw/master/API
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final

from uenvd.errors import DigestMismatch
from uenvd.publish.recipe.lockfile import Package, SourceFile

SNAPSHOT_VARIABLE: Final = "UENVD_SNAPSHOT_URL"
MIRROR_VARIABLE: Final = "UENVD_DEBIAN_MIRROR"
_SNAPSHOT: Final = "https://snapshot.debian.org"
_MIRROR: Final = "https://deb.debian.org/debian"
_WAIT_S: Final = 60.0
"""For a connection, and for each piece."""
_ASK_S: Final = 20.0
"""For the archive's answer to a question: it is often not reachable from compute nodes."""
MAX_FILE_BYTES: Final = 8 << 30
_MAX_ANSWER_BYTES: Final = 8 << 20
_PIECE_BYTES: Final = 1 << 20


class NotThere(Exception):  # told to `fetch_from`, never to a user
    """One place does not have the file."""


def any_content(urls: Iterator[str], target: Path) -> None:
    """Fetch a file from the first place that has it, whatever is in it: only for pinning it. Raises `NotThere`."""
    reasons = []
    for url in urls:
        try:
            _save(url, target)
        except NotThere as error:
            reasons.append(f"  {error}")
        else:
            return
    raise NotThere("\n".join(reasons) or "  no place is known")


def download(url: str, target: Path, sha256: str) -> None:
    """Fetch a file and check it. Raises `NotThere`, `DigestMismatch` (the file is removed then)."""
    found = _save(url, target)
    if found != sha256:
        target.unlink()
        raise DigestMismatch(
            f"{url} is not what the recipe pins: sha256 {found}, expected {sha256}",
            hint="the source serves other bytes under the same name; look at both before you change the lock file",
        )


def _save(url: str, target: Path) -> str:
    """Fetch a file; return its SHA-256. Nothing is left of it when it fails."""
    total = hashlib.sha256()
    size_bytes = 0
    try:
        with _open(url, _WAIT_S) as response, target.open("wb") as file:
            while piece := response.read(_PIECE_BYTES):
                size_bytes += len(piece)
                if size_bytes > MAX_FILE_BYTES:
                    raise NotThere(f"{url}: is larger than {MAX_FILE_BYTES >> 30} GiB")
                total.update(piece)
                file.write(piece)
    except (OSError, HTTPException, ValueError) as error:
        target.unlink(missing_ok=True)
        raise NotThere(f"{url}: {_reason(error)}") from error
    except NotThere:
        target.unlink(missing_ok=True)
        raise
    return total.hexdigest()


def fetch_from(urls: Iterator[str] | Sequence[str], target: Path, sha256: str) -> list[str]:
    """Fetch a file from the first place that has it; return why the others had not. An empty list of places is no success.

    Raises `NotThere` with all reasons, `DigestMismatch` when a place had other bytes and no later one the right ones.
    """
    reasons: list[str] = []
    mismatch: DigestMismatch | None = None
    for url in urls:
        try:
            download(url, target, sha256)
        except NotThere as error:
            reasons.append(str(error))
        except DigestMismatch as error:
            mismatch = mismatch or error
            reasons.append(error.message)
        else:
            return reasons
    if mismatch is not None:
        raise mismatch
    raise NotThere("\n".join(f"  {reason}" for reason in reasons) or "  no place is known")


def places_of_deb(package: Package) -> Iterator[str]:
    """Yield where the archive of all Debian packages has one; raises `NotThere` when it cannot be asked or has none."""
    base = os.environ.get(SNAPSHOT_VARIABLE, _SNAPSHOT).rstrip("/")
    answer = _ask(f"{base}/mr/binary/{package.name}/{_quoted(package.version)}/binfiles")
    found = [
        str(one["hash"])
        for one in _results(answer)
        if one.get("architecture") in {package.architecture, None} and _is_hash(one.get("hash"))
    ]
    if not found:
        raise NotThere(f"{base}: has no {package.name} {package.version} for {package.architecture}")
    yield from (f"{base}/file/{sha1}" for sha1 in found)


def places_of_source(file: SourceFile) -> Iterator[str]:
    """Yield addresses of a source file: those in the lock file in order; for a Debian source package the mirror's pool, then the archive."""
    for place in file.places:
        if not place.startswith("debian:"):
            yield place
            continue
        name, _, version = place.removeprefix("debian:").partition("=")
        yield f"{os.environ.get(MIRROR_VARIABLE, _MIRROR).rstrip('/')}/{pool_path(name)}/{_quoted(file.file)}"
        try:
            yield from _archived_sources(name, version, file.file)
        except NotThere:
            continue


def pool_path(source: str) -> str:
    """Return the directory of a source package on a mirror (section main)."""
    return f"pool/main/{source[:4] if source.startswith('lib') else source[0]}/{source}"


def _archived_sources(name: str, version: str, file: str) -> Iterator[str]:
    base = os.environ.get(SNAPSHOT_VARIABLE, _SNAPSHOT).rstrip("/")
    answer = _ask(f"{base}/mr/package/{name}/{_quoted(version)}/srcfiles?fileinfo=1")
    about = answer.get("fileinfo")
    for sha1, known in (about if isinstance(about, dict) else {}).items():
        if (
            _is_hash(sha1)
            and isinstance(known, list)
            and any(isinstance(one, dict) and one.get("name") == file for one in known)
        ):
            yield f"{base}/file/{sha1}"


def _ask(url: str) -> dict[str, Any]:
    try:
        answer = json.loads(_read(url))
    except ValueError as error:
        raise NotThere(f"{url}: answers no JSON") from error
    if not isinstance(answer, dict):
        raise NotThere(f"{url}: answers something else")
    return answer


def _read(url: str) -> bytes:
    try:
        with _open(url, _ASK_S) as response:
            data: bytes = response.read(_MAX_ANSWER_BYTES)
    except (OSError, HTTPException, ValueError) as error:
        raise NotThere(f"{url}: {_reason(error)}") from error
    return data


def _open(url: str, timeout_s: float) -> Any:  # noqa: ANN401  # what urlopen returns depends on the scheme
    if not url.startswith(("https://", "http://", "file:///")):
        raise NotThere(f"{url}: is no address")
    return urllib.request.urlopen(url, timeout=timeout_s)  # noqa: S310  # the schemes were checked


def _results(answer: dict[str, Any]) -> list[dict[str, Any]]:
    found = answer.get("result")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _is_hash(value: object) -> bool:
    return (
        isinstance(value, str) and len(value) == 40 and all(letter in "0123456789abcdef" for letter in value)
    )


def _quoted(text: str) -> str:
    return urllib.parse.quote(text, safe="+~")


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"status {error.code}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__
