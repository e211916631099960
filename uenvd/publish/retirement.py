"""Which images may go: rules, and everything that keeps an image. Pure.

An image goes in two steps. *Retired*, it loses its tags, so nobody begins to use it, and its digest still works: jobs in the queue, lock files
and sessions hold digests. *Deleted* it is after a time of grace, and only when no job is left that was submitted before it was retired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Final, Literal

from uenvd.oci.index import LATEST, Entry
from uenvd.oci.reference import split_repository
from uenvd.publish.catalogue.model import natural

Action = Literal["keep", "retire", "wait", "delete"]
DEFAULT_GRACE_DAYS: Final = 30


@dataclass(frozen=True)
class Rules:
    """What may go. Of `keep` and `older_than_days` those that are given must both allow it; with neither only what `expired` says goes."""

    keep: int | None = None
    """The newest so many images of each environment (name and microarchitecture, over all versions) stay."""
    older_than_days: int | None = None
    expired: bool = False
    """What was deprecated with a day that is over goes, also if it is ``latest``: users were told."""
    grace_days: int = DEFAULT_GRACE_DAYS
    only: tuple[str, ...] = ()
    """Patterns of ``name`` or ``name/version``; none: all."""
    protect: tuple[str, ...] = ()
    """Patterns of ``name``, ``name/version``, ``name/version:tag``, or digests, that stay whatever else is said."""


@dataclass(frozen=True)
class Image:
    """An image of a namespace, with or without tags."""

    entry: Entry
    retired: datetime | None = None
    """Since when, with a time zone; None: it is not."""


@dataclass(frozen=True)
class Decision:
    """What becomes of an image, and why."""

    image: Image
    action: Action
    reason: str


def decide(
    images: Sequence[Image],
    rules: Rules,
    *,
    held: Mapping[str, str],
    oldest_job: datetime | None,
    now: datetime,
) -> list[Decision]:
    """Decide about each image, sorted by name.

    Args:
        images: all of one namespace and system, tagged or retired.
        rules: what may go.
        held: digests that somebody holds -> who: lock files, queued jobs that name them, what ``latest`` was before.
        oldest_job: when the oldest job that is in the queue or running was submitted; None: there is none, or no Slurm.
        now: with a time zone.

    """
    newest = _newest(images, rules.keep or 0)
    ordered = sorted(
        images, key=lambda one: (one.entry.repository, natural(",".join(one.entry.tags)), one.entry.digest)
    )
    return [_decide(one, rules, newest, held, oldest_job, now) for one in ordered]


def freed_bytes(decisions: Sequence[Decision], *actions: Action) -> int:
    """Return the bytes of squashfs files that no image names any more after these actions; shared ones are counted once."""
    going = {
        one.image.entry.layer_digest: one.image.entry.size_bytes for one in decisions if one.action in actions
    }
    staying = {one.image.entry.layer_digest for one in decisions if one.action not in actions}
    return sum(size for layer, size in going.items() if layer not in staying)


def _decide(
    image: Image,
    rules: Rules,
    newest: set[tuple[str, str]],
    held: Mapping[str, str],
    oldest_job: datetime | None,
    now: datetime,
) -> Decision:
    entry = image.entry
    kept = _kept(image, rules, newest, held, now)
    if image.retired is None or (kept and entry.tags):
        return Decision(image, "keep", kept) if kept else Decision(image, "retire", _why(entry, rules, now))
    if kept:
        return Decision(image, "wait", kept)
    deletable = image.retired + timedelta(days=rules.grace_days)
    if now < deletable:
        return Decision(image, "wait", f"retired {image.retired:%Y-%m-%d}, stays until {deletable:%Y-%m-%d}")
    if oldest_job is not None and oldest_job <= image.retired:
        return Decision(
            image, "wait", f"a job of {oldest_job:%Y-%m-%d} is still there, from before it was retired"
        )
    return Decision(image, "delete", f"retired {image.retired:%Y-%m-%d}")


def _kept(
    image: Image, rules: Rules, newest: set[tuple[str, str]], held: Mapping[str, str], now: datetime
) -> str:
    """Return what keeps an image; nothing if it may go."""
    entry = image.entry
    name, version = (split_repository(entry.repository) or ("",) * 5)[3:]
    names = [name, f"{name}/{version}", entry.digest, *(f"{name}/{version}:{tag}" for tag in entry.tags)]
    if any(fnmatchcase(one, pattern) for pattern in rules.protect for one in names):
        return "protected"
    if entry.digest in held:
        return held[entry.digest]
    if not image.entry.tags and image.retired is not None:
        return ""
    removal = _day(entry.removal)
    if removal is not None and removal > now.date() and image.retired is None:
        return f"users were told that it stays until {entry.removal}"
    expired = rules.expired and removal is not None and bool(entry.deprecated)
    if LATEST in entry.tags and not expired:
        return "it is latest"
    if rules.only and not any(
        fnmatchcase(one, pattern) for pattern in rules.only for one in (name, f"{name}/{version}")
    ):
        return "not asked for"
    if expired:
        return ""
    if rules.keep is None and rules.older_than_days is None:
        return "no rule lets it go"
    if rules.keep is not None and (entry.repository, entry.digest) in newest:
        return f"among the newest {rules.keep}"
    if rules.older_than_days is not None:
        made = _when(entry)
        if made is None:
            return "its age is not known"
        if now - made < timedelta(days=rules.older_than_days):
            return f"not older than {rules.older_than_days} days"
    return ""


def _why(entry: Entry, rules: Rules, now: datetime) -> str:
    removal = _day(entry.removal)
    if rules.expired and removal is not None and removal <= now.date():
        return f"deprecated until {entry.removal}"
    made = _when(entry)
    age = f"{(now - made).days} days old" if made else "of unknown age"
    return age if rules.keep is None else f"{age}, not among the newest {rules.keep}"


def _newest(images: Sequence[Image], keep: int) -> set[tuple[str, str]]:
    """Return (repository, digest) of the newest images of each environment; retired ones without tags do not count."""
    groups: dict[tuple[str, str, str, str], list[Entry]] = {}
    for image in images:
        parts = split_repository(image.entry.repository)
        if parts is not None and image.entry.tags:
            groups.setdefault(parts[:4], []).append(image.entry)
    found = set()
    for entries in groups.values():
        entries.sort(key=_order, reverse=True)
        found |= {(entry.repository, entry.digest) for entry in entries[:keep]}
    return found


def _order(entry: Entry) -> tuple[datetime, object, object, str]:
    version = entry.repository.rpartition("/")[2]
    made = _when(entry) or datetime.min.replace(tzinfo=UTC)
    return (made, natural(version), natural(",".join(entry.tags)), entry.digest)


def _when(entry: Entry) -> datetime | None:
    try:
        found = datetime.fromisoformat(entry.date or "")
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _day(text: str | None) -> date | None:
    try:
        return date.fromisoformat(text) if text else None
    except ValueError:
        return None
