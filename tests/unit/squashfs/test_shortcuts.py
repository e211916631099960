"""`Image.facts` and `Image.spans_at`, which skip most of the decoding, say what `inode` and `spans` say, or leave it to them."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import pytest

from support.images import build_tree, make_image, open_image
from support.rawimage import FILE, NONE, RawImage, run
from uenvd.errors import FormatError
from uenvd.squashfs import Image, Inode, Kind, Span
from uenvd.squashfs.inode import facts_of


def inodes(image: Image) -> list[Inode]:
    found, waiting = [], [image.root]
    while waiting:
        inode = image.inode(waiting.pop())
        found.append(inode)
        if inode.kind is Kind.DIRECTORY:
            waiting += [entry.ref for entry in image.entries(inode)]
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tree(
        tmp_path_factory.mktemp("shortcuts") / "tree",
        block_sizes=(4 << 10,),
        many=300,
        large_bytes=(1 << 20) + 5,
    )


@pytest.mark.parametrize(
    "options", [(), ("-no-fragments",), ("-always-use-fragments",), ("-noI", "-noD", "-noF")]
)
def test_same_answers(tree: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    image = open_image(make_image(tree, tmp_path / "i", block_size=4 << 10, extra=list(options)))
    rng = random.Random(3)
    short = 0
    for inode in inodes(image):
        assert image.facts(inode.ref) == facts_of(inode)
        for offset in (0, 1, 4096, rng.randrange(1 << 21)):
            spans = image.spans_at(inode.ref, offset, rng.randrange(1, 40_000))
            if spans is None:
                continue
            assert inode.kind is Kind.FILE
            short += 1
            size = sum(span.stop - span.start for span in spans)
            assert spans == image.spans(inode, offset, size or 1)
    assert short > 1000


def test_files_after_are_the_neighbours(tree: Path, tmp_path: Path) -> None:
    image = open_image(make_image(tree, tmp_path / "i", block_size=4 << 10))
    files = sorted(inode.ref for inode in inodes(image) if inode.kind is Kind.FILE)
    known = set(files)
    seen = 0
    for ref in files:
        after = image.files_after(ref, 4)
        assert known.issuperset(after)
        assert after == sorted(after)
        seen += len(after)
    assert seen > len(files)


def test_fragments_follow_each_other(tree: Path, tmp_path: Path) -> None:
    image = open_image(make_image(tree, tmp_path / "i", block_size=4 << 10, extra=["-always-use-fragments"]))
    spans = [
        span for inode in inodes(image) if inode.kind is Kind.FILE for span in image.spans(inode, 0, 1 << 21)
    ]
    tails = sorted({span.block for span in spans if not span.block.exact})
    assert len(tails) >= 3
    following = [
        image.fragment_after(block) for block in tails
    ]  # in the order of the table, which is not that of the blocks
    assert following.count(None) == 1
    assert len(set(following)) == len(tails)
    assert set(following) - {None} < set(tails)


@pytest.mark.parametrize(
    ("sizes", "file_bytes", "fragment"),
    [
        ([1 << 25 | 100], 4000, (NONE, 0)),
        ([5000], 4000, (NONE, 0)),
        ([1 << 24 | 100], 4000, (NONE, 0)),
        ([4000], 4000, (7, 0)),
        ([], 100, (0, 4090)),
    ],
)
def test_what_spans_refuses_has_no_shortcut(
    sizes: list[int], file_bytes: int, fragment: tuple[int, int]
) -> None:
    raw = RawImage(data=bytes(8000), fragments=[(96, 4000)])
    ref = raw.file(2, file_bytes, sizes, fragment=fragment[0], offset=fragment[1])
    raw.directory(1, run([(b"f", ref, 2, FILE)]))
    image, _root = raw.open_root()
    with pytest.raises(FormatError):
        image.spans(image.inode(ref), 0, 4096)
    shortcut: list[Span] | None = None
    with suppress(FormatError):
        shortcut = image.spans_at(ref, 0, 4096)
    assert shortcut is None
