"""The cache of one node: a content-addressed store of images. All state is in the file system; every step survives ``kill -9``.

Layout of ``root`` (an OCI image layout, readable by skopeo and oras)::

    oci-layout  index.json     complete images, as ``<repository>:<tag>`` or ``<repository>@<digest>``
    blobs/sha256/<hex>         only bytes whose digest was verified; mtime = last use
    partial/<hex>.part         pulls on their way (`uenvd.cache.partial`)
    images/<hex>.json          one record for each manifest: repository, tags, layer, pinned
    registry/                  what the registry said last (`uenvd.cache.memory`)
    .lock                      flock for changes of records, index and evictions

**A lease is a shared lock** (flock) on the open file description of a blob: whoever holds a descriptor from `Store.open`, or inherited a
copy of it, keeps the blob from eviction, and the kernel ends the lease with the last copy.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from uenvd.cache.memory import RegistryMemory
from uenvd.cache.partial import Partial
from uenvd.cache.records import CachedImage, Record
from uenvd.errors import DigestMismatch, InUse, ManifestError, NotFound, StorageError, UenvError
from uenvd.oci.files import locked, read_bounded, storage_errors, sync_directory, write_atomically
from uenvd.oci.layout import LAYOUT_BYTES, REF_NAME
from uenvd.oci.manifest import (
    EMPTY_BLOB,
    EMPTY_DIGEST,
    INDEX_TYPE,
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    Descriptor,
    Manifest,
    check_digest,
    parse_manifest,
)
from uenvd.oci.reference import is_digest

log = logging.getLogger(__name__)

PART_KEPT_S: Final = 7 * 86400.0
"""How long the bytes of an interrupted pull wait for its continuation."""
UNUSED_KEPT_S: Final = 3600.0
"""How long a blob without a record, or the temporary file of a writer that is gone, is left alone."""
MAX_RECORD_BYTES: Final = 1 << 20


class Store:
    """The cache in ``root``. Methods block, and may be called from several threads and processes at once.

    Any of them raises `StorageError` (`StorageFull`) when the file system does not let it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.memory = RegistryMemory(root / "registry")
        self._blobs = root / "blobs" / "sha256"
        self._partial = root / "partial"
        self._images = root / "images"

    # -- life

    def prepare(self) -> None:
        """Create what is missing; drop what nobody will finish: parts of blobs that are here, and parts older than 7 days."""
        with storage_errors(self.root, "preparing the cache in"):
            if not self.root.exists():
                # Who may use which image is not for the file system to say: nobody else looks in here.
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for directory in (self._blobs, self._partial, self._images, self.root / "registry"):
                directory.mkdir(parents=True, exist_ok=True)
            with locked(self.root / ".lock"):
                if not (self.root / "oci-layout").exists():
                    write_atomically(self.root / "oci-layout", LAYOUT_BYTES)
                self._sweep()
                self.memory.sweep()
                self._write_index()

    def _sweep(self) -> None:
        for part in self._partial.glob("*.part"):
            with suppress(OSError, InUse):
                if (self._blobs / part.stem).exists() or time.time() - part.stat().st_mtime > PART_KEPT_S:
                    with _exclusive(part):
                        part.unlink()
        for directory in (self.root, self._blobs, self._images, self.root / "registry"):
            for leftover in directory.glob(".*.tmp"):
                # A writer renames within seconds.
                with suppress(OSError):
                    if time.time() - leftover.stat().st_mtime > UNUSED_KEPT_S:
                        leftover.unlink()

    def usage(self) -> tuple[int, int]:
        """Return (bytes that blobs and parts occupy, bytes free to an ordinary user in the file system)."""
        used = 0
        with storage_errors(self.root, "looking at the cache in"):
            for directory in (self._blobs, self._partial):
                for entry in os.scandir(directory):
                    with suppress(FileNotFoundError):
                        used += entry.stat(follow_symlinks=False).st_blocks * 512
            room = os.statvfs(self.root)
        return used, room.f_bavail * room.f_frsize

    # -- blobs

    def has(self, digest: str) -> bool:
        """Tell whether the blob is here, complete and verified."""
        return self._blob(digest).exists()

    def open(self, digest: str) -> int:
        """Return a read-only descriptor of a blob; it is a lease (see the module). The caller closes it. Raises `NotFound`."""
        path = self._blob(digest)
        while True:
            with storage_errors(path, "opening"):
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                except FileNotFoundError as error:
                    raise NotFound(f"the blob {digest} is not in the cache") from error
            try:
                with storage_errors(path, "locking"):
                    fcntl.flock(fd, fcntl.LOCK_SH)
                    gone = os.fstat(fd).st_nlink == 0
            except BaseException:
                os.close(fd)
                raise
            if not gone:
                self.touch(digest)
                return fd
            # Evicted between the open and the lock.
            os.close(fd)

    def touch(self, digest: str) -> None:
        """Note that a blob was used now. Not noting it is no error."""
        with suppress(OSError):
            os.utime(self._blob(digest))

    def begin(self, descriptor: Descriptor) -> Partial:
        """Start or continue to write a blob. Raises `InUse` while another process or thread writes it, `StorageFull`."""
        target = self._blob(descriptor.digest)
        return Partial(descriptor, self._partial / f"{target.name}.part", target)

    def part_bytes(self, digest: str) -> int:
        """Return how many bytes an unfinished pull of the blob has (0 without one)."""
        try:
            return (self._partial / f"{self._blob(digest).name}.part").stat().st_size
        except OSError:
            return 0

    def verify(self, digest: str) -> None:
        """Read a blob again. One that does not have its digest any more is removed. Raises `DigestMismatch`, `NotFound`."""
        fd = self.open(digest)
        with os.fdopen(fd, "rb") as file, storage_errors(self._blob(digest), "reading"):
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if f"sha256:{found}" != digest:
            with storage_errors(self._blob(digest), "removing the damaged blob"):
                self._blob(digest).unlink(missing_ok=True)
            raise DigestMismatch(f"the blob {digest} in the cache was damaged and has been removed")

    # -- images

    def put_manifest(
        self,
        repository: str,
        manifest: Manifest,
        layer: Descriptor,
        config: bytes | None = None,
        *,
        tag: str | None = None,
    ) -> None:
        """Keep a manifest with its config blob, and note that ``repository:tag`` means it now.

        ``layer`` is the squashfs blob; it may come later or be here. Called again once it is here, the image appears in
        ``index.json``. Cheap when nothing is new.
        """
        with storage_errors(self.root, "storing a manifest in"):
            if manifest.config.digest == EMPTY_DIGEST:
                self._put_bytes(EMPTY_DIGEST, EMPTY_BLOB)
            elif config is not None:
                check_digest(config, manifest.config.digest, "the config blob")
                self._put_bytes(manifest.config.digest, config)
            self._put_bytes(manifest.digest, manifest.raw)
            if self._renamed(repository, manifest, layer, tag) is None:
                return  # without the lock: a full or read-only disk does not matter here
            with locked(self.root / ".lock"):
                record = self._renamed(repository, manifest, layer, tag)
                if record is None:
                    return
                if tag is not None:
                    self._take_tag(repository, tag, manifest.digest)
                self._write_record(record)
                self._write_index()

    def _renamed(
        self, repository: str, manifest: Manifest, layer: Descriptor, tag: str | None
    ) -> Record | None:
        """Return the record with the new name; None if that changes nothing."""
        before = self._record(manifest.digest)
        after = (before or Record(manifest.digest, layer, ())).named(repository, tag)
        after = replace(after, listed=self.has(layer.digest))
        return None if after == before else after

    def _take_tag(self, repository: str, tag: str, manifest_digest: str) -> None:
        for other in self._records():
            changed = other.without_tag(repository, tag)
            if other.manifest_digest != manifest_digest and changed != other:
                self._write_record(changed)

    def manifest(self, digest: str) -> Manifest | None:
        """Return a manifest of the cache; None if it is not here (or damaged)."""
        try:
            return parse_manifest(read_bounded(self._blob(digest), MAX_MANIFEST_BYTES), digest)
        except (OSError, UenvError):
            return None

    def config(self, manifest: Manifest) -> bytes | None:
        """Return the config blob of a manifest; None if it is not here (or damaged)."""
        try:
            data = read_bounded(self._blob(manifest.config.digest), MAX_CONFIG_BYTES)
            check_digest(data, manifest.config.digest, "the config blob")
        except (OSError, UenvError):
            return None
        return data

    def images(self, *, complete_only: bool = True) -> list[CachedImage]:
        """Return the images, one for each repository that has it, sorted by repository and digest.

        Only those whose squashfs blob is here, unless told otherwise.
        """
        found = [image for record in self._records() for image in self._cached(record)]
        found = [image for image in found if image.complete or not complete_only]
        return sorted(found, key=lambda image: (image.repository, image.manifest_digest))

    def image(self, manifest_digest: str) -> CachedImage | None:
        """Return one image by the digest of its manifest, complete or not, as the first repository has it."""
        record = self._record(manifest_digest)
        return next(iter(self._cached(record)), None) if record is not None else None

    def pin(self, manifest_digest: str, pinned: bool = True) -> None:
        """Protect an image from eviction, or not any more. Raises `NotFound`."""
        with storage_errors(self.root, "pinning an image in"), locked(self.root / ".lock"):
            self._write_record(replace(self._existing(manifest_digest), pinned=pinned))

    def evict(self, manifest_digest: str) -> int:
        """Remove an image and return how many bytes that freed; blobs that another image uses stay.

        Raises `NotFound`, and `InUse` while somebody has a lease on the squashfs blob, pulls it, or the image is pinned.
        """
        with storage_errors(self.root, "evicting an image from"), locked(self.root / ".lock"):
            record = self._existing(manifest_digest)
            if record.pinned:
                raise InUse(f"the image {manifest_digest} is pinned", hint="unpin it first")
            mine = self._blobs_of(record)
            theirs: set[str] = set()
            for other in self._records():
                if other.manifest_digest != manifest_digest:
                    theirs |= self._blobs_of(other)
            freed = 0
            if record.layer.digest not in theirs:
                freed += self._remove_layer(record.layer.digest)
            # The record goes before the small blobs: a crash in between leaves unused bytes, never a record without its manifest.
            self._record_path(manifest_digest).unlink()
            self._write_index()
            for digest in mine - theirs - {record.layer.digest}:
                freed += _remove(self._blob(digest))
            sync_directory(self._blobs)
            return freed

    def collect(self) -> int:
        """Remove blobs that no image refers to, older than an hour and not leased; return how many bytes that freed."""
        freed = 0
        with storage_errors(self.root, "collecting unused blobs in"), locked(self.root / ".lock"):
            used: set[str] = set()
            for record in self._records():
                used |= self._blobs_of(record)
            for path in self._blobs.iterdir():
                with suppress(InUse, FileNotFoundError):
                    if (
                        f"sha256:{path.name}" not in used
                        and time.time() - path.stat().st_mtime > UNUSED_KEPT_S
                    ):
                        with _exclusive(path):
                            freed += _remove(path)
        return freed

    # -- what the registry said: see RegistryMemory

    def remember_tag(self, repository: str, tag: str, digest: str, when_s: float) -> None:
        """See `RegistryMemory.remember_tag`."""
        self.memory.remember_tag(repository, tag, digest, when_s)

    def recall_tag(self, repository: str, tag: str) -> tuple[str, float] | None:
        """See `RegistryMemory.recall_tag`."""
        return self.memory.recall_tag(repository, tag)

    def remember_tags(self, repository: str, tags: Sequence[str], when_s: float) -> None:
        """See `RegistryMemory.remember_tags`."""
        self.memory.remember_tags(repository, tags, when_s)

    def recall_tags(self, repository: str) -> tuple[list[str], float] | None:
        """See `RegistryMemory.recall_tags`."""
        return self.memory.recall_tags(repository)

    def remember_repositories(self, prefix: str, repositories: Sequence[str], when_s: float) -> None:
        """See `RegistryMemory.remember_repositories`."""
        self.memory.remember_repositories(prefix, repositories, when_s)

    def recall_repositories(self, prefix: str) -> tuple[list[str], float] | None:
        """See `RegistryMemory.recall_repositories`."""
        return self.memory.recall_repositories(prefix)

    # -- inside

    def _blob(self, digest: str) -> Path:
        if not is_digest(digest):
            raise StorageError(f"{digest!r} is no sha256 digest")
        return self._blobs / digest.removeprefix("sha256:")

    def _put_bytes(self, digest: str, data: bytes) -> None:
        path = self._blob(digest)
        if path.exists():
            self.touch(digest)
        else:
            write_atomically(path, data)

    def _remove_layer(self, digest: str) -> int:
        part = self._partial / f"{self._blob(digest).name}.part"
        freed = 0
        if part.exists():
            with _exclusive(part):
                freed += _remove(part)
        if self._blob(digest).exists():
            with _exclusive(self._blob(digest)):
                freed += _remove(self._blob(digest))
        return freed

    def _blobs_of(self, record: Record) -> set[str]:
        manifest = self.manifest(record.manifest_digest)
        config = {manifest.config.digest} if manifest is not None else set()
        return {record.manifest_digest, record.layer.digest} | config

    def _record_path(self, manifest_digest: str) -> Path:
        return self._images / f"{self._blob(manifest_digest).name}.json"

    def _record(self, manifest_digest: str) -> Record | None:
        try:
            return Record.decode(read_bounded(self._record_path(manifest_digest), MAX_RECORD_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, StorageError, ManifestError) as error:
            log.warning("the record of %s in the cache is unusable: %s", manifest_digest, error)
            return None

    def _existing(self, manifest_digest: str) -> Record:
        record = self._record(manifest_digest)
        if record is None:
            raise NotFound(f"the image {manifest_digest} is not in the cache")
        return record

    def _records(self) -> list[Record]:
        with storage_errors(self._images, "listing"):
            names = [path.stem for path in self._images.glob("*.json")]
        found = (self._record(f"sha256:{name}") for name in names if is_digest(f"sha256:{name}"))
        return [record for record in found if record is not None]

    def _write_record(self, record: Record) -> None:
        write_atomically(self._record_path(record.manifest_digest), record.encode())

    def _cached(self, record: Record) -> Iterator[CachedImage]:
        manifest = self.manifest(record.manifest_digest)
        if manifest is None:
            return
        try:
            last_use_s, complete = self._blob(record.layer.digest).stat().st_mtime, True
        except OSError:
            last_use_s, complete = 0.0, False
        for repository, tags in record.names:
            yield CachedImage(repository, tags, manifest, record.layer, record.pinned, complete, last_use_s)

    def _write_index(self) -> None:
        """Derive ``index.json`` from the records, if it says something else."""
        entries = []
        for image in self.images():
            names = [f"{image.repository}:{tag}" for tag in image.tags]
            for name in names or [f"{image.repository}@{image.manifest_digest}"]:
                entries.append(replace(image.manifest.descriptor, annotations={REF_NAME: name}).to_json())
        body = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}
        data = json.dumps(body, separators=(",", ":")).encode()
        path = self.root / "index.json"
        if not path.exists() or path.read_bytes() != data:
            write_atomically(path, data)


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file inside the ``with`` block. Raises `InUse` at once if anybody has a lock on it."""
    # Open for writing: NFS gives an exclusive lock only then.
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(f"{path.name} is in use") from None
        yield
    finally:
        os.close(fd)


def _remove(path: Path) -> int:
    try:
        size = path.stat().st_blocks * 512
        path.unlink()
    except FileNotFoundError:
        return 0
    return size
