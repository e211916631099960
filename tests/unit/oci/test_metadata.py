"""``uenv/meta``: packed the same way each time, and read however hostile it is."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from support.publishing import env_json
from uenvd.errors import ManifestError, UsageError
from uenvd.oci.manifest import digest_of
from uenvd.oci.metadata import find_packed, pack_directory, packed_texts, read_packed_meta

META = env_json("app", mount="/user-tools", views={"default": {"scalar": {"A": "1"}}})


def tree(directory: Path) -> Path:
    (directory / "meta/extra/deep").mkdir(parents=True)
    (directory / "meta/env.json").write_bytes(META)
    (directory / "meta/extra/deep/run.sh").write_text("#!/bin/sh\n")
    (directory / "meta/extra/deep/run.sh").chmod(0o755)
    (directory / "meta/link").symlink_to("env.json")
    return directory / "meta"


def test_equal_trees_give_equal_bytes(tmp_path: Path) -> None:
    first, second = tree(tmp_path / "one"), tree(tmp_path / "two")
    os.utime(second / "env.json", (1, 1))
    packed, plain_digest = pack_directory(first, "meta")
    assert pack_directory(second, "meta") == (packed, plain_digest)
    assert digest_of(gzip.decompress(packed)) == plain_digest
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        assert archive.getnames() == [
            "meta",
            "meta/env.json",
            "meta/extra",
            "meta/extra/deep",
            "meta/extra/deep/run.sh",
            "meta/link",
        ]
        assert archive.getmember("meta/extra/deep/run.sh").mode == 0o755
        assert {entry.mtime for entry in archive} == {0}
    meta = read_packed_meta(packed)
    assert meta is not None and (meta.mount, [view.name for view in meta.views]) == (
        "/user-tools",
        ["default"],
    )


def test_what_cannot_be_packed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no directory"):
        pack_directory(tmp_path / "absent", "meta")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="no file"):
        pack_directory(tmp_path, "meta")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_others_are_read(form: int) -> None:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=form) as archive:
        if form != tarfile.USTAR_FORMAT:
            long = tarfile.TarInfo("meta/" + "x" * 150)
            long.size = 3
            archive.addfile(long, io.BytesIO(b"abc"))
        entry = tarfile.TarInfo("./meta/env.json")
        entry.size, entry.mtime = len(META), 1.5
        archive.addfile(entry, io.BytesIO(META))
    assert find_packed(gzip.compress(plain.getvalue()), "meta/env.json") == META
    assert find_packed(gzip.compress(plain.getvalue()), "meta/absent") is None


def archive_of(name: str, data: bytes, kind: bytes = tarfile.REGTYPE, size: int | None = None) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size = kind, len(data) if size is None else size
    return gzip.compress(entry.tobuf() + data + bytes(-len(data) % 512) + bytes(1024))


def test_hostile_archives() -> None:
    assert read_packed_meta(archive_of("meta/env.json", b"", tarfile.SYMTYPE)) is None
    assert read_packed_meta(archive_of("meta/env.json", b"not json")) is None
    assert read_packed_meta(archive_of("meta/env.json", b"{", size=1 << 19)) is None
    assert read_packed_meta(gzip.compress(b"")) is None
    assert read_packed_meta(gzip.compress(b"short")) is None
    for bad in (
        b"no gzip",
        gzip.compress(b"\xff" * 1024),
        archive_of("meta/env.json", b"x" * ((1 << 20) + 1)),
    ):
        with pytest.raises(ManifestError):
            read_packed_meta(bad)
    with pytest.raises(ManifestError, match="no tar"):
        read_packed_meta(gzip.compress(b"a" * 512))


def test_a_bomb_stays_small_in_memory() -> None:
    large, endless = archive_of("meta/ballast", bytes(60 << 20)), gzip.compress(b"".join(_endless()))
    tracemalloc.start()
    try:
        assert read_packed_meta(large) is None
        with pytest.raises(ManifestError, match="unpacks to more"):
            read_packed_meta(endless)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def _endless() -> list[bytes]:
    entry = tarfile.TarInfo("meta/ballast")
    entry.size = 30 << 20
    return [entry.tobuf() + bytes(30 << 20)] * 3


def test_no_metadata_is_no_error() -> None:
    assert read_packed_meta(archive_of("meta/configure.json", json.dumps({}).encode())) is None


def test_texts_of_a_directory_are_bounded() -> None:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for name, data in (
            ("meta/recipe/a.yaml", b"a" * 600),
            ("./meta/recipe/sub/b", "ü".encode()),
            ("meta/recipe/binary", b"\xff"),
            ("meta/recipe/../../etc/passwd", b"x"),
            ("meta/recipe/new\nline", b"x"),
            ("meta/recipe/too-much", b"c" * 600),
            ("meta/env.json", b"{}"),
            ("meta/recipe/last", b"z"),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        link = tarfile.TarInfo("meta/recipe/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    packed = gzip.compress(plain.getvalue())
    assert packed_texts(packed, "meta/recipe/", 1000) == {"a.yaml": "a" * 600, "sub/b": "ü", "last": "z"}
    assert packed_texts(packed, "meta/other/", 1000) == {}
    assert packed_texts(gzip.compress(b""), "meta/recipe/", 1000) == {}
    with pytest.raises(ManifestError):
        packed_texts(b"no gzip", "meta/recipe/", 1000)
    with pytest.raises(ManifestError, match="more than 64 MiB"):
        packed_texts(gzip.compress(b"".join(_endless())), "meta/recipe/", 1000)
