"""``uenvd-publish retire``: take old images away by rules, never one that is in use. Shows what it would do unless it is told to do it."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from uenvd.errors import ManifestError, NotFound, RegistryDenied, RegistryError, ResourceMissing, UsageError
from uenvd.oci.attach import attach, attachments, json_content, now, when
from uenvd.oci.index import LATEST, Entry
from uenvd.oci.reference import fallback_tag, is_fallback_tag
from uenvd.oci.remote import Remote
from uenvd.publish.console import say, show, show_json, show_table
from uenvd.publish.history import releases_of
from uenvd.publish.options import (
    BUILD,
    DEPLOY,
    add_registry_options,
    add_system_option,
    need_system,
    open_registry,
)
from uenvd.publish.queue import read_queue
from uenvd.publish.releases import (
    DEPRECATION_TYPE,
    Deprecation,
    describe,
    list_repositories,
    read_all,
    refresh_repository,
)
from uenvd.publish.retirement import DEFAULT_GRACE_DAYS, Decision, Image, Rules, decide, freed_bytes

RETIREMENT_TYPE: Final = "uenv/retirement"
"""That an image lost its tags, and which: JSON ``{"tags": [...]}``; its annotation says when."""
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_LOCK_BYTES: Final = 16 << 20
_LOCK_NAME: Final = "uenv.lock"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "only",
        nargs="*",
        metavar="PATTERN",
        help="name or name/version, with * and ?; default: all environments",
    )
    rules = parser.add_argument_group("what may go (all that are given must allow it)")
    rules.add_argument(
        "--keep", type=_count, metavar="N", help="keep the newest N images of each name, over its versions"
    )
    rules.add_argument("--older-than", type=_count, metavar="DAYS", help="keep what is not older")
    rules.add_argument(
        "--expired",
        action="store_true",
        help="what was deprecated with a --date that is over goes, even if it is latest",
    )
    stays = parser.add_argument_group("what stays")
    stays.add_argument(
        "--protect",
        action="append",
        default=[],
        metavar="PATTERN",
        help="name, name/version, name/version:tag or a digest; may be repeated",
    )
    stays.add_argument(
        "--locked",
        action="append",
        default=[],
        type=Path,
        metavar="PATH",
        help=f"a file: every digest in it stays ({_LOCK_NAME}, a list of pins); a directory: every {_LOCK_NAME} below it",
    )
    stays.add_argument(
        "--grace",
        type=_count,
        default=DEFAULT_GRACE_DAYS,
        metavar="DAYS",
        help=f"how long a retired image can still be used by its digest; default {DEFAULT_GRACE_DAYS}",
    )
    stays.add_argument("--no-queue", action="store_true", help="do not ask squeue which jobs there are")
    parser.add_argument("--namespace", default=DEPLOY, metavar="NS", help=f"default {DEPLOY}")
    parser.add_argument("--yes", action="store_true", help="do it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_system_option(parser)
    add_registry_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Decide, show, and with ``--yes`` do it."""
    if arguments.keep == 0:
        raise UsageError("--keep 0 would keep nothing", hint="say at least --keep 1")
    rules = Rules(
        arguments.keep,
        arguments.older_than,
        arguments.expired,
        arguments.grace,
        tuple(arguments.only),
        tuple(arguments.protect),
    )
    system = need_system(arguments)
    held = locked_digests(arguments.locked)
    queue = None if arguments.no_queue else read_queue()
    if queue is None and not arguments.no_queue:
        say("note: there is no Slurm here; jobs in its queue are protected by the time of grace only")
    held |= dict.fromkeys(queue.digests if queue else (), "a job in the queue names it")
    with closing(open_registry(arguments)) as remote:
        images = read_images(remote, arguments.namespace, system)
        held = rollback_targets(remote, [one.entry for one in images]) | held
        today = datetime.now(UTC)
        decisions = decide(images, rules, held=held, oldest_job=queue.oldest if queue else None, now=today)
        _show(arguments, decisions)
        if arguments.yes:
            return _carry_out(remote, decisions, today + timedelta(days=rules.grace_days))
    if any(one.action in {"retire", "delete"} for one in decisions):
        say("nothing was changed; to do it: the same with --yes")
    return 0


