"""The channel transport on its own: workers are killed, the image arrives late, the mount goes away; readers notice nothing but time."""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import signal
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from support import images
from support.fusetools import has_ended, is_mounted, served, until
from uenvd import mounts
from uenvd.fuse import crew
from uenvd.fuse.channel import MAX_ATTEMPTS, Channel
from uenvd.fuse.faults import Faults
from uenvd.fuse.protocol import Missing
from uenvd.fuse.slots import Slots
from uenvd.fuse.source import FileSource
from uenvd.fuse.tree import Tree

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root")

KILLS = int(os.environ.get("UENVD_KILLS", "12"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.build_tree(tmp_path_factory.mktemp("t") / "tree", block_sizes=(128 << 10,), many=300)


@pytest.fixture(scope="module")
def image(tree: Path) -> Path:
    return images.make_image(tree, tree.parent / "image")


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def is_plain(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def test_workers_killed_under_readers(tree: Path, image: Path, tmp_path: Path) -> None:
    names = [
        path.relative_to(tree)
        for at in ("", "many", "sizes")
        for path in (tree / at).iterdir()
        if is_plain(path)
    ]
    expected = {name: hashlib.sha256((tree / name).read_bytes()).digest() for name in names}
    point = tmp_path / "mount"
    point.mkdir()
    wrong: list[object] = []
    over = threading.Event()

    def read(seed: int) -> None:
        rng = random.Random(seed)
        while not over.is_set():
            name = rng.choice(names)
            try:
                fd = os.open(point / name, os.O_RDONLY)
                try:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # so that the server is asked
                    data = b"".join(iter(lambda fd=fd: os.read(fd, 1 << 20), b""))  # type: ignore[misc]
                finally:
                    os.close(fd)
                if hashlib.sha256(data).digest() != expected[name]:
                    wrong.append(name)
            except OSError as error:
                wrong.append(error)

    with served(image, point, "workers=2", transport="channel") as process:
        readers = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for reader in readers:
            reader.start()
        rng = random.Random(1)
        for _ in range(KILLS):
            pids: list[int] = until(lambda: len(found := children(process.pid)) == 2 and found, "two workers")
            victim = rng.choice(pids)
            os.kill(victim, signal.SIGKILL)
            until(lambda victim=victim: victim not in children(process.pid), "the parent notices")  # type: ignore[misc]
        over.set()
        for reader in readers:
            reader.join(30)
            assert not reader.is_alive(), "a reader hangs"
    assert not wrong
    assert process.returncode == 0


def test_unmounting_ends_everything(image: Path, tmp_path: Path) -> None:
    with served(image, tmp_path, transport="channel") as process:
        pids = children(process.pid)
        assert (tmp_path / "one").exists()
        subprocess.run(["umount", tmp_path], check=True)
        until(lambda: process.poll() is not None, "the server ends")
        assert process.returncode == 0
        assert all(has_ended(pid) for pid in pids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_unmount(image: Path, tmp_path: Path, number: signal.Signals) -> None:
    with served(image, tmp_path, transport="channel") as process:
        process.send_signal(number)
        until(lambda: process.poll() is not None, "the server ends")
        assert process.returncode == 0
        assert not is_mounted(tmp_path)


class LateSource(FileSource):
    """Bytes of data blocks arrive only after they were wanted and the wake descriptor was written to."""

    def __init__(
        self, image_fd: int, wake_fd: int, wanted_fd: int, first_missing: int, end_missing: int
    ) -> None:
        super().__init__(image_fd)
        self.wake_fd, self.wanted_fd = wake_fd, wanted_fd
        self.missing = (first_missing, end_missing)
        self.state = b""

    def read(self, pos_bytes: int, size_bytes: int) -> bytes:
        if self.state != b"+" and pos_bytes < self.missing[1] and pos_bytes + size_bytes > self.missing[0]:
            if self.state == b"-":
                raise OSError(5, "it will not come")
            raise Missing(pos_bytes, pos_bytes + size_bytes)
        return super().read(pos_bytes, size_bytes)

    def want(self, first_byte: int, end_byte: int) -> None:
        os.write(self.wanted_fd, b"w")

    def woken(self) -> None:
        self.state = os.read(self.wake_fd, 1)


@pytest.fixture
def late(image: Path, tmp_path: Path) -> Iterator[tuple[Path, int, int]]:
    """Serve an image whose data are missing; give the mount, what tells that bytes are wanted, and what brings them (+) or not (-)."""
    fuse_fd, negotiated = crew.mount(crew.Plan(str(tmp_path), "late", 1, mounts.IMAGE_ATTRIBUTES))
    wake, waker = os.pipe()
    wanted, want = os.pipe()
    slots = Slots(mmap.mmap(-1, Slots.size_bytes(4)), 4)
    image_fd = os.open(image, os.O_RDONLY)
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            end = images.open_image(image).superblock.inode_table_pos
            source = LateSource(image_fd, wake, want, 96, end)
            tree = Tree(image_fd, source=source)
            Channel(fuse_fd, tree, negotiated, slots.some(0, 4), Faults("late"), source_wake_fd=wake).serve()
        os._exit(0)
    os.close(fuse_fd)
    yield tmp_path, wanted, waker
    mounts.umount(tmp_path, detach=True)
    until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid, "the worker ends")
    for fd in (wake, waker, wanted, want, image_fd):
        os.close(fd)


@pytest.mark.parametrize("comes", [True, False])
def test_bytes_that_come_late_or_never(late: tuple[Path, int, int], tree: Path, comes: bool) -> None:
    point, wanted, waker = late
    result: list[object] = []

    def read() -> None:
        try:
            result.append((point / "random").read_bytes())
        except OSError as error:
            result.append(error.errno)

    reader = threading.Thread(target=read)
    reader.start()
    os.read(wanted, 1)
    assert sorted(os.listdir(point)) == sorted(os.listdir(tree)), "others are served meanwhile"
    assert not result
    os.write(waker, b"+" if comes else b"-")
    reader.join(20)
    assert result == ([(tree / "random").read_bytes()] if comes else [5])


def test_a_request_that_ends_its_workers_gets_eio(image: Path, tmp_path: Path) -> None:
    """What a successor finds in the slot after so many attempts is not begun again."""
    fuse_fd, negotiated = crew.mount(crew.Plan(str(tmp_path), "poison", 1, mounts.IMAGE_ATTRIBUTES))
    slots = Slots(mmap.mmap(-1, Slots.size_bytes(1)), 1)
    image_fd = os.open(image, os.O_RDONLY)
    result: list[int] = []

    def ask() -> None:
        try:
            os.stat(tmp_path / "one")
            result.append(0)
        except OSError as error:
            result.append(error.errno or -1)

    asker = threading.Thread(target=ask)
    asker.start()
    while True:  # GETATTR of the root may come first; the poison is LOOKUP
        os.readv(fuse_fd, slots[0].vector)
        if slots[0].buffer[4] == 1:
            break
        Channel(fuse_fd, Tree(image_fd), negotiated, slots, Faults("x"))._work(slots[0])
    for _ in range(MAX_ATTEMPTS):
        slots[0].begin()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            Channel(fuse_fd, Tree(image_fd), negotiated, slots.some(0, 1), Faults("x")).serve()
        os._exit(0)
    os.close(fuse_fd)
    asker.join(10)
    mounts.umount(tmp_path, detach=True)
    os.waitpid(pid, 0)
    os.close(image_fd)
    assert result == [5]
