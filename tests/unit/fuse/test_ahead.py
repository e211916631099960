"""What is decoded before anybody asks: the neighbours of files that are read in order, nothing after reads in no order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.images import content, make_image
from uenvd.fuse.ahead import Ahead
from uenvd.fuse.shared import SharedBlocks
from uenvd.fuse.tree import ROOT_INO, Tree


@pytest.fixture(params=[[], ["-no-fragments"]], ids=["fragments", "no fragments"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tree]:
    directory = tmp_path / "tree"
    directory.mkdir()
    for number in range(40):
        (directory / f"{number:02}").write_bytes(content(1500, number))
    fd = os.open(make_image(directory, tmp_path / "i", block_size=4096, extra=request.param), os.O_RDONLY)
    shared = SharedBlocks.create(1 << 20)
    yield Tree(fd, shared=shared)
    os.close(fd)
    os.close(shared.fd)


def read(tree: Tree, ahead: Ahead, number: int) -> bool:
    """Read a file as the channel does; return whether its block was there before."""
    found = tree.lookup(ROOT_INO, b"%02d" % number)
    assert found is not None
    spans = tree.plan(found.ino, 0, 4096)
    ready = all(tree.has_ready(span.block) for span in spans)
    assert b"".join(bytes(tree.shared_part(span)) for span in spans) == content(1500, number)
    ahead.note(tree.ref_of(found.ino), spans)
    while ahead.wanted:
        ahead.work()
    return ready


def test_files_in_order_are_there_before_they_are_asked_for(tree: Tree) -> None:
    ahead = Ahead(tree)
    assert sum(read(tree, ahead, number) for number in range(40)) >= 32


def test_files_in_no_order_are_not_decoded_for_nothing(tree: Tree) -> None:
    ahead = Ahead(tree)
    for number in (30, 20, 10):
        found = tree.lookup(ROOT_INO, b"%02d" % number)
        assert found is not None
        ahead.note(tree.ref_of(found.ino), tree.plan(found.ino, 0, 4096))
        assert not ahead.wanted or number == 30, "the first read of all may be the beginning of an order"
        while ahead.wanted:
            ahead.work()


def test_nothing_follows_a_file_that_goes_on(tmp_path: Path) -> None:
    directory = tmp_path / "tree"
    directory.mkdir()
    for number in range(4):
        (directory / f"{number}").write_bytes(content(20_000, number))
    fd = os.open(make_image(directory, tmp_path / "i", block_size=4096, extra=["-no-fragments"]), os.O_RDONLY)
    shared = SharedBlocks.create(1 << 20)
    tree = Tree(fd, shared=shared)
    ahead = Ahead(tree)
    for number in range(3):
        found = tree.lookup(ROOT_INO, b"%d" % number)
        assert found is not None
        ref = tree.ref_of(found.ino)
        for offset in range(0, 16384, 4096):
            ahead.note(ref, tree.plan(found.ino, offset, 4096))
            assert not ahead.wanted
    ahead.note(ref, tree.plan(found.ino, 16384, 4096))
    assert ahead.wanted, "here it ends"
    os.close(fd)
    os.close(shared.fd)
