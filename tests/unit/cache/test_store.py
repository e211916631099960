import errno
import fcntl
import json
import os
import stat
import threading
import time
from pathlib import Path
from typing import NoReturn

import pytest

from uenvd.cache import blobs as blobs_module
from uenvd.cache import store as store_module
from uenvd.cache.directory import Directory
from uenvd.cache.leases import held_anywhere
from uenvd.cache.memory import KEPT_S
from uenvd.cache.store import PART_KEPT_S, UNUSED_KEPT_S, Store
from uenvd.errors import DigestMismatch, InUse, NotFound, StorageError, StorageFull
from uenvd.oci.manifest import (
    CONFIG_TYPE,
    SQUASHFS_TYPE,
    Descriptor,
    ImageConfig,
    Manifest,
    build_manifest,
    digest_of,
    parse_manifest,
)

REPOSITORY = "deploy/demo/zen3/app/1.0"
DATA = b"hsqs" + bytes(range(256)) * 40
LAYER = Descriptor(SQUASHFS_TYPE, digest_of(DATA), len(DATA))
CONFIG = ImageConfig(None, "x86_64").encode()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "cache")
    made.prepare()
    return made


def fill(store: Store, data: bytes = DATA) -> Descriptor:
    descriptor = Descriptor(SQUASHFS_TYPE, digest_of(data), len(data))
    with store.begin(descriptor) as partial:
        partial.write(data)
        partial.commit()
    return descriptor


def manifest(layer: Descriptor = LAYER, config: bytes = CONFIG, note: str = "") -> Manifest:
    return parse_manifest(
        build_manifest(layer, Descriptor(CONFIG_TYPE, digest_of(config), len(config)), {"n": note}), None
    )


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def blob(store: Store, digest: str) -> Path:
    return store.root / "blobs/sha256" / digest.removeprefix("sha256:")


# --- blobs ----------------------------------------------------------------------------------------------------------------------


def test_a_blob_appears_with_its_digest(store: Store) -> None:
    assert not store.has(LAYER.digest)
    with pytest.raises(NotFound):
        store.open(LAYER.digest)
    fill(store)
    assert store.has(LAYER.digest)
    fd = store.open(LAYER.digest)
    try:
        assert os.pread(fd, 1 << 20, 0) == DATA
        assert not os.get_inheritable(fd)
        with pytest.raises(OSError):
            os.write(fd, b"x")
    finally:
        os.close(fd)
    assert list((store.root / "partial").iterdir()) == []


@pytest.mark.parametrize("data", [DATA[:-1], DATA[:-1] + b"x", b""])
def test_wrong_bytes_are_removed(store: Store, data: bytes) -> None:
    partial = store.begin(LAYER)
    partial.write(data)
    with pytest.raises(DigestMismatch):
        partial.commit()
    assert not store.has(LAYER.digest)
    assert store.begin(LAYER).offset_bytes == 0


def test_too_many_bytes_are_refused_before_they_are_written(store: Store) -> None:
    partial = store.begin(LAYER)
    with pytest.raises(DigestMismatch):
        partial.write(DATA + b"x")
    assert list((store.root / "partial").iterdir()) == []


def test_an_interrupted_writer_is_continued(store: Store) -> None:
    with store.begin(LAYER) as partial:
        partial.write(DATA[:1000])
    assert store.part_bytes(LAYER.digest) == 1000
    with store.begin(LAYER) as partial:
        assert partial.offset_bytes == 1000
        partial.write(DATA[1000:])
        partial.commit()
    assert blob(store, LAYER.digest).read_bytes() == DATA


def test_a_part_that_is_too_long_starts_again(store: Store) -> None:
    (store.root / "partial" / f"{LAYER.digest[7:]}.part").write_bytes(DATA + b"more")
    with store.begin(LAYER) as partial:
        assert partial.offset_bytes == 0


def test_one_writer_at_a_time(store: Store) -> None:
    first = store.begin(LAYER)
    with pytest.raises(InUse):
        store.begin(LAYER)
    first.keep()
    second = store.begin(LAYER)
    second.abort()
    second.abort()
    second.keep()
    store.begin(LAYER).abort()


