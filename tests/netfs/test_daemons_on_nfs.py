"""Real daemons on nodes that share a directory of an NFS server: starts, readers and evictions, and what happens when something dies."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support import daemon
from support.daemon import Client, Daemon, running_daemon
from support.fusetools import NOBODY, Session, session, until
from support.lazyimage import LABEL, MOUNT_POINT, LazyImage, arrived_bytes, mounted, push_lazy
from support.netfs import SERVER, USER_NAME, Node, Server
from support.registry import FakeRegistry

pytestmark = [
    pytest.mark.usefixtures("node"),
    pytest.mark.parametrize("nodes", ["nfs3", "nfs42"], indirect=True),
]

LINK_BYTES_PER_S = 400_000
"""Of each connection."""


class Here:
    """What a node keeps between two calls."""

    stack: ExitStack
    daemon: Daemon
    client: Client
    inside: Session


def start(root: Path, registry: str) -> None:
    Here.stack = ExitStack()
    daemon.START_DEADLINE_S = 120.0  # an emulated processor
    work = Path(tempfile.mkdtemp(prefix="uenvd-test-", dir="/var/tmp"))
    work.chmod(0o755)
    extra = (
        "mounts: {linger: 100ms}\nlazy: {deadline: 180s}\n"
        f"cache: {{local: none, shared: {root}, user: {USER_NAME}}}\n"
    )
    Here.daemon = Here.stack.enter_context(running_daemon(work / "uenvd", registry, extra=extra))


def stop() -> None:
    Here.stack.close()


def mount() -> int:
    """Mount the image; return how much of it had arrived when it could be used."""
    Here.client = Here.stack.enter_context(Here.daemon.client())
    mounted(Here.client)
    arrived = arrived_bytes(Here.daemon)
    Here.inside = Here.stack.enter_context(session(NOBODY, Here.client.descriptors[0], MOUNT_POINT))
    return arrived


def read(name: str) -> object:
    """Return the hash of a file of the image."""
    path = f"{MOUNT_POINT}/{name}"
    return Here.inside.eval(f"__import__('hashlib').file_digest(open('{path}', 'rb'), 'sha256').hexdigest()")


def log() -> str:
    return Here.daemon.log


def arrived() -> int:
    return arrived_bytes(Here.daemon)


def evict() -> dict[str, object]:
    return Here.daemon.ask("evict", uenv=LABEL)


def kill() -> None:
    Here.daemon.kill()


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry(address=SERVER) as registry:
        yield registry


@pytest.fixture
def image(fake: FakeRegistry, public_dir: Path) -> LazyImage:
    return push_lazy(fake, public_dir, files=8)


@pytest.fixture
def pair(nodes: list[Node], root: Path, fake: FakeRegistry, image: LazyImage) -> Iterator[tuple[Node, Node]]:
    """Two nodes whose daemons share a directory, and a slow way to the registry."""
    first, second = nodes[:2]
    fake.spoil(image.blob_path, bytes_per_s=LINK_BYTES_PER_S)
    begun: list[Node] = []
    try:
        for node in (first, second):
            node.do(start, root, fake.url)
            begun.append(node)
        yield first, second
    finally:
        fake.spoils.clear()
        fake.hang_up()
        for node in begun:
            node.do(stop)


def check_all(node: Node, image: LazyImage) -> None:
    for name, data in image.files.items():
        assert node.do(read, name) == sha(data), name


def test_a_node_reads_what_another_is_still_pulling(
    pair: tuple[Node, Node], fake: FakeRegistry, image: LazyImage
) -> None:
    here, there = pair
    before = fake.written_bytes
    assert here.do(mount) < image.size_bytes / 2
    assert there.do(mount) < image.size_bytes / 2
    assert there.do(read, "f06") == sha(image.files["f06"])
    assert there.do(arrived) < image.size_bytes
    for node in (here, there):
        check_all(node, image)
    until(lambda: here.do(arrived) == there.do(arrived) == image.size_bytes, "the rest is pulled", 120)
    copies = (fake.written_bytes - before) / image.size_bytes
    print(f"{copies:.3f} copies")
    assert copies < 1.5, "nobody else pulls it"
    answer = here.do(evict)
    assert not answer["ok"], answer
    check_all(there, image)


def test_another_node_goes_on_when_the_puller_is_killed(
    pair: tuple[Node, Node], fake: FakeRegistry, image: LazyImage
) -> None:
    here, there = pair
    here.do(mount)
    there.do(mount)
    assert there.do(read, "f01") == sha(image.files["f01"])
    here.do(kill)
    reading = there.begin(read, "f07")
    assert reading.result(200) == sha(image.files["f07"]), there.do(log)
    check_all(there, image)
    assert "cannot be renewed" not in there.do(log)


def test_mounts_go_on_when_the_file_server_is_back(
    pair: tuple[Node, Node], server: Server, fake: FakeRegistry, image: LazyImage
) -> None:
    here, there = pair
    fake.spoils.clear()
    here.do(mount)
    there.do(mount)
    check_all(here, image)
    server.stop()
    try:
        reading = there.begin(read, "f03")
        asking = here.begin(mount)
        assert not reading.done.wait(3) or reading.result() == sha(image.files["f03"])
    finally:
        server.start()
    assert reading.result(120) == sha(image.files["f03"])
    asking.result(120)
    check_all(there, image)
    check_all(here, image)
