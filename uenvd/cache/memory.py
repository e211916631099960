"""What the registry said last, so that a known label resolves when the registry is down, also after a restart.

One JSON file for each question, replaced atomically; a damaged one counts as absent. Nothing here is trusted for content: a digest
that is remembered is checked again wherever bytes are fetched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from uenvd.cache.identity import CacheUser, as_user
from uenvd.errors import StorageError
from uenvd.oci.files import read_bounded, write_atomically
from uenvd.oci.reference import is_digest

log = logging.getLogger(__name__)

MAX_FILE_BYTES: Final = 32 << 20
MAX_IN_MEMORY: Final = 4096
KEPT_S: Final = 90 * 86400.0
"""Answers that nobody renewed for so long are forgotten."""


class RegistryMemory:
    """Answers of the registry, in files below ``root``. Safe for several threads and processes; times are seconds since the epoch."""

    def __init__(self, root: Path, user: CacheUser | None = None) -> None:
        self._root = root
        self.user = user or CacheUser()
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Any, float]] = {}

    def remember_tag(self, repository: str, tag: str, digest: str, when_s: float) -> None:
        """Note that ``repository:tag`` had this manifest digest at ``when_s``."""
        self._remember(f"tag {repository}:{tag}", digest, when_s)

    def recall_tag(self, repository: str, tag: str) -> tuple[str, float] | None:
        """Return (manifest digest, when it was seen)."""
        match self._recall(f"tag {repository}:{tag}"):
            case (str(digest), when_s) if is_digest(digest):
                return digest, when_s
            case _:
                return None

    def remember_tags(self, repository: str, tags: Sequence[str], when_s: float) -> None:
        """Note the list of tags of a repository."""
        self._remember(f"tags {repository}", list(tags), when_s)

    def recall_tags(self, repository: str) -> tuple[list[str], float] | None:
        """Return (tags, when they were listed)."""
        return _texts(self._recall(f"tags {repository}"))

    def remember_repositories(self, prefix: str, repositories: Sequence[str], when_s: float) -> None:
        """Note the repositories that begin with ``prefix``."""
        self._remember(f"repositories {prefix}", list(repositories), when_s)

    def recall_repositories(self, prefix: str) -> tuple[list[str], float] | None:
        """Return (repositories, when they were listed)."""
        return _texts(self._recall(f"repositories {prefix}"))

    def remember_document(self, name: str, document: object, when_s: float) -> None:
        """Note a JSON value that the registry has under a name of the caller's."""
        self._remember(f"document {name}", document, when_s)

    def recall_document(self, name: str) -> tuple[Any, float] | None:
        """Return (JSON value, when it was read); the caller checks it."""
        return self._recall(f"document {name}")

    @as_user
    def sweep(self) -> None:
        """Remove the files of answers that are too old. Raises `OSError`."""
        for path in self._root.glob("*.json"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > KEPT_S:
                    path.unlink()

    def _recall(self, question: str) -> tuple[Any, float] | None:
        known = self._known.get(question)
        if known is not None:
            return known
        try:
            with self.user:
                data = read_bounded(self._path(question), MAX_FILE_BYTES)
            body = json.loads(data)
        except (OSError, ValueError, RecursionError, StorageError):
            return None
        match body:
            case {"question": asked, "value": value, "when": int() | float() as when_s} if asked == question:
                return self._keep(question, (value, float(when_s)))
            case _:
                return None

    def _remember(self, question: str, value: object, when_s: float) -> None:
        """Keep an answer. Where it cannot be written it is kept until the end of the process, and the log says so."""
        self._keep(question, (value, when_s))
        body = json.dumps({"question": question, "value": value, "when": when_s}).encode()
        try:
            # Not durable: what a power failure loses is asked again.
            with self.user:
                write_atomically(self._path(question), body, durable=False)
        except OSError as error:
            log.warning("the registry's answer cannot be kept in %s: %s", self._root, error.strerror)

    def _keep(self, question: str, answer: tuple[Any, float]) -> tuple[Any, float]:
        with self._lock:
            self._known.pop(question, None)
            self._known[question] = answer
            while len(self._known) > MAX_IN_MEMORY:
                del self._known[next(iter(self._known))]
        return answer

    def _path(self, question: str) -> Path:
        # A question may be longer than a file name, so its hash names the file.
        return self._root / f"{hashlib.sha256(question.encode()).hexdigest()[:40]}.json"


def _texts(answer: tuple[Any, float] | None) -> tuple[list[str], float] | None:
    match answer:
        case (list(names), when_s) if all(isinstance(name, str) for name in names):
            return names, when_s
        case _:
            return None
