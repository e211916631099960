"""Who holds what: the leases of this daemon, and how much one user may hold.

Concurrency: everything here is synchronous; a lease is taken and given back without a checkpoint.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from uenvd.config import Limits
from uenvd.daemon.peer import Identity
from uenvd.daemon.requests import Wanted
from uenvd.daemon.served import BlobSource, FileSource, Served
from uenvd.daemon.servedimages import ServedImages
from uenvd.errors import LimitExceeded
from uenvd.label import ViewName
from uenvd.oci.remote import Remote


@dataclass(eq=False)
class Lease:
    """What one `mount` request holds, for as long as its connection lasts."""

    owner: Identity
    images: Sequence[Wanted]
    views: tuple[ViewName, ...] | None
    """None: not even default views."""
    points: Sequence[str]
    """The mount points, in the order of ``images``."""
    job: tuple[int, int] | None
    served: list[Served] = field(default_factory=list)
    name: str = field(default_factory=lambda: secrets.token_hex(16))
    """Nobody can guess it: it is the right to wait for the lease."""
    since_s: float = field(default_factory=time.time)

    @property
    def ready(self) -> bool:
        """Whether every file of every image can be read."""
        return all(served.state == "serving" for served in self.served)

    @property
    def notes(self) -> list[str]:
        """What there is to say of the images, by now."""
        return [f"{served.label}: {note}" for served in self.served for note in served.notes]


class Leases:
    """All leases. Root's are not limited."""

    def __init__(self, images: ServedImages, remote: Remote, limits: Limits) -> None:
        self._images = images
        self._remote = remote
        self._limits = limits
        self._by_name: dict[str, Lease] = {}

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._by_name.values())

    def get(self, name: str) -> Lease | None:
        """Return the lease of this name."""
        return self._by_name.get(name)

    def begin(self, lease: Lease) -> None:
        """Take the lease on all its images. Raises `LimitExceeded`, and then nothing is taken."""
        if lease.owner.uid != 0:
            self._check_limits(lease)
        lease.served = [
            self._images.acquire(wanted.label, self._source(wanted, lease.owner)) for wanted in lease.images
        ]
        self._by_name[lease.name] = lease

    def end(self, lease: Lease) -> None:
        """Give a lease back; one that ended already is left alone."""
        if self._by_name.pop(lease.name, None) is not None:
            for served in lease.served:
                self._images.release(served)

    def _source(self, wanted: Wanted, owner: Identity) -> BlobSource | FileSource:
        if wanted.image is not None:
            return BlobSource(self._remote, wanted.image)
        assert wanted.path is not None
        return FileSource(wanted.path, owner)

    def _check_limits(self, lease: Lease) -> None:
        held = [served for other in self if other.owner.uid == lease.owner.uid for served in other.served]
        files = sum(isinstance(served.source, FileSource) for served in held)
        new_files = sum(wanted.image is None for wanted in lease.images)
        pulls = len({served for served in held if served.is_on_its_way})
        for count, limit, what in (
            (len(held) + len(lease.images), self._limits.mounts, "mounts"),
            (files + new_files if new_files else 0, self._limits.files, "mounts of files of one's own"),
            (pulls + 1, self._limits.pulls, "images on their way to this node"),
        ):
            if count > limit:
                raise LimitExceeded(f"uid {lease.owner.uid} may have {limit} {what} at once on this node")
        each_bytes = self._images.image_memory_bytes
        if new_files and (files + new_files) * each_bytes > self._limits.memory_bytes:
            raise LimitExceeded(
                f"mounts of files of one's own may take {self._limits.memory_bytes / 1e9:.1f} GB of memory of this node for uid"
                f" {lease.owner.uid}, each up to {each_bytes / 1e9:.1f} GB",
                hint="end a session that uses one; the site sets limits.memory",
            )
