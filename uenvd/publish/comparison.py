"""The performance of an image against the release before it: reports read from the registry, compared by `uenvd.publish.performance`."""

from __future__ import annotations

from dataclasses import dataclass

from uenvd.errors import (
    DeployRefused,
    ManifestError,
    NotFound,
    RegistryDenied,
    RegistryError,
    ReportError,
    UenvError,
)
from uenvd.oci.index import LATEST, Entry, read_index
from uenvd.oci.reference import repository_of, split_repository
from uenvd.oci.remote import Remote
from uenvd.publish.gate import newest_report
from uenvd.publish.history import RELEASING, releases_of
from uenvd.publish.options import DEPLOY
from uenvd.publish.performance import Comparison, Thresholds, compare, figures

_SHOWN = 8


@dataclass(frozen=True)
class Compared:
    """An image against the release before it."""

    name: str
    """Of that release: ``name/version:tag``."""
    digest: str
    """Of that release."""
    comparison: Comparison

    def lines(self) -> list[str]:
        """Return what to tell: a summary, then what is worse or was lost."""
        changes, worse, lost = self.comparison.changes, self.comparison.worse, self.comparison.lost
        said = f"{len(changes)} figures compared with {self.name}: "
        said += f"{len(worse)} worse" if worse else "none is worse"
        said += f", {len(lost)} not measured any more" if lost else ""
        return [
            said,
            *(f"  worse: {change}" for change in worse[:_SHOWN]),
            *(f"  lost: {figure}" for figure in lost[:_SHOWN]),
        ]

    def to_json(self) -> dict[str, object]:
        """Return the JSON object."""
        return {
            "with": self.name,
            "digest": self.digest,
            "worse": [str(change) for change in self.comparison.worse],
            "lost": [str(figure) for figure in self.comparison.lost],
            "figures": [
                {
                    "test": change.after.test,
                    "system": change.after.system,
                    "environment": change.after.environment,
                    "variable": change.after.variable,
                    "unit": change.after.unit,
                    "before": change.before.value,
                    "after": change.after.value,
                }
                for change in self.comparison.changes
            ],
        }


def compare_with_previous(
    remote: Remote,
    repository: str,
    digest: str,
    *,
    namespace: str = DEPLOY,
    thresholds: Thresholds | None = None,
    report: bytes | None = None,
) -> Compared | None:
    """Compare an image with what is released now; None where either has no figures. ``report``: its own, where that is at hand.

    That is ``latest`` of the same version (of an image that is released itself what it replaced), or where this is the first image of a
    version, that of the newest other version for the same system and microarchitecture. Raises the remote's errors for the image itself only.
    """
    report = report if report is not None else newest_report(remote, repository, digest)
    now = figures(report) if report is not None else []
    if not now:
        return None
    for entry_repository, entry_digest, name in _before(remote, repository, digest, namespace):
        try:
            old_report = newest_report(remote, entry_repository, entry_digest)
            before = figures(old_report) if old_report is not None else []
        except (DeployRefused, ReportError, ManifestError, RegistryError):
            continue
        if before:
            return Compared(name, entry_digest, compare(before, now, thresholds))
    return None


def performance_of(
    remote: Remote, repository: str, digest: str, *, namespace: str = DEPLOY, report: bytes | None = None
) -> Compared | None:
    """Compare as `compare_with_previous` does, as far as that can be found out: for showing, where it decides nothing."""
    try:
        return compare_with_previous(remote, repository, digest, namespace=namespace, report=report)
    except UenvError:
        return None


def _before(remote: Remote, repository: str, digest: str, namespace: str) -> list[tuple[str, str, str]]:
    """Return (repository, digest, name) of releases that came before, the one to compare with first."""
    parts = split_repository(repository)
    if parts is None:
        return []
    _namespace, system, uarch, name, version = parts
    own = repository_of(namespace, system, uarch, name, version)
    found = []
    if repository == own:
        # Of what is released itself: what it replaced.
        notes = [note for note in releases_of(remote, own, digest) if note.action in RELEASING]
        found += [
            (own, note.previous, f"{name}/{version}@{note.previous[:19]}") for note in notes if note.previous
        ]
        if notes:
            return found + _other_versions(remote, namespace, parts, digest)
    try:
        there = remote.resolve(own, LATEST)
        if there != digest:
            found.append((own, there, f"{name}/{version}:{LATEST}"))
    except NotFound:
        pass
    return found + _other_versions(remote, namespace, parts, digest)


def _other_versions(
    remote: Remote, namespace: str, parts: tuple[str, str, str, str, str], digest: str
) -> list[tuple[str, str, str]]:
    """Return what is released of other versions, the newest first; nothing where there is no index."""
    _namespace, system, uarch, name, version = parts
    try:
        index = read_index(remote, namespace, system)
    except (RegistryError, RegistryDenied, ManifestError):
        return []
    others: list[Entry] = []
    for path in index.repositories():
        other = split_repository(path)
        if other is not None and other[2:4] == (uarch, name) and other[4] != version:
            others += [entry for entry in index.of_repository(path) if LATEST in entry.tags]
    others.sort(key=lambda entry: entry.date or "", reverse=True)
    return [
        (entry.repository, entry.digest, f"{name}/{entry.repository.rpartition('/')[2]}:{LATEST}")
        for entry in others
        if entry.digest != digest
    ]
