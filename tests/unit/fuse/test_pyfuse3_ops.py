"""The operations without a kernel: what gets out of them, and how many threads work for whom."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pyfuse3
import pytest
import trio
import trio.testing

from support import images
from uenvd.errors import FormatError
from uenvd.fuse.faults import Faults
from uenvd.fuse.pyfuse3_ops import Operations
from uenvd.fuse.tree import Part, Tree
from uenvd.squashfs import Span

CTX = cast("pyfuse3.RequestContext", None)


class SlowTree(Tree):
    """Parts come only from threads, and only when the test lets them."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.gate = threading.Event()
        self.parts: list[Span] = []
        self.error: Exception | None = None

    def peek(self, span: Span, inline_bytes: int = 0) -> Part | None:
        return super().peek(span, inline_bytes) if inline_bytes or self.blocks.get(span.block) else None

    def part(self, span: Span) -> Part:
        self.parts.append(span)
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return super().part(span)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[SlowTree]:
    """A file ``f`` of ten blocks, ``a`` and ``b`` in one fragment block."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_bytes(images.content(40_960, 1))
    for name in "ab":
        (source / name).write_bytes(name.encode() * 1000)
    fd = os.open(images.make_image(source, tmp_path / "i", block_size=4096), os.O_RDONLY)
    yield SlowTree(fd)
    os.close(fd)


def ino(tree: Tree, name: bytes) -> int:
    found = tree.lookup(1, name)
    assert found is not None
    return found.ino


async def wait_for_threads(tree: SlowTree, count: int) -> None:
    with trio.fail_after(10):
        while len(tree.parts) < count:
            await trio.sleep(0.001)


async def test_one_decode_for_all_who_want_a_block(tree: SlowTree) -> None:
    operations = Operations(tree, Faults("x"))
    got: list[bytes] = []

    async def read(name: bytes) -> None:
        got.append(bytes(await operations.read(ino(tree, name), 0, 4096)))

    async with trio.open_nursery() as nursery:
        for name in (b"a", b"b", b"a", b"b"):
            nursery.start_soon(read, name)
        await wait_for_threads(tree, 1)
        await trio.testing.wait_all_tasks_blocked()
        assert len(tree.parts) == 1, "the others wait without a thread"
        tree.gate.set()
    assert sorted(got) == sorted(name * 1000 for name in (b"a", b"b", b"a", b"b"))
    assert len(tree.parts) == 1


async def test_threads_are_as_many_as_cores(tree: SlowTree) -> None:
    operations = Operations(tree, Faults("x"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(operations.read, ino(tree, b"f"), 0, 40_960)
        cores = len(os.sched_getaffinity(0))
        await wait_for_threads(tree, min(cores, 10))
        await trio.testing.wait_all_tasks_blocked()
        assert len(tree.parts) == min(cores, 10)
        tree.gate.set()
    assert len(tree.parts) == 10


async def test_read_returns_the_bytes(tree: SlowTree, tmp_path: Path) -> None:
    tree.gate.set()
    operations = Operations(tree, Faults("x"))
    expected = (tmp_path / "source" / "f").read_bytes()
    for offset, size in ((0, 40_960), (5, 4096), (4096, 4096), (40_959, 100), (40_960, 1)):
        assert bytes(await operations.read(ino(tree, b"f"), offset, size)) == expected[offset : offset + size]


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (FormatError("bad"), errno.EIO),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (MemoryError(), errno.EIO),
        (KeyError("a bug"), errno.EIO),
    ],
)
async def test_only_fuse_errors_get_out(tree: SlowTree, error: Exception, number: int) -> None:
    tree.error = error
    tree.gate.set()
    operations = Operations(tree, Faults("x"))
    for size in (100, 40_960):  # one block in hand, several
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await operations.read(ino(tree, b"f"), 0, size)
        assert caught.value.errno == number
    tree.error = None
    assert len(await operations.read(ino(tree, b"f"), 0, 40_960)) == 40_960, "a fault does not stay"


@pytest.fixture
def device() -> Iterator[tuple[int, int]]:
    """A pipe in the place of /dev/fuse: what its second end gets are requests that wait."""
    before = signal.getsignal(signal.SIGALRM)
    reader, writer = os.pipe()
    yield reader, writer
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    os.close(reader)
    os.close(writer)


async def test_a_blocked_read_of_the_device_is_interrupted_while_threads_work(
    tree: SlowTree, device: tuple[int, int]
) -> None:
    """See `Operations._nudged`: a signal comes again and again, and only then."""
    caught: list[int] = []
    operations = Operations(tree, Faults("x"))
    operations.watch(device[0])
    signal.signal(signal.SIGALRM, lambda number, _frame: caught.append(number))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(operations.read, ino(tree, b"f"), 0, 40_960)
        await wait_for_threads(tree, 1)
        assert signal.getitimer(signal.ITIMER_REAL)[1] > 0
        with trio.fail_after(10):
            while len(caught) < 2:
                await trio.sleep(0.01)
        tree.gate.set()
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


async def test_a_lone_request_needs_no_thread(tree: SlowTree, device: tuple[int, int]) -> None:
    tree.gate.set()
    operations = Operations(tree, Faults("x"))
    operations.watch(device[0])
    assert bytes(await operations.read(ino(tree, b"a"), 0, 1000)) == b"a" * 1000
    assert tree.parts == []
    os.write(device[1], b"somebody waits")
    assert len(await operations.read(ino(tree, b"f"), 0, 4096)) == 4096
    assert len(tree.parts) == 1


async def test_absent_names_are_answers_that_the_kernel_may_keep(tree: SlowTree) -> None:
    operations = Operations(tree, Faults("x"))
    entry = await operations.lookup(1, b"nothing", CTX)
    assert entry.st_ino == 0
    assert entry.entry_timeout > 86400 * 365
    entry = await operations.lookup(1, b"f", CTX)
    assert entry.st_ino == ino(tree, b"f")
    assert min(entry.entry_timeout, entry.attr_timeout) > 86400 * 365
    assert entry.st_size == 40_960


async def test_image_without_xattrs_is_asked_once(tree: SlowTree) -> None:
    operations = Operations(tree, Faults("x"))
    for question in (operations.listxattr(1, CTX), operations.getxattr(1, b"user.x", CTX)):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await question
        assert caught.value.errno == (errno.ENOSYS if not tree.has_xattrs else pyfuse3.ENOATTR)


async def test_flush_is_asked_once(tree: SlowTree) -> None:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await Operations(tree, Faults("x")).flush(1)
    assert caught.value.errno == errno.ENOSYS


async def test_init_cannot_fail(tree: SlowTree, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    Operations(tree, Faults("x"), broken).init()
    assert "Broken pipe" in caplog.text