def test_a_verified_blob_that_rots_is_removed(store: Store) -> None:
    fill(store)
    store.verify(LAYER.digest)
    blob(store, LAYER.digest).write_bytes(DATA[:-1] + b"?")
    with pytest.raises(DigestMismatch):
        store.verify(LAYER.digest)
    assert not store.has(LAYER.digest)


def test_use_is_noted(store: Store) -> None:
    fill(store)
    age(blob(store, LAYER.digest), 10_000)
    os.close(store.open(LAYER.digest))
    assert time.time() - blob(store, LAYER.digest).stat().st_mtime < 100


def test_what_is_no_digest_is_no_path(store: Store) -> None:
    for digest in ("", "sha256:../../etc/passwd", "sha512:" + "0" * 64):
        with pytest.raises(StorageError):
            store.has(digest)


# --- images ---------------------------------------------------------------------------------------------------------------------


def test_an_image_from_manifest_to_eviction(store: Store) -> None:
    found = manifest()
    store.put_manifest(REPOSITORY, found, LAYER, CONFIG, tag="v1")
    assert store.images() == []
    (image,) = store.images(complete_only=False)
    assert (image.complete, image.last_use_s) == (False, 0.0)
    fill(store)
    store.put_manifest(REPOSITORY, found, LAYER, CONFIG, tag="latest")
    (image,) = store.images()
    assert (image.repository, image.tags, image.manifest, image.layer) == (
        REPOSITORY,
        ("v1", "latest"),
        found,
        LAYER,
    )
    assert (image.layer_digest, image.size_bytes, image.complete) == (LAYER.digest, len(DATA), True)
    assert store.image(found.digest) == image
    assert store.manifest(found.digest) == found
    assert store.config(found) == CONFIG
    index = json.loads((store.root / "index.json").read_bytes())
    names = [entry["annotations"]["org.opencontainers.image.ref.name"] for entry in index["manifests"]]
    assert names == [f"{REPOSITORY}:v1", f"{REPOSITORY}:latest"]
    used, free = store.usage()
    assert used >= len(DATA) and free > 0
    assert store.evict(found.digest) >= len(DATA)
    assert store.images(complete_only=False) == []
    assert list((store.root / "blobs/sha256").iterdir()) == []
    with pytest.raises(NotFound):
        store.evict(found.digest)


def test_a_tag_that_moves_leaves_the_old_image(store: Store) -> None:
    old, new = manifest(note="old"), manifest(note="new")
    fill(store)
    store.put_manifest(REPOSITORY, old, LAYER, CONFIG, tag="latest")
    store.put_manifest(REPOSITORY, new, LAYER, CONFIG, tag="latest")
    store.put_manifest("build/x", new, LAYER, CONFIG, tag="latest")
    assert {(image.repository, image.manifest.digest): image.tags for image in store.images()} == {
        (REPOSITORY, old.digest): (),
        (REPOSITORY, new.digest): ("latest",),
        ("build/x", new.digest): ("latest",),
    }


def test_noting_the_same_again_writes_nothing(store: Store) -> None:
    fill(store)
    store.put_manifest(REPOSITORY, manifest(), LAYER, CONFIG, tag="v1")
    before = {path: path.stat().st_ino for path in store.root.rglob("*.json")}
    store.put_manifest(REPOSITORY, manifest(), LAYER, CONFIG, tag="v1")
    assert {path: path.stat().st_ino for path in store.root.rglob("*.json")} == before


def test_shared_blobs_outlive_one_image(store: Store) -> None:
    one, two = manifest(note="1"), manifest(note="2")
    fill(store)
    for number, each in enumerate((one, two)):
        store.put_manifest(REPOSITORY, each, LAYER, CONFIG, tag=f"v{number}")
    assert store.evict(one.digest) < len(DATA)
    assert store.has(LAYER.digest) and store.config(two) == CONFIG
    assert store.manifest(one.digest) is None
    assert store.evict(two.digest) >= len(DATA)