def read_images(remote: Remote, namespace: str, system: str) -> list[Image]:
    """Return the images of a system: those that have tags, and those that were retired and wait. Raises the remote's errors."""
    index = read_all(remote, namespace, system, say)
    repositories = set(index.repositories())
    try:
        repositories |= set(list_repositories(remote, namespace, system))
    except (RegistryError, RegistryDenied) as error:
        say(f"note: {error.message}; retired images of versions that have no other image are not seen")
    found = []
    for repository in sorted(repositories):
        entries = [entry for entry in index.of_repository(repository) if entry.tags]
        for entry in entries:
            # Whatever is retired is deprecated, too; so this is not asked for every image.
            since = _retired_since(remote, repository, entry.digest) if entry.deprecated else None
            found.append(Image(entry, since))
        tagged = {entry.digest for entry in entries}
        subjects = {"sha256:" + tag[7:71] for tag in remote.every_tag(repository) if is_fallback_tag(tag)}
        for digest in sorted(subjects - tagged):
            since = _retired_since(remote, repository, digest)
            if since is not None:
                try:
                    entry = describe(remote, repository, digest, ())
                except (NotFound, ManifestError):
                    # A deletion broke off: what is attached is still there.
                    entry = Entry(repository, digest, (), digest, 0)
                found.append(Image(entry, since))
    return found


def _retired_since(remote: Remote, repository: str, digest: str) -> datetime | None:
    notes = attachments(remote, repository, digest, RETIREMENT_TYPE)
    return when(notes[0].annotations) if notes else None


def rollback_targets(remote: Remote, entries: Iterable[Entry]) -> dict[str, str]:
    """Return the digests to which `rollback` would take ``latest``."""
    found = {}
    for entry in entries:
        if LATEST in entry.tags:
            for note in releases_of(remote, entry.repository, entry.digest)[:1]:
                if note.previous is not None:
                    found[note.previous] = "latest can be rolled back to it"
    return found


def locked_digests(paths: Sequence[Path]) -> dict[str, str]:
    """Return the digests in files and in the lock files below directories, and where. Raises `UsageError` for what cannot be read."""
    found: dict[str, str] = {}
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path} is not there", hint="what protects images must be readable")
        for file in _lock_files(path) if path.is_dir() else [path]:
            try:
                if file.stat().st_size > _MAX_LOCK_BYTES:
                    raise UsageError(f"{file} is longer than {_MAX_LOCK_BYTES} bytes: no lock file")
                text = file.read_text(errors="replace")
            except OSError as error:
                raise UsageError(f"{file} cannot be read: {error.strerror}") from error
            found |= dict.fromkeys(_DIGEST.findall(text), f"locked by {file}")
    return found


def _lock_files(directory: Path) -> list[Path]:
    def failed(error: OSError) -> None:
        raise UsageError(
            f"{error.filename} cannot be read: {error.strerror}", hint="run as one who may read all of it"
        )

    found = []
    for where, _directories, names in os.walk(directory, onerror=failed):
        found += [Path(where) / _LOCK_NAME] if _LOCK_NAME in names else []
    return sorted(found)


def _show(arguments: argparse.Namespace, decisions: Sequence[Decision]) -> None:
    retire, delete = freed_bytes(decisions, "retire", "delete"), freed_bytes(decisions, "delete")
    if arguments.json:
        body: dict[str, Any] = {
            "images": [
                {
                    "repository": one.image.entry.repository,
                    "digest": one.image.entry.digest,
                    "tags": list(one.image.entry.tags),
                    "size": one.image.entry.size_bytes,
                    "action": one.action,
                    "reason": one.reason,
                }
                for one in decisions
            ],
            "freed_bytes": {"now": delete, "after_grace": retire},
        }
        show_json(body)
        return
    rows = [_row(one) for one in sorted(decisions, key=lambda one: one.action == "keep")]
    show_table(("action", "uenv", "uarch", "digest", "MB", "why"), rows)
    show(f"freed now: {delete / 1e6:.1f} MB; when the time of grace is over: {retire / 1e6:.1f} MB")
    if arguments.namespace != BUILD:
        say(f"note: bytes that other namespaces ({BUILD}) have too are freed when they go there as well")


