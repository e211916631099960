"""One cache directory: blobs, and a record of each image. All state is in the file system; every step survives ``kill -9``.

Layout of ``root`` (an OCI image layout, readable by skopeo and oras)::

    oci-layout  index.json     complete images, as ``<repository>:<tag>`` or ``<repository>@<digest>``
    blobs/sha256/<hex>         only bytes whose digest was verified (`uenvd.cache.blobs`)
    partial/<hex>.part .map    pulls on their way (`uenvd.cache.partial`)
    claims/<hex>.claim         who writes what (`uenvd.cache.claim`)
    images/<hex>.json          one record for each manifest: repository, tags, layer, pinned
    quarantine/                blobs that turned out to be damaged
    scrub/<hex>                when a blob was checked last (`uenvd.cache.scrub`)
    registry/                  what the registry said last (`uenvd.cache.memory`)
    .lock                      flock for changes of records and index
    leases/ used/ trash/       of a shared directory: who reads what, when it was used last, what is being removed
    wishes/<hex>.<token>       of a shared directory: what readers of other nodes wait for (`uenvd.cache.wishes`)

Of a shared directory all changes are made as ``cache.user``, by any node; instead of ``.lock`` there is a heartbeat claim.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from uenvd.cache.blobs import GRACE_S, Blobs, removed
from uenvd.cache.claim import HeartbeatClaim
from uenvd.cache.identity import CacheUser, as_user
from uenvd.cache.memory import RegistryMemory
from uenvd.cache.partial import Partial
from uenvd.cache.policy import Candidate, Room, victims
from uenvd.cache.recordfiles import RecordFiles
from uenvd.cache.records import CachedImage, Record
from uenvd.errors import DigestMismatch, InUse, NotFound, StorageError, StorageFull, UenvError
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
QUARANTINE_KEPT_S: Final = 7 * 86400.0
"""How long a damaged blob is kept for those who want to know what happened to it."""
UNUSED_KEPT_S: Final = 3600.0
"""How long a blob without a record, or the temporary file of a writer that is gone, is left alone."""
_CHANGE_PATIENCE_S: Final = 45.0
"""Longer than a dead node's claim lives."""


