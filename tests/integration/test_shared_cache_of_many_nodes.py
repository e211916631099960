"""One directory, several nodes, each with an NFS client of its own (support.nfsdouble): what one did, the others see; who dies, is replaced."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.nfsdouble import NOBODY, mounted
from support.registry import FakeRegistry
from uenvd.cache import blobs, claim, leases
from uenvd.cache.directory import Directory
from uenvd.cache.gc import collect
from uenvd.cache.identity import CacheUser
from uenvd.cache.partview import Gone
from uenvd.cache.pull import pull_blob
from uenvd.cache.store import Store
from uenvd.errors import InUse, NotFound, StorageError
from uenvd.oci.manifest import (
    CONFIG_TYPE,
    SQUASHFS_TYPE,
    Descriptor,
    Manifest,
    build_manifest,
    digest_of,
    parse_manifest,
)
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import never, no_progress, open_remote

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems for other users")

REPOSITORY = "deploy/demo/zen3/app/1.0"
DATA = b"hsqs" + bytes(range(256)) * 400
LAYER = Descriptor(SQUASHFS_TYPE, digest_of(DATA), len(DATA))
HEX = LAYER.digest.removeprefix("sha256:")
CONFIG = Descriptor(CONFIG_TYPE, digest_of(b"{}"), 2)


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


def sent_bytes(fake: FakeRegistry, size_bytes: int) -> int:
    """Return how many bytes of a blob were asked for."""
    sent = 0
    for seen in fake.seen:
        if seen.method == "GET" and "/blobs/" in seen.path:
            first, _, last = (
                seen.headers.get("Range", f"bytes=0-{size_bytes - 1}").removeprefix("bytes=").partition("-")
            )
            sent += int(last or size_bytes - 1) - int(first) + 1
    return sent


@pytest.fixture(scope="module")
def farm() -> Iterator[tuple[Path, Path, Path]]:
    """A server's directory and two clients of it. It is on a file system that does not use inode numbers twice: the double has nothing else."""
    top = Path(tempfile.mkdtemp(prefix="uenvd-test-", dir="/var/tmp"))
    top.chmod(0o755)
    directory = top / "server"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=0755", "tmpfs", directory], check=True)
    try:
        with (
            mounted(directory, top / "a", squash=True) as first,
            mounted(directory, top / "b", squash=True) as second,
        ):
            yield directory, first, second
    finally:
        subprocess.run(["umount", "-l", directory], check=True)
        shutil.rmtree(top, ignore_errors=True)


@pytest.fixture
def place(request: pytest.FixtureRequest, farm: tuple[Path, Path, Path]) -> Iterator[str]:
    """A directory of this test's own on the server, which trusts root as little as everybody else."""
    name = request.node.name
    (farm[0] / name).mkdir()
    os.chown(farm[0] / name, NOBODY, NOBODY)
    yield name
    shutil.rmtree(farm[0] / name, ignore_errors=True)


@pytest.fixture
def server(farm: tuple[Path, Path, Path], place: str) -> Path:
    return farm[0] / place


@pytest.fixture
def mounts(farm: tuple[Path, Path, Path], place: str) -> tuple[Path, Path]:
    return farm[1] / place, farm[2] / place


@pytest.fixture
def nodes(mounts: tuple[Path, Path]) -> tuple[Directory, Directory]:
    first, second = (
        Directory(mount / "cache", CacheUser(NOBODY, NOBODY), node=name)
        for mount, name in zip(mounts, "ab", strict=True)
    )
    first.prepare()
    second.prepare()
    return first, second


def manifest(layer: Descriptor = LAYER, note: str = "") -> Manifest:
    return parse_manifest(build_manifest(layer, CONFIG, {"n": note}), None)


