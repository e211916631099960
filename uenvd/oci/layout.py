"""A directory instead of a registry: an OCI image layout (image specification 1.1, ``image-layout.md``).

``index.json`` lists every tagged manifest with the annotation ``org.opencontainers.image.ref.name`` = ``<repository>:<tag>``, which
``skopeo … oci:DIR:<repository>:<tag>`` understands. It is replaced atomically under a lock, so several processes may push at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from threading import local
from typing import Any, Final, cast

from uenvd.errors import (
    Cancelled,
    DigestMismatch,
    ManifestError,
    NotFound,
    RegistryError,
    RegistryUnreachable,
    UsageError,
)
from uenvd.oci.fallback import by_tags, settled
from uenvd.oci.files import (
    COPY_BYTES,
    locked,
    pieces_of,
    read_bounded,
    storage_errors,
    sync_directory,
    write_atomically,
)
from uenvd.oci.manifest import (
    DOCKER_INDEX_TYPE,
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
    parse_descriptor,
    parse_index,
    parse_manifest,
)
from uenvd.oci.reference import (
    RegistryAddress,
    check_reference,
    is_digest,
    is_fallback_tag,
    is_repository,
    is_tag,
)
from uenvd.oci.remote import Progress, never, no_progress

REF_NAME: Final = "org.opencontainers.image.ref.name"
MAX_INDEX_BYTES: Final = 64 << 20
LAYOUT_BYTES: Final = b'{"imageLayoutVersion":"1.0.0"}'


class LayoutRemote:
    """`uenvd.oci.remote.Remote` over a directory. The directory is made by the first push; before, it is unreachable."""

    def __init__(self, address: RegistryAddress) -> None:
        self.address = address
        self.root = Path(address.path).expanduser()
        self._local = local()

    @contextmanager
    def deadline(self, seconds: float | None, cancelled: Callable[[], bool] = never) -> Iterator[None]:
        """See `Remote.deadline`. Looked at between operations; a file system that hangs is not interrupted."""
        before = getattr(self._local, "bounds", None)
        self._local.bounds = (None if seconds is None else time.monotonic() + seconds, cancelled)
        try:
            yield
        finally:
            self._local.bounds = before

    def tags(self, repository: str) -> list[str]:
        """See `Remote.tags`."""
        return [tag for tag in self.every_tag(repository) if not is_fallback_tag(tag)]

    def every_tag(self, repository: str) -> list[str]:
        """See `Remote.every_tag`."""
        self._check_repository(repository)
        begin = f"{repository}:"
        names = (name.removeprefix(begin) for name in self._names() if name.startswith(begin))
        return sorted({tag for tag in names if is_tag(tag)})

    def repositories(self, prefix: str) -> list[str]:
        """See `Remote.repositories`."""
        found = {name.rpartition(":")[0] for name in self._names()}
        return sorted(name for name in found if name.startswith(prefix) and is_repository(name))

    def manifest(self, repository: str, reference: str) -> Manifest:
        """See `Remote.manifest`. A digest is found whatever the repository: blobs of a layout have none."""
        raw, digest = self._raw_manifest(repository, reference)
        try:
            return parse_manifest(raw, digest)
        except ManifestError as error:
            raise ManifestError(f"{repository} {reference}: {error.message}", hint=error.hint) from error

    def manifest_bytes(self, repository: str, reference: str) -> tuple[bytes, str]:
        """See `Remote.manifest_bytes`."""
        raw, _ = self._raw_manifest(repository, reference)
        return raw, media_type_of(raw)

    def resolve(self, repository: str, tag: str) -> str:
        """See `Remote.resolve`. A layout that does not exist yet has no tags."""
        if not (self.root / "index.json").exists():
            raise NotFound(f"{self.address}: {repository}:{tag} is not there")
        return self._raw_manifest(repository, tag)[1]

    def small_blob(self, repository: str, descriptor: Descriptor, limit_bytes: int) -> bytes:
        """See `Remote.small_blob`."""
        self._check_repository(repository)
        if descriptor.digest == EMPTY_DIGEST:
            return EMPTY_BLOB
        data = self._read_blob(descriptor.digest, limit_bytes)
        check_digest(data, descriptor.digest, f"{self.address}: the blob")
        if len(data) != descriptor.size_bytes:
            raise DigestMismatch(
                f"{self.address}: {descriptor.digest} has {len(data)} bytes, not {descriptor.size_bytes}"
            )
        return data

    def stream_blob(
        self, repository: str, descriptor: Descriptor, offset_bytes: int, cancelled: Callable[[], bool]
    ) -> Iterator[bytes]:
        """See `Remote.stream_blob`."""
        self._check_repository(repository)

        def check() -> None:
            self._check()
            if cancelled():
                raise Cancelled("the transfer was cancelled")

        left = descriptor.size_bytes - offset_bytes
        what = f"{self.address}: the blob {descriptor.digest} is not there"
        with self._readable("reading a blob of"):
            for piece in pieces_of(self._blob(descriptor.digest), offset_bytes, check, what):
                yield piece[:left]
                left -= len(piece)
                if left <= 0:
                    return
        if left:
            raise DigestMismatch(f"{self.address}: the blob {descriptor.digest} is {left} bytes too short")

    def open_range(
        self,
        repository: str,
        descriptor: Descriptor,
        first_byte: int,
        end_byte: int,
        cancelled: Callable[[], bool] = never,
    ) -> FileRange:
        """See `Remote.open_range`."""
        self._check_repository(repository)
        self._check()
        path = self._blob(descriptor.digest)
        with self._readable("reading a blob of"):
            try:
                file = path.open("rb", buffering=0)
            except FileNotFoundError as error:
                raise NotFound(f"{self.address}: the blob {descriptor.digest} is not there") from error
            size = os.fstat(file.fileno()).st_size
        if size != descriptor.size_bytes:
            file.close()
            raise DigestMismatch(
                f"{self.address}: the blob {descriptor.digest} has {size} bytes, not {descriptor.size_bytes}"
            )
        return FileRange(file, first_byte, end_byte, self, cancelled)

    def without_mirrors(self) -> LayoutRemote:
        """See `Remote.without_mirrors`."""
        return self

    def referrers(self, repository: str, digest: str, artifact_type: str | None) -> list[Descriptor]:
        """See `Remote.referrers`. By the tag schema (``sha256-<hex>``), as the oras command does in a layout."""
        check_reference(repository, digest)
        return settled(self, repository, by_tags(self, repository, digest), artifact_type)

    def push_blob(
        self, repository: str, path: Path, descriptor: Descriptor, progress: Progress = no_progress
    ) -> None:
        """See `Remote.push_blob`."""

        def pieces() -> Iterator[bytes]:
            try:
                with path.open("rb") as source:
                    while piece := source.read(COPY_BYTES):
                        yield piece
            except OSError as error:
                raise UsageError(f"{path} cannot be read: {error.strerror}") from error

        self.push_stream(repository, descriptor, pieces, progress, name=str(path))

    def push_stream(
        self,
        repository: str,
        descriptor: Descriptor,
        pieces: Callable[[], Iterator[bytes]],
        progress: Progress = no_progress,
        *,
        name: str = "what was received",
    ) -> None:
        """See `Remote.push_stream`. ``name`` is what messages call the source."""
        self._check_repository(repository)
        target = self._prepare_blob(descriptor.digest)
        if target.exists():
            progress(descriptor.size_bytes, descriptor.size_bytes)
            return
        hasher, done = hashlib.sha256(), 0
        temporary = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
        try:
            with storage_errors(self.root, "writing a blob into"), temporary.open("xb") as file:
                for piece in pieces():
                    self._check()
                    hasher.update(piece)
                    file.write(piece)
                    done += len(piece)
                    progress(done, descriptor.size_bytes)
                if f"sha256:{hasher.hexdigest()}" != descriptor.digest or done != descriptor.size_bytes:
                    raise DigestMismatch(
                        f"{name} does not have the digest {descriptor.digest}",
                        hint="was it changed meanwhile?",
                    )
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(target)
                sync_directory(target.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def mount_blob(self, repository: str, descriptor: Descriptor, source: str) -> bool:
        """See `Remote.mount_blob`. All repositories of a layout share their blobs."""
        self._check_repository(repository)
        self._check_repository(source)
        return self._blob(descriptor.digest).exists()

    def push_attachment(
        self, repository: str, tag: str, raw: bytes, subject: str, media_type: str = MANIFEST_TYPE
    ) -> bool:
        """See `Remote.push_attachment`. A layout lists nothing by itself."""
        check_reference(repository, subject)
        self.push_manifest(repository, tag, raw, media_type)
        return False

    def untag(self, repository: str, tag: str) -> bool:
        """See `Remote.untag`."""
        check_reference(repository, tag)
        name = f"{repository}:{tag}"
        with storage_errors(self.root, "updating the index of"), locked(self.root / ".index.lock"):
            self._write_index([entry for entry in self._index() if _ref_name(entry) != name])
        return True

    def delete(self, repository: str, digest: str) -> bool:
        """See `Remote.delete`. Blobs that were reached by this manifest and are by no other one are removed."""
        check_reference(repository, digest)
        begin = f"{repository}:"
        with storage_errors(self.root, "deleting from"), locked(self.root / ".index.lock"):
            kept = [
                entry
                for entry in self._index()
                if entry.get("digest") != digest or not _ref_name(entry).startswith(begin)
            ]
            before = self._reached([digest])
            self._write_index(kept)
            alive = self._reached(str(entry.get("digest")) for entry in kept)
            for one in before - alive:
                self._blob(one).unlink(missing_ok=True)
        return True

    def _reached(self, digests: Iterable[str]) -> set[str]:
        """Return all blobs that manifests and indexes lead to, their subjects among them."""
        found: set[str] = set()
        waiting = [digest for digest in digests if is_digest(digest)]
        while waiting:
            digest = waiting.pop()
            if digest in found:
                continue
            found.add(digest)
            try:
                raw = self._read_blob(digest, MAX_MANIFEST_BYTES)
                if media_type_of(raw) in {INDEX_TYPE, DOCKER_INDEX_TYPE}:
                    waiting += [entry.digest for entry in parse_index(raw)]
                    continue
                manifest = parse_manifest(raw, None)
            except (NotFound, ManifestError):
                continue
            found |= {blob.digest for blob in (manifest.config, *manifest.layers)}
            waiting += [manifest.subject.digest] if manifest.subject else []
        return found

    @contextmanager
    def updating(self, name: str) -> Iterator[bool]:
        """See `Remote.updating`. One lock for the whole layout, held against all processes of this machine."""
        self._check()
        with storage_errors(self.root, f"updating {name} in"):
            self.root.mkdir(parents=True, exist_ok=True)
            with locked(self.root / ".update.lock"):
                yield True

    def push_bytes(self, repository: str, data: bytes, media_type: str) -> Descriptor:
        """See `Remote.push_bytes`."""
        self._check_repository(repository)
        descriptor = Descriptor(media_type, digest_of(data), len(data))
        self._store(data, descriptor.digest)
        return descriptor

    def push_manifest(
        self, repository: str, tag: str | None, raw: bytes, media_type: str = MANIFEST_TYPE
    ) -> str:
        """See `Remote.push_manifest`. Like a registry, it refuses a manifest whose blobs are not there."""
        digest = digest_of(raw)
        check_reference(repository, tag if tag is not None else digest)
        artifact_type: str | None = None
        if media_type != INDEX_TYPE:
            manifest = parse_manifest(raw, digest)
            artifact_type = manifest.artifact_type
            for blob in (manifest.config, *manifest.layers):
                if blob.digest != EMPTY_DIGEST and not self._blob(blob.digest).exists():
                    raise RegistryError(
                        f"{self.address}: the blob {blob.digest} of the manifest is not there"
                    )
            if manifest.config.digest == EMPTY_DIGEST:
                self._store(EMPTY_BLOB, EMPTY_DIGEST)
        self._store(raw, digest)
        if tag is not None:
            name = f"{repository}:{tag}"
            entry = Descriptor(media_type, digest, len(raw), {REF_NAME: name}, artifact_type)
            with storage_errors(self.root, "updating the index of"), locked(self.root / ".index.lock"):
                kept = [other for other in self._index() if _ref_name(other) != name]
                self._write_index([*kept, entry.to_json()])
        return digest

    def close(self) -> None:
        """See `Remote.close`."""

    def _store(self, data: bytes, digest: str) -> None:
        target = self._prepare_blob(digest)
        if not target.exists():
            with storage_errors(self.root, "writing a blob into"):
                write_atomically(target, data)

    def _prepare_blob(self, digest: str) -> Path:
        self._check()
        target = self._blob(digest)
        with storage_errors(self.root, "writing to the image layout"):
            target.parent.mkdir(parents=True, exist_ok=True)
            if not (self.root / "oci-layout").exists():
                write_atomically(self.root / "oci-layout", LAYOUT_BYTES)
            with locked(self.root / ".index.lock"):
                if not (self.root / "index.json").exists():
                    self._write_index([])
        return target

    def _blob(self, digest: str) -> Path:
        return self.root / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def _read_blob(self, digest: str, limit_bytes: int) -> bytes:
        self._check()
        with self._readable("reading a blob of"):
            try:
                return read_bounded(self._blob(digest), limit_bytes)
            except FileNotFoundError as error:
                self._index()
                raise NotFound(f"{self.address}: {digest} is not there") from error

    def _raw_manifest(self, repository: str, reference: str) -> tuple[bytes, str]:
        check_reference(repository, reference)
        digest = reference
        if not is_digest(reference):
            name = f"{repository}:{reference}"
            # Some tools append without removing the former entry: the last one counts.
            entry = next((entry for entry in reversed(self._index()) if _ref_name(entry) == name), None)
            if entry is None:
                raise NotFound(f"{self.address}: {name} is not there")
            digest = parse_descriptor(entry, f"the entry for {name} in {self.root / 'index.json'}").digest
        raw = self._read_blob(digest, MAX_MANIFEST_BYTES)
        check_digest(raw, digest, f"{self.address}: the manifest")
        return raw, digest

    def _names(self) -> list[str]:
        return [name for name in map(_ref_name, self._index()) if ":" in name]

    def _index(self) -> list[dict[str, Any]]:
        """Return the entries of ``index.json`` as they are; foreign ones are kept."""
        self._check()
        path = self.root / "index.json"
        with self._readable("reading"):
            try:
                raw = read_bounded(path, MAX_INDEX_BYTES)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise RegistryUnreachable(
                    f"there is no image layout at {self.root} (no index.json)",
                    hint="check the path, or push a first image: uenvd-publish push FILE LABEL --registry "
                    + str(self.address),
                ) from error
        entries = load_object(raw, str(path)).get("manifests")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ManifestError(f"{path} has no list of manifests")
        return cast("list[dict[str, Any]]", entries)

    def _write_index(self, entries: list[dict[str, Any]]) -> None:
        body = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}
        write_atomically(self.root / "index.json", json.dumps(body, separators=(",", ":")).encode())

    @contextmanager
    def _readable(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RegistryUnreachable(
                f"{doing} the image layout {self.root} fails: {error.strerror}"
            ) from error

    def _check(self) -> None:
        ends, cancelled = getattr(self._local, "bounds", None) or (None, never)
        if cancelled():
            raise Cancelled("the transfer was cancelled")
        if ends is not None and time.monotonic() >= ends:
            raise RegistryUnreachable(f"{self.address} did not answer in time")

    def _check_repository(self, repository: str) -> None:
        if not is_repository(repository):
            raise RegistryError(f"{repository!r} is no valid repository name")


class FileRange:
    """`uenvd.oci.remote.BlobRange` of a file."""

    ignores_range = False
    trusted = True

    def __init__(
        self,
        file: FileIO,
        first_byte: int,
        end_byte: int,
        layout: LayoutRemote,
        cancelled: Callable[[], bool],
    ) -> None:
        self.first_byte = self._at = first_byte
        self.end_byte = end_byte
        self._file = file
        self._layout = layout
        self._cancelled = cancelled

    def readinto(self, buffer: memoryview) -> int:
        """See `BlobRange.readinto`."""
        self._layout._check()
        if self._cancelled():
            raise Cancelled("the transfer was cancelled")
        with self._layout._readable("reading a blob of"):
            count = os.preadv(self._file.fileno(), [buffer[: self.end_byte - self._at]], self._at)
        if not count:
            raise RegistryUnreachable(f"{self._layout.address}: the file {self._file.name} became shorter")
        self._at += count
        return count

    def close(self) -> None:
        """See `BlobRange.close`."""
        self._file.close()


def _ref_name(entry: dict[str, Any]) -> str:
    annotations = entry.get("annotations")
    name = annotations.get(REF_NAME) if isinstance(annotations, dict) else None
    return name if isinstance(name, str) else ""
