"""Only signed images, where the site demands it (``signatures:`` in the configuration).

What is remembered of an image are its signatures, as the registry had them, never a verdict: they are checked against the keys that are there now,
which needs no network. So an image that was used once is used on without the registry, and a key that was taken away counts no more after `KEYS_S`.

Concurrency: the tables are changed synchronously between awaits; files and signatures are read and checked in threads.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from uenvd.config import SignatureConfig
from uenvd.daemon.question import Image, Question
from uenvd.errors import ConfigError, SignatureRefused
from uenvd.oci.index import LATEST
from uenvd.oci.signatures import PublicKey, check_envelopes, read_envelopes, read_keys, signed_name

if TYPE_CHECKING:
    from uenvd.cache.store import Store
    from uenvd.daemon.catalogue import Catalogue

log = logging.getLogger(__name__)

KEYS_S: Final = 2.0
"""How long the keys that were read are used."""
_MAX_GOOD: Final = 4096


class Signatures:
    """The signatures of this node's images."""

    def __init__(self, settings: SignatureConfig, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._keys: Mapping[str, PublicKey] = {}
        self._read_s = float("-inf")
        self._good: dict[tuple[str, str, str | None], PublicKey] = {}

    async def require(self, catalogue: Catalogue, image: Image, question: Question, *, pinned: bool) -> None:
        """Return if the image needs no signature or has a good one. ``pinned``: it was asked for by its digest, so its tag does not matter.

        Raises `SignatureRefused`, `ConfigError` for keys that cannot be used, and what the registry raises when it is asked in vain.
        """
        found = image.found
        if found.repository.label.namespace not in self._settings.required:
            return
        path, digest = found.repository.path, found.digest
        name = signed_name(path)
        tag = None if pinned or found.tag == LATEST else found.tag
        keys = await self._current_keys()
        good = self._good.get((name, digest, tag))
        if good is not None and good.key_id in keys:
            return
        document = f"signatures {path}@{digest}"
        known = await trio.to_thread.run_sync(self._store.memory.recall_document, document)
        if known is not None:
            try:
                await self._check(known[0], keys, name, digest, tag)
            except SignatureRefused:
                pass  # there may be a better one by now
            else:
                return
        answer = await catalogue.document(
            document,
            question,
            lambda: [one.decode(errors="replace") for one in read_envelopes(catalogue.remote, path, digest)],
        )
        try:
            await self._check(answer, keys, name, digest, tag)
        except SignatureRefused as error:
            log.warning("%s@%s is refused: %s", path, digest, error.message)
            raise SignatureRefused(
                f"'{found.label}' may not be used: only signed images of its namespace are, and {error.message}",
                hint=error.hint,
            ) from error

    async def _check(
        self,
        envelopes: Any,  # noqa: ANN401 - any JSON value
        keys: Mapping[str, PublicKey],
        name: str,
        digest: str,
        tag: str | None,
    ) -> None:
        texts = (
            [one.encode() for one in envelopes if isinstance(one, str)] if isinstance(envelopes, list) else []
        )
        key = await trio.to_thread.run_sync(
            partial(check_envelopes, texts, keys, name, digest, tag, tag_needed=self._settings.tags)
        )
        if len(self._good) >= _MAX_GOOD:
            self._good.clear()
        self._good[name, digest, tag] = key

    async def _current_keys(self) -> Mapping[str, PublicKey]:
        if trio.current_time() - self._read_s > KEYS_S:
            self._keys = await trio.to_thread.run_sync(_trusted_keys, self._settings.keys)
            self._read_s = trio.current_time()
        return self._keys


def _trusted_keys(directory: Path) -> Mapping[str, PublicKey]:
    """Read the keys (blocking). Raises `ConfigError`, also where others than root and this daemon's user could put keys."""
    try:
        mode = directory.stat().st_mode
    except OSError as error:
        raise ConfigError(f"signatures.keys: {directory} cannot be read: {error.strerror}") from error
    if not stat.S_ISDIR(mode) or mode & 0o022:
        raise ConfigError(
            f"signatures.keys: {directory} is no directory that only its owner may change",
            hint=f"chmod go-w {directory}",
        )
    return read_keys(directory)
