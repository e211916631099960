"""Who asks decides whether workers take turns; what lies in the page cache is read without giving the turn away."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.images import content, make_image
from uenvd.fuse.answers import Answers
from uenvd.fuse.faults import Faults
from uenvd.fuse.protocol import Opcode
from uenvd.fuse.protocol import request as q
from uenvd.fuse.shared import SharedBlocks
from uenvd.fuse.tree import ROOT_INO, Tree


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    (tmp_path / "tree").mkdir()
    for number in range(8):
        (tmp_path / f"tree/{number}").write_bytes(content(1500, number))
    fd = os.open(make_image(tmp_path / "tree", tmp_path / "image", block_size=4096), os.O_RDONLY)
    shared = SharedBlocks.create(1 << 20)
    yield Tree(fd, shared=shared)
    os.close(fd)
    os.close(shared.fd)


def asked(pid: int, unique: int = 2) -> bytes:
    return q.HEADER.pack(q.HEADER_BYTES, Opcode.GETATTR, unique, ROOT_INO, 0, 0, pid, 0, 0)


def test_one_who_asks_alone(tree: Tree) -> None:
    answers = Answers(tree, Faults("x"))

    def ask(pid: int, times: int) -> bool:
        for _ in range(times):
            assert answers.answer(asked(pid), q.HEADER_BYTES)
        return answers.one_asks

    assert not ask(7, 20)
    assert ask(7, 20)
    assert not ask(8, 1)
    assert not any(ask(pid, 1) for pid in (7, 8) * 40), "two who take turns"
    assert not ask(0, 100), "processes in other containers have no number here"


@pytest.mark.parametrize("cached", [True, False])
def test_the_turn_is_given_away_for_what_has_to_be_waited_for(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    if cached:
        monkeypatch.setattr(tree, "_read_now", tree.source.read)
    else:
        monkeypatch.setattr(tree, "_read_now", lambda _pos, _size: None)
    calls: list[str] = []
    tree.before_work = lambda: calls.append("wait")
    tree.before_decoding = lambda: calls.append("decode")
    found = tree.lookup(ROOT_INO, b"3")
    assert found is not None
    (span,) = tree.plan(found.ino, 0, 4096)
    for _ in range(2):
        assert bytes(tree.shared_part(span)) == content(1500, 3)
    assert calls.count("decode") == (1 if span.block.compressed else 0)
    assert ("wait" in calls) is not cached


def test_neighbours_in_a_block_are_decoded_once(tree: Tree) -> None:
    decoded: list[str] = []
    tree.before_decoding = lambda: decoded.append("x")
    for number in range(8):
        found = tree.lookup(ROOT_INO, b"%d" % number)
        assert found is not None
        (span,) = tree.plan(found.ino, 0, 4096)
        assert bytes(tree.shared_part(span)) == content(1500, number)
    assert len(decoded) <= 4, "two files a block"
