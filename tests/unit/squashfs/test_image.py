"""`Image` on images that mksquashfs made: the same tree as the source's and as what unsquashfs extracts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from support.images import (
    BLOCK_SIZES,
    COMPRESSORS,
    Node,
    build_tree,
    differences,
    extract,
    make_image,
    open_image,
    read_all,
    read_image,
    scan,
)
from uenvd.errors import FormatError
from uenvd.squashfs import Image, Inode, Kind

SPECIAL = os.geteuid() == 0
"""Device nodes, owners and trusted attributes need root; without it the tree has all the rest."""

Tree = tuple[Path, dict[bytes, Node]]


@pytest.fixture(scope="module")
def small_tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = build_tree(
        tmp_path_factory.mktemp("small") / "tree",
        block_sizes=(4096,),
        many=100,
        large_bytes=1_200_000,
        special=SPECIAL,
    )
    return tree, scan(tree)


@pytest.fixture(scope="module")
def whole_tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = build_tree(tmp_path_factory.mktemp("whole") / "tree", special=SPECIAL)
    return tree, scan(tree)


@pytest.fixture(scope="module")
def whole(whole_tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> tuple[Image, bytes, Path]:
    """The reader on the image of the whole tree, the image's bytes, the tree."""
    out = make_image(whole_tree[0], tmp_path_factory.mktemp("whole") / "image")
    return open_image(out), out.read_bytes(), whole_tree[0]


def found(image: Image, path: bytes) -> Inode:
    inode = image.find(path)
    assert inode is not None, path
    return inode


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_same_tree_as_the_source_and_as_unsquashfs(
    small_tree: Tree, tmp_path: Path, compressor: str, block_size: int
) -> None:
    tree, expected = small_tree
    out = make_image(tree, tmp_path / "image", compressor=compressor, block_size=block_size)
    actual = read_image(out)
    assert not differences(expected, actual)
    if SPECIAL:  # unsquashfs restores setuid and setgid bits for root only
        assert not differences(scan(extract(out, tmp_path / "extracted")), actual)


def test_same_whole_tree(whole_tree: Tree, tmp_path: Path) -> None:
    out = make_image(whole_tree[0], tmp_path / "image", block_size=1 << 20)
    actual = read_image(out)
    assert not differences(whole_tree[1], actual)
    if SPECIAL:  # unsquashfs restores setuid and setgid bits for root only
        assert not differences(scan(extract(out, tmp_path / "extracted")), actual)


