"""One directory on a real NFS server, several nodes with a kernel client each: what docs/cache.md promises of `cache.shared`."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.netfs import EXPORT, SHARED, USER, Node, Server
from uenvd.cache import blobs, claim, leases
from uenvd.cache.directory import Directory
from uenvd.cache.identity import CacheUser
from uenvd.cache.partial import Partial
from uenvd.errors import InUse, NotFound, StorageError, StorageFull
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

# --- what nodes do ------------------------------------------------------------------------------------------------------------------


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


@pytest.fixture
def three(nodes: list[Node], root: Path) -> Iterator[tuple[Node, Node, Node]]:
    """Three nodes with one prepared directory, and the usual times."""
    first, second, third = nodes
    for node in nodes:
        node.do(quick_claims, 30.0, 15.0, 2.0)
        node.do(prepare, root, node.name)
    yield first, second, third


# --- the server is what we think ----------------------------------------------------------------------------------------------------


def who_may(path: Path, uid: int) -> str:
    try:
        with CacheUser(uid, uid):
            (path / "x").write_bytes(b"")
            (path / "x").unlink()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


def test_root_is_nobody_there_and_the_cache_belongs_to_its_user(
    three: tuple[Node, Node, Node], root: Path
) -> None:
    here, there, _ = three
    assert here.do(who_may, root, USER) == "ok"
    assert here.do(who_may, root, 0) == "EACCES"
    here.do(fill)
    there.do(take)
    assert there.do(read)
    there.do(let_go)
    owners = {
        (status.st_uid, status.st_gid)
        for directory, _dirs, files in os.walk(EXPORT / root.name)
        for status in (os.stat(os.path.join(directory, name)) for name in files)
    }
    assert owners == {(USER, USER)}


# --- publication --------------------------------------------------------------------------------------------------------------------


def plainly_there() -> bool:
    with CacheUser(USER, USER):
        return Here.cache.blobs.path(LAYER.digest).exists()


def tags() -> list[tuple[str, ...]]:
    return [image.tags for image in Here.cache.images()]


def test_what_was_looked_for_in_vain_is_seen_when_another_node_has_it(
    three: tuple[Node, Node, Node],
) -> None:
    here, there, _ = three
    assert not there.do(has)
    assert not there.do(plainly_there)  # now this client remembers that there is none
    here.do(fill)
    until(lambda: there.do(has), "the blob of the other node does not appear", 3.0)
    there.do(take)
    assert there.do(read)
    assert there.do(tags) == [("v1",)]
    there.do(let_go)


def test_what_another_node_removed_is_not_found(three: tuple[Node, Node, Node]) -> None:
    here, there, _ = three
    here.do(fill)
    assert there.do(has)
    there.do(take)
    assert there.do(read)
    there.do(let_go)
    here.do(evict)
    assert not there.do(has)
    with pytest.raises(NotFound):
        there.do(take)


def hold_open() -> None:
    Here.fd = Here.part.open_for_reader()


def drop_fd() -> None:
    os.close(Here.fd)


def used() -> int:
    return Here.cache.blobs.used_bytes()


def test_what_is_served_from_its_part_is_counted_once(three: tuple[Node, Node, Node]) -> None:
    """A name that goes while a descriptor of it is open stays on NFS as ``.nfs...`` (nfs(5): "silly rename")."""
    here, there, _ = three
    here.do(begin, 0, len(DATA))
    here.do(hold_open)
    here.do(commit)
    assert here.do(read)
    assert there.do(has)
    assert any(name.startswith(".nfs") for name in there.do(names, "partial"))
    for node in (here, there):
        assert node.do(used) < 1.5 * len(DATA)
    here.do(drop_fd)
    until(lambda: there.do(names, "partial") == [], "the name that was left goes with the descriptor", 5.0)


def leave_hidden(place: str, age_s: float) -> None:
    path = Here.cache.root / place / ".nfs0000000000000001000000ff"
    with CacheUser(USER, USER):
        path.write_bytes(bytes(5000))
        os.utime(path, (time.time() - age_s, time.time() - age_s))


def sweep() -> None:
    Here.cache.sweep()


def test_what_a_node_left_hidden_when_it_crashed_is_removed(three: tuple[Node, Node, Node]) -> None:
    here, there, _ = three
    places = ("partial", "trash", "claims", "leases", "blobs/sha256", "images")
    for place in places:
        here.do(leave_hidden, place, 8 * 86400.0)
    there.do(sweep)
    assert {place: there.do(names, place) for place in places} == {place: [] for place in places}
    here.do(leave_hidden, "partial", 60.0)
    there.do(sweep)
    assert there.do(names, "partial"), "its client may still read it"


def no_locks() -> None:
    def refuse(*_arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    Here.locks = fcntl.flock  # type: ignore[attr-defined]
    fcntl.flock = refuse  # type: ignore[assignment]


def locks_again() -> None:
    fcntl.flock = Here.locks  # type: ignore[attr-defined]


def flocks_of_reader() -> int:
    """Return how many locks of the file system a reader of a part asked for."""
    asked = []

    def note(*arguments: Any) -> None:
        asked.append(arguments)

    Here.locks, fcntl.flock = fcntl.flock, note  # type: ignore[attr-defined,assignment]
    try:
        os.close(Here.part.open_for_reader())
    finally:
        locks_again()
    return len(asked)


def test_no_lock_of_the_file_system_is_needed_or_asked_for(three: tuple[Node, Node, Node]) -> None:
    here, there, _ = three
    for node in (here, there):
        node.do(no_locks)
    try:
        here.do(fill)
        there.do(take)
        there.do(let_go)
        here.do(evict)
        there.do(begin)
        assert there.do(flocks_of_reader) == 0, "a lock manager that does not answer would hang the start"
        there.do(end_part)
        there.do(sweep)
    finally:
        for node in (here, there):
            node.do(locks_again)


# --- one writer ---------------------------------------------------------------------------------------------------------------------


def part_bytes() -> int:
    return Here.cache.blobs.part_bytes(LAYER.digest, exact=True)


def sync() -> None:
    Here.part.sync()


def test_one_node_pulls_and_the_other_is_told(three: tuple[Node, Node, Node]) -> None:
    here, there, third = three
    here.do(begin, 0, 500_000)
    with pytest.raises(InUse):
        there.do(begin)
    here.do(sync)
    until(lambda: there.do(part_bytes) == 500_000, "the other node's progress", 3.0)
    here.do(end_part)
    until(lambda: there.do(begins), "the right to write is free again", 3.0)
    there.do(write, 0, len(DATA))
    there.do(commit)
    third.do(take)
    assert third.do(read)
    third.do(let_go)


def pull_in_child() -> None:
    """Begin a pull in a process of its own, so that it can be killed."""
    child = os.fork()
    if child == 0:
        try:
            begin(0, 300_000)
            Here.part.sync()
            os.write(Here.pipe[1], b"x")  # type: ignore[attr-defined]
            signal.pause()
        finally:
            os._exit(1)
    Here.child = child
    os.read(Here.pipe[0], 1)  # type: ignore[attr-defined]


def make_pipe() -> None:
    Here.pipe = os.pipe()  # type: ignore[attr-defined]


def kill_child() -> None:
    os.kill(Here.child, signal.SIGKILL)
    os.waitpid(Here.child, 0)


def test_a_killed_puller_is_replaced_here_at_once_and_elsewhere_after_a_while(
    three: tuple[Node, Node, Node],
) -> None:
    here, there, _ = three
    there.do(quick_claims, 3.0, 1.5, 0.3)
    here.do(make_pipe)
    here.do(pull_in_child)
    assert not there.do(begins)
    here.do(kill_child)
    assert here.do(begins), "a dead process of this boot is known to be dead"
    assert here.do(part_bytes) == 300_000, "what it left is gone on with"
    here.do(end_part)
    here.do(pull_in_child)
    here.do(kill_child)
    took_s = until(lambda: there.do(begins), "a silent node's claim does not hold for ever")
    assert took_s >= 2.5
    assert there.do(part_bytes) == 0, "a file that somebody may still write to does not become ours"
    there.do(write, 0, len(DATA))
    there.do(commit)
    assert here.do(has)


def test_a_node_that_was_cut_off_finds_itself_replaced(three: tuple[Node, Node, Node]) -> None:
    here, there, third = three
    here.do(quick_claims, 30.0, 2.0, 0.3)
    for node in (there, third):
        node.do(quick_claims, 4.0, 2.0, 0.3)
    here.do(begin, 0, len(DATA))
    assert not there.do(begins)
    here.connected(False)
    try:
        until(lambda: there.do(begins), "the node that is cut off holds the claim for ever", 30.0)
        there.do(write, 0, 1000)
    finally:
        here.connected(True)
    with pytest.raises(InUse):
        here.do(commit)
    assert not third.do(has)
    there.do(write, 0, len(DATA))
    there.do(commit)
    third.do(forget_absent)
    third.do(take)
    assert third.do(read)
    third.do(let_go)
    assert there.do(names, "claims") == []


def holds_still() -> bool:
    try:
        Here.part._claim.check()
    except InUse:
        return False
    return True


def never_fenced() -> None:
    claim.FENCE_S = 3600.0  # type: ignore[misc]


def test_a_holder_sees_that_his_claim_was_taken(three: tuple[Node, Node, Node]) -> None:
    """Also when he knows of no pause of his own: his client shows him his file, which he has open, under its name for a minute."""
    here, there, _ = three
    here.do(quick_claims, 30.0, 3600.0, 0.3)
    here.do(begin, 0, 1000)
    until(lambda: here.do(holds_still), "his own")
    there.do(steal)
    until(lambda: not here.do(holds_still), "he does not see that it was taken", 5.0)
    there.do(end_part)


def steal() -> None:
    quick_claims(0.0, 3600.0, 3600.0)
    begins()
    assert begins()


# --- readers ------------------------------------------------------------------------------------------------------------------------


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


# --- trouble ------------------------------------------------------------------------------------------------------------------------


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
