"""Images of whatever made them are served as unsquashfs unpacks them and as the kernel mounts them, over each transport.

squashfs-tools-ng (gensquashfs, tar2sqfs) and mksquashfs, every compressor, and options that change what lies where in the image.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import images
from support.forkedfs import ForkedFs, forked_fs
from support.fusetools import open_to_all, session
from support.minidaemon import mini_daemon
from uenvd import mounts

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="test images hold devices and other users' files")

TRANSPORTS = ("pyfuse3", "channel")
NOT_IN_LINUX = ("lzma",)
"""Compressors that only unsquashfs understands."""
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}

NG = "gensquashfs --quiet --keep-time --keep-xattr --pack-dir {tree}"
TAR = "tar --create --xattrs --xattrs-include=* --sort=name --directory {tree} ."
MK = "mksquashfs {tree} {out} -no-progress -quiet -noappend"
# gensquashfs 1.2.0 writes lz4 images that neither unsquashfs nor Linux accepts: their id table is nowhere.
TOOLS = {
    **{f"gensquashfs {name}": f"{NG} --compressor {name} {{out}}" for name in images.COMPRESSORS if name != "lz4"},
    "gensquashfs blocks of 4 KiB": f"{NG} --compressor zstd --block-size 4096 {{out}}",
    "gensquashfs blocks of 1 MiB": f"{NG} --compressor xz --block-size 1048576 {{out}}",
    "gensquashfs exportable": f"{NG} --compressor gzip --exportable {{out}}",
    "gensquashfs without tail packing": f"{NG} --compressor zstd --no-tail-packing {{out}}",
    "tar2sqfs": f"{TAR} | tar2sqfs --quiet --compressor zstd {{out}}",
    "tar2sqfs exportable, small blocks": f"{TAR} | tar2sqfs --quiet --compressor lzo --exportable --block-size 4096 {{out}}",
    "mksquashfs -tar": f"{TAR} | mksquashfs - {{out}} -tar -no-progress -quiet -noappend -comp zstd",
    "mksquashfs -tailends -nopad": f"{MK} -tailends -nopad -comp zstd -b 8192",
    "mksquashfs -no-duplicates -no-exports -no-sparse": f"{MK} -no-duplicates -no-exports -no-sparse -comp gzip -b 16384",
    "mksquashfs -always-use-fragments -noF": f"{MK} -always-use-fragments -noF -comp xz -b 4096",
    "mksquashfs -noD -noX, fragments compressed": f"{MK} -noD -noX -comp lzma",
    "mksquashfs xz with filters": f"{MK} -comp xz -Xbcj x86,arm -Xdict-size 50% -b 65536",
    "mksquashfs gzip with strategies": f"{MK} -comp gzip -Xcompression-level 1 -Xwindow-size 9 -Xstrategy huffman_only,filtered",
    "mksquashfs lz4 high": f"{MK} -comp lz4 -Xhc -b 1M",
    "mksquashfs lzo algorithm": f"{MK} -comp lzo -Xalgorithm lzo1x_1_15 -b 1M",
    "mksquashfs zstd 22": f"{MK} -comp zstd -Xcompression-level 22 -b 1M",
}  # fmt: skip

Scan = dict[bytes, images.Node]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything, in little: devices, holes, hard links, attributes out of line, sizes around a block's."""
    open_to_all()
    directory = tmp_path_factory.mktemp("tree") / "tree"
    return images.build_tree(directory, block_sizes=(4 << 10, 16 << 10), many=80, large_bytes=300_001)


