"""A version that a recipe pins is no longer offered: the archive of all that Debian published has it, and if not, the error says what to do."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from uenvd.errors import BuildFailed, DigestMismatch
from uenvd.publish.build.inputs import fetch_packages, fetch_sources
from uenvd.publish.recipe.lockfile import Package, SourceFile

DEB = b"!<arch>\nnot really a package\n" * 100
SOURCE = b"a source" * 100
SHA1 = {
    name: hashlib.sha1(data, usedforsecurity=False).hexdigest()
    for name, data in (("deb", DEB), ("source", SOURCE))
}
PACKAGE = Package("uenvd-never-packaged", "1:2.0~rc1+b1-3", "amd64", hashlib.sha256(DEB).hexdigest())


class Archive(BaseHTTPRequestHandler):
    """The interface of snapshot.debian.org, as far as it is used."""

    answers: dict[str, bytes]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        body = self.answers.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Archive]]:
    binaries = {
        "result": [
            {"architecture": "arm64", "hash": "0" * 40},
            {"architecture": "amd64", "hash": SHA1["deb"]},
            {"hash": 7},
        ]
    }
    sources = {
        "result": [{"hash": SHA1["source"]}],
        "fileinfo": {
            "1" * 40: [{"name": "other.dsc"}],
            SHA1["source"]: [{"name": "lib_1.orig.tar.gz", "path": "/pool/main"}],
        },
    }
    answers = {
        "/mr/binary/uenvd-never-packaged/1%3A2.0~rc1+b1-3/binfiles": json.dumps(binaries).encode(),
        "/mr/package/libtiny/1-2/srcfiles?fileinfo=1": json.dumps(sources).encode(),
        f"/file/{SHA1['deb']}": DEB,
        f"/file/{SHA1['source']}": SOURCE,
    }
    kind = type("Own", (Archive,), {"answers": answers, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setenv("UENVD_SNAPSHOT_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("UENVD_DEBIAN_MIRROR", f"http://127.0.0.1:{server.server_port}/debian")
    yield kind
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def no_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for an apt that no longer offers the version."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/apt-get").write_text(
        "#!/bin/sh\necho \"E: Version '2.0' was not found\" >&2\nexit 100\n"
    )
    (tmp_path / "bin/apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")


def quiet(_text: str) -> None:
    pass


@pytest.mark.usefixtures("no_apt")
def test_the_archive_has_it(archive: type[Archive], tmp_path: Path) -> None:
    (found,) = fetch_packages([PACKAGE], tmp_path / "cache", quiet)
    assert found.read_bytes() == DEB
    assert found.name == "uenvd-never-packaged_1%3a2.0~rc1+b1-3_amd64.deb"
    archive.asked.clear()
    assert fetch_packages([PACKAGE], tmp_path / "cache", quiet) == (found,)
    assert archive.asked == [], "the cache is asked first"


@pytest.mark.usefixtures("no_apt")
def test_the_archive_has_other_bytes(archive: type[Archive], tmp_path: Path) -> None:
    archive.answers[f"/file/{SHA1['deb']}"] = b"exchanged"
    with pytest.raises(DigestMismatch, match="not what the recipe pins"):
        fetch_packages([PACKAGE], tmp_path / "cache", quiet)
    assert not list((tmp_path / "cache").rglob("*.deb"))


@pytest.mark.usefixtures("no_apt")
@pytest.mark.parametrize(
    "answer", [None, b"<html>", b'{"result": "none"}', b'{"result": [{"hash": "../../etc"}]}', b"[]"]
)
def test_nobody_has_it(archive: type[Archive], tmp_path: Path, answer: bytes | None) -> None:
    path = "/mr/binary/uenvd-never-packaged/1%3A2.0~rc1+b1-3/binfiles"
    if answer is None:
        del archive.answers[path]
    else:
        archive.answers[path] = answer
    with pytest.raises(BuildFailed, match="cannot be had from apt or from the archive") as caught:
        fetch_packages([PACKAGE], tmp_path / "cache", quiet, Path("recipes/x/1"))
    assert "Version '2.0' was not found" in caught.value.message
    assert "uenvd-publish lock recipes/x/1" in caught.value.hint


@pytest.mark.usefixtures("no_apt")
def test_the_archive_is_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("UENVD_SNAPSHOT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(BuildFailed, match="refused"):
            fetch_packages([PACKAGE], tmp_path / "cache", quiet)


def test_sources_come_from_the_first_place_that_has_the_right_bytes(
    archive: type[Archive], tmp_path: Path
) -> None:
    base = archive.answers
    base["/wrong"] = b"another"
    (tmp_path / "lib").write_bytes(SOURCE)
    digest = hashlib.sha256(SOURCE).hexdigest()
    here = f"http://127.0.0.1:{_port()}"
    pinned = SourceFile("lib_1.orig.tar.gz", digest, (f"{here}/gone", f"{here}/wrong", "debian:libtiny=1-2"))
    found = fetch_sources([pinned], tmp_path / "cache", quiet)["lib_1.orig.tar.gz"]
    assert found.read_bytes() == SOURCE
    asked = [
        "/gone",
        "/wrong",
        "/debian/pool/main/libt/libtiny/lib_1.orig.tar.gz",
        "/mr/package/libtiny/1-2/srcfiles?fileinfo=1",
        f"/file/{SHA1['source']}",
    ]
    assert archive.asked == asked
    del base[f"/file/{SHA1['source']}"]
    with pytest.raises(DigestMismatch):
        fetch_sources([pinned], tmp_path / "other", quiet)
    with pytest.raises(BuildFailed, match="status 404"):
        fetch_sources([pinned._replace(places=(f"{here}/gone",))], tmp_path / "other", quiet)


def _port() -> str:
    import os

    return os.environ["UENVD_SNAPSHOT_URL"].rstrip("/").rpartition(":")[2]
