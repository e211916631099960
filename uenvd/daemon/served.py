"""One image that is mounted, from the first lease to the last byte: what is known of it.

A `Served` is one FUSE connection: it exists before the image's bytes do, so that a job gets its mount at once and waits
for the bytes later. States:

    opening -> pulling -> starting -> serving -> (gone)
                  \\__________\\____________\\-> failed

Concurrency: changed by `uenvd.daemon.servedimages` only, synchronously; others wait for `Served.changed`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from uenvd.daemon.lazy import Lazy
from uenvd.daemon.peer import Identity
from uenvd.daemon.question import Image
from uenvd.daemon.resolution import Repository
from uenvd.daemon.servers import Server
from uenvd.errors import UenvError
from uenvd.oci.remote import Remote
from uenvd.views import ImageMeta


@dataclass(frozen=True)
class BlobSource:
    """An image of a registry: shared by all users of the node."""

    remote: Remote
    image: Image


@dataclass(frozen=True)
class FileSource:
    """A file of the user's own: opened and served as him."""

    path: str
    owner: Identity


@dataclass(frozen=True)
class AdoptedSource:
    """An image that an earlier daemon served."""

    digest: str | None
    """None: a file of ``owner``'s own."""
    blob: str | None
    size_bytes: int
    repository: str | None = None
    owner: Identity | None = None


@dataclass(eq=False)
class Served:
    """One FUSE connection and what is known of it."""

    label: str
    source: BlobSource | FileSource | AdoptedSource
    name: str = field(default_factory=lambda: secrets.token_hex(8))
    """Name of its mount in the daemon's namespace; new for each connection."""
    state: str = "opening"
    leases: int = 0
    done_bytes: int = 0
    rate_bytes_per_s: float = 0.0
    meta: ImageMeta | None = None
    notes: tuple[str, ...] = ()
    """What the worker had to say of the image, for its users."""
    error: UenvError | None = None
    lazy: Lazy | None = None
    """Brings it, while or after it is served already."""
    worker: Server | None = None
    """Who serves it, once it is served."""
    changed: trio.Event = field(default_factory=trio.Event)
    retired: bool = False
    """No further lease may be taken on it."""

    @property
    def digest(self) -> str | None:
        """Digest of the manifest; None for a file."""
        match self.source:
            case BlobSource():
                return self.source.image.found.digest
            case AdoptedSource():
                return self.source.digest
            case _:
                return None

    @property
    def blob(self) -> tuple[str, int] | None:
        """Digest and size in bytes of the image itself; None for a file."""
        match self.source:
            case BlobSource():
                return self.source.image.layer.digest, self.source.image.layer.size_bytes
            case AdoptedSource() if self.source.blob is not None:
                return self.source.blob, self.source.size_bytes
            case _:
                return None

    @property
    def repository(self) -> Repository | None:
        """Where the image comes from, as far as that is known."""
        match self.source:
            case BlobSource():
                return self.source.image.found.repository
            case AdoptedSource() if self.source.repository is not None:
                return Repository.parse(self.source.repository)
            case _:
                return None

    @property
    def owner(self) -> Identity | None:
        """Whose own file it is; None for an image of the registry."""
        return None if isinstance(self.source, BlobSource) else self.source.owner

    @property
    def total_bytes(self) -> int:
        """Size of the image as far as it is known."""
        blob = self.blob
        return blob[1] if blob is not None else 0

    @property
    def arrived_bytes(self) -> int:
        """How much of it is here, as far as that is of interest."""
        return self.done_bytes if self.lazy is None else self.lazy.done_bytes

    @property
    def is_on_its_way(self) -> bool:
        """Whether bytes of it are fetched, or are about to be."""
        return self.state in ("opening", "pulling") or (self.lazy is not None and not self.lazy.done)

    @property
    def mount_source(self) -> str:
        """What mountinfo shows as the source: the session's truth."""
        return f"uenvd:{self.digest or self.label}"

    def set_state(self, state: str) -> None:
        """Move on, and wake who waits for it."""
        self.state = state
        self.changed.set()
        self.changed = trio.Event()

    async def wait_for(self, ready: Callable[[Served], bool]) -> None:
        """Wait until ``ready`` holds or the image failed; raises its error then."""
        while not ready(self):
            if self.error is not None:
                raise self.error
            await self.changed.wait()
