"""Listings and look-ups agree, and hostile directories are refused."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.rawimage import DIR, FILE, RawImage, place, run
from uenvd.errors import FormatError
from uenvd.squashfs import DirEntry, Image, Inode, Kind


def with_files(names: list[bytes]) -> tuple[RawImage, list[tuple[bytes, int, int, int]]]:
    """An image with an empty file for each name, numbered from 2, and their entries."""
    raw = RawImage()
    return raw, [(name, raw.file(number, 0), number, FILE) for number, name in enumerate(names, 2)]


def with_entry(name: bytes = b"name", *, number: int = 2, kind: int = FILE) -> tuple[Image, Inode]:
    raw = RawImage()
    ref = raw.file(2, 0)
    raw.directory(1, run([(name, ref, number, kind)]))
    return raw.open_root()


def agree(image: Image, directory: Inode) -> list[DirEntry]:
    """Return the entries after checking that a look-up of each gives the same."""
    entries = list(image.entries(directory))
    for entry in entries:
        assert image.lookup(directory, entry.name) == entry
    return entries


def test_an_entry() -> None:
    image, root = with_entry()
    (entry,) = agree(image, root)
    assert (entry.name, entry.inode_number, entry.kind) == (b"name", 2, Kind.FILE)
    assert image.child(entry).size_bytes == 0
    assert image.lookup(root, b"other") is None
    assert image.lookup(root, b"") is None


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_a_size_below_four_means_empty(size: int) -> None:
    raw = RawImage()
    raw.directory(1, b"", size=size)
    image, root = raw.open_root()
    assert list(image.entries(root)) == []
    assert image.lookup(root, b"a") is None


@pytest.mark.parametrize("name", [b".", b"..", b"a/b", b"/", b"nul\0", b"\0"])
def test_forbidden_names(name: bytes) -> None:
    image, root = with_entry(name)
    with pytest.raises(FormatError, match="forbidden name"):
        list(image.entries(root))
    with pytest.raises(FormatError, match="forbidden name"):
        image.lookup(root, b"name")


@pytest.mark.parametrize("kind", [0, 8, 14, 65535])
def test_types_that_are_not_basic(kind: int) -> None:
    image, root = with_entry(kind=kind)
    with pytest.raises(FormatError, match=f"type {kind}"):
        list(image.entries(root))


@pytest.mark.parametrize(("number", "kind"), [(3, FILE), (2, DIR), (2, 3)])
def test_an_entry_that_says_another_than_its_inode(number: int, kind: int) -> None:
    image, root = with_entry(number=number, kind=kind)
    (entry,) = image.entries(root)
    with pytest.raises(FormatError, match="its inode FILE 2"):
        image.child(entry)
    with pytest.raises(FormatError, match="its inode FILE 2"):
        image.lookup(root, b"name")


def test_runs_join() -> None:
    raw, entries = with_files([b"a", b"b", b"c"])
    raw.directory(1, run(entries[:1], base=500) + run(entries[1:]))
    assert [entry.name for entry in agree(*raw.open_root())] == [b"a", b"b", b"c"]


def test_in_an_unsorted_listing_the_first_of_a_name_wins() -> None:
    raw, entries = with_files([b"c", b"a", b"c", b"b"])
    raw.directory(1, run(entries))
    found = agree(*raw.open_root())
    assert [(entry.name, entry.inode_number) for entry in found] == [(b"c", 2), (b"a", 3), (b"b", 5)]


@pytest.mark.parametrize(
    ("count", "text"),
    [(256, "run of 257"), (0xFFFFFFFF, "run of 4294967296"), (1, "ends inside an entry")],
)
def test_counts_beyond_the_listing(count: int, text: str) -> None:
    raw, entries = with_files([b"a"])
    raw.directory(1, run(entries, count=count))
    image, root = raw.open_root()
    with pytest.raises(FormatError, match=text):
        list(image.entries(root))


def test_a_listing_cut_at_each_byte() -> None:
    raw, entries = with_files([b"a", b"bb"])
    listing = run(entries)
    for size in range(1, len(listing)):
        cut = RawImage(inodes=raw.inodes)
        cut.directory(1, listing, size=size + 3)
        image, root = cut.open_root()
        with pytest.raises(FormatError):
            list(image.entries(root))


def test_a_listing_beyond_the_table() -> None:
    raw, entries = with_files([b"a"])
    raw.directory(1, run(entries), size=60_000)
    image, root = raw.open_root()
    with pytest.raises(FormatError, match="directory table"):
        list(image.entries(root))


def test_inodes_outside_of_the_table() -> None:
    raw = RawImage()
    raw.directory(1, run([(b"a", 1 << 40, 2, FILE)]))
    image, root = raw.open_root()
    with pytest.raises(FormatError, match="outside of the inode table"):
        list(image.entries(root))


def test_an_offset_beyond_a_metadata_block() -> None:
    raw = RawImage()
    raw.directory(1, run([(b"a", 8192, 2, FILE)]))
    image, root = raw.open_root()
    with pytest.raises(FormatError, match="offset 8192"):
        list(image.entries(root))


def test_inode_numbers_do_not_wrap() -> None:
    raw = RawImage()
    ref = raw.file(2, 0)
    raw.directory(1, run([(b"a", ref, 2, FILE)], base=5).replace(b"\x05\0\0\0", b"\x01\0\0\0", 1))
    image, root = raw.open_root()
    with pytest.raises(FormatError, match="number -2"):
        list(image.entries(root))


class TestCycles:
    """A directory contains the root, itself or its parent."""

    def test_the_root_in_the_root(self) -> None:
        raw = RawImage()
        raw.directory(1, run([(b"again", 0, 1, DIR)]))
        image, root = raw.open_root()
        with pytest.raises(FormatError, match="contains itself"):
            image.lookup(root, b"again")

    def test_the_root_further_down(self) -> None:
        raw = RawImage()
        inner_size = 32
        sub = raw.directory(2, run([(b"up", inner_size, 7, DIR)]), parent=1)
        assert raw.directory(1, run([(b"sub", sub, 2, DIR)])) == inner_size
        image, root = raw.open_root()
        entry = image.lookup(root, b"sub")
        assert entry is not None
        with pytest.raises(FormatError, match="contains itself or a directory above"):
            list(image.entries(image.child(entry)))
        with pytest.raises(FormatError):
            image.find(b"sub/up")

    def test_the_parent_by_its_number(self) -> None:
        raw = RawImage()
        other = raw.directory(5, b"")
        sub = raw.directory(2, run([(b"up", other, 5, DIR)]), parent=5)
        raw.directory(1, run([(b"sub", sub, 2, DIR)]))
        image, root = raw.open_root()
        entry = image.lookup(root, b"sub")
        assert entry is not None
        with pytest.raises(FormatError, match="above it, as b'up'"):
            list(image.entries(image.child(entry)))

    def test_a_longer_circle_ends_in_find(self) -> None:
        raw = RawImage()
        ref = {number: 32 * (number - 2) for number in (2, 3, 4)}
        for number in (2, 3, 4):
            following = number + 1 if number < 4 else 2
            raw.directory(number, run([(b"on", ref[following], following, DIR)]), parent=77)
        raw.directory(1, run([(b"on", ref[2], 2, DIR)]))
        image = raw.open()
        assert image.find(b"on/on/on") is not None
        with pytest.raises(FormatError, match="inside itself"):
            image.find(b"on/on/on/on")


class TestIndex:
    """Segments of a directory with an index."""

    NAMES = tuple(b"%03d" % i for i in range(100))

    def build(
        self, index_of: list[tuple[int, bytes | None]], *, names: tuple[bytes, ...] = NAMES
    ) -> tuple[Image, Inode]:
        """Runs of ten entries; the index has (number of the run, name or None for the right one)."""
        raw, entries = with_files(list(names))
        runs = [run(entries[i : i + 10]) for i in range(0, 100, 10)]
        starts = [sum(map(len, runs[:i])) for i in range(10)]
        index = [
            (starts[i], place(starts[i])[0], names[10 * i] if name is None else name) for i, name in index_of
        ]
        raw.indexed(1, b"".join(runs), index)
        return raw.open_root()

    @pytest.mark.parametrize("runs", [[1, 2, 3, 4, 5, 6, 7, 8, 9], [5], [0, 5], [9], [0, 1, 2], []])
    def test_each_way_to_index_the_runs(self, runs: list[int]) -> None:
        image, root = self.build([(i, None) for i in runs])
        assert tuple(entry.name for entry in agree(image, root)) == self.NAMES
        for name in (b"", b"0", b"0005", b"0095", b"050a", b"zzz", b"\xff" * 300):
            assert image.lookup(root, name) is None

    def test_a_lookup_decodes_one_segment(self) -> None:
        """The runs before and after the one of the name may be damaged."""
        names = list(self.NAMES)
        names[5] = b"..."
        names[75] = b"a/b"
        image, root = self.build([(3, None), (5, None), (7, None)], names=tuple(names))
        assert image.lookup(root, b"042") is not None
        assert image.lookup(root, b"069") is not None
        with pytest.raises(FormatError):
            image.lookup(root, b"075")

    @pytest.mark.parametrize(
        ("index", "text"),
        [
            ([(3, b"035")], "name comes before"),
            ([(3, b"029")], "name comes after"),
            ([(3, None), (2, b"100")], "does not ascend"),
            ([(3, None), (5, b"001")], "does not ascend"),
            ([(3, None), (3, None)], "does not ascend"),
        ],
    )
    def test_an_index_that_lies(self, index: list[tuple[int, bytes | None]], text: str) -> None:
        image, root = self.build(index)
        with pytest.raises(FormatError, match=text):
            list(image.entries(root))

    def test_an_index_that_leads_elsewhere(self) -> None:
        raw, entries = with_files([b"a", b"b"])
        first, second = run(entries[:1]), run(entries[1:])
        raw.listings = bytes(9000)
        raw.indexed(1, first + second, [(len(first), 0, b"b")])
        image, root = raw.open_root()
        with pytest.raises(FormatError, match="does not lead"):
            list(image.entries(root))

    def test_more_index_entries_than_the_listing_can_have(self) -> None:
        raw, entries = with_files([b"a", b"b"])
        raw.indexed(1, run(entries), [], count=65535)
        image, root = raw.open_root()
        with pytest.raises(FormatError, match="index of 65535 entries"):
            image.lookup(root, b"a")

    def test_an_index_beyond_the_inode_table(self) -> None:
        raw, entries = with_files([b"a", b"b", b"c"])
        raw.indexed(1, run(entries) * 3, [], count=1)
        image, root = raw.open_root()
        with pytest.raises(FormatError, match="inode table"):
            image.lookup(root, b"a")

    @settings(max_examples=60, deadline=None)
    @given(
        names=st.lists(
            st.binary(min_size=1, max_size=6).filter(
                lambda n: not {b"/", b"\0"} & {n[i : i + 1] for i in range(6)}
            ),
            max_size=40,
        ),
        cuts=st.sets(st.integers(1, 39), max_size=6),
        by_index=st.booleans(),
    )
    def test_whatever_the_order_lookup_and_listing_agree(
        self, names: list[bytes], cuts: set[int], by_index: bool
    ) -> None:
        names = [name for name in names if name not in (b".", b"..")] or [b"x"]
        raw, entries = with_files(names)
        borders = [0, *sorted(cut for cut in cuts if cut < len(names)), len(names)]
        runs = [run(entries[a:b]) for a, b in itertools.pairwise(borders)]
        starts = [sum(map(len, runs[:i])) for i in range(len(runs))]
        index = [(starts[i], 0, names[borders[i]]) for i in range(1, len(runs))] if by_index else []
        raw.indexed(1, b"".join(runs), index)
        image, root = raw.open_root()
        try:
            listed = {entry.name: entry for entry in image.entries(root)}
        except FormatError:
            listed = None
        for name in {*names, b"not there"}:
            try:
                found = image.lookup(root, name)
            except FormatError:
                assert listed is None
            else:
                assert listed is None or listed.get(name) == found


def test_a_huge_listing_without_index_is_refused() -> None:
    raw = RawImage()
    entry = b"\0\0\0\0\x02\0\0\0a"
    header = b"\xff\0\0\0\0\0\0\0\x01\0\0\0"
    listing = (header + entry * 256) * 300
    raw.file(1, 0)
    raw.indexed(2, listing, [])
    image, root = raw.open_root()
    with pytest.raises(FormatError, match="directory"):
        list(image.entries(root))
    raw = RawImage()
    raw.inode(DIR + 7, 1, b"\x02\0\0\0\xff\xff\xff\x7f" + bytes(12) + b"\0\0\0\0")
    image, root = raw.open_root()
    with pytest.raises(FormatError, match="without index"):
        list(image.entries(root))


def test_what_is_no_directory() -> None:
    raw = RawImage()
    raw.file(1, 0)
    image, root = raw.open_root()
    with pytest.raises(FormatError, match="no directory"):
        image.lookup(root, b"a")
    with pytest.raises(FormatError, match="no directory"):
        list(image.entries(root))
    with pytest.raises(FormatError, match="no directory"):
        image.parent(root)