def test_a_lease_protects_from_eviction_also_as_an_inherited_copy(store: Store) -> None:
    found = manifest()
    fill(store)
    store.put_manifest(REPOSITORY, found, LAYER, CONFIG)
    lease = store.open(LAYER.digest)
    copy = os.dup(lease)
    other = store.open(LAYER.digest)
    os.close(lease)
    for last in (copy, other):
        with pytest.raises(InUse):
            store.evict(found.digest)
        assert os.pread(last, 4, 0) == b"hsqs"
        os.close(last)
    store.evict(found.digest)


def test_pins_and_running_pulls_protect_from_eviction(store: Store) -> None:
    found = manifest()
    store.put_manifest(REPOSITORY, found, LAYER, CONFIG)
    partial = store.begin(LAYER)
    with pytest.raises(InUse):
        store.evict(found.digest)
    partial.write(DATA)
    partial.commit()
    store.pin(found.digest)
    assert store.images()[0].pinned
    with pytest.raises(InUse, match="pinned"):
        store.evict(found.digest)
    store.pin(found.digest, False)
    assert store.evict(found.digest) >= len(DATA)
    with pytest.raises(NotFound):
        store.pin(found.digest)


def test_an_interrupted_pull_is_evicted_with_its_image(store: Store) -> None:
    found = manifest()
    store.put_manifest(REPOSITORY, found, LAYER, CONFIG)
    with store.begin(LAYER) as partial:
        partial.write(DATA[:5000])
    assert store.evict(found.digest) > 0
    assert list((store.root / "partial").iterdir()) == []


