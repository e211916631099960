import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from uenvd.cache.directory import Directory
from uenvd.cache.store import Store
from uenvd.daemon import app
from uenvd.errors import StorageError


class Sleeping(Directory):
    """A directory on a file server that does not answer until it is woken."""

    def __init__(self, root: Path, node: str | None = None) -> None:
        super().__init__(root, node=node)
        self.awake = threading.Event()
        self.answered = threading.Event()

    def prepare(self) -> None:
        assert self.awake.wait(60)
        super().prepare()
        self.answered.set()


@pytest.fixture
def sleeping(tmp_path: Path) -> Iterator[Sleeping]:
    directory = Sleeping(tmp_path / "shared", node="n")
    yield directory
    directory.awake.set()


async def test_a_file_server_that_does_not_answer_delays_the_start_and_no_more(
    tmp_path: Path, sleeping: Sleeping, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app, "PREPARE_S", 0.05)
    store = Store(tmp_path / "local", sleeping)
    with trio.fail_after(20):
        await app._prepare(store)
    assert "begins without it" in caplog.text
    assert (tmp_path / "local" / "oci-layout").exists()
    assert not sleeping.answered.is_set()
    sleeping.awake.set()
    with trio.fail_after(20):
        await trio.to_thread.run_sync(sleeping.answered.wait)
    assert (tmp_path / "shared" / "oci-layout").exists(), "nothing has to be restarted"


async def test_the_only_directory_that_does_not_answer_is_no_reason_to_end(
    sleeping: Sleeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "PREPARE_S", 0.05)
    with trio.fail_after(20):
        await app._prepare(Store(None, sleeping))


async def test_a_directory_that_cannot_be_made_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        await app._prepare(Store(tmp_path / "file" / "cache"))


def test_what_was_away_at_the_start_is_prepared_when_it_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mnt").touch()
    store = Store(tmp_path / "local", Directory(tmp_path / "mnt" / "shared", node="n"))
    caplog.set_level(logging.WARNING)
    store.prepare()
    assert "Not a directory" in caplog.text
    (tmp_path / "mnt").unlink()
    store.prepare_rest()
    assert (tmp_path / "mnt" / "shared" / "oci-layout").exists()