def fill(directory: Directory, data: bytes = DATA) -> Descriptor:
    layer = Descriptor(SQUASHFS_TYPE, digest_of(data), len(data))
    with directory.begin(layer) as partial:
        partial.write(data)
        partial.commit()
    directory.put_manifest(REPOSITORY, manifest(layer), layer, b"{}", tag=f"v{len(data)}")
    return layer


def until(condition: Callable[[], bool], what: str, deadline_s: float = 20.0) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.02)


# --- publication --------------------------------------------------------------------------------------------------------------------


def test_what_was_looked_for_in_vain_is_seen_when_another_node_has_it(
    nodes: tuple[Directory, Directory],
) -> None:
    here, there = nodes
    assert not there.blobs.has(LAYER.digest)
    assert not (there.blobs.path(LAYER.digest)).exists()  # now this client remembers that there is none
    fill(here)
    assert not (there.blobs.path(LAYER.digest)).exists(), "the double forgets what an NFS client remembers"
    until(lambda: there.blobs.has(LAYER.digest), "the blob of the other node does not appear", 3.0)
    fd = there.blobs.open(LAYER.digest)
    try:
        assert os.pread(fd, 1 << 20, 0) == DATA
    finally:
        os.close(fd)
    assert [image.tags for image in there.images()] == [(f"v{len(DATA)}",)]
    assert there.blobs.present([LAYER.digest, "sha256:" + "0" * 64]) == {LAYER.digest}


def test_what_another_node_removed_is_not_found(nodes: tuple[Directory, Directory]) -> None:
    here, there = nodes
    fill(here)
    assert there.blobs.has(LAYER.digest)
    here.evict(manifest().digest)
    assert not there.blobs.has(LAYER.digest)
    with pytest.raises(NotFound):
        there.blobs.open(LAYER.digest)


def test_stock_tools_read_the_layout(nodes: tuple[Directory, Directory]) -> None:
    here, there = nodes
    fill(here)
    source = f"oci:{there.root}:{REPOSITORY}:v{len(DATA)}"
    done = subprocess.run(
        ["skopeo", "inspect", "--raw", source], capture_output=True, user=NOBODY, group=NOBODY, check=True
    )
    assert json.loads(done.stdout)["layers"][0]["digest"] == LAYER.digest


# --- one writer ---------------------------------------------------------------------------------------------------------------------


def test_one_node_pulls_and_the_other_is_told(nodes: tuple[Directory, Directory]) -> None:
    here, there = nodes
    partial = here.begin(LAYER)
    with pytest.raises(InUse):
        there.begin(LAYER)
    partial.write(DATA[:5000])
    partial.record()
    until(lambda: there.blobs.part_bytes(LAYER.digest) == 5000, "the other node's progress")
    partial.keep()
    until(lambda: _begins(there), "the right to write is free again", 3.0)


def _begins(directory: Directory) -> bool:
    try:
        partial = directory.begin(LAYER)
    except InUse:
        return False
    assert partial.offset_bytes == 5000, "what the first one left is gone on with"
    partial.write(DATA[5000:])
    partial.commit()
    return True


