"""The words in which requests are answered. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from uenvd import protocol
from uenvd.cache.store import Level
from uenvd.daemon.leases import Lease
from uenvd.daemon.question import Image
from uenvd.daemon.served import Served


def level_frame(level: Level) -> dict[str, Any]:
    """Return how full a directory of the cache is, for `status`."""
    return {
        "name": level.name,
        "path": str(level.path),
        "used_bytes": level.used_bytes,
        "free_bytes": level.free_bytes,
        "quota_bytes": level.quota_bytes,
        "error": level.error,
    }


def served_frame(served: Served) -> dict[str, Any]:
    """Return how an image is served, for `status`."""
    return {
        "digest": served.digest,
        "label": served.label,
        "state": served.state,
        "leases": served.leases,
        "done_bytes": served.arrived_bytes,
        "total_bytes": served.total_bytes,
        "worker": served.worker.pid if served.worker else None,
        "workers": list(served.worker.worker_pids) if served.worker else [],
    }


def lease_frame(lease: Lease) -> dict[str, Any]:
    """Return who has what, for `status`."""
    return {"uid": lease.owner.uid, "labels": [wanted.label for wanted in lease.images], "job": lease.job}


def progress_frame(lease: Lease) -> protocol.Frame:
    """Return how far the images of a lease are, as an event."""
    waiting: Sequence[Served] = [served for served in lease.served if served.state != "serving"]
    done = sum(served.done_bytes for served in waiting)
    total = sum(served.total_bytes for served in waiting)
    first = waiting[0]
    if first.state == "pulling":
        return pull_frame(first.label, done, total, sum(served.rate_bytes_per_s for served in waiting))
    return protocol.progress("start", done, total, f"starting {first.label}")


def pull_frame(label: str, done_bytes: int, total_bytes: int, rate_bytes_per_s: float) -> protocol.Frame:
    """Return how far a pull is, as an event."""
    text = f"pulling {label}: {done_bytes / 1e6:.0f} of {total_bytes / 1e6:.0f} MB"
    frame = protocol.progress("pull", done_bytes, total_bytes, text, rate_bytes_per_s)
    if "eta_s" in frame:
        frame["message"] += f", {rate_bytes_per_s / 1e6:.0f} MB/s, {_duration(frame['eta_s'])} left"
    return frame


def _duration(seconds: int) -> str:
    return f"{seconds} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def date_of(image: Image) -> str | None:
    """Return when an image was made, as far as it says so (RFC 3339)."""
    created = image.manifest.annotations.get("org.opencontainers.image.created")
    return created or (image.config.created if image.config else None)
