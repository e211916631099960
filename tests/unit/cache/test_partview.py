"""A part that somebody else writes, seen from outside: only what is durable, in the same file as its readers have."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from uenvd.cache import blobs
from uenvd.cache.directory import Directory
from uenvd.cache.partial import Partial
from uenvd.cache.partmap import map_of
from uenvd.cache.partview import Gone, PartView
from uenvd.oci.manifest import Descriptor, digest_of

DATA = bytes(range(256)) * 40
LAYER = Descriptor("application/octet-stream", digest_of(DATA), len(DATA))


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Directory:
    monkeypatch.setattr(blobs, "_ABSENT_S", 0.0)
    found = Directory(tmp_path / "shared", node="a")
    found.prepare()
    return found


@pytest.fixture
def part(directory: Directory) -> Iterator[Partial]:
    partial = directory.begin(LAYER)
    yield partial
    partial.keep()


@pytest.fixture
def view(directory: Directory, part: Partial) -> Iterator[PartView]:
    found = Directory(directory.root, node="b").blobs.follow(LAYER.digest, LAYER.size_bytes)
    assert found is not None
    yield found
    found.close()


def test_nobody_is_followed_who_does_not_write(directory: Directory, tmp_path: Path) -> None:
    assert directory.blobs.follow(LAYER.digest, LAYER.size_bytes) is None
    local = Directory(tmp_path / "local")
    local.prepare()
    local.begin(LAYER).keep()
    assert local.blobs.follow(LAYER.digest, LAYER.size_bytes) is None


def test_only_what_is_durable_counts(part: Partial, view: PartView) -> None:
    assert not view.look()
    assert view.has_file
    part.write_at(100, DATA[100:300])
    part.record()
    assert not view.look(), "another node may write there again"
    assert list(view.durable) == []
    part.sync()
    assert view.look()
    assert list(view.durable) == [(100, 300)]
    assert not view.look()
    assert view.read(100, 200) == DATA[100:300]
    part.write_at(300, DATA[300:])
    part.sync()
    assert view.look()
    assert list(view.durable) == [(100, len(DATA))]
    assert view.read(0, 100) == bytes(100), "a hole: who reads it verifies it"


def test_a_lease_is_there_before_the_part_is_the_blob(directory: Directory, view: PartView) -> None:
    assert directory.blobs.held() == {LAYER.digest[7:]: ["b"]}


def test_a_part_that_is_not_there_yet_appears(directory: Directory, part: Partial) -> None:
    part.path.rename(part.path.with_suffix(".away"))
    view = PartView(
        part.path, Path("/none"), LAYER.size_bytes, directory.user, directory.blobs.wishes(LAYER.digest)
    )  # type: ignore[arg-type]
    assert not view.look()
    assert not view.has_file
    with pytest.raises(OSError, match="descriptor"):
        view.open_for_reader()
    part.path.with_suffix(".away").rename(part.path)
    view.look()
    assert view.has_file
    view.close()


def test_a_map_that_is_damaged_or_cut_says_what_it_said_before(part: Partial, view: PartView) -> None:
    part.write_at(0, DATA[:50])
    part.sync()
    assert view.look()
    with map_of(part.path).open("ab") as file:
        file.write(b"w 50 ")
        file.flush()
        assert not view.look()
        file.write(b"60\nd\n")
        file.flush()
        assert view.look()
        assert list(view.durable) == [(0, 60)]
        file.write(b"\0\0\0\0nonsense\nw 60 70\nd\n")
        file.flush()
        assert not view.look()
    assert list(view.durable) == [(0, 60)]
    map_of(part.path).write_bytes(b"")
    assert not view.look()
    assert list(view.durable) == []


def test_a_map_of_another_size_is_not_believed(part: Partial, view: PartView) -> None:
    map_of(part.path).write_bytes(f"uenvd-map-1 {LAYER.size_bytes + 1} b\nw 0 10\nd\n".encode())
    assert not view.look()
    assert list(view.durable) == []


def test_a_map_that_is_written_anew_is_read_anew(part: Partial, view: PartView) -> None:
    part.write_at(0, DATA)
    part.sync()
    assert view.look()
    part.discard(10, 20)
    assert not view.look()
    assert list(view.durable) == [], "not before it is said again"
    part.sync()
    part.write_at(10, DATA[10:20])
    part.sync()
    assert view.look()
    assert list(view.durable) == [(0, len(DATA))]


def test_a_part_that_was_removed_is_gone_and_its_readers_read_on(part: Partial, view: PartView) -> None:
    part.write_at(0, DATA[:1000])
    part.sync()
    view.look()
    fd = view.open_for_reader()
    part.abort()
    with pytest.raises(Gone):
        view.look()
    with pytest.raises(Gone):
        view.check()
    assert os.pread(fd, 1000, 0) == DATA[:1000]
    os.close(fd)


def test_another_part_under_the_name_is_not_taken_for_the_first(
    directory: Directory, part: Partial, view: PartView
) -> None:
    part.write_at(0, DATA[:1000])
    part.sync()
    view.look()
    part.abort()
    with directory.begin(LAYER) as other:
        other.write_at(0, b"x" * 1000)
        other.sync()
        with pytest.raises(Gone):
            view.look()
        assert view.read(0, 1000) == DATA[:1000], "it is still the file of its readers"


def test_a_part_that_became_the_blob_is_not_gone(directory: Directory, part: Partial, view: PartView) -> None:
    part.write_at(0, DATA)
    part.sync()
    view.look()
    fd = view.open_for_reader()
    part.commit()
    assert not view.look()
    assert view.ended
    view.check()
    assert view.read(0, len(DATA)) == DATA
    blob = directory.blobs.open(LAYER.digest)
    assert os.path.sameopenfile(fd, blob)
    os.close(fd)
    os.close(blob)


def test_a_writer_has_a_name(part: Partial, view: PartView) -> None:
    assert view.writer() == os.uname().nodename
    part.keep()
    assert view.writer() == ""
