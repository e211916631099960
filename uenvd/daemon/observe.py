"""What can be asked about the daemon itself: the operations `status`, `metrics` and `job`, and the readers of the gauges.

Concurrency: gauges are read in the event loop and look only at what is in memory; the size of the cache, which costs I/O, is asked for in a
thread before the text is made.
"""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import trio

from uenvd import __version__, protocol
from uenvd.cache.store import Store
from uenvd.config import Config
from uenvd.daemon import disk
from uenvd.daemon.access import Permit
from uenvd.daemon.control import Answer, Connection
from uenvd.daemon.journal import Journal, Used, now_s
from uenvd.daemon.leases import Lease, Leases
from uenvd.daemon.metrics import METRICS, Metrics
from uenvd.daemon.served import BlobSource, Served
from uenvd.daemon.servedimages import ServedImages
from uenvd.daemon.telling import lease_frame, level_frame, served_frame
from uenvd.errors import UenvError
from uenvd.oci.remote import Remote
from uenvd.protocol import Request
from uenvd.views import applied_views

PAGE_BYTES: Final = resource.getpagesize()


class Observer:
    """Watches one daemon's parts, and answers for them."""

    def __init__(
        self,
        config: Config,
        remote: Remote,
        *,
        store: Store,
        served: ServedImages,
        leases: Leases,
        journal: Journal,
        connections: Callable[[], int],
        metrics: Metrics = METRICS,
    ) -> None:
        self._config = config
        self._remote = remote
        self._store = store
        self._served = served
        self._leases = leases
        self._connections = connections
        self.journal = journal
        self._metrics = metrics
        self._fresh: dict[str, str] = {}
        metrics.leases.read_from(lambda: sum(1 for _lease in leases))
        metrics.images.read_from(lambda: Counter(one.state for one in served))
        metrics.workers.read_from(lambda: sum(one.worker is not None for one in served))
        metrics.descriptors.read_from(_open_descriptors)
        metrics.memory_bytes.read_from(_resident_bytes)
        metrics.connections.read_from(connections)

    # --- what the service tells ---------------------------------------------------------------------------------------------------------

    async def began(self, lease: Lease, fresh: Sequence[Served]) -> None:
        """Count the images of a lease that was just taken; ``fresh`` are those that nobody had mounted."""
        hows = []
        for served in lease.served:
            source = served.source
            if not isinstance(source, BlobSource):
                how = "file"
            elif served in fresh:
                here = await disk.call(self._store.has, source.image.layer.digest)
                how = "cached" if here else "pulled"
            else:
                how = "served" if served.state == "serving" else "joined"
            hows.append(how)
            self._metrics.mounts.inc(how=how)
        slowest = ("served", "file", "cached", "joined", "pulled")
        self._fresh[lease.name] = max(hows, key=slowest.index, default="served")

    def joined(self, lease: Lease) -> None:
        """Count the images of a lease, all of them served already. No checkpoint."""
        for _served in lease.served:
            self._metrics.mounts.inc(how="served")
        self._fresh[lease.name] = "served"

    def usable(self, lease: Lease, applied: str) -> None:
        """Note that a lease's files can be read and its views are known: once for each lease, further calls do nothing. No checkpoint."""
        how = self._fresh.pop(lease.name, None)
        if how is None:
            return
        self._metrics.ready_seconds.observe(max(0.0, time.time() - lease.since_s), how=how)
        if lease.job is None:
            return
        job, step = lease.job
        views = dict(applied_views(applied))
        for wanted, mount in zip(lease.images, lease.points, strict=True):
            shown = views.get(wanted.digest or wanted.label, ())
            self.journal.note(
                Used(job, step, lease.owner.uid, wanted.label, wanted.digest, mount, shown, now_s())
            )

    def ended(self, lease: Lease) -> None:
        """Forget a lease. No checkpoint."""
        self._fresh.pop(lease.name, None)

    # --- the operations -----------------------------------------------------------------------------------------------------------------

    async def text(self) -> str:
        """Return the metrics in Prometheus' exposition format."""
        used: float
        free: float
        try:
            used, free = await disk.call(self._store.usage)
        except UenvError:  # the cache is away: its size is not known, all else is
            used = free = float("nan")
        self._metrics.cache_bytes.set(used)
        self._metrics.cache_free_bytes.set(free)
        return self._metrics.text()

    async def status(self, connection: Connection, permit: Permit) -> Answer:
        """Answer the operation `status`: what is served. Files and leases of others are root's business only."""
        uid = connection.peer.identity.uid

        def is_visible(served: Served) -> bool:
            if served.owner is not None:
                return uid in (0, served.owner.uid)
            repository = served.repository
            return permit.allows(repository.label) if repository is not None else uid == 0

        levels = await disk.call(self._store.levels)
        return Answer(
            protocol.success(
                version=__version__,
                system=self._config.system,
                uarch=self._config.uarch,
                registry=str(self._remote.address),
                mount_points=list(self._config.mount_points),
                images=[served_frame(served) for served in self._served if is_visible(served)],
                leases=[lease_frame(lease) for lease in self._leases if uid in (0, lease.owner.uid)],
                cache=level_frame(levels[0]) | {"levels": [level_frame(level) for level in levels]},
                connections=self._connections(),
                metrics=self.summary(),
            )
        )

    async def metrics(self) -> Answer:
        """Answer the operation `metrics`."""
        return Answer(protocol.success(text=await self.text()))

    async def job(self, connection: Connection, request: Request) -> Answer:
        """Answer the operation `job`: what a job used on this node; of others' jobs only root is told."""
        uid = connection.peer.identity.uid
        steps = await trio.to_thread.run_sync(
            self.journal.steps_of, request.job_id, None if uid == 0 else uid
        )
        return Answer(protocol.success(job=request.job_id, steps=steps))

    def summary(self) -> dict[str, Any]:
        """Return what `status` shows of the metrics; durations in seconds, upper bounds of their histogram's bucket, None without any."""
        metrics = self._metrics
        hits = sum(metrics.mounts.value(how=how) for how in ("served", "joined", "cached"))
        return {
            "since": metrics_start(metrics),
            "mounts": int(metrics.mounts.total()),
            "hits": int(hits),
            "misses": int(metrics.mounts.value(how="pulled")),
            "pulls": int(metrics.pulls.total()),
            "pulled_bytes": int(metrics.pulled_bytes.total()),
            "failed_requests": int(metrics.requests.total() - metrics.succeeded()),
            "failed_images": int(metrics.image_failures.total()),
            "ready_median_s": _finite(metrics.ready_seconds.quantile(0.5)),
            "ready_p99_s": _finite(metrics.ready_seconds.quantile(0.99)),
        }


def metrics_start(metrics: Metrics) -> float:
    """Return when the daemon started, seconds of the epoch."""
    return next((value for _suffix, _labels, value in metrics.start_time.samples()), 0.0)


def _finite(value: float | None) -> float | None:
    return None if value is None or value == float("inf") else value


def _open_descriptors() -> float:
    return sum(1 for _entry in Path("/proc/self/fd").iterdir()) - 1


def _resident_bytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