PULL = """
import sys
from pathlib import Path
from uenvd.cache.directory import Directory
from uenvd.cache.identity import CacheUser
from uenvd.oci.manifest import SQUASHFS_TYPE, Descriptor
root, digest, size = sys.argv[1:]
directory = Directory(Path(root), CacheUser(65534, 65534), node="killed")
partial = directory.begin(Descriptor(SQUASHFS_TYPE, digest, int(size)))
partial.write(bytes(1000))
partial.record()
print("claimed", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def puller(mounts: tuple[Path, Path]) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the first node that has begun to write the blob."""
    process = subprocess.Popen(
        [sys.executable, "-c", PULL, str(mounts[0] / "cache"), LAYER.digest, str(len(DATA))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_killed_puller_of_this_node_is_replaced_at_once(
    nodes: tuple[Directory, Directory], puller: subprocess.Popen[bytes]
) -> None:
    assert puller.stdout is not None
    assert puller.stdout.readline() == b"claimed\n"
    with pytest.raises(InUse):
        nodes[0].begin(LAYER)
    puller.kill()
    puller.wait()
    until(lambda: _takes(nodes[0]), "a dead process of this machine is known to be dead", 5.0)


def _takes(directory: Directory) -> bool:
    try:
        directory.begin(LAYER).abort()
    except InUse:
        return False
    return True


def foreign_claim(directory: Directory, name: str = HEX) -> Path:
    """Put the claim of another machine into the directory."""
    path = directory.blobs.claims / f"{name}.claim"
    body = {"token": "t", "host": "far", "boot": "b", "pid_namespace": 1, "pid": 1, "started": 1}
    with directory.user:
        path.write_text(json.dumps(body))
    return path


def test_a_dead_node_is_replaced_when_it_was_silent_long_enough(
    nodes: tuple[Directory, Directory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "STALE_S", 1.5)
    monkeypatch.setattr(blobs, "_ABSENT_S", 0.0)
    path = foreign_claim(nodes[0])
    part = nodes[0].blobs.part_path(LAYER.digest)
    with nodes[0].user:
        part.write_bytes(b"what the dead node wrote, and may still write")
    began_s = time.monotonic()
    while time.monotonic() - began_s < 1.8:  # it lives: it renews, by a clock that is an hour slow
        os.utime(path, (time.time() - 3600, time.time() - 3600 + time.monotonic() - began_s))
        assert not _takes(nodes[1])
        time.sleep(0.1)
    until(lambda: _takes(nodes[1]), "a silent node's claim does not hold for ever")
    assert not part.exists(), "a file that somebody may still write to does not become ours"


def test_a_node_that_was_replaced_stops_writing(
    nodes: tuple[Directory, Directory], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = nodes
    monkeypatch.setattr(claim, "_LOOK_S", 0.0)
    monkeypatch.setattr(claim, "BEAT_S", 3600.0)
    monkeypatch.setattr(blobs, "_ABSENT_S", 0.0)
    lost = here.begin(LAYER)
    lost.write(DATA)
    monkeypatch.setattr(claim, "STALE_S", 0.0)
    monkeypatch.setattr(claim.Holder, "is_gone", lambda _self: False)
    _takes(there)  # sees it the first time
    winner = there.begin(LAYER)
    with pytest.raises(InUse):
        lost.commit()
    lost.keep()
    assert not there.blobs.has(LAYER.digest)
    winner.write(DATA)
    winner.commit()
    assert there.blobs.path(LAYER.digest).read_bytes() == DATA


def test_sixteen_processes_pull_one_image_once(server: Path, fake: FakeRegistry) -> None:
    """Their nodes see one directory; who does not pull follows. Forked, so that sixteen cost no sixteen starts of Python."""
    layer = Descriptor(SQUASHFS_TYPE, fake.put_blob(DATA * 20), len(DATA) * 20)
    fake.spoil("/blobs/", bytes_per_s=8_000_000)
    script = (
        "import os, sys; from pathlib import Path\n"
        "from uenvd.cache.directory import Directory; from uenvd.cache.identity import CacheUser\n"
        "from uenvd.cache.pull import pull_blob; from uenvd.cache.store import Store\n"
        "from uenvd.oci.manifest import Descriptor; from uenvd.oci.reference import parse_registry\n"
        "from uenvd.oci.remote import never, no_progress, open_remote\n"
        "root, url, repository, digest, size = sys.argv[1:]\n"
        "def pull(number):\n"
        "    store = Store(None, Directory(Path(root), CacheUser(65534, 65534), node=f'n{number}'))\n"
        "    store.prepare()\n"
        "    layer = Descriptor('application/octet-stream', digest, int(size))\n"
        "    pull_blob(open_remote(parse_registry(url)), repository, layer, store, progress=no_progress, cancelled=never)\n"
        "    os.close(store.open(digest))\n"
        "children = []\n"
        "for number in range(16):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        try:\n"
        "            pull(number); os._exit(0)\n"
        "        except BaseException:\n"
        "            import traceback; traceback.print_exc(); os._exit(1)\n"
        "    children.append(child)\n"
        "sys.exit(sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            script,
            str(server / "cache"),
            fake.url,
            REPOSITORY,
            layer.digest,
            str(layer.size_bytes),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sent = sent_bytes(fake, layer.size_bytes)
    assert sent <= 1.02 * layer.size_bytes, f"{sent / layer.size_bytes:.3f} copies"


def test_a_part_is_read_on_another_node_while_it_is_written(nodes: tuple[Directory, Directory]) -> None:
    here, there = nodes
    with here.begin(LAYER) as part:
        part.write_at(0, DATA[:10_000])
        part.sync()
        view = there.blobs.follow(LAYER.digest, LAYER.size_bytes)
        assert view is not None
        try:
            assert view.look()
            fd = view.open_for_reader()
            assert view.read(0, 20_000)[:10_000] == DATA[:10_000], "behind that there is a hole, or nothing"
            part.write_at(10_000, DATA[10_000:])
            part.sync()
            assert view.look()
            assert view.read(0, len(DATA)) == DATA
            assert os.pread(fd, len(DATA), 0) == DATA, "whoever has opened it before sees the same"
            part.abort()
            with pytest.raises(Gone):
                view.look()
            os.close(fd)
        finally:
            view.close()
    assert there.blobs.follow(LAYER.digest, LAYER.size_bytes) is None


# --- readers ------------------------------------------------------------------------------------------------------------------------


def test_one_node_evicts_while_another_reads(nodes: tuple[Directory, Directory]) -> None:
    here, there = nodes
    fill(here)
    fd = there.blobs.open(LAYER.digest)
    try:
        with pytest.raises(InUse, match="read by 1 other"):
            here.evict(manifest().digest)
        assert os.pread(fd, 1 << 20, 0) == DATA
        assert here.blobs.path(LAYER.digest).exists() and here.images()
    finally:
        os.close(fd)
    assert there.blobs.leases is not None
    there.blobs.leases._held[HEX] -= leases.JUST_TAKEN_S + 1
    assert there.blobs.leases.renew([], []) == {HEX}
    assert here.evict(manifest().digest) >= len(DATA)


def test_reading_and_evicting_at_the_same_time_never_fails_a_read(nodes: tuple[Directory, Directory]) -> None:
    """Whoever gets a descriptor can read with it: the remover finds the lease, or the reader finds no blob."""
    here, there = nodes
    failures: list[BaseException] = []
    reads = 0
    stop = threading.Event()

    def evict() -> None:
        while not stop.is_set():
            try:
                if not here.blobs.has(LAYER.digest):
                    fill(here)
                here.evict(manifest().digest)
            except (InUse, NotFound):
                continue
            except BaseException as error:
                failures.append(error)
                return

    remover = threading.Thread(target=evict)
    remover.start()
    try:
        end_s = time.monotonic() + 2.0
        while time.monotonic() < end_s and not failures:
            try:
                with os.fdopen(there.blobs.open(LAYER.digest), "rb", buffering=0) as file:
                    assert os.pread(file.fileno(), 1 << 20, 0) == DATA
                    reads += 1
            except NotFound:
                there.blobs._absent.clear()
                continue
            assert there.blobs.leases is not None
            there.blobs.leases._held[HEX] -= leases.JUST_TAKEN_S + 1
            there.blobs.leases.renew([], [])
    finally:
        stop.set()
        remover.join(10)
    assert not failures, failures
    assert reads > 3


def test_leases_outlive_the_daemon_and_end_with_the_grace(nodes: tuple[Directory, Directory]) -> None:
    here, there = nodes
    fill(here)
    os.close(there.blobs.open(LAYER.digest))
    successor = Directory(there.root, there.user, node="b")
    successor.prepare()
    assert successor.blobs.leases is not None
    assert successor.blobs.leases.inherited == {HEX}
    assert successor.blobs.leases.renew([], [HEX]) == set(), "a reader that nobody knows of keeps it"
    with pytest.raises(InUse):
        here.evict(manifest().digest)
    here.blobs.grace_s = 0.3
    with pytest.raises(InUse):
        here.evict(manifest().digest)
    until(lambda: _evicts(here), "the lease of a node that died ends")
    assert successor.blobs.leases.renew([LAYER.digest[7:]], []) == set()
    assert (there.root / "leases/b.json").exists(), "a node that was taken for dead says that it is not"


def _evicts(directory: Directory) -> bool:
    try:
        return directory.evict(manifest().digest) > 0
    except InUse:
        return False


def test_a_removal_that_a_crash_interrupted_is_finished_or_undone(nodes: tuple[Directory, Directory]) -> None:
    here, there = nodes
    leased, unused = fill(here), fill(here, DATA + b"x")
    os.close(there.blobs.open(leased.digest))
    trash = here.root / "trash"
    with here.user:
        for layer in (leased, unused):
            here.blobs.path(layer.digest).rename(trash / f"{layer.digest[7:]}.abc")
    os.utime(trash)
    for path in (here.root / "trash").iterdir():
        assert path.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: time.clock_gettime(time.CLOCK_REALTIME) + 3600)
        here.sweep()
    assert list(trash.iterdir()) == []
    assert here.blobs.path(leased.digest).exists() and not here.blobs.path(unused.digest).exists()


# --- room ---------------------------------------------------------------------------------------------------------------------------


def test_room_is_made_where_nobody_reads(nodes: tuple[Directory, Directory]) -> None:
    here, there = nodes
    layers = [fill(here, DATA + bytes([number])) for number in range(4)]
    os.close(there.blobs.open(layers[0].digest))
    here.pin(manifest(layers[1]).digest)
    here._quota_bytes = sum(layer.size_bytes for layer in layers)
    here._high, here._low = 0.9, 0.5
    shown = collect(here, dry_run=True)
    assert {one.kept for one in shown.candidates} == {None, "pinned", "in use"}
    assert len(list((here.root / "blobs/sha256").iterdir())) >= 8
    collect(here)
    assert {layer.digest for layer in layers if here.blobs.has(layer.digest)} == {
        layers[0].digest,
        layers[1].digest,
    }


# --- trouble ------------------------------------------------------------------------------------------------------------------------


def test_root_alone_gets_nowhere_on_a_server_that_squashes_it(
    mounts: tuple[Path, Path], server: Path
) -> None:
    server.chmod(0o700)
    with pytest.raises(StorageError, match="Permission denied"):
        Directory(mounts[0] / "cache", CacheUser(1234, 1234), node="a").prepare()
    Directory(mounts[0] / "cache", CacheUser(NOBODY, NOBODY), node="a").prepare()
    assert (server / "cache").stat().st_uid == NOBODY


def test_a_server_that_is_away_costs_the_shared_directory_only(
    server: Path, public_dir: Path, fake: FakeRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    fake.put_blob(DATA)
    with mounted(server, public_dir / "away", squash=True) as mount:
        shared = Directory(mount / "cache", CacheUser(NOBODY, NOBODY), node="a")
        store = Store(public_dir / "local", shared)
        store.prepare()
    remote = open_remote(parse_registry(fake.url))
    pull_blob(remote, REPOSITORY, LAYER, store, progress=no_progress, cancelled=never)
    store.put_manifest(REPOSITORY, manifest(), LAYER, b"{}", tag="v1")
    fd = store.open(LAYER.digest)
    os.close(fd)
    assert [image.complete for image in store.images()] == [True]
    assert "No such file" in caplog.text
    with pytest.raises(StorageError, match="No such file"):
        Store(None, shared).begin(LAYER)