def test_unused_blobs_are_collected(store: Store) -> None:
    used, unused, young = fill(store), fill(store, b"unused"), fill(store, b"young")
    store.put_manifest(REPOSITORY, manifest(), used, CONFIG)
    for path in (store.root / "blobs/sha256").iterdir():
        if path.name != young.digest[7:]:
            age(path, UNUSED_KEPT_S + 10)
    lease = os.open(blob(store, unused.digest), os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(lease, fcntl.LOCK_SH)
        assert store.collect() == 0
    finally:
        os.close(lease)
    assert store.collect() > 0
    assert not store.has(unused.digest) and store.has(young.digest) and store.images()


def test_a_config_blob_must_belong_to_its_manifest(store: Store) -> None:
    with pytest.raises(DigestMismatch):
        store.put_manifest(REPOSITORY, manifest(), LAYER, b"other")


# --- restart, damage, trouble ---------------------------------------------------------------------------------------------------


def test_everything_is_there_after_a_restart(store: Store) -> None:
    fill(store)
    store.put_manifest(REPOSITORY, manifest(), LAYER, CONFIG, tag="v1")
    store.pin(manifest().digest)
    store.remember_tag(REPOSITORY, "v1", manifest().digest, 12.5)
    store.remember_tags(REPOSITORY, ["v1", "v2"], 13)
    store.remember_repositories("deploy/", [REPOSITORY], 14)
    again = Store(store.root)
    again.prepare()
    assert again.images() == store.images() and again.images()[0].pinned
    assert again.recall_tag(REPOSITORY, "v1") == (manifest().digest, 12.5)
    assert again.recall_tags(REPOSITORY) == (["v1", "v2"], 13.0)
    assert again.recall_repositories("deploy/") == ([REPOSITORY], 14.0)
    assert again.recall_tag(REPOSITORY, "v2") is None
    assert again.recall_tags("other") is None
    assert again.recall_repositories("build/") is None


def test_preparing_drops_what_nobody_will_finish(store: Store) -> None:
    fill(store)
    parts = store.root / "partial"
    names = {"done": LAYER.digest[7:], "old": "1" * 64, "young": "2" * 64}
    for name in names.values():
        (parts / f"{name}.part").write_bytes(b"x")
    age(parts / f"{names['old']}.part", PART_KEPT_S + 10)
    leftover = store.root / "blobs/sha256/.abc.1.tmp"
    leftover.write_bytes(b"x")
    age(leftover, UNUSED_KEPT_S + 10)
    store.remember_tags("old", ["x"], 1)
    (old_answer,) = (store.root / "registry").glob("*.json")
    age(old_answer, KEPT_S + 10)
    busy = store.begin(Descriptor("x", "sha256:" + "3" * 64, 10))
    age(parts / f"{'3' * 64}.part", PART_KEPT_S + 10)
    Store(store.root).prepare()
    assert {path.name[0] for path in parts.iterdir()} == {"2", "3"}
    assert not leftover.exists() and not old_answer.exists()
    busy.abort()


def test_what_crashed_nodes_left_of_a_shared_directory_goes(tmp_path: Path) -> None:
    """Also what an NFS client hid because somebody had it open, and files under a name for the time of writing."""
    shared = Directory(tmp_path, node="a")
    shared.prepare()
    places = ("partial", "leases", "claims", "trash", "blobs/sha256", "images")
    for place in places:
        for name, kept_s in ((".nfs00000000000a0001000000ff", PART_KEPT_S), (".x.1.tmp", UNUSED_KEPT_S)):
            (tmp_path / place / name).write_bytes(b"x")
            age(tmp_path / place / name, kept_s + 10)
    (young := tmp_path / "partial" / ".nfs00000000000a0002000000ff").write_bytes(b"x")
    age(young, PART_KEPT_S - 10)
    shared.sweep()
    assert [path for place in places for path in (tmp_path / place).iterdir()] == [young]


def test_a_blob_that_another_node_is_removing_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever name an NFS client still has for it."""
    here, there = (Directory(tmp_path, node=name) for name in "ab")
    here.prepare()
    fill(Store(None, here))
    path = here.blobs.path(LAYER.digest)

    def look(*arguments: object, **how: object) -> dict[str, list[str]]:
        (aside,) = (tmp_path / "trash").iterdir()
        os.link(aside, path)
        assert not there.blobs.has(LAYER.digest)
        with pytest.raises(NotFound):
            there.blobs.open(LAYER.digest)
        path.unlink()
        there.blobs._absent.clear()
        assert there.blobs.leases is not None
        there.blobs.leases.take(LAYER.digest[7:])
        return held_anywhere(*arguments, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(blobs_module, "held_anywhere", look)
    with pytest.raises(InUse, match="read by 1 other"):
        here.blobs.remove(LAYER.digest)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    os.close(there.blobs.open(LAYER.digest))


def test_a_part_with_the_name_of_the_blob_is_counted_once(store: Store) -> None:
    fill(store)
    used = store.usage()[0]
    os.link(store.root / "blobs/sha256" / LAYER.digest[7:], store.root / "partial" / ".nfs1")
    assert store.usage()[0] == used


def test_nobody_asks_for_a_lock_in_a_shared_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the lock manager of a file server does not answer, whoever asks waits for ever."""
    shared = Directory(tmp_path, node="a")
    shared.prepare()
    with shared.begin(LAYER) as partial:
        monkeypatch.setattr(fcntl, "flock", lambda *_args: pytest.fail("a lock was asked for"))
        os.close(partial.open_for_reader())
        partial.write(DATA)
        partial.commit()
    os.close(shared.blobs.open(LAYER.digest))
    shared.sweep()


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b"{}", b'{"schema":1}', b"\xff", b'{"manifest":"x","layer":{},"names":[]}']
)
def test_a_damaged_record_costs_one_image(store: Store, damage: bytes) -> None:
    fill(store)
    store.put_manifest(REPOSITORY, manifest(), LAYER, CONFIG, tag="v1")
    other = manifest(note="other")
    store.put_manifest(REPOSITORY, other, LAYER, CONFIG, tag="v2")
    (store.root / "images" / f"{manifest().digest[7:]}.json").write_bytes(damage)
    again = Store(store.root)
    again.prepare()
    assert [image.manifest for image in again.images()] == [other]
    again.put_manifest(REPOSITORY, manifest(), LAYER, CONFIG, tag="v1")
    assert len(again.images()) == 2


