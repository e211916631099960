"""What is in an image, as a bill of materials: CycloneDX 1.6, JSON (ECMA-424), by the OWASP library.

Found in the squashfs file itself, which is neither mounted nor unpacked: distributions of Python (``*.dist-info/METADATA``), packages of Spack
(``.spack/spec.json``), of conda (``conda-meta/*.json``), and what the recipe in ``meta/recipe`` pins (Debian packages, source files). One
image always gives the same bytes.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.parser import HeaderParser
from pathlib import Path
from typing import Any, Final

from uenvd.publish.build.imagefile import entries, opened
from uenvd.publish.build.tree import Entry

SBOM_TYPE: Final = "uenv/sbom"
SBOM_MEDIA_TYPE: Final = "application/vnd.cyclonedx+json"
MAX_COMPONENTS: Final = 20_000
_MAX_FILE_BYTES: Final = 4 << 20
_NAMESPACE: Final = uuid.UUID("b7f0a5c2-7d0e-5e0c-9c0a-3f5b8a5f6f51")
_DIST_INFO = re.compile(r"(?:^|/)[^/]+\.dist-info/METADATA$")
_SPACK = re.compile(r"(?:^|/)\.spack/spec\.json$")
_CONDA = re.compile(r"(?:^|/)conda-meta/[^/]+\.json$")
_LOCK = re.compile(r"^meta/recipe/(?!toolchain\.lock$)[^/]+\.lock$")
"""Not the tool chain's: it compiles what is in the image, and is not in it."""
_SOURCE = re.compile(
    r"(?P<file>[A-Za-z0-9][^\s=]*)\s+sha256:(?P<sha256>[0-9a-f]{64})\s+(?P<place>\S+)(\s+\S+)*"
)
_DEBIAN_SOURCE = re.compile(r"debian:(?P<name>[^=\s]+)=(?P<version>\S+)")
_DEB = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9+.-]+)=(?P<version>\S+)\s+(?P<arch>[a-z0-9]+)\s+sha256:(?P<sha256>[0-9a-f]{64})"
)
_LICENSE_CHARS: Final = 200


@dataclass(frozen=True, order=True)
class Component:
    """One package in an image."""

    kind: str
    """Type of its package URL: ``pypi``, ``deb``, ``conda``, or ``generic`` for Spack's."""
    name: str
    version: str
    qualifiers: tuple[tuple[str, str], ...] = ()
    """Of the package URL."""
    license: str = field(default="", compare=False)
    """As the package says it, not checked."""
    sha256: str = field(default="", compare=False)
    """Of the file it came from, 64 hexadecimal digits; empty where that is not known."""


def components(image: Path) -> list[Component]:
    """Return the packages of an image, sorted, each once. Raises `UsageError`, `FormatError`."""
    found: dict[Component, Component] = {}
    with opened(image) as squashfs:
        for entry in entries(squashfs):
            if entry.kind != "file":
                continue
            for component in _components_of(entry):
                found.setdefault(component, component)
            if len(found) >= MAX_COMPONENTS:
                break
    return sorted(found.values())


def _components_of(entry: Entry) -> Iterator[Component]:
    reader = next(
        (read for pattern, read in _READERS if pattern.search(entry.path)),
        None,
    )
    if reader is None:
        return
    data = entry.read()[:_MAX_FILE_BYTES]
    try:
        yield from reader(data.decode(errors="replace"))
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return  # a damaged description describes nothing


def _python(text: str) -> Iterator[Component]:
    headers = HeaderParser().parsestr(text)
    name, version = headers.get("Name"), headers.get("Version")
    if name and version:
        shown = headers.get("License-Expression") or headers.get("License") or ""
        first = str(shown).strip().splitlines()
        yield Component(
            "pypi",
            re.sub(r"[-_.]+", "-", str(name)).lower(),
            str(version),
            license=first[0][:_LICENSE_CHARS] if len(first) == 1 else "",
        )


def _spack(text: str) -> Iterator[Component]:
    node = json.loads(text)["spec"]["nodes"][0]
    digest = str(node.get("hash", ""))
    yield Component(
        "generic", str(node["name"]), str(node["version"]), (("spack-hash", digest),) if digest else ()
    )


def _conda(text: str) -> Iterator[Component]:
    body = json.loads(text)
    sha256 = str(body.get("sha256") or "")
    yield Component(
        "conda",
        str(body["name"]),
        str(body["version"]),
        (("build", str(body["build"])),) if body.get("build") else (),
        license=str(body.get("license") or "")[:_LICENSE_CHARS],
        sha256=sha256 if re.fullmatch(r"[0-9a-f]{64}", sha256) else "",
    )


def _debian(text: str) -> Iterator[Component]:
    for line in text.splitlines():
        match = _DEB.fullmatch(line.strip())
        if match is not None:
            yield Component(
                "deb", match["name"], match["version"], (("arch", match["arch"]),), sha256=match["sha256"]
            )
        match = _SOURCE.fullmatch(line.strip())
        if match is not None:
            debian = _DEBIAN_SOURCE.fullmatch(match["place"])
            if debian is not None:
                yield Component(
                    "deb", debian["name"], debian["version"], (("arch", "source"),), sha256=match["sha256"]
                )
            else:
                where = (("download_url", match["place"]),)
                yield Component("generic", match["file"], "", where, sha256=match["sha256"])


_READERS: Final = ((_DIST_INFO, _python), (_SPACK, _spack), (_CONDA, _conda), (_LOCK, _debian))


def document(
    found: Iterable[Component], *, name: str, version: str, layer_digest: str, created: str | None = None
) -> bytes:
    """Return the bill of materials of an image.

    Args:
        found: what is in it.
        name: of the environment.
        version: of the environment.
        layer_digest: ``sha256:…`` of the squashfs file; makes the serial number.
        created: RFC 3339, when the image was made; None: the beginning of 1970, so that the bytes stay the same.

    """
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component as Part
    from cyclonedx.model.component import ComponentType
    from cyclonedx.model.license import DisjunctiveLicense
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    bom = Bom(serial_number=uuid.uuid5(_NAMESPACE, layer_digest))
    bom.metadata.timestamp = _time(created)
    bom.metadata.component = Part(
        type=ComponentType.CONTAINER,
        name=name,
        version=version,
        bom_ref=layer_digest,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=layer_digest.removeprefix("sha256:"))],
    )
    for one in found:
        namespace = "debian" if one.kind == "deb" else None
        url = PackageURL(one.kind, namespace, one.name, one.version or None, dict(one.qualifiers))
        bom.components.add(
            Part(
                type=ComponentType.LIBRARY,
                name=one.name,
                version=one.version,
                purl=url,
                bom_ref=url.to_string(),
                licenses=[DisjunctiveLicense(name=one.license)] if one.license else (),
                hashes=[HashType(alg=HashAlgorithm.SHA_256, content=one.sha256)] if one.sha256 else (),
            )
        )
    # There are no dependencies to tell, and the library's remark about that is no concern of the user's.
    bom.register_dependency(bom.metadata.component, list(bom.components))
    body: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _time(created: str | None) -> datetime:
    try:
        found = datetime.fromisoformat(created or "")
    except ValueError:
        return datetime.fromtimestamp(0, UTC)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
