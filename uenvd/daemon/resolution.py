"""What a label means, given what the registry has. Pure: tags in, one image (or an error with the table) out.

The rule: no tag -> ``latest`` if there, else the only digest, else the table of candidates. Never what happens to be cached.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from uenvd.errors import AmbiguousLabel, LabelError, UnknownLabel
from uenvd.label import Label
from uenvd.oci.index import SystemIndex
from uenvd.oci.reference import is_fallback_tag, split_repository

LATEST = "latest"


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository that holds one version of an environment for one microarchitecture."""

    path: str
    label: Label
    """All fields but tag and digest."""

    @classmethod
    def parse(cls, path: str) -> Repository | None:
        """Read the five parts of ``namespace/system/uarch/name/version``; None for a repository of another kind."""
        parts = split_repository(path)
        if parts is None:
            return None
        namespace, system, uarch, name, version = parts
        return cls(path, Label(name=name, version=version, system=system, uarch=uarch, namespace=namespace))


@dataclass(frozen=True, slots=True)
class Found:
    """One tag of one repository, or a digest in it."""

    repository: Repository
    tag: str | None
    digest: str

    @property
    def label(self) -> Label:
        """The full label, without the digest."""
        return self.repository.label._replace(tag=self.tag)


@dataclass(frozen=True, slots=True)
class Listed:
    """One tag of an image, as a list knows it: by the index, or by its manifest."""

    found: Found
    layer_digest: str
    size_bytes: int
    date: str | None
    """RFC 3339."""
    deprecated: str | None = None
    """Why it should not be used any more."""


def listed(wanted: Label, index: SystemIndex) -> list[Listed]:
    """Return the tagged images of an index that a label with any fields missing may mean; the name is a prefix."""
    rows = []
    for repository in matching(wanted, index.repositories(), name_prefix=True):
        for entry in index.of_repository(repository.path):
            if wanted.digest in {None, entry.digest}:
                rows += [
                    Listed(
                        Found(repository, tag, entry.digest),
                        entry.layer_digest,
                        entry.size_bytes,
                        entry.date,
                        entry.deprecated,
                    )
                    for tag in image_tags(entry.tags)
                    if wanted.tag in {None, tag}
                ]
    return sorted(rows, key=lambda row: (row.found.repository.path, row.found.tag or ""))


def matching(wanted: Label, repositories: Iterable[str], *, name_prefix: bool = False) -> list[Repository]:
    """Return the repositories that a label may mean, in a stable order."""
    without_tag = wanted._replace(tag=None, digest=None)
    parsed = (Repository.parse(path) for path in repositories)
    found = [
        repo
        for repo in parsed
        if repo is not None and without_tag.matches(repo.label, name_prefix=name_prefix)
    ]
    return sorted(found, key=lambda repo: repo.path)


def image_tags(tags: Iterable[str]) -> list[str]:
    """Drop the tags that are no images: those under which attachments are found."""
    return sorted(tag for tag in tags if not is_fallback_tag(tag))


def tags_to_ask(wanted: Label, tags: Sequence[str]) -> list[str]:
    """Return the tags of a repository whose digests decide."""
    if wanted.tag is not None:
        return [wanted.tag] if wanted.tag in tags else []
    return [LATEST] if LATEST in tags else list(tags)


def choose(wanted: Label, found: Sequence[Found], known: Mapping[str, Sequence[str]]) -> Found:
    """Return the one image that a label means.

    ``wanted`` is the label as the user wrote it, ``known`` (repository -> tags) what there is under other names, for the hint.
    Raises `UnknownLabel`, `AmbiguousLabel`.
    """
    digests = {one.digest for one in found}
    if len(digests) > 1:
        raise AmbiguousLabel(f"'{wanted}' can mean {len(digests)} different images:\n{table(found)}")
    if digests:
        # Several tags of one digest: the label as the user wrote it is the best name for it.
        return min(found, key=lambda one: (one.tag == LATEST, one.label))
    raise UnknownLabel(f"no image is called '{wanted}'", hint=_suggestion(wanted, known))


def need_name(wanted: Label) -> None:
    """Raises `LabelError` for a label that no image can be chosen by."""
    if wanted.name is None:
        raise LabelError(f"'{wanted}' names no environment", hint="begin with a name: name/version:tag")


def table(found: Iterable[Found]) -> str:
    """Return an aligned table of candidates, newest text order last, each line indented."""
    rows = [("uenv", "system", "uarch", "digest")]
    for one in sorted(found, key=lambda one: one.label):
        label = one.label
        plain = Label(name=label.name, version=label.version, tag=label.tag)
        rows.append((str(plain), f"@{label.system}", f"%{label.uarch}", one.digest[:19]))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _suggestion(wanted: Label, known: Mapping[str, Sequence[str]]) -> str | None:
    same = [(repo, known[repo.path]) for repo in matching(Label(name=wanted.name), known)]
    if same:
        bare = [(Label(name=repo.label.name, version=repo.label.version), tags) for repo, tags in same]
        names = sorted(
            {str(label._replace(tag=tag)) for label, tags in bare for tag in tags}
            or {str(label) for label, _tags in bare}
        )
        systems = sorted({str(repo.label.system) for repo, _tags in same})
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        return f"there is: {shown} (system {', '.join(systems)})"
    names = sorted({str(repo.label.name) for path in known if (repo := Repository.parse(path)) is not None})
    near = difflib.get_close_matches(wanted.name or "", names, n=3)
    return f"did you mean {' or '.join(near)}? list all with: uenvctl image find" if near else None
