"""The NFS server of a shared cache is full, read-only or gone for a while."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.netfs import EXPORT, SHARED, Node, Server
from support.nfscache import (
    DATA,
    Here,
    begin,
    commit,
    evict,
    fill,
    has,
    let_go,
    names,
    read,
    sync,
    take,
    until,
    write,
)
from uenvd.cache.partial import Partial
from uenvd.errors import InUse, StorageError, StorageFull
from uenvd.oci.manifest import (
    SQUASHFS_TYPE,
    Descriptor,
)


def pull_big(size_bytes: int) -> str:
    descriptor = Descriptor(SQUASHFS_TYPE, "sha256:" + "7" * 64, size_bytes)
    part = Here.cache.begin(descriptor)
    try:
        piece = os.urandom(1 << 20)
        for at in range(0, size_bytes, len(piece)):
            part.write_at(at, piece[: size_bytes - at])
        part.sync()
    except StorageFull as error:
        return str(error)
    finally:
        part.keep()
    return "no error"


def free() -> int:
    return Here.cache.blobs.free_bytes()


def test_a_full_server_is_told_and_what_was_pulled_is_removed(
    three: tuple[Node, Node, Node], root: Path
) -> None:
    here, there, _ = three
    room = here.do(free)
    real = os.statvfs(EXPORT)
    assert abs(room - real.f_bavail * real.f_frsize) < 8 << 20
    filler = EXPORT / root.name / "filler"
    with pytest.raises(StorageFull):
        here.do(pull_big, room + (64 << 20))
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room - (24 << 20))
    try:
        assert "no room" in here.do(pull_grown, 40 << 20)
        # Its client hides what goes while it is open; after an error it gives it up only with the next writeback, half a minute later.
        until(lambda: here.do(names, "partial") == [], "what was pulled is there still", 60.0)
    finally:
        filler.unlink()
    here.do(fill)
    assert there.do(has)


def pull_grown(size_bytes: int) -> str:
    """Pull what fitted when it began: somebody else was faster."""
    Partial._check_room = lambda _self: None  # type: ignore[method-assign]
    Here.cache._make_room = lambda _descriptor: None  # type: ignore[method-assign]
    return pull_big(size_bytes)


def test_read_only_for_a_while(server: Server, three: tuple[Node, Node, Node]) -> None:
    here, there, _ = three
    here.do(fill)
    there.do(take)
    server.export("ro")
    try:
        assert there.do(read)
        with pytest.raises(StorageError, match="Read-only"):
            here.do(pull_big, 1000)
    finally:
        server.export()
    assert there.do(read)
    here.do(pull_big, 1000)
    there.do(let_go)


def drop_pages() -> None:
    os.posix_fadvise(Here.fd, 0, 0, os.POSIX_FADV_DONTNEED)


def test_the_server_goes_and_comes_back(server: Server, three: tuple[Node, Node, Node]) -> None:
    here, there, third = three
    here.do(fill)
    there.do(take)
    here.do(evict_nothing)
    server.stop()
    try:
        there.do(drop_pages)
        reading = there.begin(read)
        asking = third.begin(has)
        assert not reading.done.wait(2) and not asking.done.is_set(), "hard mounts wait"
    finally:
        server.start()
    assert reading.result(120)
    assert asking.result(120)
    with pytest.raises(InUse):
        here.do(evict)
    there.do(let_go)
    third.do(take)
    assert third.do(read)
    third.do(let_go)
    assert here.do(evict)


def evict_nothing() -> None:
    with pytest.raises(InUse):
        evict()


def test_the_puller_goes_on_when_the_server_is_back(server: Server, three: tuple[Node, Node, Node]) -> None:
    """Nobody takes a claim meanwhile: nobody can."""
    here, there, _ = three
    here.do(begin, 0, 100_000)
    server.stop()
    try:
        syncing = here.begin(sync)
        assert not syncing.done.wait(1)
    finally:
        server.start()
    syncing.result(120)
    here.do(write, 100_000, len(DATA))
    here.do(commit)
    until(lambda: there.do(has), "published", 3.0)
    assert SHARED.name == "shared"