@pytest.fixture(scope="module")
def tree_of_tar(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without sockets, which a tar file cannot hold."""
    directory = tmp_path_factory.mktemp("tar") / "tree"
    subprocess.run(["cp", "--archive", tree, directory], check=True)
    (directory / "socket").unlink()
    return directory


@contextmanager
def kernel_mount(image: Path) -> Iterator[Path]:
    """Mount with the kernel's own squashfs, padded: a loop device has whole sectors."""
    with (
        tempfile.NamedTemporaryFile(dir="/var/tmp") as padded,
        tempfile.TemporaryDirectory(dir="/var/tmp") as name,
    ):
        data = image.read_bytes()
        padded.write(data + bytes(-len(data) % 4096))
        padded.flush()
        subprocess.run(["mount", "-t", "squashfs", "-o", "loop,ro", padded.name, name], check=True)
        try:
            yield Path(name)
        finally:
            mounts.umount(name)


def make(tool: str, tree: Path, directory: Path) -> Path:
    """Run the command line; return the image."""
    out = directory / "image"
    command = TOOLS[tool].format(tree=tree, out=out)
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return out


Show = Callable[..., Iterator[tuple[str, Scan]]]


@pytest.fixture(scope="module")
def server() -> Iterator[ForkedFs]:
    """What starts the servers."""
    with forked_fs() as running:
        yield running


@pytest.fixture
def shown(server: ForkedFs, tmp_path: Path) -> Show:
    """``shown(image, *options)``: over each transport, its name and what the tree looks like through a mount."""

    def show(image: Path, *options: str) -> Iterator[tuple[str, Scan]]:
        point = tmp_path / "mount"
        point.mkdir()
        for transport in TRANSPORTS:
            words = [word for option in (f"transport={transport}", *options) for word in ("-o", option)]
            with server.mounted(image, point, *words):
                yield transport, images.scan(point)

    return show


@pytest.mark.parametrize("tool", TOOLS)
def test_served_as_others_show_it(
    tool: str, tree: Path, tree_of_tar: Path, shown: Show, tmp_path: Path
) -> None:
    image = make(tool, tree_of_tar if "tar" in tool else tree, tmp_path)
    expected = images.scan(images.extract(image, tmp_path / "extracted"))
    assert len(expected) > 200
    if not any(name in tool or f"-comp {name}" in TOOLS[tool] for name in NOT_IN_LINUX):
        with kernel_mount(image) as point:
            assert not images.differences(expected, images.scan(point)), "unsquashfs and the kernel disagree"
    for transport, actual in shown(image):
        assert not images.differences(expected, actual), transport


@pytest.mark.parametrize("offset", [1, 4096, 1_000_003])
def test_an_image_inside_of_a_file(offset: int, tree: Path, shown: Show, tmp_path: Path) -> None:
    """Behind a header, as AppImage and SIF have it, and with something behind it."""
    image = make("gensquashfs zstd", tree, tmp_path)
    expected = images.scan(images.extract(image, tmp_path / "extracted"))
    wrapped = tmp_path / "wrapped"
    wrapped.write_bytes(b"#" * offset + image.read_bytes() + b"what follows")
    for transport, actual in shown(wrapped, f"offset={offset}"):
        assert not images.differences(expected, actual), transport


def test_an_image_that_was_appended_to(tree: Path, shown: Show, tmp_path: Path) -> None:
    image = make("mksquashfs -tailends -nopad", tree, tmp_path)
    more = tmp_path / "more"
    more.mkdir()
    (more / "new").write_bytes(images.content(50_000, 9))
    images.make_image(more, image, append=True, extra=["-root-becomes", "before"])
    expected = images.scan(images.extract(image, tmp_path / "extracted"))
    assert b"before/links/first" in expected
    for transport, actual in shown(image):
        assert not images.differences(expected, actual), transport


def test_a_confined_worker_has_every_compressor(tree: Path, tmp_path: Path) -> None:
    """Its library has to be loaded before the doors are shut."""
    expected = images.scan(tree / "sizes")
    (tmp_path / "work").mkdir()
    with mini_daemon(tmp_path / "work") as daemon:
        for compressor in images.COMPRESSORS:
            image = images.make_image(tree / "sizes", tmp_path / compressor, compressor=compressor)
            image.chmod(0o644)
            daemon.add(compressor, image)
            clone = daemon.clone(compressor)
            with session(0, clone, "/mnt") as user:
                os.close(clone)
                actual = images.scan(Path(f"/proc/{user.process.pid}/root/mnt"))
            assert not images.differences(expected, actual), compressor
