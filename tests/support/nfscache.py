"""What the nodes of tests/netfs do with the cache that they share: functions that `support.netfs.Node` runs, each in its node."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from support.netfs import USER
from uenvd.cache import blobs, claim
from uenvd.cache.directory import Directory
from uenvd.cache.identity import CacheUser
from uenvd.cache.partial import Partial
from uenvd.errors import InUse
from uenvd.oci.manifest import (
    CONFIG_TYPE,
    SQUASHFS_TYPE,
    Descriptor,
    Manifest,
    build_manifest,
    digest_of,
    parse_manifest,
)

REPOSITORY = "deploy/demo/zen3/app/1.0"
DATA = b"hsqs" + bytes(range(256)) * 4096
LAYER = Descriptor(SQUASHFS_TYPE, digest_of(DATA), len(DATA))
HEX = LAYER.digest.removeprefix("sha256:")
CONFIG = Descriptor(CONFIG_TYPE, digest_of(b"{}"), 2)


class Here:
    """What a node keeps between two calls."""

    cache: Directory
    part: Partial
    fd = -1
    go = threading.Event()
    reached = threading.Event()
    child = -1


def manifest(note: str = "") -> Manifest:
    return parse_manifest(build_manifest(LAYER, CONFIG, {"n": note}), None)


def prepare(root: Path, node: str, *, part: str = "cache") -> None:
    Here.cache = Directory(root / part, CacheUser(USER, USER), node=node)
    Here.cache.prepare()
    Here.go.clear()
    Here.reached.clear()


def has() -> bool:
    return Here.cache.blobs.has(LAYER.digest)


def forget_absent() -> None:
    Here.cache.blobs._absent.clear()
    Here.cache.blobs._busy.clear()


def fill() -> None:
    with Here.cache.begin(LAYER) as partial:
        partial.write(DATA)
        partial.commit()
    Here.cache.put_manifest(REPOSITORY, manifest(), LAYER, b"{}", tag="v1")


def evict() -> int:
    return Here.cache.evict(manifest().digest)


def take() -> None:
    Here.fd = Here.cache.blobs.open(LAYER.digest)


def read(first: int = 0, size_bytes: int = len(DATA)) -> bool:
    return os.pread(Here.fd, size_bytes, first) == DATA[first : first + size_bytes]


def let_go() -> None:
    os.close(Here.fd)
    held = Here.cache.blobs.leases
    assert held is not None
    held.drop(HEX)


def begin(first: int = 0, end: int = 0) -> None:
    Here.part = Here.cache.begin(LAYER)
    if end:
        Here.part.write_at(first, DATA[first:end])
        Here.part.record()


def begins() -> bool:
    forget_absent()
    try:
        begin()
    except InUse:
        return False
    return True


def write(first: int, end: int) -> None:
    Here.part.write_at(first, DATA[first:end])


def sync() -> None:
    Here.part.sync()


def commit() -> None:
    Here.part.commit()


def end_part() -> None:
    Here.part.keep()


def quick_claims(stale_s: float, fence_s: float, beat_s: float) -> None:
    claim.STALE_S, claim.FENCE_S, claim.BEAT_S, claim._LOOK_S = stale_s, fence_s, beat_s, 0.2  # type: ignore[misc]
    blobs._ABSENT_S = 0.0  # type: ignore[misc]


def go() -> None:
    Here.go.set()


def reached() -> bool:
    return Here.reached.wait(30)


def names(place: str) -> list[str]:
    with CacheUser(USER, USER):
        return sorted(os.listdir(Here.cache.root / place))


def until(condition: Callable[[], bool], what: str, deadline_s: float = 20.0) -> float:
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < deadline_s, what
        time.sleep(0.05)
    return time.monotonic() - began_s