def _row(one: Decision) -> tuple[str, ...]:
    entry = one.image.entry
    _namespace, _system, uarch, name, version = entry.repository.split("/")
    return (
        one.action,
        f"{name}/{version}" + (f":{','.join(entry.tags)}" if entry.tags else ""),
        f"%{uarch}",
        entry.digest.removeprefix("sha256:")[:12],
        f"{entry.size_bytes / 1e6:.1f}",
        one.reason,
    )


def _carry_out(remote: Remote, decisions: Sequence[Decision], until: datetime) -> int:
    stuck = []
    for one in decisions:
        entry = one.image.entry
        if one.action == "retire":
            retire_image(remote, entry, until)
            say(f"retired {entry.repository}:{','.join(entry.tags)} ({entry.digest})")
        elif one.action == "wait" and entry.tags:
            if untag(remote, entry):  # a run broke off before it got here
                refresh_repository(remote, entry.repository, say)
        elif one.action == "delete":
            if delete_image(remote, entry):
                say(f"deleted {entry.repository}@{entry.digest}")
            else:
                stuck.append(f"{entry.repository}@{entry.digest}")
    if stuck:
        listed = "\n".join(f"  {name}" for name in stuck)
        raise ResourceMissing(
            f"{remote.address} deletes nothing that is asked for by the OCI interface; left there:\n{listed}",
            hint="delete these by the registry's own interface, then: uenvd-publish reindex",
        )
    return 0


def retire_image(remote: Remote, entry: Entry, until: datetime) -> bool:
    """Note that an image is retired, tell users, and take its tags away; tell whether that was possible.

    The notes come first: they have tags of their own, by which a later run finds an image that has none any more. Where a registry cannot
    take tags away the image keeps them, and users are told until it is deleted.
    """
    repository, digest = entry.repository, entry.digest
    note = json.dumps({"tags": list(entry.tags)}, sort_keys=True).encode()
    # The time makes it a new note: what got its tags back and is retired again has its time of grace again.
    attach(
        remote,
        repository,
        digest,
        RETIREMENT_TYPE,
        [json_content("retirement.json", note)],
        {"uenv.retirement.since": now()},
    )
    if not entry.deprecated:
        told = Deprecation("it is retired", f"{until:%Y-%m-%d}")
        attach(
            remote, repository, digest, DEPRECATION_TYPE, [json_content("deprecation.json", told.encode())]
        )
    gone = untag(remote, entry)
    refresh_repository(remote, repository, say, fresh=[digest])
    return gone


def untag(remote: Remote, entry: Entry) -> bool:
    """Take all tags of an image away; tell whether that was possible."""
    if all(remote.untag(entry.repository, tag) for tag in entry.tags):
        return True
    say(
        f"note: {remote.address} takes no tags away; {entry.repository} keeps them until the image is deleted"
    )
    return False


def delete_image(remote: Remote, entry: Entry) -> bool:
    """Delete an image, what is attached to it, and the list of that; tell whether the registry deletes at all.

    The image goes first: its attachments are how a run that broke off is continued.
    """
    repository, digest = entry.repository, entry.digest
    attached = [one.digest for one in remote.referrers(repository, digest, None)]
    tags = {tag for tag in remote.every_tag(repository) if tag.startswith(fallback_tag(digest))}
    if not remote.delete(repository, digest):
        return False
    for one in attached:
        remote.delete(repository, one)
    for tag in sorted(tags):
        with suppress(NotFound):
            remote.delete(repository, remote.resolve(repository, tag))
    refresh_repository(remote, repository, say)
    return True


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of days or images")
    return int(text)
