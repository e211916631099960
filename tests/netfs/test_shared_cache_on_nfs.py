"""One directory on a real NFS server, several nodes with a kernel client each: what docs/cache.md promises of `cache.shared`."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from support.netfs import EXPORT, USER, Node
from support.nfscache import (
    DATA,
    LAYER,
    Here,
    begin,
    begins,
    commit,
    end_part,
    evict,
    fill,
    forget_absent,
    has,
    let_go,
    names,
    quick_claims,
    read,
    sync,
    take,
    until,
    write,
)
from uenvd.cache import claim
from uenvd.cache.identity import CacheUser
from uenvd.errors import InUse, NotFound

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
