"""The index of a system: one small artifact that says what there is, because hosted registries have no usable catalogue.

``<namespace>/<system>/index:latest`` is a manifest of type `INDEX_ARTIFACT` with one JSON layer. (A repository called ``_index`` is no valid name:
components begin with a letter or digit.) A label is still resolved from its tag; the index tells which names there are. It can always be made
anew from the registry, so losing an update is a nuisance and not a loss; still, updates read, change, write, wait and read again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from uenvd.errors import LabelError, ManifestError, NotFound, RegistryError
from uenvd.oci.attach import now
from uenvd.oci.manifest import (
    CREATED,
    EMPTY_BLOB,
    EMPTY_TYPE,
    TITLE,
    build_artifact,
    load_object,
)
from uenvd.oci.optimistic import until_it_stays
from uenvd.oci.reference import is_digest, is_repository, is_tag, repository_of, split_repository
from uenvd.oci.remote import Remote

INDEX_ARTIFACT: Final = "application/vnd.uenvd.index"
INDEX_LAYER: Final = "application/vnd.uenvd.index.v1+json"
INDEX_NAME: Final = "index"
LATEST: Final = "latest"
INDEX_TAG: Final = LATEST
MAX_INDEX_BYTES: Final = 8 << 20
MAX_ENTRIES: Final = 20_000
MAX_TEXT: Final = 4096
VERDICTS: Final = frozenset({"passed", "waived", "untested"})


@dataclass(frozen=True)
class Entry:
    """One image: a digest in a repository, and its tags there."""

    repository: str
    """``namespace/system/uarch/name/version``."""
    digest: str
    """Of the manifest."""
    tags: tuple[str, ...]
    """Sorted; ``latest`` may be among them."""
    layer_digest: str
    size_bytes: int
    """Of the squashfs file."""
    date: str | None = None
    """RFC 3339: when it was built."""
    mount: str | None = None
    default_view: str | None = None
    views: tuple[tuple[str, str], ...] | None = None
    """(name, description); None where they are not known."""
    verdict: str = "untested"
    """One of `VERDICTS`."""
    remark: str | None = None
    """How many tests passed, or why they were waived."""
    deprecated: str | None = None
    """What users are told: why nobody should begin to use it, what to use instead, until when it stays. None for an image that may be used."""
    successor: str | None = None
    """The label to use instead of a deprecated image."""
    removal: str | None = None
    """``YYYY-MM-DD``: a deprecated image stays at least until then."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object; the parts of the label are spelt out for other readers."""
        parts = split_repository(self.repository) or ("", "", "", "", "")
        body: dict[str, Any] = {
            "name": parts[3],
            "version": parts[4],
            "uarch": parts[2],
            "tags": list(self.tags),
            "digest": self.digest,
            "layer": self.layer_digest,
            "size": self.size_bytes,
            "date": self.date,
            "mount": self.mount,
            "default_view": self.default_view,
            "views": None if self.views is None else [list(view) for view in self.views],
            "verdict": self.verdict,
            "remark": self.remark,
            "deprecated": self.deprecated,
            "successor": self.successor,
            "removal": self.removal,
        }
        return {key: value for key, value in body.items() if value is not None}


@dataclass(frozen=True)
class SystemIndex:
    """What a namespace of a system has."""

    namespace: str
    system: str
    entries: Mapping[tuple[str, str], Entry] = field(default_factory=dict)
    """(repository, digest) -> entry."""

    def encode(self) -> bytes:
        """Return the layer; equal indexes give equal bytes."""
        body = {
            "schema": 1,
            "namespace": self.namespace,
            "system": self.system,
            "images": [self.entries[key].to_json() for key in sorted(self.entries)],
        }
        return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()

    def with_repository(self, repository: str, entries: Iterable[Entry]) -> SystemIndex:
        """Return the index with all that one repository has replaced."""
        kept = {key: entry for key, entry in self.entries.items() if key[0] != repository}
        return replace(self, entries=kept | {(entry.repository, entry.digest): entry for entry in entries})

    def of_repository(self, repository: str) -> list[Entry]:
        """Return the images of one repository."""
        return self._by_repository.get(repository, [])

    def repositories(self) -> list[str]:
        """Return the repositories that have images, sorted."""
        return list(self._by_repository)

    @cached_property
    def _by_repository(self) -> dict[str, list[Entry]]:
        found: dict[str, list[Entry]] = {}
        for key in sorted(self.entries):
            found.setdefault(key[0], []).append(self.entries[key])
        return found


def index_repository(namespace: str, system: str) -> str:
    """Return where the index of a system is."""
    return f"{namespace}/{system}/{INDEX_NAME}"


