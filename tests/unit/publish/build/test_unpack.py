"""Source archives: what comes out of them, and those that want out of their directory."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from uenvd.errors import BuildFailed
from uenvd.publish.build.unpack import settle_times, unpack


def tar(path: Path, *entries: tarfile.TarInfo, data: bytes = b"text") -> Path:
    with tarfile.open(path, "w:xz") as archive:
        for entry in entries:
            if entry.isfile():
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
            else:
                archive.addfile(entry)
    return path


def file(name: str, mode: int = 0o644) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.mode = mode
    return entry


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def test_the_one_top_directory_is_left_out(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "a.tar.xz",
        file("a-1/configure", 0o4775),
        file("a-1/src/x.c", 0o600),
        link("a-1/y", "src/x.c"),
    )
    assert unpack("a.tar.xz", {"a.tar.xz": path}, tmp_path / "out") == []
    assert sorted(str(found.relative_to(tmp_path / "out")) for found in (tmp_path / "out").rglob("*")) == [
        "configure",
        "src",
        "src/x.c",
        "y",
    ]
    assert (tmp_path / "out/configure").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "out/src/x.c").stat().st_mode & 0o7777 == 0o644


def test_an_archive_without_a_top_directory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("one", "1")
        archive.writestr("two/three", "3")
    unpack("a.zip", {"a.zip": tmp_path / "a.zip"}, tmp_path / "out")
    assert (tmp_path / "out/two/three").read_text() == "3"


HOSTILE: list[Callable[[Path], list[tarfile.TarInfo]]] = [
    lambda _outside: [file("../evil")],
    lambda outside: [file(f"{outside}/evil")],
    lambda outside: [link("a", str(outside)), file("a/evil")],
    lambda _outside: [link("d/l", ".."), link("d/m", "l/../.."), file("d/m/evil")],
    lambda outside: [link("a", f"{outside}/victim", tarfile.LNKTYPE)],
    lambda _outside: [link("fifo", "", tarfile.FIFOTYPE)],
    lambda _outside: [link("device", "", tarfile.CHRTYPE)],
]


@pytest.mark.parametrize("entries", HOSTILE)
def test_nothing_gets_out(tmp_path: Path, entries: Callable[[Path], list[tarfile.TarInfo]]) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_text("mine")
    path = tar(tmp_path / "a.tar.xz", *entries(outside))
    with pytest.raises(BuildFailed, match=r"a\.tar\.xz cannot be unpacked"):
        unpack("a.tar.xz", {"a.tar.xz": path}, tmp_path / "deep/out")
    assert sorted(found.name for found in outside.iterdir()) == ["victim"]
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "deep/evil").exists()


@pytest.mark.parametrize("data", [b"", b"no archive", b"\xfd7zXZ\0truncated"])
def test_what_is_no_archive(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar.xz").write_bytes(data)
    with pytest.raises(BuildFailed, match="cannot be unpacked"):
        unpack("a.tar.xz", {"a.tar.xz": tmp_path / "a.tar.xz"}, tmp_path / "out")


def debian(directory: Path) -> dict[str, Path]:
    files = {
        "a_1.orig.tar.xz": tar(directory / "a_1.orig.tar.xz", file("a-1/x.c")),
        "a_1-2.debian.tar.xz": tar(
            directory / "a_1-2.debian.tar.xz",
            file("debian/patches/series"),
            data=b"# first\nfix.patch -p1\n\nmore/other.patch # why\n",
        ),
    }
    sums = "".join(
        f" {hashlib.sha256(path.read_bytes()).hexdigest()} 1 {name}\n" for name, path in files.items()
    )
    dsc = directory / "a_1-2.dsc"
    dsc.write_text(
        f"Format: 3.0 (quilt)\nChecksums-Sha1:\n {'0' * 40} 1 z\nChecksums-Sha256:\n{sums}Files:\n {'0' * 32} 1 other.orig.tar.gz\n"
    )
    return {**files, "a_1-2.dsc": dsc}


def test_a_debian_source_package_brings_its_patches(tmp_path: Path) -> None:
    files = debian(tmp_path)
    patches = unpack("a_1-2.dsc", files, tmp_path / "out")
    assert [str(path.relative_to(tmp_path / "out/debian/patches")) for path in patches] == [
        "fix.patch",
        "more/other.patch",
    ]
    assert (tmp_path / "out/x.c").read_text() == "text"


def test_a_debian_source_package_whose_files_are_not_pinned(tmp_path: Path) -> None:
    files = debian(tmp_path)
    del files["a_1-2.debian.tar.xz"]
    with pytest.raises(BuildFailed, match=r"not in the lock file: a_1-2\.debian\.tar\.xz") as caught:
        unpack("a_1-2.dsc", files, tmp_path / "out")
    assert "--source debian:" in caught.value.hint


def test_one_time_for_all_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").write_text("")
    (tmp_path / "a/dangling").symlink_to("nowhere")
    settle_times(tmp_path, 1_000_000)
    assert os.lstat(tmp_path / "a/b").st_mtime == os.lstat(tmp_path / "a/dangling").st_mtime == 1_000_000