OPTIONS = {
    "no fragments": ["-no-fragments"],
    "always fragments": ["-always-use-fragments"],
    "nothing compressed": ["-noI", "-noD", "-noF", "-noX", "-noId"],
    "inodes uncompressed": ["-noI"],
    "data uncompressed": ["-noD"],
    "fragments uncompressed": ["-noF"],
    "no export table": ["-no-exports"],
    "no duplicates check": ["-no-duplicates"],
    "no padding": ["-nopad"],
    "no sparse": ["-no-sparse"],
    "tail ends": ["-no-tailends"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_same_tree_with_each_option(small_tree: Tree, tmp_path: Path, name: str) -> None:
    tree, expected = small_tree
    out = make_image(tree, tmp_path / "image", block_size=8192, extra=OPTIONS[name])
    assert not differences(expected, read_image(out))


@pytest.mark.parametrize(
    ("compressor", "extra"),
    [
        ("gzip", ["-Xcompression-level", "1", "-Xwindow-size", "8", "-Xstrategy", "huffman_only,default"]),
        ("xz", ["-Xdict-size", "8192", "-Xbcj", "x86,arm"]),
        ("lz4", ["-Xhc"]),
        ("zstd", ["-Xcompression-level", "22"]),
    ],
)
def test_same_tree_with_each_compressor_option(
    small_tree: Tree, tmp_path: Path, compressor: str, extra: list[str]
) -> None:
    tree, expected = small_tree
    out = make_image(tree, tmp_path / "image", compressor=compressor, block_size=16384, extra=extra)
    assert open_image(out).superblock.has_compressor_options
    assert not differences(expected, read_image(out))


def test_all_root(small_tree: Tree, tmp_path: Path) -> None:
    tree, expected = small_tree
    out = make_image(tree, tmp_path / "image", extra=["-all-root"])
    assert not differences(
        {path: replace(node, uid=0, gid=0) for path, node in expected.items()}, read_image(out)
    )


def test_no_xattrs(small_tree: Tree, tmp_path: Path) -> None:
    tree, expected = small_tree
    out = make_image(tree, tmp_path / "image", extra=["-no-xattrs"])
    assert not differences(
        {path: replace(node, xattrs={}) for path, node in expected.items()}, read_image(out)
    )


def test_an_image_that_was_appended_to(small_tree: Tree, tmp_path: Path) -> None:
    tree, expected = small_tree
    out = make_image(tree, tmp_path / "image")
    make_image(tree / "modes", out, append=True, extra=["-root-becomes", "before"])
    actual = read_image(out)
    before = {path: replace(node, same_as=b"") for path, node in expected.items() if path != b"."}
    inside = {
        path[7:]: replace(node, same_as=b"") for path, node in actual.items() if path.startswith(b"before/")
    }
    assert not differences(before, inside)
    assert actual[b"0600"].content == expected[b"modes/0600"].content


def test_a_name_with_a_slash_by_mksquashfs_is_refused(small_tree: Tree, tmp_path: Path) -> None:
    out = make_image(small_tree[0] / "modes", tmp_path / "image")
    make_image(small_tree[0] / "names", out, append=True, extra=["-root-becomes", "a/b"])
    image = open_image(out)
    with pytest.raises(FormatError, match="forbidden name b'a/b'"):
        list(image.entries(image.inode(image.root)))


class TestWholeTree:
    """Methods one by one, on the tree with a directory of 5,000 files."""

    def test_every_name_is_found_and_others_are_not(self, whole: tuple[Image, bytes, Path]) -> None:
        image, _data, tree = whole
        for name in (b"many", b"names", b"modes", b"sizes", b""):
            directory = found(image, name)
            entries = {entry.name: entry for entry in image.entries(directory)}
            assert sorted(entries) == sorted(os.listdir(os.path.join(os.fsencode(tree), name)))
            assert list(entries) == sorted(entries)
            for key, entry in entries.items():
                assert image.lookup(directory, key) == entry
                assert image.lookup(directory, key + b"\0") is None
                assert image.lookup(directory, key[:-1]) == entries.get(key[:-1])

    def test_the_large_directory_has_an_index_and_a_lookup_uses_it(
        self, whole: tuple[Image, bytes, Path]
    ) -> None:
        _image, data, _tree = whole
        reads: list[int] = []

        def read(pos: int, size: int) -> bytes:
            reads.append(pos)
            return data[pos : pos + size]

        image = Image(read, len(data))
        many = found(image, b"many")
        assert many.index_count > 10
        reads.clear()
        assert image.lookup(many, b"file-02500-") is not None
        # Two blocks of listings, two of the inode table (the index, the inode).
        assert len(reads) <= 4

    def test_opening_reads_no_table(self, whole: tuple[Image, bytes, Path]) -> None:
        _image, data, _tree = whole
        reads: list[int] = []

        def read(pos: int, size: int) -> bytes:
            reads.append(pos + size)
            return data[pos : pos + size]

        Image(read, len(data))
        assert max(reads) <= 96 + 2 + 8

    def test_parents(self, whole: tuple[Image, bytes, Path]) -> None:
        image, _data, _tree = whole
        assert image.parent(image.inode(image.root)) == image.root
        assert image.parent(found(image, b"many")) == image.root
        names = found(image, b"names")
        assert image.parent(found(image, b"names/" + b"d" * 255)) == names.ref

    def test_link_counts_of_directories(self, whole: tuple[Image, bytes, Path]) -> None:
        image, _data, _tree = whole
        for path in (b"", b"names", b"deep", b"no-files", b"many"):
            directory = found(image, path)
            below = sum(entry.kind is Kind.DIRECTORY for entry in image.entries(directory))
            assert directory.nlink == 2 + below, path

    def test_holes_store_nothing(self, whole: tuple[Image, bytes, Path]) -> None:
        image, _data, _tree = whole
        file = found(image, b"holes/all")
        spans = image.spans(file, 0, file.size_bytes)
        assert len(spans) > 20
        assert all(span.block.stored_bytes == 0 for span in spans[:-1])
        assert spans[0].block == spans[1].block

    def test_find(self, whole: tuple[Image, bytes, Path]) -> None:
        image, _data, _tree = whole
        assert found(image, b"/").ref == found(image, b".").ref == found(image, b"").ref == image.root
        assert found(image, b"//links/./first/").size_bytes == 9000
        for path in (
            b"nothing",
            b"hello.txt/x",
            b"links/..",
            b"links/relative/x",
            b"deep/0/9",
            b"many/" + b"x" * 5000,
        ):
            assert image.find(path) is None, path

    def test_reads_at_each_border(self, whole: tuple[Image, bytes, Path]) -> None:
        image, data, tree = whole
        block = image.superblock.block_size_bytes
        for name in (
            f"sizes/{2 * block + 77}",
            f"sizes/{block}",
            f"sizes/{block - 1}",
            "holes/middle",
            "large",
        ):
            file, expected = found(image, name.encode()), (tree / name).read_bytes()
            borders = {
                0,
                1,
                block - 1,
                block,
                block + 1,
                2 * block,
                len(expected) - 1,
                len(expected),
                len(expected) + 1,
            }
            for offset in borders:
                for size in (0, 1, 2, block, 2 * block + 1):
                    assert read_all(image, file, data, offset, size) == expected[offset : offset + size], (
                        name,
                        offset,
                        size,
                    )

    def test_read_file(self, whole: tuple[Image, bytes, Path]) -> None:
        image, _data, tree = whole
        for name in ("hello.txt", "large", "empty", "holes/start"):
            expected = (tree / name).read_bytes()
            assert image.read_file(found(image, name.encode()), len(expected)) == expected
            if expected:
                with pytest.raises(FormatError, match="more than"):
                    image.read_file(found(image, name.encode()), len(expected) - 1)

    def test_hard_links_are_one_inode(self, whole: tuple[Image, bytes, Path]) -> None:
        image, _data, _tree = whole
        assert (
            found(image, b"third").ref
            == found(image, b"links/first").ref
            == found(image, b"links/second").ref
        )
        assert found(image, b"third").nlink == 3


class TestCallback:
    """What the read callback does wrong."""

    def test_its_errors_pass_through(self, whole: tuple[Image, bytes, Path]) -> None:
        _image, data, _tree = whole
        broken = False

        def read(pos: int, size: int) -> bytes:
            if broken:
                raise OSError(5, "the disk")
            return data[pos : pos + size]

        image = Image(read, len(data))
        broken = True
        with pytest.raises(OSError, match="the disk"):
            image.inode(image.root)
        broken = False
        assert found(image, b"hello.txt").size_bytes == 6
        with pytest.raises(OSError, match="the disk"):
            Image(lambda _pos, _size: (_ for _ in ()).throw(OSError("the disk")))

    def test_short_reads_are_damage(self, whole: tuple[Image, bytes, Path]) -> None:
        _image, data, _tree = whole
        image = Image(lambda pos, size: data[pos : pos + min(size, 100)])
        with pytest.raises(FormatError):
            image.inode(image.root)
