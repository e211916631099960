"""What a system has, as entries of its index: read from the registry, kept up to date in it. Library of deploy, reindex, list and show."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from uenvd.errors import DeployRefused, ManifestError, NotFound, RegistryDenied, RegistryError
from uenvd.oci import index as indexes
from uenvd.oci.attach import WAIVER_TYPE, attached_meta, attachments, protect
from uenvd.oci.index import Entry, SystemIndex, update_index
from uenvd.oci.manifest import (
    CONFIG_TYPE,
    CREATED,
    MAX_CONFIG_BYTES,
    ImageConfig,
    Manifest,
    load_object,
    parse_config,
    squashfs_layer,
)
from uenvd.oci.reference import split_repository
from uenvd.oci.remote import Remote
from uenvd.publish.gate import check_tested
from uenvd.publish.options import BUILD

DEPRECATION_TYPE: Final = "uenv/deprecation"
"""Why an image should not be used any more: JSON ``{"reason": text or null, "date": "YYYY-MM-DD", "successor": label}``; the newest one counts."""
MAX_NOTE_BYTES: Final = 64 << 10
_MAX_LABEL_CHARS: Final = 400
_DATE = re.compile(r"\d{4}-\d\d-\d\d")


def note_json(reason: str | None) -> bytes:
    """Return the content of a waiver or deprecation."""
    return json.dumps({"reason": reason}).encode()


@dataclass(frozen=True)
class Deprecation:
    """Why an image should not be used any more."""

    reason: str
    date: str | None = None
    """``YYYY-MM-DD``: it stays at least until then."""
    successor: str | None = None
    """The label of what to use instead."""

    def __str__(self) -> str:
        """Return the whole of what users are told; old daemons, which know nothing of the fields, show it too."""
        text = self.reason
        if self.successor:
            text += f"; use {self.successor} instead"
        if self.date:
            text += f"; it may be removed from {self.date} on"
        return text[: indexes.MAX_TEXT]

    def encode(self) -> bytes:
        """Return the content of the attachment."""
        body = {"reason": self.reason, "date": self.date, "successor": self.successor}
        return json.dumps({key: value for key, value in body.items() if value}, sort_keys=True).encode()


def read_deprecation(remote: Remote, repository: str, digest: str) -> Deprecation | None:
    """Return what the newest deprecation of an image says; None without one, or where it was taken back."""
    body = _newest_note(remote, repository, digest, DEPRECATION_TYPE)
    reason, date, successor = (body.get(key) for key in ("reason", "date", "successor"))
    if not isinstance(reason, str):
        return None
    good = isinstance(date, str) and _DATE.fullmatch(date)
    return Deprecation(
        reason[: indexes.MAX_TEXT],
        date if good else None,
        successor[:_MAX_LABEL_CHARS] if isinstance(successor, str) and successor.isprintable() else None,
    )


def read_note(remote: Remote, repository: str, digest: str, artifact_type: str) -> str | None:
    """Return the reason in the newest waiver or deprecation of an image; None without one."""
    reason = _newest_note(remote, repository, digest, artifact_type).get("reason")
    return reason[: indexes.MAX_TEXT] if isinstance(reason, str) else None


def _newest_note(remote: Remote, repository: str, digest: str, artifact_type: str) -> dict[str, Any]:
    for manifest in attachments(remote, repository, digest, artifact_type)[:1]:
        try:
            return load_object(remote.small_blob(repository, manifest.layers[0], MAX_NOTE_BYTES), "the note")
        except (IndexError, ManifestError, RegistryError):
            continue
    return {}


def describe(remote: Remote, repository: str, digest: str, tags: Iterable[str]) -> Entry:
    """Make the entry of one image. Raises `ManifestError` for what is none, and the remote's errors."""
    manifest = remote.manifest(repository, digest)
    layer = squashfs_layer(manifest)
    config = _config(remote, repository, manifest)
    meta = (config.meta if config else None) or attached_meta(remote, repository, digest)
    verdict, remark = verdict_of(remote, repository, digest)
    deprecation = read_deprecation(remote, repository, digest)
    return Entry(
        repository,
        digest,
        tuple(sorted(tags)),
        layer.digest,
        layer.size_bytes,
        date=(config.created if config else None) or manifest.annotations.get(CREATED),
        mount=meta.mount if meta else None,
        default_view=meta.default_view if meta else None,
        views=tuple((view.name, view.description) for view in meta.views) if meta else None,
        verdict=verdict,
        remark=remark,
        deprecated=str(deprecation) if deprecation else None,
        successor=deprecation.successor if deprecation else None,
        removal=deprecation.date if deprecation else None,
    )


