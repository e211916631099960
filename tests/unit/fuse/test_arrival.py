"""The board of an arriving image, and the source that reads by it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from uenvd.fuse.arrival import Board, OwnBoard, take_board
from uenvd.fuse.protocol import Missing
from uenvd.fuse.source import WANT, ArrivingSource


@pytest.fixture
def board() -> Iterator[OwnBoard]:
    own = OwnBoard([10, 20, 30], 5.0)
    yield own
    own.close()


def shown(own: OwnBoard) -> Board:
    named = own.descriptors()
    found = take_board({name: [descriptor] for name, descriptor in named.items()})
    assert found is not None
    return found


def test_what_is_here_is_seen_by_others_who_cannot_write(board: OwnBoard) -> None:
    theirs = shown(board)
    assert (theirs.size_bytes, theirs.count, theirs.deadline_s) == (60, 3, 5.0)
    assert theirs.chunks_of(9, 11) == range(2)
    assert theirs.chunks_of(60, 70) == range(0)
    assert not theirs.covers(range(3))
    board.set_here(0)
    board.set_here(2)
    assert theirs.is_here(0)
    assert list(theirs.missing(range(3))) == [range(1, 2)]
    board.set_cause("it rains")
    board.set_complete()
    assert theirs.cause == "it rains"
    assert theirs.complete
    named = board.descriptors()
    with pytest.raises(OSError, match="descriptor"):
        os.pwrite(named["board"], b"\1", 4096)
    for descriptor in named.values():
        os.close(descriptor)


def test_first_reads_are_kept_in_order(board: OwnBoard) -> None:
    theirs = shown(board)
    assert board.first_reads() == []
    theirs.note_read(range(2, 3))
    assert board.first_reads() == [2]


def test_only_chunks_on_the_board_are_read(board: OwnBoard, tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(bytes(range(60)))
    fd = os.open(path, os.O_RDONLY)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        source = ArrivingSource(fd, shown(board), theirs)
        board.set_here(0)
        assert source.read(2, 4) == bytes(range(2, 6))
        with pytest.raises(Missing) as missing:
            source.read(5, 30)
        assert (missing.value.first_byte, missing.value.end_byte) == (10, 60)
        source.want(10, 60)
        source.want(10, 60)
        assert ours.recv(100) == WANT.pack(b"W", 10, 60)
        with pytest.raises(BlockingIOError):
            ours.recv(100, socket.MSG_DONTWAIT)
        assert source.give_up(missing.value, 4.0) is None
        board.set_cause("the registry is gone")
        error = source.give_up(missing.value, 5.5)
        assert error is not None
        assert "chunk 1" in str(error)
        assert "the registry is gone" in str(error)
        board.set_here(1)
        board.set_here(2)
        assert source.read(5, 100) == bytes(range(5, 60))
        os.truncate(path, 50)
        with pytest.raises(OSError, match="shorter"):
            source.read(40, 20)
    os.close(fd)


def test_a_file_that_was_removed_on_its_server_is_waited_for(
    board: OwnBoard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer was succeeded by one who writes another file, which will be given."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def pread(_fd: int, _size: int, _position: int) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "pread", pread)
    with ours, theirs, (tmp_path / "part").open("wb+") as file:
        source = ArrivingSource(file.fileno(), shown(board), theirs)
        board.set_here(1)
        with pytest.raises(Missing) as missing:
            source.read(12, 4)
        assert (missing.value.first_byte, missing.value.end_byte) == (10, 30)
        source.want(10, 30)
        assert ours.recv(100) == WANT.pack(b"W", 10, 30)
        source.woken()
        source.want(10, 30)
        assert ours.recv(100) == WANT.pack(b"W", 10, 30), "each time that it is looked for"
        board.set_complete()
        with pytest.raises(OSError, match="tale"):
            source.read(12, 4)
