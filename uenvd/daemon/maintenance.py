"""``uenvd gc`` and ``uenvd scrub``: the cache's upkeep by hand, with or without a running daemon."""

from __future__ import annotations

import time

from uenvd.cache.directory import Directory
from uenvd.cache.gc import Round, collect
from uenvd.cache.leases import node_name
from uenvd.cache.scrub import next_blob, scrub_blob
from uenvd.cache.store import Store
from uenvd.config import Config

_UNLIMITED_BYTES_PER_S = 1 << 40


def run_gc(config: Config, *, dry_run: bool, wanted_bytes: int) -> int:
    """Make room in every directory of the cache and say what went, or would go; return the exit status. Raises `StorageError`."""
    for directory in _directories(config):
        done = collect(directory, dry_run=dry_run, wanted_bytes=wanted_bytes)
        print("\n".join(report(directory, done, dry_run=dry_run)))
    return 0


def run_scrub(config: Config, *, rate_bytes_per_s: int | None) -> int:
    """Read every image of the cache again, at once; return 1 if one is damaged. Raises `StorageError`."""
    damaged = 0
    for directory in _directories(config):
        began_s = time.time()
        while (digest := next_blob(directory, 0.0, began_s)) is not None:
            done = scrub_blob(directory, digest, rate_bytes_per_s or _UNLIMITED_BYTES_PER_S, lambda: False)
            if done is not None and done.damaged:
                damaged += 1
                print(f"{directory.root}: {digest}: damaged, put into quarantine")
        print(f"{directory.root}: checked")
    return 1 if damaged else 0


def report(directory: Directory, done: Round, *, dry_run: bool) -> list[str]:
    """Return what a person is told of a round."""
    room = done.room
    quota = f" of {_gb(room.quota_bytes)}" if room.quota_bytes is not None else ""
    lines = [f"{directory.root}: {_gb(room.used_bytes)}{quota} used, {_gb(room.free_bytes)} free"]
    for one in done.candidates:
        verdict = "remove" if one in done.victims else one.kept or "keep"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.last_use_s))
        lines.append(
            f"  {verdict:8}  {_gb(one.size_bytes):>10}  last used {used}  {', '.join(one.names) or one.layer}"
        )
    gain = sum(one.size_bytes for one in done.victims)
    lines.append(
        f"  would remove {len(done.victims)} images, {_gb(gain)}"
        if dry_run
        else f"  removed {_gb(done.freed_bytes)}"
    )
    return lines


def _directories(config: Config) -> tuple[Directory, ...]:
    # The daemon's own name: what the node reads is known by one lease file, and this program takes no lease.
    return Store.from_config(config.cache, node_name(config.run_dir)).writable


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"
