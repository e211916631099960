"""Whoever is killed while he waits for bytes that do not come ends at once: a job that is cancelled drains no node."""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from support.daemon import Daemon, running_daemon
from support.fusetools import SOMEBODY, Session, has_ended, session, until
from support.lazyimage import MOUNT_POINT, LazyImage, mounted, push_lazy
from support.registry import FakeRegistry

pytestmark = pytest.mark.usefixtures("node")

PATIENT = "mounts: {linger: 100ms}\nlazy: {deadline: 60s}\n"
SOON_S = 10.0
"""Much less than the deadline of reads, and enough for a busy machine."""
MAPPED = (
    "(lambda mmap, fd: (lambda m: (m.madvise(mmap.MADV_RANDOM), m[{at}])[1])"
    "(mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)))"
    "(__import__('mmap'), os.open('{mount}/f11', os.O_RDONLY))"
)
"""One page fault, without readahead: the process waits for the very request. (With readahead, and in read(2), it waits for the page: killable.)"""
HIDDEN = ("unshare", "-m", "sh", "-c", 'mount -t proc -o hidepid=2 proc /proc && exec "$@"', "-")
"""Where a process sees its own user's processes only, unless it is root's."""


def begin(inside: Session, expression: str) -> threading.Thread:
    """Evaluate an expression that does not end before its process does."""

    def wait() -> None:
        with suppress(ValueError, OSError):
            inside.eval(expression)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def is_parked(daemon: Daemon, pid: int) -> bool:
    """Tell whether a process sleeps uninterruptibly or in the image's read."""
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state in "DS" and "/f11" in " ".join(
        str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()
    )


@pytest.mark.parametrize("wrapper", [(), HIDDEN], ids=["seen by the supervisor", "by the daemon only"])
def test_who_is_killed_ends_at_once_and_others_get_their_bytes(
    public_dir: Path, wrapper: tuple[str, ...]
) -> None:
    with FakeRegistry() as fake:
        image: LazyImage = push_lazy(fake, public_dir)
        slow = fake.spoil(image.blob_path, bytes_per_s=2_000_000)
        with (
            running_daemon(public_dir / "uenvd", fake.url, extra=PATIENT, wrapper=wrapper) as daemon,
            daemon.client() as client,
            daemon.client() as second,
        ):
            mounted(client)
            mounted(second)
            with (
                session(SOMEBODY, client.descriptors[0], MOUNT_POINT) as inside,
                session(SOMEBODY, second.descriptors[0], MOUNT_POINT) as patient,
            ):
                held = fake.spoil(image.blob_path, silent=True)
                fake.spoils.remove(slow)
                fake.hang_up()
                at = 500_000
                asked = fake.count("GET", image.blob_path)
                expression = MAPPED.format(mount=MOUNT_POINT, at=at)
                thread = begin(inside, expression)
                until(lambda: fake.count("GET", image.blob_path) > asked, "it is asked for")
                until(lambda: is_parked(daemon, inside.process.pid), "it waits")
                found: list[object] = []
                other = threading.Thread(target=lambda: found.append(patient.eval(expression)))
                other.start()
                until(lambda: is_parked(daemon, patient.process.pid), "another one, too")
                inside.process.send_signal(signal.SIGKILL)
                until(lambda: has_ended(inside.process.pid), "it ends", SOON_S)
                thread.join(SOON_S)
                fake.spoils.remove(held)
                fake.hang_up()
                other.join(30)
                assert found == [image.files["f11"][at]], "the other one is not concerned"
