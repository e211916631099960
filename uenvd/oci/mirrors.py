"""A registry with mirrors: other places that may have the same content.

As in containers-registries.conf(5), mirrors are asked in their order and the registry last. What is asked by digest may come from any of them,
because the digest is checked wherever the bytes are used. What a *tag* means only the registry itself says, unless the site believes its
mirrors (``registry.mirrors_resolve``). Pushes, lists and referrers are the registry's.

A mirror that fails is left alone for `SKIP_S`; one that merely does not have the thing is asked again for the next one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Final, TypeVar

from uenvd.errors import Cancelled, NotFound, RegistryUnreachable, UenvError
from uenvd.oci.manifest import MANIFEST_TYPE, Descriptor, Manifest
from uenvd.oci.reference import is_digest
from uenvd.oci.remote import BlobRange, Progress, Remote, never, no_progress

log = logging.getLogger(__name__)

T = TypeVar("T")

SKIP_S: Final = 60.0
ASK_S: Final = 5.0
"""How long a mirror may take for a small thing, or half of what is left, whichever is less."""


class MirroredRemote:
    """`uenvd.oci.remote.Remote` of a registry, with mirrors in front of it."""

    def __init__(self, source: Remote, mirrors: Sequence[Remote], *, resolve: bool = False) -> None:
        self.address = source.address
        self._source = source
        self._mirrors = [_Mirror(remote) for remote in mirrors]
        self._resolve = resolve
        self._bounds = threading.local()

    def without_mirrors(self) -> Remote:
        """See `Remote.without_mirrors`."""
        return self._source

    @contextmanager
    def deadline(self, seconds: float | None, cancelled: Callable[[], bool] = never) -> Iterator[None]:
        """See `Remote.deadline`."""
        before = getattr(self._bounds, "end", None)
        end = None if seconds is None else time.monotonic() + seconds
        self._bounds.end = end if before is None else before if end is None else min(before, end)
        try:
            with ExitStack() as stack:
                for remote in (self._source, *(mirror.remote for mirror in self._mirrors)):
                    stack.enter_context(remote.deadline(seconds, cancelled))
                yield
        finally:
            self._bounds.end = before

    # -- what a digest vouches for

    def manifest(self, repository: str, reference: str) -> Manifest:
        """See `Remote.manifest`."""
        return self._ask(
            lambda remote: remote.manifest(repository, reference), by_digest=is_digest(reference)
        )

    def manifest_bytes(self, repository: str, reference: str) -> tuple[bytes, str]:
        """See `Remote.manifest_bytes`."""
        return self._ask(
            lambda remote: remote.manifest_bytes(repository, reference), by_digest=is_digest(reference)
        )

    def resolve(self, repository: str, tag: str) -> str:
        """See `Remote.resolve`."""
        return self._ask(lambda remote: remote.resolve(repository, tag), by_digest=False)

    def small_blob(self, repository: str, descriptor: Descriptor, limit_bytes: int) -> bytes:
        """See `Remote.small_blob`."""
        return self._ask(
            lambda remote: remote.small_blob(repository, descriptor, limit_bytes), by_digest=True
        )

    def open_range(
        self,
        repository: str,
        descriptor: Descriptor,
        first_byte: int,
        end_byte: int,
        cancelled: Callable[[], bool] = never,
    ) -> BlobRange:
        """See `Remote.open_range`."""
        for mirror in self._usable(descriptor.digest):
            try:
                blob = mirror.remote.open_range(repository, descriptor, first_byte, end_byte, cancelled)
            except Cancelled:
                raise
            except UenvError as error:
                mirror.failed(error, descriptor.digest)
            else:
                return _MirrorRange(blob, mirror)
        return self._source.open_range(repository, descriptor, first_byte, end_byte, cancelled)

    def stream_blob(
        self, repository: str, descriptor: Descriptor, offset_bytes: int, cancelled: Callable[[], bool]
    ) -> Iterator[bytes]:
        """See `Remote.stream_blob`. From the registry itself: a stream that changed its source would have to be begun again."""
        return self._source.stream_blob(repository, descriptor, offset_bytes, cancelled)

    # -- what only the registry says

    def tags(self, repository: str) -> list[str]:
        """See `Remote.tags`."""
        return self._source.tags(repository)

    def every_tag(self, repository: str) -> list[str]:
        """See `Remote.every_tag`."""
        return self._source.every_tag(repository)

    def repositories(self, prefix: str) -> list[str]:
        """See `Remote.repositories`."""
        return self._source.repositories(prefix)

    def referrers(self, repository: str, digest: str, artifact_type: str | None) -> list[Descriptor]:
        """See `Remote.referrers`."""
        return self._source.referrers(repository, digest, artifact_type)

    def push_blob(
        self, repository: str, path: Path, descriptor: Descriptor, progress: Progress = no_progress
    ) -> None:
        """See `Remote.push_blob`."""
        self._source.push_blob(repository, path, descriptor, progress)

    def push_bytes(self, repository: str, data: bytes, media_type: str) -> Descriptor:
        """See `Remote.push_bytes`."""
        return self._source.push_bytes(repository, data, media_type)

    def push_manifest(
        self, repository: str, tag: str | None, raw: bytes, media_type: str = MANIFEST_TYPE
    ) -> str:
        """See `Remote.push_manifest`."""
        return self._source.push_manifest(repository, tag, raw, media_type)

    def push_stream(
        self,
        repository: str,
        descriptor: Descriptor,
        pieces: Callable[[], Iterator[bytes]],
        progress: Progress = no_progress,
    ) -> None:
        """See `Remote.push_stream`."""
        self._source.push_stream(repository, descriptor, pieces, progress)

    def mount_blob(self, repository: str, descriptor: Descriptor, source: str) -> bool:
        """See `Remote.mount_blob`."""
        return self._source.mount_blob(repository, descriptor, source)

    def push_attachment(
        self, repository: str, tag: str, raw: bytes, subject: str, media_type: str = MANIFEST_TYPE
    ) -> bool:
        """See `Remote.push_attachment`."""
        return self._source.push_attachment(repository, tag, raw, subject, media_type)

    def untag(self, repository: str, tag: str) -> bool:
        """See `Remote.untag`."""
        return self._source.untag(repository, tag)

    def delete(self, repository: str, digest: str) -> bool:
        """See `Remote.delete`."""
        return self._source.delete(repository, digest)

    def updating(self, name: str) -> AbstractContextManager[bool]:
        """See `Remote.updating`."""
        return self._source.updating(name)

    def close(self) -> None:
        """See `Remote.close`."""
        self._source.close()
        for mirror in self._mirrors:
            mirror.remote.close()

    # -- inside

    def _usable(self, digest: str = "") -> Iterator[_Mirror]:
        return (mirror for mirror in self._mirrors if mirror.usable and not mirror.lacks(digest))

    def _ask(self, question: Callable[[Remote], T], *, by_digest: bool) -> T:
        for mirror in self._usable() if by_digest or self._resolve else ():
            end = getattr(self._bounds, "end", None)
            patience_s = ASK_S if end is None else min(ASK_S, (end - time.monotonic()) / 2)
            try:
                with mirror.remote.deadline(max(0.0, patience_s)):
                    return question(mirror.remote)
            except Cancelled:
                raise
            except UenvError as error:
                mirror.failed(error)
        return question(self._source)


class _Mirror:
    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self._skip_until = float("-inf")
        self._lacking: tuple[str, float] = ("", 0.0)

    @property
    def usable(self) -> bool:
        return time.monotonic() >= self._skip_until

    def lacks(self, digest: str) -> bool:
        """Tell whether it did not have a blob a moment ago: each of its pieces would ask again."""
        name, until = self._lacking
        return bool(digest) and name == digest and time.monotonic() < until

    def failed(self, error: UenvError, digest: str = "") -> None:
        if isinstance(error, NotFound):
            self._lacking = (digest, time.monotonic() + SKIP_S)
            return
        if self.usable:
            log.warning("the mirror %s is left alone for %.0f s: %s", self.remote.address, SKIP_S, error)
        self._skip_until = time.monotonic() + SKIP_S


class _MirrorRange:
    """Bytes of a mirror; trouble with them is the mirror's."""

    trusted = False

    def __init__(self, blob: BlobRange, mirror: _Mirror) -> None:
        self.first_byte = blob.first_byte
        self.end_byte = blob.end_byte
        self.ignores_range = blob.ignores_range
        self._blob = blob
        self._mirror = mirror

    def readinto(self, buffer: memoryview) -> int:
        try:
            return self._blob.readinto(buffer)
        except RegistryUnreachable as error:
            self._mirror.failed(error)
            raise

    def close(self) -> None:
        self._blob.close()
