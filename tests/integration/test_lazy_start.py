"""Jobs that start before the pull ends: what they read is right, whatever becomes of registry, daemon and workers meanwhile."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import Daemon, running_daemon
from support.fusetools import NOBODY, session, until
from support.lazyimage import MB, MOUNT_POINT, LazyImage, arrived_bytes, mounted, push_lazy
from support.registry import FakeRegistry

pytestmark = pytest.mark.usefixtures("node")

FAST = "mounts: {linger: 100ms}\nlazy: {deadline: 3s}\n"
PATIENT = "mounts: {linger: 100ms}\nlazy: {deadline: 30s}\n"


@pytest.fixture
def fake(public_dir: Path) -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        yield registry


@pytest.fixture
def image(fake: FakeRegistry, public_dir: Path) -> LazyImage:
    return push_lazy(fake, public_dir)


def digest_in(name: str) -> str:
    """Return an expression that hashes a file of the image."""
    return f"__import__('hashlib').file_digest(open('{MOUNT_POINT}/{name}', 'rb'), 'sha256').hexdigest()"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_whole(daemon: Daemon, image: LazyImage) -> bool:
    return (daemon.cache / "blobs" / "sha256" / image.layer.removeprefix("sha256:")).exists()


def test_files_are_read_before_the_pull_ends_and_all_of_them_are_right(
    public_dir: Path, fake: FakeRegistry, image: LazyImage
) -> None:
    fake.spoil(image.blob_path, bytes_per_s=6_000_000)
    with running_daemon(public_dir / "uenvd", fake.url, extra=PATIENT) as daemon, daemon.client() as client:
        done = mounted(client)
        assert done["env"], "the views are known from the config blob"
        assert arrived_bytes(daemon) < image.size_bytes / 2
        with session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
            assert inside.eval(digest_in("f09")) == sha(image.files["f09"])
            assert not is_whole(daemon, image)
            for name, data in image.files.items():
                assert inside.eval(digest_in(name)) == sha(data)
            until(lambda: is_whole(daemon, image), "the rest is pulled", 20)
            for name, data in image.files.items():
                assert inside.eval(digest_in(name)) == sha(data)
        assert not list((daemon.cache / "partial").iterdir())
        (record,) = daemon.ask("images")["records"]
        assert record["digest"] == image.digest


def test_a_registry_that_dies_costs_only_what_is_not_there_and_all_goes_on_when_it_is_back(
    public_dir: Path, fake: FakeRegistry, image: LazyImage
) -> None:
    slow = fake.spoil(image.blob_path, bytes_per_s=4_000_000)
    with running_daemon(public_dir / "uenvd", fake.url, extra=FAST) as daemon, daemon.client() as client:
        mounted(client)
        with session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
            assert inside.eval(digest_in("f08")) == sha(image.files["f08"])
            gone = fake.spoil(image.blob_path, reset=True)
            fake.spoils.remove(slow)
            fake.hang_up()
            assert inside.eval(digest_in("f08")) == sha(image.files["f08"]), "what is here is read"
            assert inside.eval(digest_in("f11")) == {"errno": 5}
            assert "did not come within 3 s" in daemon.log
            assert "app/1.0" in daemon.log
            fake.spoils.remove(gone)
            until(lambda: inside.eval(digest_in("f11")) == sha(image.files["f11"]), "reads go on", 30)
            until(lambda: is_whole(daemon, image), "the rest is pulled", 30)
            for name, data in image.files.items():
                assert inside.eval(digest_in(name)) == sha(data)


def test_wrong_bytes_are_fetched_again_and_never_served(
    public_dir: Path, fake: FakeRegistry, image: LazyImage
) -> None:
    fake.spoil(image.blob_path, corrupt=True, times=4)
    with running_daemon(public_dir / "uenvd", fake.url, extra=PATIENT) as daemon, daemon.client() as client:
        mounted(client)
        with session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
            for name, data in reversed(image.files.items()):
                assert inside.eval(digest_in(name)) == sha(data)
        assert "has other bytes" in daemon.log
        until(lambda: is_whole(daemon, image), "the rest is pulled", 20)


def test_bytes_that_stay_wrong_are_an_error_for_their_readers_alone(
    public_dir: Path, fake: FakeRegistry, image: LazyImage
) -> None:
    with running_daemon(public_dir / "uenvd", fake.url, extra=FAST) as daemon, daemon.client() as client:
        slow = fake.spoil(image.blob_path, bytes_per_s=2_000_000)
        mounted(client)
        with session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
            assert inside.eval(digest_in("f05")) == sha(image.files["f05"])
            wrong = fake.spoil(image.blob_path, corrupt=True)
            fake.spoils.remove(slow)
            fake.hang_up()
            assert inside.eval(digest_in("f10")) == {"errno": 5}
            assert inside.eval(digest_in("f05")) == sha(image.files["f05"])
            fake.spoils.remove(wrong)
            until(lambda: inside.eval(digest_in("f10")) == sha(image.files["f10"]), "it is right again", 30)


def reading(inside: object, name: str, found: list[object]) -> threading.Thread:
    """Begin to read a file in the background."""

    def read() -> None:
        found.append(inside.eval(digest_in(name)))  # type: ignore[attr-defined]

    thread = threading.Thread(target=read)
    thread.start()
    return thread


def is_asked_for(fake: FakeRegistry, image: LazyImage) -> int:
    return fake.count("GET", image.blob_path)


def test_a_daemon_that_is_killed_while_jobs_wait_is_followed_by_one_that_goes_on(
    public_dir: Path, fake: FakeRegistry, image: LazyImage
) -> None:
    slow = fake.spoil(image.blob_path, bytes_per_s=2_000_000)
    with running_daemon(public_dir / "uenvd", fake.url, extra=PATIENT) as daemon, daemon.client() as client:
        mounted(client)
        with session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
            assert inside.eval(digest_in("f04")) == sha(image.files["f04"])
            held = fake.spoil(image.blob_path, silent=True)
            fake.spoils.remove(slow)
            fake.hang_up()
            found: list[object] = []
            asked = is_asked_for(fake, image)
            thread = reading(inside, "f11", found)
            until(lambda: is_asked_for(fake, image) > asked, "it is asked for")
            daemon.kill()
            fake.spoils.remove(held)
            fake.hang_up()
            assert inside.process.poll() is None
            daemon.start()
            thread.join(20)
            assert found == [sha(image.files["f11"])]
            for name, data in image.files.items():
                assert inside.eval(digest_in(name)) == sha(data)
            until(lambda: is_whole(daemon, image), "the rest is pulled", 20)
            assert inside.eval(digest_in("f07")) == sha(image.files["f07"])


def test_a_worker_that_is_killed_while_a_read_waits_costs_nothing(
    public_dir: Path, fake: FakeRegistry, image: LazyImage
) -> None:
    slow = fake.spoil(image.blob_path, bytes_per_s=2_000_000)
    with running_daemon(public_dir / "uenvd", fake.url, extra=PATIENT) as daemon, daemon.client() as client:
        mounted(client)
        with session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
            held = fake.spoil(image.blob_path, silent=True)
            fake.spoils.remove(slow)
            fake.hang_up()
            found: list[object] = []
            asked = is_asked_for(fake, image)
            thread = reading(inside, "f11", found)
            until(lambda: is_asked_for(fake, image) > asked, "it is asked for")
            for _ in range(3):
                (served,) = daemon.ask("status")["images"]
                former = set(served["workers"])
                for pid in former:
                    os.kill(pid, signal.SIGKILL)
                until(
                    lambda former=former: not former & set(daemon.ask("status")["images"][0]["workers"]),
                    "others work",
                )
            supervisor = daemon.workers()[0]
            os.kill(supervisor, signal.SIGKILL)
            until(lambda: daemon.workers() not in ([], [supervisor]), "another supervises")
            fake.spoils.remove(held)
            fake.hang_up()
            thread.join(30)
            assert found == [sha(image.files["f11"])]


def test_who_does_not_wait_any_more_leaves_the_bytes_for_the_next_one(
    public_dir: Path, fake: FakeRegistry, image: LazyImage
) -> None:
    slow = fake.spoil(image.blob_path, bytes_per_s=4_000_000)
    with running_daemon(public_dir / "uenvd", fake.url, extra=PATIENT) as daemon:
        with daemon.client() as client:
            mounted(client)
            evicted = daemon.ask("evict", uenv=f"app/1.0@{image.digest}")
            assert evicted["error"]["code"] == "in-use"
            with session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
                assert inside.eval(digest_in("f06")) == sha(image.files["f06"])
                assert not is_whole(daemon, image)
        until(lambda: daemon.ask("status")["images"] == [], "it is let go", 20)
        (part,) = (daemon.cache / "partial").glob("*.part")
        assert part.stat().st_size > MB
        fake.spoils.remove(slow)
        with daemon.client() as client:
            mounted(client)
            with session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
                for name, data in image.files.items():
                    assert inside.eval(digest_in(name)) == sha(data)


def test_two_images_arrive_side_by_side_and_one_that_is_pulled_by_name_too(
    public_dir: Path, fake: FakeRegistry, image: LazyImage
) -> None:
    other = push_lazy(fake, public_dir, files=6, name="other")
    fake.spoil(f"{image.blob_path}|{other.blob_path}", bytes_per_s=8_000_000)
    with (
        running_daemon(public_dir / "uenvd", fake.url, extra=PATIENT) as daemon,
        daemon.client() as client,
        daemon.client() as second,
    ):
        mounted(client)
        mounted(second, "other/1.0:v1")
        with (
            session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside,
            session(NOBODY, second.descriptors[0], MOUNT_POINT) as beside,
        ):
            assert beside.eval(digest_in("f05")) == sha(other.files["f05"])
            assert inside.eval(digest_in("f11")) == sha(image.files["f11"])
            assert daemon.ask("pull", uenv="app/1.0")["ok"]
            assert is_whole(daemon, image)


def test_it_can_be_switched_off(public_dir: Path, fake: FakeRegistry, image: LazyImage) -> None:
    with (
        running_daemon(public_dir / "uenvd", fake.url, extra="lazy: off\n") as daemon,
        daemon.client() as client,
    ):
        mounted(client)
        assert is_whole(daemon, image)
