"""Images of unusual size: 100,000 entries in a directory, a file beyond 4 GiB, 200,000 files; in bounded memory, over each transport."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.forkedfs import forked_fs
from support.fusetools import open_to_all, rss_bytes, served
from support.hugeimages import directory_of, file_of, small_content, tree_of
from uenvd import mounts

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root")

ENTRIES = 100_000
DIRECTORIES, FILES_EACH = 2000, 100
MOUNT_S = 0.3
"""From the order to the first answer, 200,000 files; the modules are loaded, as in a worker that waits for its image."""
MEMORY_BYTES = 128 << 20
"""Of one process at its highest; the cache is 16 MiB."""
GIB = 1 << 30

Server = subprocess.Popen[bytes]


@pytest.fixture(params=["pyfuse3", "channel"])
def transport(request: pytest.FixtureRequest) -> str:
    open_to_all()
    name: str = request.param
    return name


@contextmanager
def serving(image: Path, directory: Path, transport: str) -> Iterator[tuple[Path, Server]]:
    point = directory / f"mount-{transport}"
    point.mkdir()
    with served(image, point, "cache=16", transport=transport) as process:
        yield point, process


@contextmanager
def kernel_mount(image: Path, directory: Path) -> Iterator[Path]:
    """The kernel's own squashfs, as the reference."""
    point = directory / "kernel"
    point.mkdir()
    subprocess.run(["mount", "-t", "squashfs", "-o", "loop,ro", image, point], check=True)
    try:
        yield point
    finally:
        mounts.umount(point)


def highest_bytes(process: Server) -> int:
    """Return the most memory that any process of a server has had."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return max(rss_bytes(int(pid)) for pid in (process.pid, *children))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """100,000 entries in the root."""
    data, names = directory_of(ENTRIES)
    image = tmp_path_factory.mktemp("wide") / "image"
    image.write_bytes(data)
    return image, names


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200,000 files in 2,000 directories."""
    image = tmp_path_factory.mktemp("many") / "image"
    image.write_bytes(tree_of(DIRECTORIES, FILES_EACH))
    return image


def test_a_directory_of_100_000_entries(
    transport: str, wide: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    image, names = wide
    with serving(image, tmp_path, transport) as (point, process):
        assert os.listdir(os.fsencode(point)) == names
        for number in (1, 2, 256, 257, 4711, 65_536, ENTRIES - 1, ENTRIES):
            assert (point / os.fsdecode(names[number - 1])).read_bytes() == small_content(number)
        for name in ("entry-", "entry-0000000", "entry-0050000x", f"entry-{ENTRIES + 1:07}", "a", "z"):
            assert not (point / name).exists()
        assert highest_bytes(process) < MEMORY_BYTES


def test_readers_of_a_huge_directory_at_different_places(
    transport: str, wide: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    """Several are at it at once, stop, and go on: each sees every entry once."""
    image, names = wide
    with serving(image, tmp_path, transport) as (point, _process):
        listings = [os.scandir(os.fsencode(point)) for _ in range(3)]
        seen: list[list[bytes]] = [[] for _ in listings]
        rng = random.Random(1)
        try:
            for turn in range(30):
                which = turn % 3
                for _ in range(rng.randrange(500, 3000)):
                    seen[which].append(next(listings[which]).name)
        finally:
            for listing in listings:
                listing.close()
        for found in seen:
            assert found == names[: len(found)]


def test_the_kernel_sees_the_same(wide: tuple[Path, list[bytes]], many: Path, tmp_path: Path) -> None:
    """The images are what they are meant to be."""
    with kernel_mount(wide[0], tmp_path) as point:
        assert os.listdir(os.fsencode(point)) == wide[1]
        assert (point / "entry-0004711").read_bytes() == small_content(4711)
    (tmp_path / "kernel").rmdir()
    with kernel_mount(many, tmp_path) as point:
        assert len(os.listdir(point)) == DIRECTORIES
        assert (point / "d1999/f042").read_bytes() == small_content(1999 * FILES_EACH + 43)


def test_a_file_beyond_4_gib(transport: str, tmp_path: Path) -> None:
    size = 6 * GIB + 12_345
    rng = random.Random(2)
    places = (0, 2 * GIB - 3000, 2 * GIB, 4 * GIB - 1000, 4 * GIB, 5 * GIB + 77, size - 500)
    pieces = {at: rng.randbytes(500) for at in places}
    image = tmp_path / "image"
    image.write_bytes(file_of(size, pieces))
    with kernel_mount(image, tmp_path) as reference, serving(image, tmp_path, transport) as (point, process):
        assert (point / "huge").stat().st_size == size
        theirs = os.open(reference / "huge", os.O_RDONLY)
        ours = os.open(point / "huge", os.O_RDONLY)
        try:
            for at, piece in pieces.items():
                assert os.pread(ours, 500, at) == piece
                around = max(0, at - 70_000)
                assert os.pread(ours, 140_500, around) == os.pread(theirs, 140_500, around)
            assert os.pread(ours, 1000, size - 10) == pieces[size - 500][-10:]
            assert os.pread(ours, 1000, size) == b""
            assert os.pread(ours, 1000, 1 << 40) == b""
            assert os.pread(ours, 1 << 20, 3 * GIB) == bytes(1 << 20)
        finally:
            os.close(ours)
            os.close(theirs)
        assert highest_bytes(process) < MEMORY_BYTES


def test_200_000_files_walked(many: Path, tmp_path: Path) -> None:
    """Every inode, by the server that is meant for it; memory does not grow with the image."""
    open_to_all()
    with serving(many, tmp_path, "channel") as (point, process):
        done = subprocess.run(
            ["find", point, "-type", "f", "-printf", "%s\n"], capture_output=True, text=True, check=True
        )
        sizes = [int(line) for line in done.stdout.split()]
        assert len(sizes) == DIRECTORIES * FILES_EACH
        assert sum(sizes) == sum(number % 91 for number in range(1, len(sizes) + 1))
        assert (point / "d1234/f056").read_bytes() == small_content(1234 * FILES_EACH + 57)
        assert highest_bytes(process) < MEMORY_BYTES


def test_200_000_files_are_mounted_in_no_time(transport: str, many: Path, tmp_path: Path) -> None:
    """The best of several: what the machine does beside is not the server's."""
    point = tmp_path / "mount"
    point.mkdir()
    took_s = []
    with forked_fs() as server:
        for _ in range(5):
            began_s = time.monotonic()
            with server.mounted(many, point, "-o", f"transport={transport}"):
                (point / "d0000").stat()
                took_s.append(time.monotonic() - began_s)
    assert min(took_s) <= MOUNT_S, took_s