def decode_index(raw: bytes, namespace: str, system: str) -> SystemIndex:
    """Check and convert an index. Raises `ManifestError`, also for that of another system."""
    body = load_object(raw, "the index")
    if body.get("schema") != 1:
        raise ManifestError("the index was written by a newer uenvd", hint="update uenvd on this machine")
    images = body.get("images")
    if (body.get("namespace"), body.get("system")) != (namespace, system) or not isinstance(images, list):
        raise ManifestError(f"the index is not that of {namespace}/{system}")
    if len(images) > MAX_ENTRIES:
        raise ManifestError(f"the index has {len(images)} images, more than {MAX_ENTRIES}")
    found = [_entry(image, namespace, system) for image in images]
    return SystemIndex(namespace, system, {(entry.repository, entry.digest): entry for entry in found})


def _entry(body: Any, namespace: str, system: str) -> Entry:  # noqa: ANN401 -- any JSON value
    try:
        repository = repository_of(namespace, system, body["uarch"], body["name"], body["version"])
        tags = tuple(sorted(body["tags"]))
        views = body.get("views")
        entry = Entry(
            repository,
            body["digest"],
            tags,
            body["layer"],
            body["size"],
            date=_text(body, "date"),
            mount=_text(body, "mount"),
            default_view=_text(body, "default_view"),
            views=None
            if views is None
            else tuple((str(name)[:256], str(text)[:MAX_TEXT]) for name, text in views),
            verdict=body.get("verdict", "untested"),
            remark=_text(body, "remark"),
            deprecated=_text(body, "deprecated"),
            successor=_text(body, "successor"),
            removal=_text(body, "removal"),
        )
        good = (
            is_repository(repository)
            and is_digest(entry.digest)
            and is_digest(entry.layer_digest)
            and all(map(is_tag, tags))
            and isinstance(entry.size_bytes, int)
            and 0 <= entry.size_bytes < 1 << 63
            and entry.verdict in VERDICTS
        )
    except (KeyError, TypeError, ValueError, AttributeError, LabelError) as error:
        raise ManifestError("the index has a malformed entry") from error
    if not good:
        raise ManifestError(f"the index has a malformed entry for {repository}")
    return entry


def _text(body: Mapping[str, Any], key: str) -> str | None:
    value = body.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise TypeError(key)
    return value


def read_index(remote: Remote, namespace: str, system: str) -> SystemIndex:
    """Return the index of a system. Raises `NotFound` where there is none yet, `ManifestError` for a malformed one."""
    repository = index_repository(namespace, system)
    manifest = remote.manifest(repository, INDEX_TAG)
    if manifest.artifact_type != INDEX_ARTIFACT or len(manifest.layers) != 1:
        raise ManifestError(f"{repository}:{INDEX_TAG} is no index of images")
    return decode_index(remote.small_blob(repository, manifest.layers[0], MAX_INDEX_BYTES), namespace, system)


def update_index(
    remote: Remote, namespace: str, system: str, change: Callable[[SystemIndex], SystemIndex]
) -> SystemIndex:
    """Apply a change to the index of a system, so that it stays in it whoever else writes; return what there is then.

    ``change`` is called once for each attempt, on what there is at that time; applied to its own result it must change nothing. A
    malformed index counts as none. Raises `RegistryError` where others overwrite it again and again.
    """
    repository = index_repository(namespace, system)
    wanted = SystemIndex(namespace, system)

    def step() -> bool:
        nonlocal wanted
        before = _present(remote, repository)
        try:
            there: SystemIndex | None = read_index(remote, namespace, system)
        except (NotFound, ManifestError):
            there = None
        wanted = change(there or SystemIndex(namespace, system))
        if wanted == there:
            return True
        _write(remote, repository, wanted, unless=lambda: _present(remote, repository) != before)
        return False

    if not until_it_stays(remote, f"{repository}:{INDEX_TAG}", step):
        raise RegistryError(
            f"the index {repository} is overwritten by others again and again",
            hint="when they have finished, make it anew: uenvd-publish reindex --system " + system,
        )
    return wanted


def _present(remote: Remote, repository: str) -> str | None:
    """Return the digest of the index that is there."""
    with suppress(NotFound):
        return remote.resolve(repository, INDEX_TAG)
    return None


def _write(
    remote: Remote, repository: str, index: SystemIndex, unless: Callable[[], bool] = lambda: False
) -> None:
    """Store an index; ``unless``, which is asked just before it gets its tag, another was stored meanwhile."""
    data = index.encode()
    if len(data) > MAX_INDEX_BYTES:
        raise RegistryError(
            f"the index {repository} would have {len(data)} bytes, more than {MAX_INDEX_BYTES}"
        )
    layer = replace(remote.push_bytes(repository, data, INDEX_LAYER), annotations={TITLE: "index.json"})
    remote.push_bytes(repository, EMPTY_BLOB, EMPTY_TYPE)
    if not unless():
        remote.push_manifest(repository, INDEX_TAG, build_artifact(INDEX_ARTIFACT, [layer], {CREATED: now()}))
