"""The tree without a kernel."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import images
from uenvd.errors import FormatError
from uenvd.fuse.tree import ROOT_INO, Tree
from uenvd.squashfs import Block, InodeRef, Span

MakeTree = Callable[..., Tree]


@pytest.fixture
def make_tree(tmp_path: Path) -> Iterator[MakeTree]:
    """Build a small image, open its tree."""
    source = tmp_path / "source"
    (source / "d" / "e").mkdir(parents=True)
    (source / "d" / "file").write_bytes(images.content(10_000, 1))
    (source / "d" / "e" / "deep").write_bytes(b"deep")
    (source / "noise").write_bytes(os.urandom(9000))
    (source / "hole").write_bytes(b"x" * 4096 + bytes(8192) + b"y")
    (source / "suid").write_bytes(b"")
    (source / "suid").chmod(0o6755)
    os.symlink("d/file", source / "link")
    opened: list[int] = []

    def make(*options: str, **how: bool | int) -> Tree:
        image = images.make_image(source, tmp_path / "i", block_size=4096, extra=options)
        opened.append(os.open(image, os.O_RDONLY))
        return Tree(opened[-1], **how)

    yield make
    for fd in opened:
        os.close(fd)


def ino(tree: Tree, path: str) -> int:
    number = ROOT_INO
    for name in path.split("/"):
        found = tree.lookup(number, name.encode())
        assert found is not None
        number = found.ino
    return number


def test_numbers_are_stateless(make_tree: MakeTree) -> None:
    """Another server of the same image gives the same numbers, and knows them without a look-up."""
    one, two = make_tree(), make_tree()
    number = ino(one, "d/e/deep")
    assert two.attributes(number) == one.attributes(number)
    assert two.read(number, 0, 100) == b"deep"
    assert one.attributes(ROOT_INO).mode & stat.S_IFDIR
    assert number > 1


@pytest.mark.parametrize("number", [0, -1, 1 << 47, (1 << 64) - 1])
def test_numbers_that_were_never_given_out(make_tree: MakeTree, number: int) -> None:
    with pytest.raises((OSError, FormatError)):
        make_tree().attributes(number)


def test_listing_with_dots_and_offsets(make_tree: MakeTree) -> None:
    tree = make_tree()
    listed = list(tree.listing(ino(tree, "d"), 0))
    assert [entry.name for entry in listed] == [b".", b"..", b"e", b"file"]
    assert listed[0].attributes.ino == ino(tree, "d")
    assert listed[1].attributes.ino == ROOT_INO
    for entry in listed:
        rest = [later.name for later in tree.listing(ino(tree, "d"), entry.next_offset)]
        assert rest == [later.name for later in listed[listed.index(entry) + 1 :]]
    inner = list(tree.listing(ino(tree, "d/e"), 0))
    assert inner[1].attributes.ino == ino(tree, "d")
    assert list(tree.listing(ROOT_INO, 0))[1].attributes.ino == ROOT_INO


def test_parent_is_unknown_without_export_table(make_tree: MakeTree) -> None:
    tree = make_tree("-no-exports")
    assert [entry.name for entry in tree.listing(ino(tree, "d/e"), 0)] == [b".", b"..", b"deep"]


def test_mask(make_tree: MakeTree) -> None:
    assert make_tree(mask_privileged=True).lookup(ROOT_INO, b"suid").mode == stat.S_IFREG | 0o755  # type: ignore[union-attr]
    assert make_tree(mask_privileged=False).lookup(ROOT_INO, b"suid").mode == stat.S_IFREG | 0o6755  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("call", "number"),
    [
        (lambda tree: tree.lookup(ino(tree, "noise"), b"x"), errno.ENOTDIR),
        (lambda tree: list(tree.listing(ino(tree, "noise"), 0)), errno.ENOTDIR),
        (lambda tree: tree.lookup(ROOT_INO, b"n" * 256), errno.ENAMETOOLONG),
        (lambda tree: tree.readlink(ino(tree, "noise")), errno.EINVAL),
        (lambda tree: tree.plan(ino(tree, "d"), 0, 10), errno.EISDIR),
        (lambda tree: tree.plan(ino(tree, "link"), 0, 10), errno.EINVAL),
    ],
)
def test_wrong_kind(make_tree: MakeTree, call: Callable[[Tree], object], number: int) -> None:
    with pytest.raises(OSError) as caught:
        call(make_tree())
    assert caught.value.errno == number


@pytest.mark.parametrize("options", [(), ("-noD", "-noF"), ("-no-fragments",), ("-always-use-fragments",)])
def test_peek_and_part_agree(make_tree: MakeTree, tmp_path: Path, options: tuple[str, ...]) -> None:
    tree = make_tree(*options)
    for path in ("noise", "hole", "d/file"):
        expected = (tmp_path / "source" / path).read_bytes()
        number = ino(tree, path)
        for offset, size in (
            (0, 20_000),
            (1, 4096),
            (4095, 2),
            (8000, 500),
            (len(expected) - 1, 10),
            (len(expected), 1),
        ):
            spans = tree.plan(number, offset, size)
            assert b"".join(tree.part(span) for span in spans) == expected[offset : offset + size]
            peeked = [tree.peek(span) for span in spans]
            assert all(
                part is None or part == tree.part(span) for part, span in zip(peeked, spans, strict=True)
            )
            assert tree.read(number, offset, size) == expected[offset : offset + size]


def test_small_blocks_in_the_page_cache_need_no_thread(make_tree: MakeTree) -> None:
    tree = make_tree()
    assert all(tree.peek(span) is not None for span in tree.plan(ino(tree, "d/file"), 0, 10_000))


def test_truncated_file_is_an_error_for_the_read_only(make_tree: MakeTree, tmp_path: Path) -> None:
    tree = make_tree()
    number = ino(tree, "noise")
    spans = tree.plan(number, 0, 9000)
    os.truncate(tmp_path / "i", 96)
    for span in spans:
        assert tree.peek(span) is None or span.block.stored_bytes == 0
        with pytest.raises(FormatError):
            tree.part(span)


def test_wrong_sizes_of_stored_blocks_are_refused(make_tree: MakeTree) -> None:
    tree = make_tree()
    with pytest.raises(FormatError):
        tree.part(Span(Block(96, 100, True, 4096), 0, 4096))
    with pytest.raises(FormatError):
        tree.part(Span(Block(96, 100, False, 100), 50, 150))


def test_no_image(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"hello")
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    try:
        with pytest.raises(FormatError):
            Tree(fd)
        with pytest.raises(FormatError):
            Tree(fd, offset_bytes=1 << 40)
    finally:
        os.close(fd)


def test_root_has_number_one(make_tree: MakeTree) -> None:
    tree = make_tree()
    assert tree.ino_of(tree.image.root) == ROOT_INO
    assert tree.ino_of(InodeRef(0)) == (ROOT_INO if tree.image.root == 0 else 2)
