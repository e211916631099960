"""Uploads of blobs: one POST for the place, one streamed PUT (specification, "Pushing blobs", "POST then PUT").

One PUT and not chunks: hosted registries limit, mishandle or forget chunks; all of them take one PUT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

from uenvd.errors import (
    DigestMismatch,
    NotFound,
    RegistryDenied,
    RegistryError,
    RegistryUnreachable,
    UenvError,
    UsageError,
)
from uenvd.oci.manifest import Descriptor
from uenvd.oci.remote import Progress
from uenvd.oci.transport import Reply, Transport, join

_ATTEMPTS: Final = 3
_SEND_BYTES: Final = 256 << 10


class FileBody:
    """A request body that can be sent again from its beginning (after a 401, a redirection): each iteration reads the file anew."""

    def __init__(self, path: Path, size_bytes: int, progress: Progress) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._progress = progress

    def __len__(self) -> int:
        return self._size_bytes

    def __iter__(self) -> Iterator[bytes]:
        done = 0
        try:
            with self._path.open("rb") as file:
                while done < self._size_bytes:
                    piece = file.read(min(_SEND_BYTES, self._size_bytes - done))
                    if not piece:
                        raise UsageError(f"{self._path} has become shorter while it was sent")
                    yield piece
                    done += len(piece)
                    self._progress(done, self._size_bytes)
        except OSError as error:
            raise UsageError(f"{self._path} cannot be read: {error.strerror}") from error


def upload_file(
    http: Transport, repository: str, path: Path, descriptor: Descriptor, progress: Progress
) -> None:
    """Upload a file unless the registry has the blob. ``repository`` is the full name."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if size != descriptor.size_bytes:
        raise UsageError(
            f"{path} has {size} bytes where {descriptor.size_bytes} were expected; was it changed?"
        )
    _upload(http, repository, FileBody(path, descriptor.size_bytes, progress), descriptor)
    progress(descriptor.size_bytes, descriptor.size_bytes)


class StreamBody:
    """A request body from pieces that can be had again from the beginning: each iteration calls ``pieces`` anew."""

    def __init__(
        self, pieces: Callable[[], Iterator[bytes]], descriptor: Descriptor, progress: Progress
    ) -> None:
        self._pieces = pieces
        self._descriptor = descriptor
        self._progress = progress

    def __len__(self) -> int:
        return self._descriptor.size_bytes

    def __iter__(self) -> Iterator[bytes]:
        done = 0
        for piece in self._pieces():
            yield piece
            done += len(piece)
            self._progress(done, self._descriptor.size_bytes)


def upload_stream(
    http: Transport,
    repository: str,
    pieces: Callable[[], Iterator[bytes]],
    descriptor: Descriptor,
    progress: Progress,
) -> None:
    """Upload pieces unless the registry has the blob. ``repository`` is the full name."""
    _upload(http, repository, StreamBody(pieces, descriptor, progress), descriptor)
    progress(descriptor.size_bytes, descriptor.size_bytes)


def mount(http: Transport, repository: str, source: str, descriptor: Descriptor) -> bool:
    """Mount a blob from another repository ("Mounting a blob from another repository"); both are full names.

    Only 201 is a mounted blob. Everything else is "not mounted": 202 opens an upload (which is cancelled), and registries answer
    401, 403, 404 or 405 where they do not mount, or where the token is for one repository only.
    """
    if _present(http, repository, descriptor):
        return True
    query = urlencode({"mount": descriptor.digest, "from": source})
    try:
        reply = http.fetch(
            "POST",
            http.url(f"{repository}/blobs/uploads/?{query}"),
            scope=f"{repository}:push",
            what=f"mounting {descriptor.digest} from {source}",
            data=b"",
            headers={"Content-Length": "0"},
            accept=frozenset({201, 202}),
            repeat=False,
        )
    except (RegistryDenied, RegistryError):
        return False
    if reply.status == 201:
        return True
    with suppress(UenvError):
        http.fetch(
            "DELETE",
            join(reply, reply.headers.get("Location", "")),
            scope=f"{repository}:push",
            what="the upload that is not needed",
            accept=frozenset({200, 202, 204, 404, 405}),
            repeat=False,
        )
    return False


def upload_bytes(http: Transport, repository: str, data: bytes, descriptor: Descriptor) -> None:
    """Upload bytes unless the registry has the blob. ``repository`` is the full name."""
    _upload(http, repository, data, descriptor)


def _upload(
    http: Transport, repository: str, body: FileBody | StreamBody | bytes, descriptor: Descriptor
) -> None:
    if _present(http, repository, descriptor):
        return
    what = f"the upload of {descriptor.digest} to {repository}"
    for attempt in range(_ATTEMPTS):
        try:
            _attempt(http, repository, body, descriptor, what)
        except RegistryUnreachable:
            if attempt == _ATTEMPTS - 1:
                raise
            with http.watch(None) as watch, http.errors(what):
                watch.sleep(0.5 * 2**attempt)
        else:
            return


def _present(http: Transport, repository: str, descriptor: Descriptor) -> bool:
    try:
        http.fetch(
            "HEAD",
            http.url(f"{repository}/blobs/{descriptor.digest}"),
            scope=f"{repository}:pull",
            what=f"the blob {descriptor.digest} of {repository}",
        )
    except NotFound:
        return False
    return True


def _attempt(
    http: Transport, repository: str, body: FileBody | StreamBody | bytes, descriptor: Descriptor, what: str
) -> None:
    scope = f"{repository}:push"
    # Without a body, requests sends no Content-Length, which some registries insist on.
    opened = http.fetch(
        "POST",
        http.url(f"{repository}/blobs/uploads/"),
        scope=scope,
        what=what,
        data=b"",
        headers={"Content-Length": "0"},
        accept=frozenset({202}),
        repeat=False,
    )
    reply: Reply | None = None
    try:
        reply = http.fetch(
            "PUT",
            _closing_url(opened, descriptor.digest),
            scope=scope,
            what=what,
            data=body,
            headers={"Content-Type": "application/octet-stream"},
            accept=frozenset({200, 201, 202, 204, 400}),
            repeat=False,
        )
    except RegistryError as error:
        raise type(error)(
            error.message, hint=error.hint or "the registry may limit the size of a blob"
        ) from error
    if reply.status == 400:
        if b"DIGEST_INVALID" in reply.body:
            raise DigestMismatch(
                f"{what}: the registry received bytes with another digest",
                hint="was the file changed meanwhile?",
            )
        raise RegistryError(f"{what}: the registry refuses it (HTTP 400)")
    stored = reply.headers.get("Docker-Content-Digest", descriptor.digest)
    if stored != descriptor.digest:
        raise DigestMismatch(f"{what}: the registry stored it as {stored}")


def _closing_url(opened: Reply, digest: str) -> str:
    location = opened.headers.get("Location", "")
    if not location:
        raise RegistryError("the registry gave no place for the upload")
    parts = urlsplit(join(opened, location))
    query = "&".join(filter(None, [parts.query, urlencode({"digest": digest}, quote_via=quote)]))
    return urlunsplit(parts._replace(query=query))
