"""What the kernel was told once it does not ask again: a job that opens, reads and lists the same files runs no process of uenvd.

Counted where requests lie, in the slots: work on one stamps the time there. Two things the kernel asks for each time, whatever it was told: an
ioctl, and the attributes of what it is about to refuse to somebody (fs/fuse/dir.c, fuse_permission).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import images
from support.fusetools import NOBODY, open_to_all, session
from support.supervised import Parent, supervised
from uenvd.fuse.slots import Slots
from uenvd.handover import SLOTS_PER_WORKER

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="plays the daemon, which is root")

LOOK = """[
    [os.read(f := os.open(f'/mnt/d{i}/f', os.O_RDONLY), 9999), os.fstat(f), os.close(f)][2] for i in range(20)
] + [sorted(os.listdir(f'/mnt/d{i}')) for i in range(20)] + [
    [os.readlink(f'/mnt/d{i}/link'), os.path.exists(f'/mnt/d{i}/link'), os.access(f'/mnt/d{i}/f', os.R_OK)] for i in range(20)
] + [
    [os.path.lexists(f'/mnt/d{i}/missing'), os.path.exists(f'/mnt/missing{i}/x'), os.lstat(f'/mnt/d{i}').st_size] for i in range(20)
]""".replace("\n", " ")
XATTRS = "[xattr(f'/mnt/d{i}/f') for i in range(20)]"
DEFINE = "exec('def xattr(path):\\n try: return os.getxattr(path, \"user.x\").decode()\\n except OSError as e: return e.errno', globals())"


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Parent]:
    open_to_all()
    for i in range(20):
        directory = tmp_path / "tree" / f"d{i}"
        directory.mkdir(parents=True)
        (directory / "f").write_bytes(images.content(5000, i))
        (directory / "link").symlink_to("f")
    image = images.make_image(tmp_path / "tree", tmp_path / "i")
    with supervised(tmp_path) as made:
        made.start()
        made.give_image(image)
        made.serving()
        yield made


def last_request_ns(parent: Parent) -> int:
    count = parent.duty.workers * SLOTS_PER_WORKER
    with mmap.mmap(parent.slots, Slots.size_bytes(count)) as memory:
        slots = Slots(memory, count)
        last = max(slot.begun_ns for slot in slots)
        del slots
    return last


def refaulted_pages() -> int:
    """Return how often a page of some file had to be read again because the kernel had taken it back, since the boot."""
    fields = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(fields["workingset_refault_file"])


def test_silence(parent: Parent) -> None:
    with session(NOBODY, parent.mount, "/mnt") as user:
        user.eval(DEFINE)
        before = last_request_ns(parent)
        looked = [user.eval(LOOK), user.eval(XATTRS)]
        assert last_request_ns(parent) > before
        for _ in range(5):
            first, refaults = last_request_ns(parent), refaulted_pages()
            for _ in range(10):
                assert [user.eval(LOOK), user.eval(XATTRS)] == looked
            if last_request_ns(parent) == first:
                break
            assert refaulted_pages() > refaults, "asked again for what the kernel had not taken back"
        else:
            pytest.fail("this machine's kernel takes pages back all the time")
