"""Nodes that share a directory start images that one of them is still pulling: they read its part, and none of them asks the registry for it."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.daemon import Daemon, running_daemon
from support.fusetools import NOBODY, Session, session, until
from support.lazyimage import MOUNT_POINT, LazyImage, arrived_bytes, mounted, push_lazy
from support.registry import FakeRegistry, Spoil

pytestmark = pytest.mark.usefixtures("node")


@pytest.fixture(scope="module")
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


@pytest.fixture(scope="module")
def image(registry: FakeRegistry, tmp_path_factory: pytest.TempPathFactory) -> LazyImage:
    return push_lazy(registry, tmp_path_factory.mktemp("image"), files=10)


@pytest.fixture
def fake(registry: FakeRegistry) -> Iterator[FakeRegistry]:
    yield registry
    registry.spoils.clear()


@pytest.fixture
def shared(public_dir: Path) -> Path:
    """A directory of all nodes, which root is nobody in particular for."""
    path = public_dir / "shared"
    path.mkdir(mode=0o700)
    os.chown(path, NOBODY, NOBODY)
    return path


@contextmanager
def node_of(
    shared: Path, name: str, fake: FakeRegistry, *, lazy: str = "{deadline: 30s}"
) -> Iterator[Daemon]:
    extra = (
        f"mounts: {{linger: 100ms}}\nlazy: {lazy}\ncache: {{local: none, shared: {shared}, user: nobody}}\n"
    )
    with running_daemon(shared.parent / name, fake.url, extra=extra) as daemon:
        yield daemon


@contextmanager
def started(daemon: Daemon) -> Iterator[Session]:
    """A session of the image."""
    with daemon.client() as client:
        mounted(client)
        with session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
            yield inside


def digest_in(name: str) -> str:
    return f"__import__('hashlib').file_digest(open('{MOUNT_POINT}/{name}', 'rb'), 'sha256').hexdigest()"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_whole(shared: Path, image: LazyImage) -> bool:
    return (shared / "blobs" / "sha256" / image.layer.removeprefix("sha256:")).exists()


def reads_all(inside: Session, image: LazyImage) -> None:
    for name, data in image.files.items():
        assert inside.eval(digest_in(name)) == sha(data), name


def reading(inside: Session, name: str, found: list[object]) -> threading.Thread:
    thread = threading.Thread(target=lambda: found.append(inside.eval(digest_in(name))))
    thread.start()
    return thread


@contextmanager
def held(fake: FakeRegistry, image: LazyImage) -> Iterator[None]:
    """No more bytes of the image come, until `release` or the end."""
    fake.spoils.insert(0, Spoil(image.blob_path, silent=True))
    fake.hang_up()
    try:
        yield
    finally:
        fake.spoils.clear()
        fake.hang_up()


def release(fake: FakeRegistry, *slow: Spoil) -> None:
    fake.spoils[:] = slow
    fake.hang_up()


def begins(name: str) -> str:
    return f"open('{MOUNT_POINT}/{name}', 'rb').read(100).hex()"


def test_a_second_node_starts_from_what_the_first_one_has_and_is_brought_what_it_wishes(
    fake: FakeRegistry, image: LazyImage, shared: Path
) -> None:
    slow = fake.spoil(image.blob_path, bytes_per_s=600_000)
    with (
        node_of(shared, "a", fake) as first,
        node_of(shared, "b", fake) as second,
        started(first) as there,
        held(fake, image),
        started(second) as here,
    ):
        assert arrived_bytes(first) < 0.2 * image.size_bytes, "it starts long before the first node is ready"
        release(fake, slow)
        assert here.eval(begins("f08")) == image.files["f08"][:100].hex()
        assert arrived_bytes(first) < 0.8 * image.size_bytes, "what it wishes comes before the rest"
        release(fake)
        reads_all(here, image)
        until(lambda: is_whole(shared, image), "the rest is pulled", 20)
        reads_all(there, image)
        until(lambda: arrived_bytes(second) == image.size_bytes, "it is one of the cache", 20)
        reads_all(here, image)
        assert not list((shared / "partial").iterdir())
        assert not list((shared / "wishes").iterdir())
        leases = [path.read_text() for path in (shared / "leases").iterdir()]
        assert sum(image.layer.removeprefix("sha256:") in lease for lease in leases) == 2


def test_a_reader_waits_while_its_writer_is_killed_and_another_node_takes_over(
    fake: FakeRegistry, image: LazyImage, shared: Path
) -> None:
    fake.spoil(image.blob_path, bytes_per_s=600_000)
    with node_of(shared, "a", fake) as first, node_of(shared, "b", fake) as second, first.client() as client:
        mounted(client)
        with held(fake, image), started(second) as here:
            found: list[object] = []
            thread = reading(here, "f09", found)
            until(lambda: list((shared / "wishes").iterdir()), "its wish is written")
            first.kill()
            release(fake)
            thread.join(20)
            assert found == [sha(image.files["f09"])]
            reads_all(here, image)
            until(lambda: is_whole(shared, image), "the rest is pulled", 20)
            assert "this node goes on" in second.log


def test_a_daemon_that_is_killed_while_its_reader_follows_is_replaced_by_one_that_does(
    fake: FakeRegistry, image: LazyImage, shared: Path
) -> None:
    fake.spoil(image.blob_path, bytes_per_s=600_000)
    with (
        node_of(shared, "a", fake) as first,
        node_of(shared, "b", fake) as second,
        started(first),
        held(fake, image),
        started(second) as here,
    ):
        found: list[object] = []
        thread = reading(here, "f09", found)
        until(lambda: list((shared / "wishes").iterdir()), "its wish is written")
        second.kill()
        second.start()
        assert not is_whole(shared, image)
        release(fake)
        thread.join(20)
        assert found == [sha(image.files["f09"])]
        reads_all(here, image)
        until(lambda: is_whole(shared, image), "the rest is pulled", 20)
        reads_all(here, image)


def test_a_node_that_pulls_whole_is_followed_too_and_the_image_is_sent_once(
    fake: FakeRegistry, image: LazyImage, shared: Path
) -> None:
    before = fake.written_bytes
    with (
        node_of(shared, "a", fake, lazy="off") as first,
        node_of(shared, "b", fake) as second,
        held(fake, image),
        first.client() as client,
        second.client() as other,
    ):
        assert client.ask("mount", uenv="app/1.0:v1")["ok"]
        until(lambda: fake.count("GET", image.blob_path), "it pulls")
        answer = other.ask("mount", uenv="app/1.0:v1")
        until(lambda: "pulls it; what has come is used" in second.log, "it is followed")
        release(fake, Spoil(image.blob_path, bytes_per_s=1_000_000))
        assert other.ask("wait", lease=answer["lease"])["ok"]
        with session(NOBODY, other.descriptors[0], MOUNT_POINT) as inside:
            assert inside.eval(digest_in("f09")) == sha(image.files["f09"])
            until(lambda: is_whole(shared, image), "the rest is pulled", 20)
            reads_all(inside, image)
    assert fake.written_bytes - before <= 1.02 * image.size_bytes
