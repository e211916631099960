"""uenvd-publish lock: what is pinned, and that it stays pinned to what was asked for."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from uenvd.errors import UsageError
from uenvd.publish.main import main
from uenvd.publish.recipe.lockfile import read_interpreter_lock, read_sources

_APT = """#!/bin/sh
# An archive of four packages; gcc needs libc.
case "$*" in
*--simulate*)
    case "$*" in *state*) ;; esac
    for word in "$@"; do last=$word; done
    echo "Inst libc ($LIBC Debian:12 [amd64])"
    case " $* " in *" gcc "*) echo "Inst gcc (12 Debian:12 [amd64])" ;; esac
    case " $* " in *" make "*) echo "Inst make (4.3 Debian:12 [amd64])" ;; esac ;;
*download*)
    for word in "$@"; do [ ! -d "$DEBS/$word" ] || dpkg-deb --build --root-owner-group "$DEBS/$word" . >&2 || exit 1; done ;;
esac
"""


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An apt-get of our own."""
    debs = tmp_path / "debs"
    for name, version in (("gcc", "12"), ("libc", "2.36"), ("make", "4.3")):
        (debs / name / "DEBIAN").mkdir(parents=True)
        package(debs / name, version)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/apt-get").write_text(_APT)
    (tmp_path / "bin/apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("DEBS", str(debs))
    monkeypatch.setenv("LIBC", "2.36")
    monkeypatch.setenv("UENVD_CACHE_DIR", str(tmp_path / "cache"))
    return debs


def package(directory: Path, version: str) -> None:
    (directory / "DEBIAN/control").write_text(
        f"Package: {directory.name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: nobody <n@example.org>\nDescription: none\n"
    )


def test_a_tool_chain_with_all_that_it_needs(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    assert main(["lock", str(recipe), "--toolchain", "--add", "gcc"]) == 0
    path = recipe / "toolchain.lock"
    assert [(one.name, one.version) for one in read_interpreter_lock(path)] == [
        ("gcc", "12"),
        ("libc", "2.36"),
    ]
    assert "# Asked for: gcc\n" in path.read_text()
    for one in read_interpreter_lock(path):
        deb = tmp_path / "cache/debs" / one.file_name
        assert hashlib.sha256(deb.read_bytes()).hexdigest() == one.sha256
    capsys.readouterr()
    # Later there is a newer libc; make is wanted, too.
    package(archive / "libc", "2.37")
    assert main(["lock", str(recipe), "--add", "make"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "libc 2.36 -> 2.37" in said
    assert "make 4.3 is new" in said
    assert "# Asked for: gcc make\n" in path.read_text()
    assert not (recipe / "interpreter.lock").exists()


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("UENVD_CACHE_DIR", str(tmp_path / "cache"))
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    (tmp_path / "lib-1.tar.gz").write_bytes(b"one")
    place = f"file://{tmp_path}/lib-1.tar.gz"
    assert main(["lock", str(recipe), "--source", place]) == 0
    (found,) = read_sources(recipe / "sources.lock")
    assert (found.file, found.places) == ("lib-1.tar.gz", (place,))
    assert found.sha256 == hashlib.sha256(b"one").hexdigest()
    (tmp_path / "lib-1.tar.gz").write_bytes(b"other")
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror/lib-1.tar.gz").write_bytes(b"other")
    mirror = f"file://{tmp_path}/mirror/lib-1.tar.gz"
    assert main(["lock", str(recipe), "--source", mirror]) == 0
    assert "(other bytes)" in capsys.readouterr().out
    (found,) = read_sources(recipe / "sources.lock")
    assert found.places == (mirror, place)


def test_a_debian_source_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UENVD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("UENVD_DEBIAN_MIRROR", f"file://{tmp_path}/mirror")
    pool = tmp_path / "mirror/pool/main/liba/liba"
    pool.mkdir(parents=True)
    (pool / "liba_1.orig.tar.gz").write_bytes(b"orig")
    (pool / "liba_1-2.debian.tar.xz").write_bytes(b"patches")
    (pool / "liba_1-2.dsc").write_text(
        f"Format: 3.0 (quilt)\nChecksums-Sha256:\n {'0' * 64} 4 liba_1.orig.tar.gz\n {'0' * 64} 7 liba_1-2.debian.tar.xz\nFiles:\n x\n"
    )
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    assert main(["lock", str(recipe), "--source", "debian:liba=1:1-2"]) == 0
    found = read_sources(recipe / "sources.lock")
    assert [one.file for one in found] == ["liba_1-2.dsc", "liba_1.orig.tar.gz", "liba_1-2.debian.tar.xz"]
    assert {one.places for one in found} == {("debian:liba=1:1-2",)}
    # What it says of itself is not believed: the digests are those of the bytes.
    assert found[1].sha256 == hashlib.sha256(b"orig").hexdigest()


@pytest.mark.parametrize("place", ["ftp://x/y", "https://example.org/", "debian:zlib", "nothing"])
def test_what_is_no_place(tmp_path: Path, place: str) -> None:
    assert (
        main(["lock", str(tmp_path), "--source", place, "--cache", str(tmp_path / "cache")])
        == UsageError.exit_status
    )
