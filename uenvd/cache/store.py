"""The cache as the daemon sees it: a directory of this node, one that many nodes share, and further ones that are only read.

Each may be absent, but one of the first two. A blob is looked for in this order: local, shared, read-only sources. A pull goes into the
shared directory where there is one, so that it happens once for all nodes, and a blob that is there is served from there, not copied
first: the kernel keeps what was read, so most bytes of most images would be copied for nothing (``cache.copy: auto`` copies in the
background what this node serves, while there is room).

**A lease is a descriptor from `Store.open`**: while it or a copy of it is open, the blob is not evicted by any process of this node. Other
nodes are told by a heartbeat file (`uenvd.cache.leases`), which the daemon renews for what it serves (`Store.renew`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from uenvd.cache.directory import PART_KEPT_S, UNUSED_KEPT_S, Directory
from uenvd.cache.identity import CacheUser
from uenvd.cache.memory import RegistryMemory
from uenvd.cache.partial import Partial
from uenvd.cache.partview import PartView
from uenvd.cache.records import CachedImage
from uenvd.cache.trust import require_trusted, why_not
from uenvd.config import CacheConfig
from uenvd.errors import Cancelled, InUse, NotFound, StorageError, UenvError
from uenvd.oci.files import COPY_BYTES, storage_errors
from uenvd.oci.manifest import Descriptor, Manifest
from uenvd.oci.remote import never

__all__ = ["PART_KEPT_S", "UNUSED_KEPT_S", "Level", "Store"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_TROUBLE_LOG_S: Final = 60.0
HUNG_S: Final = 10.0
"""A directory in which a look-up has taken so long is not asked again before it ends."""
_HUNG_BEGIN_S: Final = 120.0
"""The same for the beginning of a pull, which may remove images first."""


@dataclass(frozen=True)
class Level:
    """One directory of the cache and how full it is, for `status`."""

    name: str
    path: Path
    used_bytes: int
    free_bytes: int
    quota_bytes: int | None
    error: str | None = None


class Store:
    """The cache. Methods block, and may be called from several threads, processes and nodes at once.

    Any of them raises `StorageError` (`StorageFull`) when no file system lets it; trouble with one directory does not hide what is in another.
    """

    def __init__(
        self,
        local: Path | Directory | None,
        shared: Directory | None = None,
        sources: Sequence[Directory] = (),
    ) -> None:
        self.local = Directory(local) if isinstance(local, Path) else local
        self.shared = shared
        self.sources = tuple(sources)
        writable = [level for level in (self.local, self.shared) if level is not None]
        if not writable:
            raise ValueError("a cache needs a directory to write to")
        self._writable: tuple[Directory, ...] = tuple(writable)
        self._pulled_into: tuple[Directory, ...] = tuple(reversed(writable))
        self.memory: RegistryMemory = self._writable[0].memory
        self._trouble: dict[Path, float] = {}
        self._prepared: set[Path] = set()
        self._calls: dict[Path, list[float]] = {one.root: [] for one in self.directories}
        """When each call that is under way should have ended, monotonic."""

    @classmethod
    def from_config(cls, settings: CacheConfig, node: str) -> Store:
        """Make the store that a configuration describes; ``node`` names this daemon. Raises `ConfigError` for an unknown user."""
        user = CacheUser.named(settings.user)
        local = shared = None
        if settings.local is not None:
            local = Directory(
                settings.local, user, quota_bytes=settings.quota_bytes, high=settings.high, low=settings.low
            )
        if settings.shared is not None:
            shared = Directory(
                settings.shared,
                user,
                node=node,
                quota_bytes=settings.shared_quota_bytes,
                high=settings.high,
                low=settings.low,
                grace_s=settings.grace_s,
            )
        return cls(local, shared, [Directory(path, user) for path in settings.sources])

    @property
    def root(self) -> Path:
        """The first directory: this node's, or else the shared one."""
        return self._writable[0].root

    @property
    def directories(self) -> tuple[Directory, ...]:
        """The directories in the order in which a blob is looked for."""
        return (*self._writable, *self.sources)

    @property
    def writable(self) -> tuple[Directory, ...]:
        """Those that are written to, this node's first."""
        return self._writable

    # -- life

    def prepare(self, only: Directory | None = None) -> None:
        """Create what is missing, in one directory or in all. Trouble with one is no error while there is another that comes before it."""
        for directory in self._writable:
            if only is not None and directory is not only:
                continue
            try:
                with self._asking(directory):
                    directory.prepare()
            except StorageError as error:
                if directory is self._writable[0]:
                    raise
                self._note_trouble(directory, error)
            else:
                self._prepared.add(directory.root)

    def prepare_rest(self) -> None:
        """Prepare what could not be prepared before, if it can be now. Trouble is for the log."""
        for directory in self._writable:
            if directory.root not in self._prepared:
                try:
                    self.prepare(directory)
                except StorageError as error:
                    self._note_trouble(directory, error)

    def usage(self) -> tuple[int, int]:
        """Return (bytes that blobs and parts occupy, bytes free to an ordinary user) of the directory that `root` names."""
        return self._writable[0].usage()

    def levels(self) -> list[Level]:
        """Return how full each directory is."""
        found = []
        for directory in self._writable:
            name = "shared" if directory.shared else "local"
            try:
                room = directory.room()
            except StorageError as error:
                found.append(Level(name, directory.root, 0, 0, None, str(error)))
            else:
                found.append(Level(name, directory.root, room.used_bytes, room.free_bytes, room.quota_bytes))
        return found

    # -- blobs

    def has(self, digest: str) -> bool:
        """Tell whether the blob is in one of the directories, complete and verified."""
        return self._holder(digest) is not None

    def present(self, digests: Iterable[str]) -> set[str]:
        """Return which of many blobs are here; for lists."""
        wanted = set(digests)
        return {digest for here in self._each(lambda one: one.blobs.present(wanted)) for digest in here}

    def open(self, digest: str) -> int:
        """Return a read-only descriptor of a blob; it is a lease (see the module). The caller closes it. Raises `NotFound`."""
        failure: UenvError = NotFound(f"the blob {digest} is not in the cache")
        for directory in self.directories:
            try:
                with self._asking(directory):
                    fd = directory.blobs.open(digest)
            except NotFound:
                continue
            except StorageError as error:
                self._note_trouble(directory, error)
                failure = error
            else:
                if directory not in self.sources or why_not(os.fstat(fd), directory.user) is None:
                    return fd
                os.close(fd)
        raise failure

    def touch(self, digest: str) -> None:
        """Note that a blob was used now. Not noting it is no error."""
        for directory in self._writable:
            directory.blobs.touch(digest)

    def begin(self, descriptor: Descriptor) -> Partial:
        """Start or continue to write a blob. Raises `InUse` while another process, thread or node writes it, `StorageFull`, `StorageError`.

        It goes into the shared directory; into this node's own when that is out of order or full.
        """
        failure: StorageError | None = None
        for directory in self._pulled_into:
            try:
                with self._asking(directory, _HUNG_BEGIN_S):
                    return directory.begin(descriptor)
            except StorageError as error:
                failure = failure or error
                if directory is not self._pulled_into[-1]:
                    self._note_trouble(directory, error)
        assert failure is not None
        raise failure

    def follow(self, descriptor: Descriptor) -> PartView | None:
        """Return what others are writing of a blob into the shared directory, leased; the caller closes it. None if nobody does.

        Raises `StorageError`.
        """
        if self.shared is None:
            return None
        with self._asking(self.shared):
            return self.shared.blobs.follow(descriptor.digest, descriptor.size_bytes)

    def look_anew(self, digest: str) -> None:
        """Something has happened to a blob in the shared directory: the next question is asked at once. Does not block."""
        if self.shared is not None:
            self.shared.blobs.look_anew(digest)

    def take_over(self, descriptor: Descriptor) -> Partial:
        """As `begin`, but only into the shared directory, for who follows a writer there."""
        if self.shared is None:
            raise InUse(f"nobody can be followed who writes {descriptor.digest}")
        with self._asking(self.shared, _HUNG_BEGIN_S):
            return self.shared.begin(descriptor)

    def part_bytes(self, digest: str) -> int:
        """Return how many bytes an unfinished pull of the blob has (0 without one)."""
        found = 0
        for directory in self._writable:
            with suppress(StorageError), self._asking(directory):
                found = max(found, directory.blobs.part_bytes(digest))
        return found

    def verify(self, digest: str) -> None:
        """Read a blob again; a damaged one is put aside. Raises `DigestMismatch`, `NotFound`."""
        directory = self._holder(digest)
        if directory is None:
            raise NotFound(f"the blob {digest} is not in the cache")
        directory.verify(digest)

    def copy_to_local(self, digest: str, size_bytes: int, cancelled: Callable[[], bool] = never) -> bool:
        """Copy a blob into this node's own directory, verified, if nothing has to go for it; return whether it is there then.

        Raises `Cancelled`, `DigestMismatch`.
        """
        source = self._holder(digest)
        if self.local is None or source is None:
            return False
        if source is self.local:
            return True
        if self.local.room().excess_bytes(size_bytes):
            return False
        try:
            partial = self.local.begin(Descriptor("application/octet-stream", digest, size_bytes))
        except InUse:
            return False
        with partial, os.fdopen(source.blobs.open(digest), "rb", buffering=0) as file:
            with storage_errors(source.blobs.path(digest), "reading"):
                file.seek(partial.offset_bytes)
                while piece := file.read(COPY_BYTES):
                    if cancelled():
                        raise Cancelled("the copy was cancelled")
                    partial.write(piece)
            partial.commit()
        return True

    # -- leases in the shared directory

    def renew(self, used: Iterable[str], read_here: Callable[[Iterable[str]], set[str]]) -> None:
        """Tell the other nodes what this one reads: the blobs (digests) ``used``, and of what a former daemon left those with a reader.

        ``read_here`` says which of some hex digests a process of this node has open.
        """
        names = {digest.removeprefix("sha256:") for digest in used}
        for directory in self._writable:
            leases = directory.blobs.leases
            if leases is None:
                continue
            left = leases.inherited - names
            for name in leases.renew(names, read_here(left) if left else ()):
                directory.blobs.touch(f"sha256:{name}")  # the end of its use is its last use

    def give_back(self, manifest_digest: str, read_here: Callable[[Iterable[str]], set[str]]) -> None:
        """Tell the other nodes at once that an image is not used here any more, unless ``read_here`` (see `renew`) knows a reader."""
        image = self.image(manifest_digest)
        leases = self.shared.blobs.leases if self.shared is not None else None
        if image is None or leases is None:
            return
        name = image.layer_digest.removeprefix("sha256:")
        if name in leases.held and not read_here([name]):
            leases.drop(name)

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
        """Keep a manifest with its config blob, and note that ``repository:tag`` means it now: where its layer is or will be.

        ``layer`` is the squashfs blob; it may come later or be here. Called again once it is here, the image appears in
        ``index.json``. Cheap when nothing is new.
        """
        holder = self._holder(layer.digest)
        first = holder if holder in self._writable else self._pulled_into[0]
        assert first is not None
        try:
            first.put_manifest(repository, manifest, layer, config, tag=tag)
        except StorageError as error:
            if first is self._writable[0]:
                raise
            # The image can be used all the same; that it is there is known to this node at least.
            self._note_trouble(first, error)
            self._writable[0].put_manifest(repository, manifest, layer, config, tag=tag)

    def manifest(self, digest: str) -> Manifest | None:
        """Return a manifest of the cache; None if it is not here (or damaged)."""
        return next((found for found in self._each(lambda one: one.manifest(digest)) if found), None)

    def config(self, manifest: Manifest) -> bytes | None:
        """Return the config blob of a manifest; None if it is not here (or damaged)."""
        found = self._each(lambda one: one.config(manifest))
        return next((config for config in found if config is not None), None)

    def images(self, *, complete_only: bool = True) -> list[CachedImage]:
        """Return the images, one for each repository that has it, sorted by repository and digest.

        Only those whose squashfs blob is here, unless told otherwise.
        """
        found: dict[tuple[str, str], CachedImage] = {}
        for images in self._each(lambda one: one.images(complete_only=False), _HUNG_BEGIN_S):
            for image in images:
                key = (image.repository, image.manifest_digest)
                known = found.get(key)
                found[key] = image if known is None else known.merged(image)
        kept = [image for image in found.values() if image.complete or not complete_only]
        return sorted(kept, key=lambda image: (image.repository, image.manifest_digest))

    def _each(self, ask: Callable[[Directory], T], patience_s: float | None = None) -> Iterator[T]:
        """Yield what each directory answers that is in order; of a single one also the error."""
        for directory in self.directories:
            try:
                with self._asking(directory, patience_s):
                    answer = ask(directory)
            except StorageError as error:
                if len(self.directories) == 1:
                    raise
                self._note_trouble(directory, error)
            else:
                yield answer

    def repositories_of(self, manifest_digest: str) -> set[str]:
        """Return the repositories in which a manifest was seen."""
        return {
            name for names in self._each(lambda one: one.repositories_of(manifest_digest)) for name in names
        }

    def image(self, manifest_digest: str) -> CachedImage | None:
        """Return one image by the digest of its manifest, complete or not, as the first repository has it."""
        found = [image for image in self._each(lambda one: one.image(manifest_digest)) if image is not None]
        return max(found, key=lambda image: image.complete, default=None)

    def pin(self, manifest_digest: str, pinned: bool = True) -> None:
        """Protect an image from eviction, or not any more. Raises `NotFound`."""
        done = False
        for directory in self._writable:
            with suppress(NotFound):
                directory.pin(manifest_digest, pinned)
                done = True
        if not done:
            raise NotFound(f"the image {manifest_digest} is not in the cache")

    def evict(self, manifest_digest: str) -> int:
        """Remove an image and return how many bytes that freed; blobs that another image uses stay.

        Raises `NotFound`, and `InUse` while somebody has a lease on the squashfs blob, pulls it, or the image is pinned.
        """
        freed, done = 0, False
        for directory in self._writable:
            with suppress(NotFound):
                freed += directory.evict(manifest_digest)
                done = True
        if not done:
            raise NotFound(f"the image {manifest_digest} is not in the cache")
        return freed

    def collect(self) -> int:
        """Remove blobs of this node's directory that no image refers to, older than an hour and not leased; return the bytes freed."""
        if self.local is None:
            return 0
        with self._asking(self.local, _HUNG_BEGIN_S):
            return self.local.collect()

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

    def _holder(self, digest: str) -> Directory | None:
        for directory in self.directories:
            try:
                with self._asking(directory):
                    if directory.blobs.has(digest):
                        if directory in self.sources:
                            require_trusted((directory.blobs.path(digest),), directory.user)
                        return directory
            except StorageError as error:
                if len(self.directories) == 1:
                    raise
                self._note_trouble(directory, error)
        return None

    @contextmanager
    def _asking(self, directory: Directory, patience_s: float | None = None) -> Iterator[None]:
        """Do something in a directory, unless an earlier call hangs there: a file system whose server is gone would take thread after thread.

        Raises `StorageError` at once then, and for a source that is not to be believed.
        """
        calls = self._calls[directory.root]
        now_s = time.monotonic()
        if any(due_s < now_s for due_s in tuple(calls)):
            raise StorageError(
                f"{directory.root}: the file system does not answer",
                hint="see whether its server is up; nothing has to be restarted when it is back",
            )
        calls.append(due_s := now_s + (HUNG_S if patience_s is None else patience_s))
        try:
            if directory in self.sources:
                blobs = directory.blobs.directory
                places = (directory.root, directory.root / "images", blobs.parent, blobs)
                require_trusted(places, directory.user)
            yield
        finally:
            calls.remove(due_s)

    def _note_trouble(self, directory: Directory, error: StorageError) -> None:
        """Log trouble with one directory that another one makes up for, at most once a minute."""
        now_s = time.monotonic()
        if now_s - self._trouble.get(directory.root, float("-inf")) >= _TROUBLE_LOG_S:
            self._trouble[directory.root] = now_s
            log.warning("%s", error)