def test_damaged_manifests_and_answers_count_as_absent(store: Store) -> None:
    fill(store)
    store.put_manifest(REPOSITORY, manifest(), LAYER, CONFIG, tag="v1")
    blob(store, manifest().digest).write_bytes(b"{}")
    assert store.manifest(manifest().digest) is None and store.images() == []
    blob(store, digest_of(CONFIG)).write_bytes(b"{}")
    assert store.config(manifest()) is None
    store.remember_tags(REPOSITORY, ["v1"], 1)
    for damage in (b"", b"[]", b'{"question":5}', b'{"value":[1],"when":1}'):
        for path in (store.root / "registry").glob("*.json"):
            path.write_bytes(damage)
        assert Store(store.root).recall_tags(REPOSITORY) is None


def test_no_room_is_said_before_the_first_byte(store: Store) -> None:
    with pytest.raises(StorageFull, match="no room"):
        store.begin(Descriptor("x", "sha256:" + "0" * 64, 1 << 60))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_in_the_middle_gives_back_what_was_taken(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    partial = store.begin(LAYER)
    partial.write(DATA[:100])

    def full(*_args: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageFull) as caught:
        partial.write(DATA[100:])
    assert str(store.root) in str(caught.value) and caught.value.hint
    assert list((store.root / "partial").iterdir()) == []


def test_a_disk_error_keeps_what_is_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = store.begin(LAYER)
    partial.write(DATA[:100])

    def broken(*_args: object) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", broken)
        with pytest.raises(StorageError) as caught:
            partial.write(DATA[100:])
    assert not isinstance(caught.value, StorageFull)
    with store.begin(LAYER) as again:
        assert again.offset_bytes == 100
        again.write(DATA[100:])
        again.commit()


def test_a_registry_answer_that_cannot_be_kept_is_remembered_for_now(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    (store.root / "registry").rmdir()
    store.remember_tags(REPOSITORY, ["v1"], 1)
    assert store.recall_tags(REPOSITORY) == (["v1"], 1.0)
    assert "cannot be kept" in caplog.text


def test_a_cache_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError) as caught:
        Store(tmp_path / "file" / "cache").prepare()
    assert "file" in str(caught.value) and caught.value.hint
    with pytest.raises(StorageError):
        Store(tmp_path / "none").usage()
    with pytest.raises(StorageError):
        Store(tmp_path / "none").begin(LAYER)
    with pytest.raises(StorageError):
        Store(tmp_path / "none").put_manifest(REPOSITORY, manifest(), LAYER, CONFIG)


# --- a file system that hangs -------------------------------------------------------------------------------------------------------


def test_a_directory_that_hangs_costs_one_thread_and_the_other_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = Directory(tmp_path / "shared", node="n")
    store = Store(tmp_path / "local", shared)
    store.prepare()
    fill(Store(tmp_path / "local"))
    inside, go_on = threading.Event(), threading.Event()

    def hanging(_digest: str) -> bool:
        inside.set()
        assert go_on.wait(20)
        return False

    monkeypatch.setattr(shared.blobs, "has", hanging)
    monkeypatch.setattr(store_module, "HUNG_S", 0.0)
    absent = "sha256:" + "0" * 64
    asker = threading.Thread(target=store.has, args=(absent,))
    asker.start()
    try:
        assert inside.wait(20)
        assert not store.has(absent)
        with pytest.raises(StorageError, match="does not answer"):
            store.open(absent)
        assert store.has(LAYER.digest), "the local one is in order"
        with store.begin(Descriptor("x", absent, 10)) as partial:
            assert partial.path.is_relative_to(tmp_path / "local")
            partial.abort()
    finally:
        go_on.set()
        asker.join(20)
    with store.begin(Descriptor("x", absent, 10)) as partial:
        assert partial.path.is_relative_to(shared.root), "with the trouble gone it is used again"
        partial.abort()
