"""The client of an OCI registry (distribution specification 1.1)."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

from uenvd.errors import (
    DigestMismatch,
    ManifestError,
    NotFound,
    RegistryDenied,
    RegistryError,
    UenvError,
)
from uenvd.oci.credentials import Credential, Keyring
from uenvd.oci.manifest import (
    DOCKER_INDEX_TYPE,
    DOCKER_MANIFEST_TYPE,
    EMPTY_BLOB,
    EMPTY_DIGEST,
    INDEX_TYPE,
    MANIFEST_TYPE,
    MAX_MANIFEST_BYTES,
    Descriptor,
    Manifest,
    check_digest,
    digest_of,
    load_object,
    media_type_of,
    parse_manifest,
)
from uenvd.oci.ranged import OPEN_READS, HttpRange, sent_range
from uenvd.oci.reference import (
    RegistryAddress,
    check_reference,
    is_digest,
    is_fallback_tag,
    is_repository,
    is_tag,
)
from uenvd.oci.referrers import list_referrers
from uenvd.oci.remote import Progress, never, no_progress
from uenvd.oci.transport import PIECE_BYTES, Reply, Transport, join
from uenvd.oci.upload import mount, upload_bytes, upload_file, upload_stream

MAX_LIST_BYTES: Final = 16 << 20
MAX_PAGES: Final = 1000
MAX_ENTRIES: Final = 200_000

_STORED: Final = frozenset({200, 201, 202})
_DELETED: Final = frozenset({200, 202, 204, 404})
_CANNOT_DELETE: Final = frozenset({400, 405, 501})
_UNKNOWN_BLOB_PAUSES_S: Final = (0.1, 0.3)
_UPDATES: Final = tuple(threading.Lock() for _ in range(64))
_ACCEPT = ", ".join([MANIFEST_TYPE, DOCKER_MANIFEST_TYPE, INDEX_TYPE, DOCKER_INDEX_TYPE])
_NEXT = re.compile(r"<([^>]*)>\s*;[^,]*\brel\s*=\s*\"?next\"?")


class RegistryRemote:
    """`uenvd.oci.remote.Remote` over HTTP. Safe to use from several threads; tokens and deadlines are kept apart by thread."""

    def __init__(
        self,
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
    ) -> None:
        self.address = address
        self._http = Transport(
            address,
            keyring=Keyring(address.host, credential, auth_file, token_file, username),
            ca_file=ca_file,
            timeout_connect_s=timeout_connect_s,
            timeout_read_s=timeout_read_s,
            deadline_s=deadline_s,
        )
        self._api_seen = False

    def deadline(
        self, seconds: float | None, cancelled: Callable[[], bool] = never
    ) -> AbstractContextManager[Any]:
        """See `Remote.deadline`."""
        return self._http.watch(seconds, cancelled)

    def tags(self, repository: str) -> list[str]:
        """See `Remote.tags`."""
        return [tag for tag in self.every_tag(repository) if not is_fallback_tag(tag)]

    def every_tag(self, repository: str) -> list[str]:
        """See `Remote.every_tag`."""
        self._check_repository(repository)
        url = self._url(repository, "tags/list")
        try:
            found = self._paged(url, "tags", scope=self._scope(repository), what=f"the tags of {repository}")
        except NotFound:
            self._expect_api()
            return []
        return sorted({tag for tag in found if is_tag(tag)})

    def manifest(self, repository: str, reference: str) -> Manifest:
        """See `Remote.manifest`."""
        reply = self.raw_manifest(repository, reference)
        try:
            return parse_manifest(reply.body, None)
        except ManifestError as error:
            raise ManifestError(
                f"{self._name(repository, reference)}: {error.message}", hint=error.hint
            ) from error

    def manifest_bytes(self, repository: str, reference: str) -> tuple[bytes, str]:
        """See `Remote.manifest_bytes`."""
        reply = self.raw_manifest(repository, reference)
        return reply.body, media_type_of(reply.body, reply.headers.get("Content-Type", ""))

    def resolve(self, repository: str, tag: str) -> str:
        """See `Remote.resolve`."""
        return digest_of(self.raw_manifest(repository, tag).body)

    def raw_manifest(self, repository: str, reference: str) -> Reply:
        """Return the answer with the verified bytes of a manifest or an index."""
        check_reference(repository, reference)
        reply = self._http.fetch(
            "GET",
            self._url(repository, f"manifests/{reference}"),
            scope=self._scope(repository),
            what=self._name(repository, reference),
            limit_bytes=MAX_MANIFEST_BYTES,
            headers={"Accept": _ACCEPT},
        )
        announced = reply.headers.get("Docker-Content-Digest", "")
        if is_digest(reference):
            check_digest(reply.body, reference, f"{self.address.host}: the manifest")
        elif is_digest(announced):
            check_digest(
                reply.body, announced, f"{self.address.host}: the manifest of {repository}:{reference}"
            )
        self._api_seen = True
        return reply

    def small_blob(self, repository: str, descriptor: Descriptor, limit_bytes: int) -> bytes:
        """See `Remote.small_blob`."""
        self._check_repository(repository)
        if descriptor.digest == EMPTY_DIGEST:
            return EMPTY_BLOB
        what = f"the blob {descriptor.digest} of {repository}"
        if descriptor.size_bytes > limit_bytes:
            raise RegistryError(
                f"{what} has {descriptor.size_bytes} bytes, more than the {limit_bytes} that are allowed"
            )
        reply = self._http.fetch(
            "GET",
            self._url(repository, f"blobs/{descriptor.digest}"),
            scope=self._scope(repository),
            what=what,
            limit_bytes=limit_bytes,
        )
        check_digest(reply.body, descriptor.digest, f"{self.address.host}: {what}")
        if len(reply.body) != descriptor.size_bytes:
            raise DigestMismatch(
                f"{what} has {len(reply.body)} bytes, its manifest says {descriptor.size_bytes}"
            )
        return reply.body

    def stream_blob(
        self, repository: str, descriptor: Descriptor, offset_bytes: int, cancelled: Callable[[], bool]
    ) -> Iterator[bytes]:
        """See `Remote.stream_blob`. A registry that ignores ranges is asked anyway, and what comes before the offset is dropped."""
        self._check_repository(repository)
        size = descriptor.size_bytes
        if not 0 <= offset_bytes <= size:
            raise ValueError(f"offset {offset_bytes} outside of a blob of {size} bytes")
        if offset_bytes == size:
            return
        at, blob = 0, None
        try:
            while at < size:
                if blob is None:
                    blob = self._opened_repeatedly(repository, descriptor, offset_bytes, cancelled)
                    at = blob.first_byte
                buffer = bytearray(min(PIECE_BYTES, size - at))
                count = blob.readinto(memoryview(buffer))
                at += count
                if at > offset_bytes:
                    del buffer[count:]
                    yield bytes(buffer[max(0, offset_bytes - at + count) :])
        finally:
            if blob is not None:
                blob.close()

    def open_range(
        self,
        repository: str,
        descriptor: Descriptor,
        first_byte: int,
        end_byte: int,
        cancelled: Callable[[], bool] = never,
    ) -> HttpRange:
        """See `Remote.open_range`."""
        with (
            self._http.watch(OPEN_READS * self._http.timeout_read_s, cancelled),
            self._http.errors(self._blob_name(repository, descriptor)),
        ):
            return self._open(repository, descriptor, first_byte, end_byte, cancelled)

    def _opened_repeatedly(
        self, repository: str, descriptor: Descriptor, first_byte: int, cancelled: Callable[[], bool]
    ) -> HttpRange:
        with (
            self._http.watch(None, cancelled) as watch,
            self._http.errors(self._blob_name(repository, descriptor)),
        ):
            return self._http.repeatedly(
                lambda: self._open(repository, descriptor, first_byte, descriptor.size_bytes, cancelled),
                watch,
            )

    def _open(
        self,
        repository: str,
        descriptor: Descriptor,
        first_byte: int,
        end_byte: int,
        cancelled: Callable[[], bool],
    ) -> HttpRange:
        self._check_repository(repository)
        size = descriptor.size_bytes
        if not 0 <= first_byte < end_byte <= size:
            raise ValueError(f"bytes {first_byte}..{end_byte} are no part of a blob of {size} bytes")
        # Closed: some registries answer 416 to an open range.
        whole = first_byte == 0 and end_byte == size
        headers = {} if whole else {"Range": f"bytes={first_byte}-{end_byte - 1}"}
        what = self._blob_name(repository, descriptor)
        response = self._http.open(
            self._url(repository, f"blobs/{descriptor.digest}"),
            scope=self._scope(repository),
            what=what,
            headers=headers,
            accept=frozenset({200, 206}),
        )
        try:
            first, end = sent_range(response, first_byte, end_byte, size, what)
        except BaseException:
            response.close()
            raise
        return HttpRange(self._http, response, first, end, what, cancelled, ignores_range=end > end_byte)

    def without_mirrors(self) -> RegistryRemote:
        """See `Remote.without_mirrors`."""
        return self

    def _blob_name(self, repository: str, descriptor: Descriptor) -> str:
        return f"the blob {descriptor.digest} of {repository}"

    def repositories(self, prefix: str) -> list[str]:
        """See `Remote.repositories`."""
        own = f"{self.address.prefix}/" if self.address.prefix else ""
        try:
            names = self._paged(
                self._http.url(f"_catalog?{urlencode({'n': 1000})}"),
                "repositories",
                scope="registry:catalog",
                what="the list of repositories",
            )
        except (RegistryDenied, NotFound, RegistryError) as error:
            raise type(error)(
                f"{self.address.host} does not list its repositories: {error.message}",
                hint="name the image in full: name/version:tag@system%uarch",
            ) from error
        return sorted(
            {
                name.removeprefix(own)
                for name in names
                if is_repository(name) and name.startswith(own + prefix)
            }
        )

    def referrers(self, repository: str, digest: str, artifact_type: str | None) -> list[Descriptor]:
        """See `Remote.referrers`."""
        check_reference(repository, digest)
        return list_referrers(self, self._http, self.full_name(repository), repository, digest, artifact_type)

    def push_blob(
        self, repository: str, path: Path, descriptor: Descriptor, progress: Progress = no_progress
    ) -> None:
        """See `Remote.push_blob`. One streamed PUT; a restart after a failure sends it from the beginning."""
        self._check_repository(repository)
        upload_file(self._http, self.full_name(repository), path, descriptor, progress)

    def push_bytes(self, repository: str, data: bytes, media_type: str) -> Descriptor:
        """See `Remote.push_bytes`."""
        self._check_repository(repository)
        descriptor = Descriptor(media_type, digest_of(data), len(data))
        upload_bytes(self._http, self.full_name(repository), data, descriptor)
        return descriptor

    def push_stream(
        self,
        repository: str,
        descriptor: Descriptor,
        pieces: Callable[[], Iterator[bytes]],
        progress: Progress = no_progress,
    ) -> None:
        """See `Remote.push_stream`."""
        self._check_repository(repository)
        upload_stream(self._http, self.full_name(repository), pieces, descriptor, progress)

    def mount_blob(self, repository: str, descriptor: Descriptor, source: str) -> bool:
        """See `Remote.mount_blob`."""
        self._check_repository(repository)
        self._check_repository(source)
        return mount(self._http, self.full_name(repository), self.full_name(source), descriptor)

    def push_attachment(
        self, repository: str, tag: str, raw: bytes, subject: str, media_type: str = MANIFEST_TYPE
    ) -> bool:
        """See `Remote.push_attachment`. The registry says by a header that it has the referrers API ("Pushing Manifests with Subject")."""
        reply = self._put_manifest(repository, tag, raw, media_type)
        return reply.headers.get("OCI-Subject", "") == subject

    def untag(self, repository: str, tag: str) -> bool:
        """See `Remote.untag`. Some registries delete what the tag names, too: that is put back, its blobs are still there."""
        try:
            raw, media_type = self.manifest_bytes(repository, tag)
        except NotFound:
            return True
        if not self._delete(repository, tag):
            return False
        try:
            self.manifest_bytes(repository, digest_of(raw))
        except NotFound:
            self.push_manifest(repository, None, raw, media_type)
        return True

    def delete(self, repository: str, digest: str) -> bool:
        """See `Remote.delete`."""
        if not is_digest(digest):
            raise RegistryError(f"{digest!r} is no digest")
        return self._delete(repository, digest)

    def _delete(self, repository: str, reference: str) -> bool:
        """Ask for a deletion (specification, "Deleting Manifests", "Deleting tags"); False where the registry has none."""
        check_reference(repository, reference)
        reply = self._http.fetch(
            "DELETE",
            self._url(repository, f"manifests/{reference}"),
            scope=self._scope(repository, "delete"),
            what=self._name(repository, reference),
            accept=_DELETED | _CANNOT_DELETE,
        )
        return reply.status in _DELETED

    @contextmanager
    def updating(self, name: str) -> Iterator[bool]:
        """See `Remote.updating`. A registry has no locks (docker-registry ignores ``If-Match``): only threads are kept out."""
        with _UPDATES[hash((str(self.address), name)) % len(_UPDATES)]:
            yield False

    def push_manifest(
        self, repository: str, tag: str | None, raw: bytes, media_type: str = MANIFEST_TYPE
    ) -> str:
        """See `Remote.push_manifest`."""
        self._put_manifest(repository, tag, raw, media_type)
        return digest_of(raw)

    def _put_manifest(self, repository: str, tag: str | None, raw: bytes, media_type: str) -> Reply:
        digest = digest_of(raw)
        reference = tag if tag is not None else digest
        check_reference(repository, reference)
        what = self._name(repository, reference)

        def put(accept: frozenset[int]) -> Reply:
            return self._http.fetch(
                "PUT",
                self._url(repository, f"manifests/{reference}"),
                scope=self._scope(repository, "push"),
                what=what,
                headers={"Content-Type": media_type},
                data=raw,
                accept=accept,
            )

        with self._http.bounded() as watch, self._http.errors(what):
            reply = put(_STORED | {400})
            for pause_s in _UNKNOWN_BLOB_PAUSES_S:
                if reply.status != 400 or b"BLOB_UNKNOWN" not in reply.body:
                    break
                # docker-registry does not see a blob at the moment at which somebody else uploads the same one.
                watch.sleep(pause_s * random.uniform(0.7, 1.3))  # noqa: S311 -- spreads clients, no secret
                reply = put(_STORED | {400})
            if reply.status == 400:
                reply = put(_STORED)
        announced = reply.headers.get("Docker-Content-Digest", digest)
        if announced != digest:
            raise DigestMismatch(
                f"{self.address.host} stored the manifest of {repository} as {announced} instead of {digest}"
            )
        return reply

    def close(self) -> None:
        """See `Remote.close`."""
        self._http.session.close()

    def full_name(self, repository: str) -> str:
        """Return the name under which the registry knows a repository: with the prefix of the address."""
        return f"{self.address.prefix}/{repository}" if self.address.prefix else repository

    def _url(self, repository: str, rest: str) -> str:
        return self._http.url(f"{self.full_name(repository)}/{rest}")

    def _scope(self, repository: str, action: str = "pull") -> str:
        return f"{self.full_name(repository)}:{action}"

    def _name(self, repository: str, reference: str) -> str:
        return f"{repository}{'@' if is_digest(reference) else ':'}{reference}"

    def _check_repository(self, repository: str) -> None:
        if not is_repository(repository):
            raise RegistryError(f"{repository!r} is no valid repository name")

    def _expect_api(self) -> None:
        """Tell "no such repository" from "no registry": the latter is an error of the address."""
        if self._api_seen:
            return
        try:
            self._http.fetch(
                "GET",
                self._http.url(""),
                scope=":pull",
                what="the registry's interface",
                accept=frozenset({200, 401, 403}),
            )
        except RegistryDenied:
            pass
        except NotFound as error:
            raise RegistryError(
                f"{self.address.base_url} is no OCI registry: there is nothing at /v2/",
                hint="check the address of the registry; a path in it is the prefix of the repositories",
            ) from error
        self._api_seen = True

    def _paged(self, url: str, key: str, *, scope: str, what: str) -> list[str]:
        """Collect a list over its pages (specification, "Listing tags": Link with rel=next)."""
        found: list[str] = []
        seen: set[str] = set()
        with self._http.bounded():
            for _ in range(MAX_PAGES):
                seen.add(url)
                reply = self._http.fetch("GET", url, scope=scope, what=what, limit_bytes=MAX_LIST_BYTES)
                try:
                    entries = load_object(reply.body, what).get(key)
                except UenvError:
                    entries = ()
                if entries is None:
                    entries = []
                if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
                    raise RegistryError(
                        f"{self.address.host}: the answer for {what} is no list",
                        hint="is this the address of an OCI registry?",
                    )
                found.extend(entries)
                self._api_seen = True
                link = _NEXT.search(reply.headers.get("Link", ""))
                if link is None or not entries:
                    return found
                url = join(reply, link.group(1))
                if url in seen or not self._http.is_ours(url) or len(found) > MAX_ENTRIES:
                    break
        raise RegistryError(f"{self.address.host}: {what} does not end, or leads to another host")
