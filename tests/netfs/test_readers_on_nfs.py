"""What is read on one node while another one removes and replaces it, in a directory of a real NFS server."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from support.netfs import EXPORT, USER, Node
from support.nfscache import (
    DATA,
    LAYER,
    Here,
    evict,
    fill,
    forget_absent,
    go,
    has,
    let_go,
    manifest,
    names,
    reached,
    read,
    take,
    until,
)
from uenvd.cache import blobs, leases
from uenvd.cache.identity import CacheUser
from uenvd.errors import InUse, NotFound
from uenvd.oci.manifest import (
    digest_of,
)


def test_one_node_evicts_while_another_reads(three: tuple[Node, Node, Node]) -> None:
    here, there, third = three
    here.do(fill)
    there.do(take)
    with pytest.raises(InUse, match="read by 1 other"):
        here.do(evict)
    assert there.do(read)
    assert third.do(has)
    there.do(let_go)
    assert here.do(evict) >= len(DATA)
    assert here.do(names, "trash") == []


def evict_slowly() -> int:
    """Evict, but pause between the look at the leases and the removal."""
    whole = blobs.held_anywhere

    def look(*arguments: Any, **how: Any) -> Any:
        found = whole(*arguments, **how)
        Here.reached.set()
        assert Here.go.wait(30)
        return found

    blobs.held_anywhere = look  # type: ignore[assignment]
    try:
        return evict()
    finally:
        blobs.held_anywhere = whole  # type: ignore[assignment]


def is_reached() -> bool:
    return Here.reached.is_set()


def take_and_read_later() -> str:
    try:
        fd = Here.cache.blobs.open(LAYER.digest)
    except NotFound:
        return "not found"
    try:
        Here.reached.set()
        assert Here.go.wait(30)
        try:
            good = os.pread(fd, len(DATA), 0) == DATA
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "read" if good else "wrong"
    finally:
        os.close(fd)


def test_who_comes_between_the_look_at_the_leases_and_the_removal_finds_no_blob(
    three: tuple[Node, Node, Node],
) -> None:
    """His client still has the name, and the file is still there under another one: what he opens is gone a moment later."""
    here, there, _ = three
    here.do(fill)
    assert there.do(has) and there.do(has)  # once more: then its client believes the name, too
    evicting = here.begin(evict_slowly)
    assert here.do(reached)
    reading = there.begin(take_and_read_later)
    until(lambda: there.do(is_reached) or reading.done.is_set(), "neither opened nor refused")
    here.do(go)
    assert evicting.result() >= len(DATA)
    there.do(go)
    assert reading.result() == "not found"


def watch_leases() -> int:
    """Read the leases again and again, until told to stop."""
    rounds = 0
    assert Here.cache.blobs.leases is not None
    directory = Here.cache.blobs.leases.path.parent
    with CacheUser(USER, USER):
        while not Here.go.is_set():
            leases.refresh(directory)
            Here.listed = {entry.name for entry in os.scandir(directory)}  # type: ignore[attr-defined]
            rounds += 1
    return rounds


def listed(name: str) -> bool:
    return name in Here.listed  # type: ignore[attr-defined]


def holds(name: str) -> bool:
    with CacheUser(USER, USER):
        return name in leases.held_anywhere(
            Here.cache.blobs._lease_files, Here.cache.blobs.watch, 3600.0, sure=True
        )


def test_a_lease_is_seen_that_came_in_the_same_moment_as_another(
    three: tuple[Node, Node, Node], root: Path
) -> None:
    """A directory's times are as fine as the server's clock tick: who reads it between two changes of one tick does not hear of the second."""
    here, _there, _ = three
    directory = EXPORT / root.name / "cache/leases"
    watching = here.begin(watch_leases)
    missed = 0
    try:
        for number in range(120):
            for name in (f"a{number}", f"b{number}"):
                lease = directory / f"{name}.json"
                lease.write_text(json.dumps({"blobs": [digest_of(name.encode())[7:]]}))
                os.chown(lease, USER, USER)
                time.sleep(0.0015)
            time.sleep(0.03)
            missed += not here.do(listed, f"b{number}.json")
            assert here.do(holds, digest_of(f"b{number}".encode())[7:])
            assert here.do(holds, digest_of(f"a{number}".encode())[7:])
            for name in (f"a{number}", f"b{number}"):
                (directory / f"{name}.json").unlink()
    finally:
        here.do(go)
    print(f"{watching.result()} looks, {missed} of 120 leases would have been missed")


def evict_for(seconds: float) -> int:
    done = 0
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        try:
            forget_absent()
            if not has():
                fill()
            evict()
            done += 1
        except (InUse, NotFound):
            continue
    return done


def read_for(seconds: float) -> int:
    reads = 0
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        forget_absent()
        try:
            take()
        except NotFound:
            continue
        try:
            os.posix_fadvise(Here.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert read(), "other bytes"
            reads += 1
        finally:
            let_go()
    return reads


def test_reading_and_evicting_at_the_same_time_never_fails_a_read(three: tuple[Node, Node, Node]) -> None:
    here, there, third = three
    evicting = here.begin(evict_for, 12.0)
    reading = [node.begin(read_for, 12.0) for node in (there, third)]
    evicted = evicting.result()
    reads = [answer.result() for answer in reading]
    print(f"evicted {evicted} times, read {reads} times")
    assert evicted > 2 and sum(reads) > 2


def pin_for(seconds: float) -> int:
    done = 0
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        Here.cache.pin(manifest().digest, done % 2 == 0)
        done += 1
    return done


def list_for(seconds: float) -> int:
    done = 0
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        found = Here.cache.images()
        assert [image.tags for image in found] == [("v1",)], found
        assert Here.cache.blobs.held() is not None
        done += 1
    return done


def lease_for(seconds: float) -> int:
    done = 0
    held = Here.cache.blobs.leases
    assert held is not None
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        take()
        let_go()
        held.take(f"{done:064x}")
        held.drop(f"{done:064x}")
        done += 1
    return done


def test_records_and_leases_that_are_replaced_while_they_are_read(three: tuple[Node, Node, Node]) -> None:
    here, there, third = three
    here.do(fill)
    answers = [here.begin(pin_for, 6.0), there.begin(list_for, 6.0), third.begin(lease_for, 6.0)]
    done = [answer.result() for answer in answers]
    print(f"pinned {done[0]}, listed {done[1]}, leased {done[2]} times")
    assert min(done) > 2
