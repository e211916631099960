"""An image in somebody else's part: whatever its writer does, only right bytes are shown, and only what is wanted is read."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.publishing import make_squashfs
from uenvd.cache import blobs
from uenvd.cache.directory import Directory
from uenvd.cache.partial import Partial
from uenvd.cache.partmap import map_of
from uenvd.cache.wishes import Wishes
from uenvd.daemon import following
from uenvd.daemon.following import Following
from uenvd.errors import InUse, UenvError
from uenvd.fuse.arrival import OwnBoard
from uenvd.oci.chunks import ChunkList, chunk_list
from uenvd.oci.manifest import Descriptor, digest_of
from uenvd.squashfs import Image


def until(condition: Callable[[], object], what: str = "", deadline_s: float = 10.0) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.005)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    files = {f"f{number}": os.urandom(300_000) for number in range(10)}
    return make_squashfs(tmp_path_factory.mktemp("image") / "a.squashfs", files).read_bytes()


@pytest.fixture(scope="module")
def chunks(data: bytes) -> ChunkList:
    def read(first: int, size: int) -> bytes:
        return data[first : first + size]

    return chunk_list(Image(read, len(data)), read, len(data))


class Steps:
    """A writer that is stepped, and who follows it."""

    def __init__(self, root: Path, data: bytes, chunks: ChunkList) -> None:
        self.data, self.chunks = data, chunks
        self.layer = Descriptor("application/octet-stream", digest_of(data), len(data))
        self.writer = Directory(root, node="a")
        self.writer.prepare()
        self.part = self.writer.begin(self.layer)
        view = Directory(root, node="b").blobs.follow(self.layer.digest, len(data))
        assert view is not None
        self.view = view
        self.board = OwnBoard(chunks.lengths, 5.0)
        self.read: list[tuple[int, int]] = []
        real = view.read
        view.read = lambda first, size: (self.read.append((first, size)), real(first, size))[1]  # type: ignore[method-assign]
        self.changes = 0
        self.follower = Following("app/1.0", self.layer, chunks, self.board, view, changed=self._changed)
        self.error: UenvError | None = None
        self.thread = threading.Thread(target=self._run)

    def _changed(self) -> None:
        self.changes += 1

    def _run(self) -> None:
        try:
            self.follower.run()
        except UenvError as error:
            self.error = error

    def span(self, number: int) -> tuple[int, int]:
        return self.board.span(range(number, number + 1))

    def write(self, *numbers: int, wrong: bool = False, part: Partial | None = None) -> None:
        part = part or self.part
        for number in numbers:
            first, end = self.span(number)
            part.write_at(first, bytes(end - first) if wrong else self.data[first:end])
        part.sync()

    def want(self, number: int) -> None:
        self.follower.want(*self.span(number))

    def tables(self) -> range:
        position = Image(lambda first, size: self.data[first : first + size], len(self.data)).superblock
        return self.board.chunks_of(position.inode_table_pos, len(self.data))

    def begin(self) -> None:
        """Let it have the tables."""
        self.thread.start()
        self.write(0, *self.tables())
        until(lambda: self.follower.tables_here, "the tables")

    @property
    def wishes(self) -> Wishes:
        assert self.part.wishes is not None
        return self.part.wishes

    def wished(self) -> list[tuple[int, int]]:
        return [one for wish in self.wishes.read(len(self.data)).values() for one in wish.ranges]

    def end(self) -> None:
        self.follower.stop()
        if self.thread.ident is not None:
            self.thread.join(10)
            assert not self.thread.is_alive()
        self.part.keep()
        self.board.close()


@pytest.fixture
def steps(tmp_path: Path, data: bytes, chunks: ChunkList, monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    monkeypatch.setattr(blobs, "_ABSENT_S", 0.0)
    for name in ("LOOK_S", "WISH_S", "RIGHT_SOON_S"):
        monkeypatch.setattr(following, name, 0.02)
    monkeypatch.setattr(following, "_CHECK_S", 0.02)
    found = Steps(tmp_path, data, chunks)
    yield found
    found.end()


MIDDLE = 10
BEFORE = 8


def test_it_can_be_served_when_the_tables_are_there_and_nothing_else_is_read(steps: Steps) -> None:
    steps.begin()
    steps.write(*range(len(steps.chunks)))
    steps.want(MIDDLE)
    until(lambda: steps.board.is_here(MIDDLE))
    shown = {number for number in range(len(steps.chunks)) if steps.board.is_here(number)}
    assert shown == {0, MIDDLE, *steps.tables()}
    assert len(steps.read) == len(shown) + 1, "the superblock is looked at once more"
    fd = steps.follower.open_for_reader()
    first, end = steps.span(MIDDLE)
    assert os.pread(fd, end - first, first) == steps.data[first:end]
    os.close(fd)


def test_before_there_is_a_file_it_waits_for_one(steps: Steps) -> None:
    away = steps.part.path.with_suffix(".away")
    steps.part.path.rename(away)
    steps.thread.start()
    with pytest.raises(InUse):
        steps.follower.open_for_reader()
    steps.write(0, *steps.tables())
    away.rename(steps.part.path)
    until(lambda: steps.follower.tables_here)


def test_bytes_that_are_not_right_yet_are_looked_at_again_and_nothing_of_the_writer_is_touched(
    steps: Steps, caplog: pytest.LogCaptureFixture
) -> None:
    steps.begin()
    steps.write(MIDDLE, wrong=True)
    steps.want(MIDDLE)
    until(lambda: steps.read.count((steps.span(MIDDLE)[0], steps.chunks.lengths[MIDDLE])) >= 3)
    assert not steps.board.is_here(MIDDLE)
    first, end = steps.span(MIDDLE)
    assert steps.part.covers(first, end)
    with steps.part.path.open("r+b") as file:  # as when a client flushes late
        file.seek(first)
        file.write(steps.data[first:end])
    until(lambda: steps.board.is_here(MIDDLE))
    assert not caplog.records


def test_a_hole_that_the_map_calls_written_is_not_shown(steps: Steps) -> None:
    steps.begin()
    first, end = steps.span(MIDDLE)
    with map_of(steps.part.path).open("ab") as file:
        file.write(f"w {first} {end}\nd\n".encode())
    steps.want(MIDDLE)
    until(lambda: (first, end - first) in steps.read)
    assert not steps.board.is_here(MIDDLE)


def test_what_is_not_durable_is_not_shown_however_right(steps: Steps) -> None:
    steps.begin()
    first, end = steps.span(MIDDLE)
    steps.part.write_at(first, steps.data[first:end])
    steps.part.record()
    steps.want(MIDDLE)
    until(steps.wished, "it is wished for")
    assert not steps.board.is_here(MIDDLE)
    steps.part.sync()
    until(lambda: steps.board.is_here(MIDDLE))


def test_who_waits_has_his_wish_written_and_withdrawn_again(steps: Steps) -> None:
    steps.begin()
    until(lambda: not steps.wished(), "the tables are here")
    steps.follower.want(steps.span(MIDDLE)[0], steps.span(MIDDLE + 1)[1])
    steps.want(BEFORE)
    wanted = [(steps.span(MIDDLE)[0], steps.span(MIDDLE + 1)[1]), steps.span(BEFORE)]
    until(lambda: steps.wished() == wanted, "neighbours together")
    steps.write(MIDDLE)
    until(lambda: steps.wished() == [steps.span(MIDDLE + 1), steps.span(BEFORE)])
    steps.write(BEFORE, MIDDLE + 1)
    until(lambda: not steps.wished())


def test_what_is_read_one_after_the_other_is_wished_for_ahead(steps: Steps) -> None:
    steps.begin()
    steps.write(1)
    steps.want(1)
    steps.want(2)
    until(
        lambda: [end for _first, end in steps.wished()] > [steps.span(3)[0]], "more than somebody waits for"
    )
    steps.write(2)
    until(lambda: not steps.wished(), "nobody waits")


def test_a_wish_is_withdrawn_at_the_end(steps: Steps) -> None:
    steps.begin()
    steps.want(MIDDLE)
    until(steps.wished)
    steps.follower.stop()
    steps.thread.join(10)
    assert not steps.wished()
    assert steps.error is None


def test_who_waits_long_is_told_why(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "CAUSE_S", 0.05)
    steps.begin()
    steps.want(MIDDLE)
    until(lambda: "pulls it and has not brought it yet" in steps.board.cause)
    assert os.uname().nodename in steps.board.cause
    steps.write(MIDDLE)
    until(lambda: not steps.board.cause)


def test_reads_that_go_on_find_the_next_chunks_verified(steps: Steps) -> None:
    steps.begin()
    steps.write(*range(len(steps.chunks)))
    for number in (1, 2):
        steps.want(number)
        until(lambda number=number: steps.board.is_here(number))  # type: ignore[misc]
    until(lambda: steps.board.is_here(3), "nobody has asked for it")


def test_a_part_that_is_removed_ends_it_and_what_was_verified_stays(steps: Steps) -> None:
    steps.begin()
    fd = steps.follower.open_for_reader()
    steps.part.abort()
    steps.want(MIDDLE)
    steps.thread.join(10)
    assert isinstance(steps.error, InUse)
    assert steps.follower.waiting == [steps.span(MIDDLE)], "for whoever brings it now"
    assert os.pread(fd, 96, 0) == steps.data[:96]
    os.close(fd)


def test_a_reader_whose_file_is_gone_is_heard(steps: Steps) -> None:
    """NFS: ESTALE for bytes that the board shows. The worker asks for them again."""
    steps.begin()
    steps.part.abort()
    assert not steps.follower.stopped, "nobody has asked"
    steps.want(0)
    steps.thread.join(10)
    assert isinstance(steps.error, InUse)


def test_the_end_of_the_writer_is_seen_by_who_waits(steps: Steps) -> None:
    steps.begin()
    steps.want(MIDDLE)
    until(steps.wished)
    before = steps.changes
    steps.part.write_at(0, steps.data)
    steps.part.commit()
    until(lambda: steps.follower.ended and steps.changes > before)
    assert steps.error is None, "its file is the blob: what was read of it is right"


def test_trouble_of_the_file_system_is_told_and_outlasted(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "TROUBLE_S", 0.05)
    steps.begin()
    real = steps.view.look
    trouble: list[int] = [1]

    def look() -> bool:
        if trouble:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real()

    monkeypatch.setattr(steps.view, "look", look)
    steps.want(MIDDLE)
    until(lambda: "Input/output error" in steps.board.cause)
    assert steps.thread.is_alive()
    steps.write(MIDDLE)
    trouble.clear()
    until(lambda: steps.board.is_here(MIDDLE))
    until(lambda: not steps.board.cause)


def test_who_goes_on_with_the_part_is_followed_in_the_same_file(steps: Steps) -> None:
    steps.begin()
    steps.part.keep()
    successor = steps.writer.begin(steps.layer)
    try:
        steps.want(MIDDLE)
        steps.write(MIDDLE, part=successor)
        until(lambda: steps.board.is_here(MIDDLE))
        assert steps.error is None
    finally:
        successor.keep()


def test_while_nobody_waits_the_file_server_is_asked_nothing(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps.begin()
    until(lambda: not steps.follower.waiting)
    asked: list[Any] = []
    real = steps.view.look
    monkeypatch.setattr(steps.view, "look", lambda: (asked.append(1), real())[1])
    time.sleep(0.2)
    assert not asked
