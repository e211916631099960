"""What a place that keeps images can do, whether it is a registry or a directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from uenvd.oci.credentials import Credential
from uenvd.oci.manifest import MANIFEST_TYPE, Descriptor, Manifest
from uenvd.oci.reference import RegistryAddress

Progress = Callable[[int, int], None]
"""Called with (done_bytes, total_bytes)."""


def never() -> bool:
    """Do not cancel."""
    return False


def no_progress(_done_bytes: int, _total_bytes: int) -> None:
    """Report to nobody."""


class BlobRange(Protocol):
    """Bytes of a blob on their way. For one thread; close it."""

    first_byte: int
    """Where they begin: at the byte that was asked for, or before it."""
    end_byte: int
    """Where they end: at or before the end that was asked for; behind it where ranges are ignored."""
    ignores_range: bool
    """The place sends the whole blob whatever it is asked for."""
    trusted: bool
    """They come from the place itself and not from a mirror of it."""

    def readinto(self, buffer: memoryview) -> int:
        """Fill a part of the buffer with the next bytes, at least one. Raises `RegistryUnreachable` where they break off or stall, `Cancelled`."""
        ...

    def close(self) -> None:
        """End the transfer; a connection whose bytes were all read is used again."""
        ...


class Remote(Protocol):
    """A place that keeps images. Every method blocks, and may be called from several threads at once.

    Errors of all methods: `RegistryUnreachable` (no answer, not in time, broken off, no directory), `RegistryDenied`,
    `NotFound`, `RegistryError` (any other answer), `Cancelled`; `DigestMismatch` and `ManifestError` where bytes are checked.
    Repositories are named without the prefix of the address.
    """

    address: RegistryAddress

    def deadline(
        self, seconds: float | None, cancelled: Callable[[], bool] = never
    ) -> AbstractContextManager[None]:
        """Bound all calls that this thread makes inside the ``with`` block, retries among them, to ``seconds`` together.

        When the time is over a call raises `RegistryUnreachable`; when ``cancelled`` turns true, `Cancelled`; both within 0.3 s.
        """
        ...

    def tags(self, repository: str) -> list[str]:
        """Return the tags of the images, sorted; [] for an unknown repository."""
        ...

    def every_tag(self, repository: str) -> list[str]:
        """Return all tags, those of attachments too (`uenvd.oci.reference.is_fallback_tag`), sorted; [] for an unknown repository."""
        ...

    def manifest(self, repository: str, reference: str) -> Manifest:
        """Return the manifest under a tag or digest; its digest is checked. Raises `NotFound`."""
        ...

    def manifest_bytes(self, repository: str, reference: str) -> tuple[bytes, str]:
        """Return (bytes, media type) of a manifest or an image index, its digest checked. Raises `NotFound`."""
        ...

    def resolve(self, repository: str, tag: str) -> str:
        """Return the digest of whatever is under a tag, an image index too. Raises `NotFound`."""
        ...

    def small_blob(self, repository: str, descriptor: Descriptor, limit_bytes: int) -> bytes:
        """Return a blob of at most ``limit_bytes``; digest and size are checked."""
        ...

    def stream_blob(
        self, repository: str, descriptor: Descriptor, offset_bytes: int, cancelled: Callable[[], bool]
    ) -> Iterator[bytes]:
        """Yield the bytes of a blob from an offset on, in pieces of at most 1 MiB. **Nothing is checked** but their number."""
        ...

    def open_range(
        self,
        repository: str,
        descriptor: Descriptor,
        first_byte: int,
        end_byte: int,
        cancelled: Callable[[], bool] = never,
    ) -> BlobRange:
        """Ask once for the bytes ``first_byte`` to ``end_byte`` - 1 of a blob. **Nothing is checked** but their number.

        `RegistryUnreachable.retry_after_s` says how long the place asks to be left alone.
        """
        ...

    def without_mirrors(self) -> Remote:
        """Return the place itself, for bytes that a mirror had wrong."""
        ...

    def repositories(self, prefix: str) -> list[str]:
        """Return all repositories that begin with ``prefix``, sorted. Raises `RegistryError` where there is no such list."""
        ...

    def referrers(self, repository: str, digest: str, artifact_type: str | None) -> list[Descriptor]:
        """Return the manifests whose subject is ``digest`` (of one artifact type, if given)."""
        ...

    def push_blob(
        self, repository: str, path: Path, descriptor: Descriptor, progress: Progress = no_progress
    ) -> None:
        """Upload a file; nothing moves if the blob is there already."""
        ...

    def push_bytes(self, repository: str, data: bytes, media_type: str) -> Descriptor:
        """Upload a small blob and return its descriptor."""
        ...

    def push_manifest(
        self, repository: str, tag: str | None, raw: bytes, media_type: str = MANIFEST_TYPE
    ) -> str:
        """Store a manifest, under a tag or (None) by its digest only; return the digest."""
        ...

    def push_stream(
        self,
        repository: str,
        descriptor: Descriptor,
        pieces: Callable[[], Iterator[bytes]],
        progress: Progress = no_progress,
    ) -> None:
        """Upload a blob from pieces; ``pieces`` is called anew for each attempt. Nothing moves if the blob is there already."""
        ...

    def mount_blob(self, repository: str, descriptor: Descriptor, source: str) -> bool:
        """Make a blob of the repository ``source`` one of ``repository`` without moving bytes; tell whether that was possible."""
        ...

    def push_attachment(
        self, repository: str, tag: str, raw: bytes, subject: str, media_type: str = MANIFEST_TYPE
    ) -> bool:
        """Store a manifest whose subject is ``subject`` under a tag; tell whether the place lists it as a referrer by itself."""
        ...

    def untag(self, repository: str, tag: str) -> bool:
        """Take a tag away; what it named stays, by its digest. Tell whether the place can do that; a tag that is not there is no error."""
        ...

    def delete(self, repository: str, digest: str) -> bool:
        """Delete a manifest and all its tags in a repository. Tell whether the place can do that; one that is not there is no error.

        A registry frees the bytes of blobs that nobody names any more when it cleans up; a layout at once.
        """
        ...

    def updating(self, name: str) -> AbstractContextManager[bool]:
        """Keep others out while what ``name`` stands for is read, changed and written back, as far as the place allows.

        The value is true where that holds for everybody; false where only for the threads of this process.
        """
        ...

    def close(self) -> None:
        """Close idle connections. Calls that run in other threads end by themselves."""
        ...


def open_remote(
    address: RegistryAddress,
    *,
    credential: Credential | None = None,
    auth_file: Path | None = None,
    ca_file: Path | None = None,
    timeout_connect_s: float = 5.0,
    timeout_read_s: float = 30.0,
    deadline_s: float | None = None,
    token_file: Path | None = None,
    username: str = "",
    mirrors: Sequence[RegistryAddress] = (),
    mirrors_resolve: bool = False,
) -> Remote:
    """Return a client of the registry or layout. Nothing is opened or connected yet.

    ``credential`` is used as it is, and so is the token in ``token_file`` (with ``username``); otherwise credentials are looked for in
    ``auth_file`` or, without one, where docker, podman and oras keep them (`uenvd.oci.credentials`): for ``mirrors`` always.
    ``deadline_s`` bounds each metadata call that has no `Remote.deadline`. For mirrors see `uenvd.oci.mirrors`.
    """
    if mirrors:
        from uenvd.oci.mirrors import MirroredRemote

        source = open_remote(
            address,
            credential=credential,
            auth_file=auth_file,
            ca_file=ca_file,
            timeout_connect_s=timeout_connect_s,
            timeout_read_s=timeout_read_s,
            deadline_s=deadline_s,
            token_file=token_file,
            username=username,
        )
        others = [
            open_remote(
                mirror,
                auth_file=auth_file,
                ca_file=ca_file,
                timeout_connect_s=min(timeout_connect_s, 2.0),
                timeout_read_s=timeout_read_s,
                deadline_s=deadline_s,
            )
            for mirror in mirrors
        ]
        return MirroredRemote(source, others, resolve=mirrors_resolve)
    if address.kind == "layout":
        from uenvd.oci.layout import LayoutRemote

        return LayoutRemote(address)
    # Deferred: a layout needs neither oras nor requests, whose imports take 0.2 s.
    from uenvd.oci.registry import RegistryRemote

    return RegistryRemote(
        address,
        credential=credential,
        auth_file=auth_file,
        ca_file=ca_file,
        timeout_connect_s=timeout_connect_s,
        timeout_read_s=timeout_read_s,
        deadline_s=deadline_s,
        token_file=token_file,
        username=username,
    )