def verdict_of(remote: Remote, repository: str, digest: str) -> tuple[str, str | None]:
    """Return (verdict, remark) of an image, by what is attached to it."""
    try:
        gate = check_tested(remote, repository, digest, read_note(remote, repository, digest, WAIVER_TYPE))
    except DeployRefused as error:
        return "untested", error.message.splitlines()[0][: indexes.MAX_TEXT]
    return gate.verdict, gate.remark[: indexes.MAX_TEXT]


def _config(remote: Remote, repository: str, manifest: Manifest) -> ImageConfig | None:
    if manifest.config.media_type != CONFIG_TYPE:
        return None
    try:
        return parse_config(remote.small_blob(repository, manifest.config, MAX_CONFIG_BYTES))
    except ManifestError:
        return None


class Reader:
    """Entries of repositories, each image described once; what an index says already is taken from there."""

    def __init__(self, remote: Remote, say: Callable[[str], None], fresh: Iterable[str] = ()) -> None:
        """``fresh``: digests that are described anew whatever an index says of them."""
        self._remote = remote
        self._say = say
        self._fresh = set(fresh)
        self._known: dict[tuple[str, str], Entry | None] = {}

    def entries(self, repository: str, index: SystemIndex) -> list[Entry]:
        """Return the images of a repository, as its tags are at this moment. What is no image is left out, with a word."""
        by_digest: dict[str, list[str]] = {}
        for tag in self._remote.tags(repository):
            try:
                by_digest.setdefault(self._remote.resolve(repository, tag), []).append(tag)
            except NotFound:
                continue
        found = []
        for digest, tags in by_digest.items():
            entry = None if digest in self._fresh else index.entries.get((repository, digest))
            entry = entry or self._describe(repository, digest)
            if entry is not None:
                found.append(replace(entry, tags=tuple(sorted(tags))))
        return found

    def _describe(self, repository: str, digest: str) -> Entry | None:
        key = (repository, digest)
        if key not in self._known:
            try:
                self._known[key] = describe(self._remote, repository, digest, ())
            except (ManifestError, NotFound) as error:
                self._say(f"note: {repository}@{digest[:19]} is left out: {error.message}")
                self._known[key] = None
        return self._known[key]


def refresh_repository(
    remote: Remote,
    repository: str,
    say: Callable[[str], None],
    *,
    fresh: Iterable[str] = (),
    create: bool = True,
) -> SystemIndex | None:
    """Bring what the index says of one repository up to date; describe ``fresh`` digests anew.

    Without an index one is made of all that the registry has, as far as it lists its repositories; with ``create`` false nothing is
    done then, and None returned.
    """
    parts = split_repository(repository)
    if parts is None or parts[0] == BUILD:
        return None
    namespace, system = parts[0], parts[1]
    try:
        indexes.read_index(remote, namespace, system)
    except (NotFound, ManifestError, RegistryDenied):
        # Some registries deny what is not there.
        if not create:
            return None
        return reindex(remote, namespace, system, say, also=[repository])
    reader = Reader(remote, say, fresh)
    return update_index(
        remote,
        namespace,
        system,
        lambda there: there.with_repository(repository, reader.entries(repository, there)),
    )


def reindex(
    remote: Remote, namespace: str, system: str, say: Callable[[str], None], *, also: Iterable[str] = ()
) -> SystemIndex:
    """Make the index of a system anew: of every repository that the registry or the present index names, and ``also``.

    What stock clients attached gets the tags that keep it from a clean-up.
    """
    reader = Reader(remote, say)
    repositories = set(also)
    try:
        repositories |= set(list_repositories(remote, namespace, system))
    except (RegistryError, RegistryDenied) as error:
        say(f"note: {error.message}; only repositories that are known already are looked at")

    def change(there: SystemIndex) -> SystemIndex:
        fresh = SystemIndex(namespace, system)
        for repository in sorted(repositories | set(there.repositories())):
            fresh = fresh.with_repository(repository, reader.entries(repository, fresh))
        return fresh

    index = update_index(remote, namespace, system, change)
    for repository, digest in index.entries:
        protect(remote, repository, digest)
    return index


def list_repositories(remote: Remote, namespace: str, system: str) -> list[str]:
    """Return the repositories of images by the registry's own list. Raises `RegistryError`, `RegistryDenied` where it has none."""
    return [
        name for name in remote.repositories(f"{namespace}/{system}/") if split_repository(name) is not None
    ]


def read_all(remote: Remote, namespace: str, system: str, say: Callable[[str], None]) -> SystemIndex:
    """Return what a system has: its index, or without one all that the registry lists."""
    try:
        return indexes.read_index(remote, namespace, system)
    except (NotFound, ManifestError) as error:
        if isinstance(error, ManifestError):
            say(f"note: {error.message}; the registry is read instead")
    reader = Reader(remote, say)
    found = SystemIndex(namespace, system)
    for repository in list_repositories(remote, namespace, system):
        found = found.with_repository(repository, reader.entries(repository, found))
    return found
