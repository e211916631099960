"""Damaged images through a real mount: whatever the bytes are, the reader gets data or an error, and the server lives, in bounded memory."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from support import images
from support.forkedfs import ForkedFs, forked_fs
from support.fusetools import has_ended, is_mounted, open_to_all, rss_bytes, until
from uenvd import mounts
from uenvd.errors import FormatError, StorageError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root")

MUTATIONS = 200
MEMORY_BYTES = 160 << 20
WALK_DEADLINE_S = 20.0
ALLOWED = {errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EOVERFLOW, errno.ENODATA, errno.EINVAL,
           errno.ENXIO, errno.ENAMETOOLONG, errno.ENOTSUP, errno.EFBIG, errno.ERANGE}  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small image with some of everything, compressed with zlib, which has a checksum."""
    open_to_all()
    base = tmp_path_factory.mktemp("original")
    tree = base / "tree"
    (tree / "meta").mkdir(parents=True)
    (tree / "meta" / "env.json").write_text('{"name": "x", "mount": "/user-environment", "views": {}}')
    (tree / "big").write_bytes(images.content(40_000, 1))
    (tree / "hole").write_bytes(bytes(30_000) + b"end")
    (tree / "names").mkdir()
    for i in range(40):
        (tree / "names" / f"{i:03}").write_bytes(b"%d" % i * i)
    os.link(tree / "big", tree / "names" / "same")
    os.symlink("names/003", tree / "link")
    os.setxattr(tree / "big", "user.x", b"value" * 100)
    return images.make_image(tree, base / "i", compressor="gzip", block_size=4096).read_bytes()


@pytest.fixture(scope="module")
def server() -> Iterator[ForkedFs]:
    """What starts the servers."""
    with forked_fs() as running:
        yield running


def read_fully(fd: int, offset: int, size: int) -> None:
    """Read all of a piece: no read before the end of the file may come back empty."""
    while size > 0:
        got = len(os.pread(fd, size, offset))
        assert got > 0
        offset += got
        size -= got


def walk(root: Path) -> list[int]:
    """Look at everything below a mount, in bounds of its own (damage can make a tree endless); return the errnos met."""
    met: list[int] = []
    todo = [(root, 0)]
    seen = 0
    while todo and seen < 500:
        path, depth = todo.pop()
        seen += 1
        try:
            info = path.lstat()
            with suppress(OSError):
                for name in os.listxattr(path, follow_symlinks=False):
                    os.getxattr(path, name, follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode):
                for i, name in enumerate(os.listdir(path)):
                    if i < 100 and depth < 8:
                        todo.append((path / name, depth + 1))
            elif stat.S_ISLNK(info.st_mode):
                os.readlink(path)
            elif stat.S_ISREG(info.st_mode):
                fd = os.open(path, os.O_RDONLY)
                try:
                    for offset in (0, max(0, info.st_size - 70_000), info.st_size // 2):
                        with suppress(OverflowError):
                            read_fully(fd, offset, min(70_000, info.st_size - offset))
                finally:
                    os.close(fd)
        except OSError as error:
            met.append(error.errno or 0)
    return met


def survive(server: ForkedFs, image: Path, mountpoint: Path) -> list[int] | None:
    """Serve, walk, unmount. Returns the errnos met, None when the image was refused. Fails on a crash, a hang, too much memory."""
    pid = server.start(image, mountpoint)
    try:
        status: list[int | None] = [None]

        def ready() -> bool:
            if is_mounted(mountpoint):
                return True
            status[0] = server.status(pid)
            return status[0] is not None

        until(ready, "the mount or the refusal")
        if status[0] is not None:
            assert os.WIFEXITED(status[0])
            assert os.WEXITSTATUS(status[0]) in (FormatError.exit_status, StorageError.exit_status)
            return None
        met: list[list[int]] = []
        walker = threading.Thread(target=lambda: met.append(walk(mountpoint)), daemon=True)
        walker.start()
        walker.join(WALK_DEADLINE_S)
        assert not walker.is_alive(), "a reader hangs"
        assert met, "the walk failed"
        assert not set(met[0]) - ALLOWED
        assert rss_bytes(pid) < MEMORY_BYTES
        assert not has_ended(pid), "the server died"
        mounts.umount(mountpoint)
        until(lambda: server.status(pid) == 0, "a clean end")
        return met[0]
    finally:
        with suppress(OSError):
            mounts.umount(mountpoint, detach=True)
        with suppress(ProcessLookupError):
            if not has_ended(pid):
                os.kill(pid, signal.SIGKILL)


def test_mutations(server: ForkedFs, original: bytes, tmp_path: Path) -> None:
    rng = random.Random(20261122)
    mountpoint = tmp_path / "m"
    mountpoint.mkdir()
    image = tmp_path / "i"
    refused = failed = clean = 0
    for number in range(MUTATIONS):
        data = bytearray(original)
        kind = number % 4
        # The superblock and the tables (the last quarter of this image) are small next to the data, and most of the format.
        low = 0 if kind == 0 else len(data) * 3 // 4 if kind < 3 else 96
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(low, 96 if kind == 0 else len(data))
            data[at] = rng.randrange(256) if rng.random() < 0.5 else data[at] ^ 1 << rng.randrange(8)
        if number % 20 == 19:
            del data[rng.randrange(len(data)) :]
            data.extend(bytes(-len(data) % 4096))  # as long as it says, or not
        image.write_bytes(data)
        met = survive(server, image, mountpoint)
        if met is None:
            refused += 1
        elif met:
            failed += 1
        else:
            clean += 1
    assert refused > 10
    assert failed > 10
    assert clean > 10


def test_undamaged(server: ForkedFs, original: bytes, tmp_path: Path) -> None:
    """The walk itself meets no error in a good image."""
    (tmp_path / "m").mkdir()
    (tmp_path / "i").write_bytes(original)
    assert survive(server, tmp_path / "i", tmp_path / "m") == []
