"""A new version of an image that is cached: only what changed is fetched, and what comes of it is right or nothing."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import running_daemon
from support.fusetools import NOBODY, session, until
from support.lazyimage import MOUNT_POINT, mounted
from support.registry import FakeRegistry
from uenvd.oci.manifest import squashfs_layer
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import no_progress, open_remote
from uenvd.publish.push import Target, push_image

pytestmark = pytest.mark.usefixtures("node")

FILES = 400


@pytest.fixture
def fake(public_dir: Path) -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        yield registry


def make_versions(directory: Path, *options: str) -> tuple[Path, Path, Path]:
    """Make two versions of a tree, 5 % of whose files differ, some also in size; return the images and the tree of the second."""
    source = random.Random(7)
    tree = directory / "tree"
    for number in range(FILES):
        path = tree / f"d{number % 20}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.randbytes(source.choice((700, 5_000, 40_000, 200_000))))
    images = []
    for version in ("1", "2"):
        if version == "2":
            for number in source.sample(range(FILES), FILES // 20):
                path = tree / f"d{number % 20}" / f"f{number}"
                path.write_bytes(source.randbytes(path.stat().st_size + source.choice((0, 0, 0, 60))))
        image = directory / f"{version}.squashfs"
        command = [
            "mksquashfs",
            tree,
            image,
            "-comp",
            "zstd",
            "-all-root",
            "-all-time",
            "1",
            "-quiet",
            "-no-progress",
        ]
        subprocess.run([*command, *options], check=True, capture_output=True)
        images.append(image)
    return images[0], images[1], tree


@pytest.mark.parametrize(
    ("options", "most", "lazy"),
    [(("-no-fragments",), 0.06, "auto"), ((), 0.20, "off")],
    ids=["our builder's image", "mksquashfs's own"],
)
def test_an_update_moves_little_more_than_what_changed(
    public_dir: Path, fake: FakeRegistry, options: tuple[str, ...], most: float, lazy: str
) -> None:
    old, new, tree = make_versions(public_dir, *options)
    remote = open_remote(parse_registry(fake.url))
    repository = "deploy/demo/zen3/app/1.0"
    for path, tag in ((old, "v1"), (new, "v2")):
        push_image(remote, path, Target(repository, tag), hashing=no_progress, progress=no_progress)
    with running_daemon(public_dir / "uenvd", fake.url, extra=f"lazy: {lazy}\n") as daemon:
        assert daemon.ask("pull", uenv="app/1.0:v1")["ok"]
        before = fake.sent_bytes
        with daemon.client() as client:
            mounted(client, f"app/1.0:v2:{MOUNT_POINT}")
            with session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
                for path in sorted(tree.rglob("f*"))[::13]:
                    name = path.relative_to(tree)
                    assert (
                        bytes.fromhex(inside.eval(f"open('{MOUNT_POINT}/{name}', 'rb').read().hex()"))
                        == path.read_bytes()
                    )
            until(lambda: len(daemon.ask("images")["records"]) == 2, "it is here", 20)
        moved = fake.sent_bytes - before
    assert moved < most * new.stat().st_size, f"{moved / new.stat().st_size:.3f}"
    shutil.rmtree(tree)


def test_a_list_that_lies_costs_a_whole_pull_and_nothing_else(public_dir: Path, fake: FakeRegistry) -> None:
    old, new, tree = make_versions(public_dir)
    remote = open_remote(parse_registry(fake.url))
    repository = "deploy/demo/zen3/app/1.0"
    digests = [
        push_image(remote, path, Target(repository, tag), hashing=no_progress, progress=no_progress).digest
        for path, tag in ((old, "v1"), (new, "v2"))
    ]
    with running_daemon(public_dir / "uenvd", fake.url, extra="lazy: off\n") as daemon:
        assert daemon.ask("pull", uenv="app/1.0:v1")["ok"]
        blob = squashfs_layer(remote.manifest(repository, digests[0])).digest.removeprefix("sha256:")
        cached = daemon.cache / "blobs" / "sha256" / blob
        with cached.open("r+b") as file:  # what the cache has is not what the list says
            file.seek(1 << 20)
            file.write(os.urandom(1 << 20))
        assert daemon.ask("pull", uenv="app/1.0:v2")["ok"]
        assert "once more" in daemon.log
        wanted = squashfs_layer(remote.manifest(repository, digests[1])).digest.removeprefix("sha256:")
        assert (daemon.cache / "blobs" / "sha256" / wanted).read_bytes() == new.read_bytes()
    shutil.rmtree(tree)
