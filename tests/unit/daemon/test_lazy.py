"""Who brings an image that is used already, as that changes: a node that is followed dies, is succeeded, finishes; and its readers."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from support.lazyimage import LazyImage, push_lazy
from support.registry import FakeRegistry
from uenvd.cache import blobs, claim
from uenvd.cache.directory import Directory
from uenvd.cache.store import Store
from uenvd.config import PullConfig
from uenvd.daemon import following, lazy
from uenvd.daemon.lazies import Lazies
from uenvd.daemon.lazy import Lazy
from uenvd.daemon.pulls import Pulls
from uenvd.daemon.question import Image, make_image
from uenvd.daemon.resolution import Found, Repository
from uenvd.errors import InUse, StorageError, StorageFull
from uenvd.fuse.arrival import Board, take_board
from uenvd.oci.manifest import Descriptor
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import Remote, open_remote

PATH = "deploy/demo/zen3/app/1.0"


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "_ABSENT_S", 0.02)
    monkeypatch.setattr(lazy, "_LOOK_S", 0.02)
    for name in ("LOOK_S", "WISH_S", "RIGHT_SOON_S", "_CHECK_S"):
        monkeypatch.setattr(following, name, 0.02)


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


@pytest.fixture(scope="module")
def pushed(registry: FakeRegistry, tmp_path_factory: pytest.TempPathFactory) -> LazyImage:
    return push_lazy(registry, tmp_path_factory.mktemp("image"), files=3)


@pytest.fixture
def fake(registry: FakeRegistry, pushed: LazyImage) -> FakeRegistry:
    registry.seen.clear()
    return registry


@pytest.fixture
def remote(fake: FakeRegistry) -> Remote:
    return open_remote(parse_registry(fake.url))


@pytest.fixture
def image(fake: FakeRegistry, pushed: LazyImage, remote: Remote) -> Image:
    manifest = remote.manifest(PATH, pushed.digest)
    repository = Repository.parse(PATH)
    assert repository is not None
    return make_image(Found(repository, "v1", pushed.digest), manifest, fake.blobs[manifest.config.digest])


@pytest.fixture
def data(fake: FakeRegistry, pushed: LazyImage) -> bytes:
    return fake.blobs[pushed.layer]


def node(tmp_path: Path, name: str) -> Directory:
    directory = Directory(tmp_path / "shared", node=name)
    directory.prepare()
    return directory


@pytest.fixture
def other(tmp_path: Path) -> Directory:
    """The node that pulls."""
    return node(tmp_path, "other")


class Served:
    """What a supervisor is given, and one reader of it."""

    def __init__(self) -> None:
        self.given: list[tuple[int, Board | None]] = []

    async def give_image(self, named: dict[str, int]) -> None:
        board = take_board({name: [os.dup(named[name])] for name in ("board", "reads") if name in named})
        self.given.append((os.dup(named["image"]), board))

    def read(self, first: int, end: int) -> bytes | None:
        """Return bytes that may be served, by the file that was given last."""
        fd, board = self.given[-1]
        if board is not None and not board.covers(board.chunks_of(first, end)):
            return None
        return os.pread(fd, end - first, first)

    def close(self) -> None:
        for fd, _board in self.given:
            os.close(fd)


@pytest.fixture
def served() -> Iterator[Served]:
    found = Served()
    yield found
    found.close()


async def until(condition: Callable[[], object], deadline_s: float = 10.0) -> None:
    with trio.fail_after(deadline_s):
        while not condition():
            await trio.sleep(0.005)


@asynccontextmanager
async def lazies(tmp_path: Path, remote: Remote, *, local: bool = False) -> AsyncIterator[Lazies]:
    store = Store(tmp_path / "local" if local else None, node(tmp_path, "mine"))
    store.prepare()
    async with trio.open_nursery() as nursery:
        settings = PullConfig()
        yield Lazies(nursery, store, Pulls(nursery, store, settings), remote, settings)
        nursery.cancel_scope.cancel()


async def begun(all_of_them: Lazies, image: Image, served: Served) -> Lazy:
    """Begin as `uenvd.daemon.servedimages` does."""
    found = await all_of_them.begin(image)
    assert found is not None
    found.connect(lambda: None, served.give_image)
    await found.until_served()
    named = await all_of_them.open(image.layer.digest)
    await served.give_image(named)
    for descriptor in named.values():
        os.close(descriptor)
    return found


def tables_first(data: bytes) -> list[tuple[int, int]]:
    """Return what a start needs, and a little: the first bytes and the last 64 KiB of a small image hold all metadata."""
    return [(0, 200_000), (len(data) - (64 << 10), len(data))]


async def test_a_node_that_is_silent_is_succeeded_in_another_file(
    tmp_path: Path,
    fake: FakeRegistry,
    other: Directory,
    image: Image,
    remote: Remote,
    data: bytes,
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part = other.begin(image.layer)
    for first, end in tables_first(data):
        part.write_at(first, data[first:end])
    part.sync()
    body = {"token": "t", "host": "far", "boot": "b", "pid_namespace": 1, "pid": 1, "started": 1}
    foreign = other.blobs.claims / f"{image.layer.digest[7:]}.claim"
    foreign.write_text(json.dumps(body))
    async with lazies(tmp_path, remote) as all_of_them:
        begun_one = await begun(all_of_them, image, served)
        begun_one.want(1000, 1001)
        await until(lambda: served.read(1000, 1001))
        assert not fake.count("GET", image.layer.digest), "the registry is not asked"
        old_fd, old_board = served.given[0]
        middle = len(data) // 2
        begun_one.want(middle, middle + 1)
        await trio.sleep(0.1)
        assert served.read(middle, middle + 1) is None
        monkeypatch.setattr(claim, "STALE_S", 0.2)
        await until(lambda: len(served.given) > 1 and served.read(middle, middle + 1000))
        assert served.read(middle, middle + 1000) == data[middle : middle + 1000], (
            "what was waited for is carried over"
        )
        assert os.pread(old_fd, 1000, 0) == data[:1000], "who has read the former file reads on"
        assert old_board is not None
        assert not old_board.complete
        assert os.fstat(served.given[1][0]).st_ino != os.fstat(old_fd).st_ino
        await until(lambda: begun_one.done)
        assert begun_one.done_bytes == len(data)
    part.keep()


async def test_a_blob_that_is_published_takes_the_place_of_the_part(
    tmp_path: Path,
    fake: FakeRegistry,
    other: Directory,
    image: Image,
    remote: Remote,
    data: bytes,
    served: Served,
) -> None:
    with other.begin(image.layer) as part:
        for first, end in tables_first(data):
            part.write_at(first, data[first:end])
        part.sync()
        async with lazies(tmp_path, remote) as all_of_them:
            begun_one = await begun(all_of_them, image, served)
            assert other.blobs.held() == {image.layer.digest[7:]: ["mine"]}
            part.write_at(0, data)
            part.commit()
            await until(lambda: len(served.given) > 1)
            assert served.given[-1][1] is None, "a complete file"
            assert served.read(0, len(data)) == data
            await until(lambda: begun_one.done)
            assert not fake.count("GET", image.layer.digest)


async def test_a_pull_that_was_given_up_is_gone_on_with(
    tmp_path: Path,
    other: Directory,
    image: Image,
    remote: Remote,
    data: bytes,
    served: Served,
    fake: FakeRegistry,
) -> None:
    part = other.begin(image.layer)
    for first, end in tables_first(data):
        part.write_at(first, data[first:end])
    part.sync()
    async with lazies(tmp_path, remote) as all_of_them:
        begun_one = await begun(all_of_them, image, served)
        inode = os.fstat(served.given[0][0]).st_ino
        part.keep()
        await until(lambda: begun_one.done)
        await until(lambda: served.read(0, len(data)) == data)
        assert os.fstat(served.given[-1][0]).st_ino == inode, "what was there is used"


async def test_what_ends_a_pull_before_anybody_reads_is_told_to_who_asked(
    tmp_path: Path, other: Directory, image: Image, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = other.begin(image.layer)
    async with lazies(tmp_path, remote) as all_of_them:
        found = await all_of_them.begin(image)
        assert found is not None

        def full(*_args: object) -> None:
            raise StorageFull("no room left")

        monkeypatch.setattr(Directory, "_make_room", full)
        part.abort()
        with trio.fail_after(10), pytest.raises(StorageFull):
            await found.until_served()


async def test_a_shared_directory_that_stays_in_trouble_is_left(
    tmp_path: Path,
    other: Directory,
    image: Image,
    remote: Remote,
    data: bytes,
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lazy, "_TROUBLE_S", 0.1)
    with other.begin(image.layer) as part:
        for first, end in tables_first(data):
            part.write_at(first, data[first:end])
        part.sync()
        async with lazies(tmp_path, remote, local=True) as all_of_them:
            begun_one = await begun(all_of_them, image, served)
            real = Directory.begin

            def away(self: Directory, descriptor: Descriptor) -> object:
                if self.shared:
                    raise StorageError("the server is away")
                return real(self, descriptor)

            monkeypatch.setattr(Directory, "begin", away)
            await until(lambda: begun_one.done)
            await until(lambda: served.read(0, len(data)) == data)
            assert (tmp_path / "local/blobs/sha256" / image.layer.digest[7:]).exists()


async def test_nobody_is_followed_in_a_directory_of_one_node(
    tmp_path: Path, image: Image, remote: Remote
) -> None:
    store = Store(tmp_path / "local")
    store.prepare()
    with store.begin(image.layer):
        async with trio.open_nursery() as nursery:
            settings = PullConfig()
            none = Lazies(nursery, store, Pulls(nursery, store, settings), remote, settings)
            assert await none.begin(image) is None


async def test_who_is_not_needed_any_more_leaves_no_claim_and_no_wish(
    tmp_path: Path, other: Directory, image: Image, remote: Remote
) -> None:
    part = other.begin(image.layer)
    async with lazies(tmp_path, remote) as all_of_them:
        found = await all_of_them.begin(image)
        assert found is not None
        assert part.wishes is not None
        wishes = part.wishes
        await until(lambda: wishes.read(image.layer.size_bytes))
        found.stop()
        await until(lambda: not wishes.read(image.layer.size_bytes))
        await until(lambda: all_of_them.get(image.layer.digest) is None)
        with pytest.raises(InUse):
            other.begin(image.layer)
    part.abort()
    other.begin(image.layer).abort()
