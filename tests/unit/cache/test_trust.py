"""Directories of images that are only read: used if they are the site's alone, else as if they were not there."""

import os
from pathlib import Path

import pytest

from support.fusetools import NOBODY
from uenvd.cache.directory import Directory
from uenvd.cache.identity import CacheUser
from uenvd.cache.store import Store
from uenvd.errors import NotFound, StorageError
from uenvd.oci.manifest import (
    CONFIG_TYPE,
    SQUASHFS_TYPE,
    Descriptor,
    ImageConfig,
    build_manifest,
    digest_of,
    parse_manifest,
)

REPOSITORY = "deploy/demo/zen3/app/1.0"
DATA = b"hsqs" + bytes(range(256)) * 40
LAYER = Descriptor(SQUASHFS_TYPE, digest_of(DATA), len(DATA))
CONFIG = ImageConfig(None, "x86_64").encode()


def fill(root: Path) -> None:
    """Put one image into a directory, as an administrator does."""
    filled = Store(root)
    filled.prepare()
    with filled.begin(LAYER) as part:
        part.write(DATA)
        part.commit()
    config = Descriptor(CONFIG_TYPE, digest_of(CONFIG), len(CONFIG))
    manifest = parse_manifest(build_manifest(LAYER, config, {}), None)
    filled.put_manifest(REPOSITORY, manifest, LAYER, CONFIG, tag="v1")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    fill(root)
    return root


def blob(source: Path) -> Path:
    return source / "blobs" / "sha256" / LAYER.digest.removeprefix("sha256:")


def store_with(source: Path, tmp_path: Path, user: CacheUser | None = None) -> Store:
    store = Store(tmp_path / "local", sources=[Directory(source, user)])
    store.prepare()
    return store


def test_what_a_source_has_is_not_pulled(source: Path, tmp_path: Path) -> None:
    store = store_with(source, tmp_path)
    assert store.has(LAYER.digest)
    (image,) = store.images()
    assert image.complete
    with os.fdopen(store.open(LAYER.digest), "rb") as file:
        assert file.read() == DATA
    assert list((tmp_path / "local" / "blobs" / "sha256").iterdir()) == []


@pytest.mark.parametrize("name", [".", "blobs", "blobs/sha256", "images"])
def test_a_directory_that_others_may_write_to_counts_as_absent(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    (source / name).chmod(0o777)
    store = store_with(source, tmp_path)
    assert not store.has(LAYER.digest)
    assert store.images() == []
    with pytest.raises(StorageError, match="is not used"):
        store.open(LAYER.digest)
    assert "others may write to it" in caplog.text


def test_a_blob_that_others_may_change_counts_as_absent(source: Path, tmp_path: Path) -> None:
    blob(source).chmod(0o664)
    store = store_with(source, tmp_path)
    assert not store.has(LAYER.digest)
    with pytest.raises(NotFound):
        store.open(LAYER.digest)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_a_blob_of_an_ordinary_user_counts_as_absent_unless_he_is_the_caches(public_dir: Path) -> None:
    source = public_dir / "source"
    fill(source)
    source.chmod(0o755)
    os.chown(blob(source), NOBODY, NOBODY)
    assert not store_with(source, public_dir).has(LAYER.digest)
    assert store_with(source, public_dir, CacheUser(NOBODY, NOBODY)).has(LAYER.digest)