class Directory:
    """The cache in ``root``. Methods block, and may be called from several threads, processes and (of a shared one) nodes at once.

    Any of them raises `StorageError` (`StorageFull`) when the file system does not let it.

    Args:
        root: the directory.
        user: whose rights are used; the process's own by default.
        node: this daemon's name among those that share the directory; None if it belongs to this node alone.
        quota_bytes: what images may occupy; None for no limit but the file system's.
        high: fraction of the quota above which the least recently used images go.
        low: fraction of the quota at which that ends.
        grace_s: how long a node's leases in a shared directory outlive its last sign of life.

    """

    def __init__(
        self,
        root: Path,
        user: CacheUser | None = None,
        *,
        node: str | None = None,
        quota_bytes: int | None = None,
        high: float = 0.95,
        low: float = 0.80,
        grace_s: float = GRACE_S,
    ) -> None:
        self.root = root
        self.user = user or CacheUser()
        self.shared = node is not None
        self.blobs = Blobs(root, self.user, node=node, grace_s=grace_s)
        self.memory = RegistryMemory(root / "registry", self.user)
        self._quota_bytes, self._high, self._low = quota_bytes, high, low
        self._images = root / "images"
        self._records = RecordFiles(self._images)
        self.on_evicted: Callable[[int], None] = lambda _freed_bytes: None
        """Called in the removing thread for each image that made room."""

    # -- life

    def prepare(self) -> None:
        """Create what is missing. In a directory of this node's own also `sweep`."""
        with storage_errors(self.root, "preparing the cache in"):
            self._make_root()
            with self.user:
                for directory in (*self.blobs.directories, self._images, self.root / "registry"):
                    directory.mkdir(parents=True, exist_ok=True)
                if self.blobs.leases is not None:
                    self.blobs.leases.inherit()
                if not (self.root / "oci-layout").exists():
                    write_atomically(self.root / "oci-layout", LAYOUT_BYTES)
        if not self.shared:
            self.sweep()

    def _make_root(self) -> None:
        with self.user:
            if self.root.exists():
                return
            try:
                # Who may use which image is not for the file system to say: nobody else looks in here.
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            except PermissionError:
                pass
            else:
                return
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.user.give(self.root)

    @as_user
    def sweep(self) -> None:
        """Drop what nobody will finish: parts of blobs that are here, parts older than 7 days, leftovers of writers that are gone."""
        self.blobs.sweep(PART_KEPT_S, QUARANTINE_KEPT_S)
        with storage_errors(self.root, "cleaning up in"):
            for directory in (self.root, *self.blobs.directories, self._images, self.root / "registry"):
                for pattern, kept_s in ((".*.tmp", UNUSED_KEPT_S), (".nfs*", PART_KEPT_S)):
                    for leftover in directory.glob(pattern):
                        # A writer renames within seconds. An NFS client hides what it has open until it closes it, or crashes.
                        with suppress(OSError):
                            if time.time() - leftover.stat().st_mtime > kept_s:
                                leftover.unlink()
            self.memory.sweep()
            with self._changing():
                self._write_index()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the right to change records and index. Raises `StorageError` when others keep it too long."""
        if not self.shared:
            with locked(self.root / ".lock"):
                yield
            return
        claim = self._claim_records()
        try:
            yield
        finally:
            claim.release()

    def _claim_records(self) -> HeartbeatClaim:
        end_s = time.monotonic() + _CHANGE_PATIENCE_S
        path = self.blobs.claims / "records.claim"
        while True:
            try:
                return HeartbeatClaim(path, self.user, self.blobs.watch, renewed=False)
            except InUse:
                if time.monotonic() >= end_s:
                    raise StorageError(
                        f"another node has been changing the records in {self.root} for {_CHANGE_PATIENCE_S:g} s"
                    ) from None
            time.sleep(0.05)

    def usage(self) -> tuple[int, int]:
        """Return (bytes that blobs and parts occupy, bytes free to an ordinary user in the file system)."""
        return self.blobs.used_bytes(), self.blobs.free_bytes()

    def room(self) -> Room:
        """Return how full it is."""
        used, free = self.usage()
        return Room(used, free, self._quota_bytes, self._high, self._low)

    # -- blobs

    def begin(self, descriptor: Descriptor) -> Partial:
        """Start or continue to write a blob. Raises `InUse` while another process, thread or node writes it, `StorageFull`.

        When there is too little room, images that nobody uses go first.
        """
        claim = self.blobs.claim(descriptor.digest)
        try:
            self._make_room(descriptor)
            partial = Partial(
                descriptor,
                self.blobs.part_path(descriptor.digest),
                self.blobs.path(descriptor.digest),
                claim,
                user=self.user,
            )
        except BaseException:
            claim.release()
            raise
        partial.wishes = self.blobs.wishes(descriptor.digest)
        return partial

    def _make_room(self, descriptor: Descriptor) -> None:
        needed = max(0, descriptor.size_bytes - self.blobs.part_bytes(descriptor.digest, exact=True))
        room = self.room()
        if not room.excess_bytes(needed):
            return
        freed = self.free(room.excess_bytes(needed))
        room = self.room()
        if needed > room.room_bytes:
            full = "of its quota" if room.free_bytes >= needed else "in the file system"
            raise StorageFull(
                f"no room left: {descriptor.digest} needs {needed} more bytes in {self.root}, {room.room_bytes} {full} are free"
                + (f" after {freed} bytes of unused images were removed" if freed else "")
            )

    @as_user
    def verify(self, digest: str) -> None:
        """Read a blob again. One that does not have its digest any more goes into quarantine. Raises `DigestMismatch`, `NotFound`."""
        fd = self.blobs.open(digest)
        with os.fdopen(fd, "rb") as file, storage_errors(self.blobs.path(digest), "reading"):
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if f"sha256:{found}" != digest:
            self.discard_damaged(digest)
            raise DigestMismatch(f"the blob {digest} in the cache was damaged and has been removed")

    @as_user
    def discard_damaged(self, digest: str) -> None:
        """Put a blob into quarantine; its images are pulled anew when somebody asks for them."""
        self.blobs.set_aside(digest)
        with storage_errors(self.root, "noting a damaged image in"), self._changing():
            self._write_index()

    # -- room

    @as_user
    def candidates(self) -> list[Candidate]:
        """Return every squashfs blob with its size, its last use, and why it may not go."""
        held = self.blobs.held()
        by_layer: dict[str, list[Record]] = {}
        for record in self._records.all():
            by_layer.setdefault(record.layer.digest, []).append(record)
        found = []
        for layer, records in by_layer.items():
            last_use_s = self.blobs.last_use_s(layer)
            if last_use_s is None:
                continue
            why = None
            if any(record.pinned for record in records):
                why = "pinned"
            elif self.blobs.is_leased(layer, held):
                why = "in use"
            names = sorted(
                f"{name}:{tag}" if tag else f"{name}@{record.manifest_digest[:19]}"
                for record in records
                for name, tags in record.names
                for tag in tags or (None,)
            )
            manifests = tuple(record.manifest_digest for record in records)
            found.append(
                Candidate(layer, manifests, tuple(names), records[0].layer.size_bytes, last_use_s, why)
            )
        return found

    def free(self, wanted_bytes: int) -> int:
        """Remove images that nobody uses, the least recently used first, until so many bytes are gained; return how many were."""
        gained = 0
        candidates = self.candidates()
        while gained < wanted_bytes:
            chosen = victims(candidates, wanted_bytes - gained)
            if not chosen:
                break
            for victim in chosen:
                candidates.remove(victim)
                for manifest_digest in victim.manifests:
                    # Taken into use, pinned or removed by somebody since we looked: another one will have to go.
                    with suppress(InUse, NotFound):
                        freed = self.evict(manifest_digest)
                        log.info(
                            "removed %s (%d bytes) to make room in %s",
                            ", ".join(victim.names),
                            freed,
                            self.root,
                        )
                        self.on_evicted(freed)
                        gained += freed
        return gained

    # -- images

    @as_user
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
            with self._changing():
                record = self._renamed(repository, manifest, layer, tag)
                if record is None:
                    return
                if tag is not None:
                    self._take_tag(repository, tag, manifest.digest)
                self._records.write(record)
                self._write_index()

    def _renamed(
        self, repository: str, manifest: Manifest, layer: Descriptor, tag: str | None
    ) -> Record | None:
        """Return the record with the new name; None if that changes nothing."""
        before = self._records.get(manifest.digest)
        after = (before or Record(manifest.digest, layer, ())).named(repository, tag)
        after = replace(after, listed=self.blobs.has(layer.digest))
        return None if after == before else after

    def _take_tag(self, repository: str, tag: str, manifest_digest: str) -> None:
        for other in self._records.all():
            changed = other.without_tag(repository, tag)
            if other.manifest_digest != manifest_digest and changed != other:
                self._records.write(changed)

    @as_user
    def manifest(self, digest: str) -> Manifest | None:
        """Return a manifest of the cache; None if it is not here (or damaged)."""
        try:
            return parse_manifest(read_bounded(self.blobs.path(digest), MAX_MANIFEST_BYTES), digest)
        except (OSError, UenvError):
            return None

    @as_user
    def config(self, manifest: Manifest) -> bytes | None:
        """Return the config blob of a manifest; None if it is not here (or damaged)."""
        try:
            data = read_bounded(self.blobs.path(manifest.config.digest), MAX_CONFIG_BYTES)
            check_digest(data, manifest.config.digest, "the config blob")
        except (OSError, UenvError):
            return None
        return data

    @as_user
    def images(self, *, complete_only: bool = True) -> list[CachedImage]:
        """Return the images, one for each repository that has it, sorted by repository and digest.

        Only those whose squashfs blob is here, unless told otherwise.
        """
        found = [image for record in self._records.all() for image in self._cached(record)]
        found = [image for image in found if image.complete or not complete_only]
        return sorted(found, key=lambda image: (image.repository, image.manifest_digest))

    @as_user
    def repositories_of(self, manifest_digest: str) -> tuple[str, ...]:
        """Return the repositories in which a manifest was seen."""
        record = self._records.get(manifest_digest)
        return tuple(name for name, _tags in record.names) if record is not None else ()

    @as_user
    def image(self, manifest_digest: str) -> CachedImage | None:
        """Return one image by the digest of its manifest, complete or not, as the first repository has it."""
        record = self._records.get(manifest_digest)
        return next(iter(self._cached(record)), None) if record is not None else None

    @as_user
    def pin(self, manifest_digest: str, pinned: bool = True) -> None:
        """Protect an image from eviction, or not any more. Raises `NotFound`."""
        with storage_errors(self.root, "pinning an image in"), self._changing():
            self._records.write(replace(self._records.existing(manifest_digest), pinned=pinned))

    @as_user
    def evict(self, manifest_digest: str) -> int:
        """Remove an image and return how many bytes that freed; blobs that another image uses stay.

        Raises `NotFound`, and `InUse` while somebody has a lease on the squashfs blob, pulls it, or the image is pinned.
        """
        with storage_errors(self.root, "evicting an image from"), self._changing():
            record = self._records.existing(manifest_digest)
            if record.pinned:
                raise InUse(
                    f"the image {manifest_digest} is pinned", hint="unpin it first: uenvctl image unpin UENV"
                )
            mine = self._blobs_of(record)
            theirs: set[str] = set()
            for other in self._records.all():
                if other.manifest_digest != manifest_digest:
                    theirs |= self._blobs_of(other)
            freed = 0
            if record.layer.digest not in theirs:
                freed += self.blobs.remove(record.layer.digest)
            # The record goes before the small blobs: a crash in between leaves unused bytes, never a record without its manifest.
            self._records.remove(manifest_digest)
            self._write_index()
            for digest in mine - theirs - {record.layer.digest}:
                freed += removed(self.blobs.path(digest))
            sync_directory(self.blobs.directory)
            return freed

    @as_user
    def collect(self) -> int:
        """Remove blobs that no image refers to, older than an hour and not leased; return how many bytes that freed."""
        freed = 0
        with storage_errors(self.root, "collecting unused blobs in"), self._changing():
            used: set[str] = set()
            for record in self._records.all():
                used |= self._blobs_of(record)
            for path in self.blobs.directory.iterdir():
                digest = f"sha256:{path.name}"
                if not is_digest(digest) or digest in used:
                    continue
                last_use_s = self.blobs.last_use_s(digest)
                if last_use_s is not None and time.time() - last_use_s > UNUSED_KEPT_S:
                    with suppress(InUse):
                        freed += self.blobs.remove(digest)
        return freed

    # -- inside

    def _put_bytes(self, digest: str, data: bytes) -> None:
        path = self.blobs.path(digest)
        last_use_s = self.blobs.last_use_s(digest)
        if last_use_s is None:
            write_atomically(path, data)
        elif time.time() - last_use_s > UNUSED_KEPT_S / 2:
            self.blobs.touch(digest)

    def _blobs_of(self, record: Record) -> set[str]:
        manifest = self.manifest(record.manifest_digest)
        config = {manifest.config.digest} if manifest is not None else set()
        return {record.manifest_digest, record.layer.digest} | config

    def _cached(self, record: Record) -> Iterator[CachedImage]:
        manifest = self.manifest(record.manifest_digest)
        if manifest is None:
            return
        last_use_s = self.blobs.last_use_s(record.layer.digest)
        for repository, tags in record.names:
            yield CachedImage(
                repository,
                tags,
                manifest,
                record.layer,
                record.pinned,
                complete=last_use_s is not None,
                last_use_s=last_use_s or 0.0,
            )

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
