"""Room for a build, seen to before it begins: images are made in memory, and a build that dies of it after an hour says nothing useful."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from uenvd.errors import ResourceMissing, StorageFull
from uenvd.publish.build.kinds import MEMORY_VARIABLE, Needs

MIN_MEMORY_BYTES: Final = 512 << 20
_SHARE: Final = 0.8
"""Of what is free: the programs of the build need some, too."""


def available_bytes() -> int:
    """Return how much memory this process may still take: what the machine has free, within the limits of its cgroup."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
    return min(available, cgroup_bytes(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))


def cgroup_bytes(root: Path, own: Path) -> int:
    """Return what the limits of this process's cgroup (version 2) and of those above it leave; without limits very much.

    What a build writes is charged there: a job or a container that exceeds its limit is killed.
    """
    left = 1 << 62
    try:
        name = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return left
    place = root / name.strip("/")
    for group in (place, *place.parents):
        if not group.is_relative_to(root):
            break
        try:
            limit = (group / "memory.max").read_text().strip()
            if limit != "max":
                left = min(left, int(limit) - int((group / "memory.current").read_text()))
        except (OSError, ValueError):
            continue
    return max(left, 0)


def check_room(needs: Needs, out_dir: Path, *, stated_bytes: int = 0, available: int | None = None) -> int:
    """Return how much memory the files of a build may take, bytes.

    Args:
        needs: the builder's estimate.
        out_dir: exists; gets the image.
        stated_bytes: what the site says instead of the estimate; 0: nothing.
        available: memory, bytes; None: `available_bytes`.

    Raises:
        ResourceMissing: there is not enough memory.
        StorageFull: the image would not fit.

    """
    available = available_bytes() if available is None else available
    wanted = stated_bytes or max(needs.memory_bytes, MIN_MEMORY_BYTES)
    usable = int(available * _SHARE)
    if usable < wanted:
        because = f"as {MEMORY_VARIABLE} says" if stated_bytes else f"estimated: {needs.because}"
        raise ResourceMissing(
            f"images are built in memory: this one needs {shown(wanted)} ({because}), and of the {shown(available)} that are free "
            f"{shown(usable)} may be taken",
            hint="ask for more memory, where this is a job or a container; where the estimate is wrong, say  memory:  in the recipe "
            f"or set {MEMORY_VARIABLE}",
        )
    free = shutil.disk_usage(out_dir).free
    if free < needs.image_bytes:
        raise StorageFull(
            f"{out_dir} has {shown(free)} free, and the image will have about {shown(needs.image_bytes)}",
            hint="make room, or name another directory: --out DIR",
        )
    return usable


def shown(size_bytes: int) -> str:
    """Return a size for humans, in MiB or GiB."""
    return f"{size_bytes / (1 << 30):.1f} GiB" if size_bytes >= 1 << 30 else f"{size_bytes >> 20} MiB"
