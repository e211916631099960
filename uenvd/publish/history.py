"""What ``latest`` was before: a note on each release, attached to it, so that one command can go back.

A note is attached before the tag moves: whatever ``latest`` names has its history. Times and names in it are what the tool was told; whoever may push
may write such notes, too.
"""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from uenvd.errors import DeployRefused, ManifestError, RegistryError
from uenvd.oci.attach import attach, attachments, json_content
from uenvd.oci.index import LATEST
from uenvd.oci.manifest import CREATED, load_object
from uenvd.oci.reference import is_digest
from uenvd.oci.remote import Remote
from uenvd.publish.provenance import ci_identity

RELEASE_TYPE: Final = "uenv/release"
"""That ``latest`` came to an image: JSON ``{"action", "tag", "previous", "by"}``."""
MAX_NOTE_BYTES: Final = 64 << 10
MAX_NOTES: Final = 50
RELEASING: Final = frozenset({"deploy", "promote"})


@dataclass(frozen=True)
class Release:
    """How ``latest`` came to an image."""

    action: str
    """``deploy``, ``promote`` or ``rollback``."""
    tag: str
    previous: str | None
    """What ``latest`` was before; None for the first."""
    by: str
    when: str
    """RFC 3339."""


def who_am_i(environ: Mapping[str, str]) -> str:
    """Return the pipeline, or outside of any the name of the user."""
    pipeline = ci_identity(environ)
    if pipeline is not None:
        return pipeline
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


def note_release(
    remote: Remote, repository: str, digest: str, *, action: str, tag: str, previous: str | None
) -> None:
    """Note that ``latest`` is about to come to an image. Raises the remote's errors."""
    body = {"action": action, "tag": tag, "previous": previous, "by": who_am_i(os.environ)}
    data = json.dumps(body, sort_keys=True).encode()
    attach(remote, repository, digest, RELEASE_TYPE, [json_content("release.json", data)])


def releases_of(remote: Remote, repository: str, digest: str) -> list[Release]:
    """Return the notes on an image, the newest first; what is malformed is left out."""
    found = []
    for manifest in attachments(remote, repository, digest, RELEASE_TYPE)[:MAX_NOTES]:
        try:
            body = load_object(remote.small_blob(repository, manifest.layers[0], MAX_NOTE_BYTES), "the note")
            previous = body["previous"]
            if previous is not None and not is_digest(str(previous)):
                continue
            note = Release(
                str(body["action"])[:40],
                str(body["tag"])[:128],
                previous,
                str(body["by"])[:300],
                manifest.annotations.get(CREATED, ""),
            )
        except (IndexError, KeyError, ManifestError, RegistryError):
            continue
        found.append(note)
    return found


def former(remote: Remote, repository: str, digest: str) -> str:
    """Return what ``latest`` was before an image was released. Raises `DeployRefused` where that is not known.

    What a rollback put there does not count: two in a row go back two releases, not there and back.
    """
    for note in releases_of(remote, repository, digest):
        if note.action in RELEASING and note.previous is not None and note.previous != digest:
            return note.previous
    raise DeployRefused(
        f"no release before {digest} is noted in {repository}: it was the first, or {LATEST} was moved by other tools",
        hint="name the release to go back to: --to TAG",
    )
