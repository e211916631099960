"""Pulls that are killed, that run twice, or that meet a full disk: nothing wrong becomes visible and nothing is lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.registry import FakeRegistry
from uenvd.cache.partmap import received_bytes
from uenvd.cache.pull import pull_blob
from uenvd.cache.store import Store
from uenvd.errors import InUse, StorageError, StorageFull
from uenvd.oci.manifest import (
    CONFIG_TYPE,
    SQUASHFS_TYPE,
    Descriptor,
    build_manifest,
    digest_of,
    parse_manifest,
)
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import never, no_progress, open_remote

REPOSITORY = "deploy/demo/zen3/app/1.0"
DATA = os.urandom(4_000_000)
LAYER = Descriptor(SQUASHFS_TYPE, digest_of(DATA), len(DATA))

PULLER = """
import sys
from pathlib import Path
from uenvd.cache.pull import pull_blob
from uenvd.cache.store import Store
from uenvd.oci.manifest import Descriptor
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import never, no_progress, open_remote
url, root, digest, size = sys.argv[1:]
store = Store(Path(root))
store.prepare()
print("ready", flush=True)
sys.stdin.read(1)
pull_blob(open_remote(parse_registry(url)), "deploy/demo/zen3/app/1.0", Descriptor("x", digest, int(size)), store,
          progress=lambda done, total: print(done, flush=True), cancelled=never)
"""


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        registry.put_blob(DATA)
        yield registry


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "cache")
    made.prepare()
    return made


@pytest.fixture
def pullers(fake: FakeRegistry, store: Store) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start processes that pull once a byte is written to their stdin."""
    running: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", PULLER, fake.url, str(store.root), LAYER.digest, str(len(DATA))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"x")
    process.stdin.flush()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def received(store: Store) -> int:
    return received_bytes(store.root / "partial" / f"{LAYER.digest.removeprefix('sha256:')}.part")


def content(store: Store) -> bytes:
    with os.fdopen(store.open(LAYER.digest), "rb") as file:
        return file.read()


def test_kill_9_in_the_middle_loses_nothing(
    fake: FakeRegistry, store: Store, pullers: Callable[[], subprocess.Popen[bytes]]
) -> None:
    rule = fake.spoil("/blobs/", bytes_per_s=2_000_000)
    process = pullers()
    go(process)
    wait_for(lambda: received(store) > 500_000)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert not store.has(LAYER.digest)
    rule.times = 0
    again = Store(store.root)
    again.prepare()
    kept = received(again)
    assert 500_000 < kept < len(DATA)
    pull_blob(
        open_remote(parse_registry(fake.url)), REPOSITORY, LAYER, again, progress=no_progress, cancelled=never
    )
    assert content(again) == DATA
    assert fake.seen[-1].headers["Range"] == f"bytes={kept}-{len(DATA) - 1}"


def test_two_processes_pull_one_blob_once(
    fake: FakeRegistry, store: Store, pullers: Callable[[], subprocess.Popen[bytes]]
) -> None:
    fake.spoil("/blobs/", bytes_per_s=4_000_000)
    both = [pullers(), pullers()]
    for process in both:
        go(process)
    for process in both:
        output, _ = process.communicate(timeout=20)
        assert process.returncode == 0
        assert output.splitlines()[-1] == str(len(DATA)).encode()
    assert content(store) == DATA
    assert fake.count("GET", "/blobs/") == 1


def test_the_second_takes_over_when_the_first_is_killed(
    fake: FakeRegistry, store: Store, pullers: Callable[[], subprocess.Popen[bytes]]
) -> None:
    fake.spoil("/blobs/", bytes_per_s=2_000_000)
    first, second = pullers(), pullers()
    go(first)
    wait_for(lambda: received(store) > 500_000)
    with pytest.raises(InUse):
        store.begin(LAYER)
    go(second)
    first.kill()
    second.communicate(timeout=20)
    assert second.returncode == 0
    assert content(store) == DATA
    assert fake.count("GET", "/blobs/") == 2
    assert "Range" in fake.seen[-1].headers


def test_a_lease_outlives_the_process_that_took_it(store: Store) -> None:
    """As a worker does: the descriptor is inherited, the daemon ends, the blob stays."""
    with store.begin(LAYER) as partial:
        partial.write(DATA)
        partial.commit()
    config = Descriptor(CONFIG_TYPE, digest_of(b"{}"), 2)
    manifest = parse_manifest(build_manifest(LAYER, config, {}), None)
    store.put_manifest(REPOSITORY, manifest, LAYER)
    taker = (
        "import os, sys, subprocess; from pathlib import Path; from uenvd.cache.store import Store\n"
        "fd = Store(Path(sys.argv[1])).open(sys.argv[2])\n"
        "print(subprocess.Popen(['sleep', '60'], pass_fds=[fd], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", taker, str(store.root), LAYER.digest],
        capture_output=True,
        check=True,
        timeout=30,
    )
    worker = int(done.stdout)
    try:
        with pytest.raises(InUse):
            store.evict(manifest.digest)
    finally:
        os.kill(worker, signal.SIGKILL)

    def evicted() -> bool:
        try:
            return store.evict(manifest.digest) > 0
        except InUse:
            return False

    wait_for(evicted)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a file system of 2 MB needs root")
    mount = tmp_path / "disk"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", mount], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def test_a_full_disk_is_one_error_and_gives_the_room_back(fake: FakeRegistry, small_disk: Path) -> None:
    store = Store(small_disk / "cache")
    store.prepare()
    remote = open_remote(parse_registry(fake.url))
    with pytest.raises(StorageFull, match="no room"):
        pull_blob(remote, REPOSITORY, LAYER, store, progress=no_progress, cancelled=never)
    assert fake.count("GET", "/blobs/") == 0
    half = os.urandom(1_200_000)
    layer = Descriptor("x", fake.put_blob(half), len(half))
    fake.spoil("/blobs/", bytes_per_s=3_000_000)
    ballast = small_disk / "ballast"

    def fill(done_bytes: int, _total_bytes: int) -> None:
        if done_bytes > 100_000 and not ballast.exists():
            ballast.write_bytes(bytes(1_000_000))

    with pytest.raises(StorageFull) as caught:
        pull_blob(remote, REPOSITORY, layer, store, progress=fill, cancelled=never)
    assert str(small_disk) in str(caught.value)
    assert store.part_bytes(layer.digest) == 0
    ballast.unlink()
    pull_blob(remote, REPOSITORY, layer, store, progress=no_progress, cancelled=never)
    assert store.has(layer.digest)


def test_a_read_only_disk_is_named(small_disk: Path) -> None:
    store = Store(small_disk / "cache")
    store.prepare()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for call in (lambda: store.begin(LAYER), store.prepare):
        with pytest.raises(StorageError, match=r"[Rr]ead-only") as caught:
            call()
        assert "read-only" in caught.value.hint
    assert store.images() == []
