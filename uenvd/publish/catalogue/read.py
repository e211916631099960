"""Reads releases with all that the catalogue shows of them out of a registry. What cannot be read is left out, with a word."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from uenvd.errors import DigestMismatch, ManifestError, NotFound, RegistryDenied, RegistryError, ReportError
from uenvd.oci.attach import META_TYPE, REFRAME_TYPE, attachments
from uenvd.oci.index import INDEX_NAME, Entry
from uenvd.oci.manifest import CONFIG_TYPE, CREATED, MAX_CONFIG_BYTES, Manifest, load_object, parse_config
from uenvd.oci.metadata import MAX_PACKED_BYTES, find_packed, packed_texts
from uenvd.oci.reference import split_repository
from uenvd.oci.remote import Remote
from uenvd.packages import packages_of
from uenvd.publish.catalogue.model import Release
from uenvd.publish.performance import Figure, figures
from uenvd.publish.reframe.report import MAX_REPORT_BYTES, Verdict, judge
from uenvd.publish.releases import read_all
from uenvd.publish.sbom import SBOM_TYPE

MAX_SBOM_BYTES: Final = 32 << 20
MAX_PACKAGES: Final = 5_000
MAX_TEXT: Final = 4_000
_RECIPE: Final = "meta/recipe/"
_MAX_RECIPE_BYTES: Final = 1 << 20
_THREADS: Final = 8
_UNREADABLE: Final = (ManifestError, NotFound, RegistryError, DigestMismatch, ReportError)


def systems_of(remote: Remote, namespace: str) -> list[str]:
    """Return the systems of a namespace by the registry's own list. Raises `RegistryError`, `RegistryDenied` where it has none."""
    found = set()
    for name in remote.repositories(f"{namespace}/"):
        parts = name.split("/")
        if split_repository(name) is not None or (len(parts) == 3 and parts[2] == INDEX_NAME):
            found.add(parts[1])
    return sorted(found)


def read_releases(
    remote: Remote, namespace: str, systems: Sequence[str], say: Callable[[str], None]
) -> list[Release]:
    """Return the tagged images of systems, each with what is attached to it; several are read at once. Raises the remote's errors."""
    entries: list[Entry] = []
    for system in systems:
        try:
            entries += read_all(remote, namespace, system, say).entries.values()
        except (NotFound, RegistryError, RegistryDenied) as error:
            say(f"note: {namespace}/{system} is left out: {error.message}")
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(
            pool.map(lambda entry: read_release(remote, entry, say), [one for one in entries if one.tags])
        )


def read_release(remote: Remote, entry: Entry, say: Callable[[str], None]) -> Release:
    """Return one image with what is attached to it."""

    def attempt(what: str, read: Callable[[], Any], otherwise: Any) -> Any:  # noqa: ANN401 - whatever `read` returns
        try:
            return read()
        except _UNREADABLE as error:
            say(f"note: {what} of {entry.repository}@{entry.digest[:19]} cannot be read: {error.message}")
            return otherwise

    repository = entry.repository
    found: list[Manifest] = attempt(
        "what is attached", lambda: attachments(remote, repository, entry.digest), []
    )
    described, architecture = attempt("the metadata", lambda: _described(remote, entry), ("", None))
    metas = [one for one in found if one.artifact_type == META_TYPE]
    reports = [one for one in found if one.artifact_type == REFRAME_TYPE]
    bills = [one for one in found if one.artifact_type == SBOM_TYPE]
    packages: dict[str, str] = {}
    if bills:
        packages = attempt("the bill of materials", lambda: _bill(remote, repository, bills[0]), {})
    if metas:
        text, recipe = attempt("the directory meta", lambda: _meta(remote, repository, metas[0]), ("", {}))
        described = described or text
        packages = packages or recipe
    verdict: Verdict | None = None
    measured: tuple[Figure, ...] = ()
    if reports:
        verdict, measured = attempt("the report", lambda: _report(remote, repository, reports[0]), (None, ()))
    return Release(
        entry,
        described[:MAX_TEXT],
        architecture,
        tuple(sorted(packages.items())[:MAX_PACKAGES]),
        verdict,
        reports[0].annotations.get(CREATED) if reports else None,
        measured,
        tuple(sorted({one.artifact_type for one in found if one.artifact_type})),
    )


def _described(remote: Remote, entry: Entry) -> tuple[str, str | None]:
    """Return (description, architecture) from our config blob; the digest pins both."""
    manifest = remote.manifest(entry.repository, entry.digest)
    if manifest.config.media_type != CONFIG_TYPE:
        return "", None
    config = parse_config(remote.small_blob(entry.repository, manifest.config, MAX_CONFIG_BYTES))
    if config is None:
        return "", None
    return (config.meta.description if config.meta else ""), config.architecture


def _meta(remote: Remote, repository: str, manifest: Manifest) -> tuple[str, dict[str, str]]:
    """Return (description, packages) from the attached directory ``meta``."""
    for layer in manifest.layers[:1]:
        packed = remote.small_blob(repository, layer, MAX_PACKED_BYTES)
        raw = find_packed(packed, "meta/env.json")
        text = load_object(raw, "env.json").get("description") if raw else ""
        recipe = packages_of(packed_texts(packed, _RECIPE, _MAX_RECIPE_BYTES))
        return (text if isinstance(text, str) else ""), recipe
    return "", {}


def _bill(remote: Remote, repository: str, manifest: Manifest) -> dict[str, str]:
    """Return name -> version of the components of a CycloneDX document."""
    for layer in manifest.layers[:1]:
        body = load_object(remote.small_blob(repository, layer, MAX_SBOM_BYTES), "the bill of materials")
        return dict(_components(body.get("components")))
    return {}


def _components(listed: object) -> Iterable[tuple[str, str]]:
    for one in listed if isinstance(listed, list) else []:
        if isinstance(one, dict) and isinstance(one.get("name"), str):
            version = one.get("version")
            yield one["name"][:256], version[:256] if isinstance(version, str) else ""


def _report(remote: Remote, repository: str, manifest: Manifest) -> tuple[Verdict | None, tuple[Figure, ...]]:
    for layer in manifest.layers:
        title = layer.annotations.get("org.opencontainers.image.title", "")
        if title.endswith(".json") or layer.media_type.endswith(("/json", "+json")):
            raw = remote.small_blob(repository, layer, MAX_REPORT_BYTES)
            return judge(raw), tuple(figures(raw))
    return None, ()
