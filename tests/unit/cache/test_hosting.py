"""What the writer of a blob does for the nodes that follow it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from uenvd.cache import hosting
from uenvd.cache.directory import Directory
from uenvd.cache.hosting import Hosting
from uenvd.cache.partial import Partial
from uenvd.cache.partview import PartView
from uenvd.cache.wishes import Wish, Wishes
from uenvd.oci.manifest import Descriptor, digest_of

DATA = bytes(range(256)) * 40
LAYER = Descriptor("application/octet-stream", digest_of(DATA), len(DATA))


def until(condition: Callable[[], object], deadline_s: float = 10.0) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosting, "LOOK_S", 0.02)


@pytest.fixture
def part(tmp_path: Path) -> Iterator[Partial]:
    directory = Directory(tmp_path, node="a")
    directory.prepare()
    with directory.begin(LAYER) as partial:
        yield partial


@pytest.fixture
def view(tmp_path: Path, part: Partial) -> Iterator[PartView]:
    found = Directory(tmp_path, node="b").blobs.follow(LAYER.digest, LAYER.size_bytes)
    assert found is not None
    yield found
    found.close()


@pytest.fixture
def wishes(part: Partial) -> Wishes:
    assert part.wishes is not None
    return part.wishes


def test_a_wish_is_fetched_first_and_seen_as_soon_as_it_is_here(
    part: Partial, view: PartView, wishes: Wishes
) -> None:
    wanted: list[tuple[int, int]] = []
    with Hosting(part, lambda first, end: wanted.append((first, end))):
        wishes.put("a", Wish(1, ((100, 200), (300, 400))))
        until(lambda: len(wanted) == 2)
        part.write_at(0, DATA[:250])
        until(lambda: view.look() and view.durable.covers(100, 200))
        part.write_at(250, DATA[250:500])
        until(lambda: view.look() and view.durable.covers(300, 400))
        assert wanted == [(100, 200), (300, 400)], "once, as long as it is the same wish"
        wishes.put("a", Wish(2, ((300, 400),)))
        until(lambda: len(wanted) == 3)


def test_what_was_here_before_it_was_wished_for_is_made_durable(
    part: Partial, view: PartView, wishes: Wishes
) -> None:
    part.write_at(0, DATA[:250])
    with Hosting(part, lambda _first, _end: None):
        wishes.put("a", Wish(1, ((100, 200),)))
        until(lambda: view.look() and view.durable.covers(100, 200))


def test_what_readers_of_this_node_waited_for_is_seen_by_others_but_not_more_often_than_often(
    part: Partial, view: PartView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosting, "LOOK_S", 60.0)
    synced: list[float] = []
    real = part.sync
    monkeypatch.setattr(part, "sync", lambda: (synced.append(time.monotonic()), real()))
    with Hosting(part, lambda _first, _end: None) as host:
        part.write_at(0, DATA[:100])
        host.note()
        until(lambda: view.look() and view.durable.covers(0, 100))
        part.write_at(100, DATA[100:200])
        host.note()
        host.note()
    assert len(synced) == 1


def test_a_wish_of_a_dead_node_is_removed(
    part: Partial, wishes: Wishes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosting, "SILENT_S", 0.1)
    wanted: list[int] = []
    with Hosting(part, lambda first, _end: wanted.append(first)):
        wishes.put("dead", Wish(1, ((0, 10),)))
        until(lambda: wanted)
        until(lambda: wishes.read(LAYER.size_bytes) == {})
    assert wanted == [0]


def test_trouble_with_wishes_is_no_trouble_of_the_pull(
    part: Partial, wishes: Wishes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setattr(wishes, "_directory", Path("/proc/self/status"))
    with Hosting(part, lambda _first, _end: None):
        until(lambda: "looking for wishes" in caplog.text)
    part.write_at(0, DATA)
    part.commit()


def test_in_a_directory_of_one_node_nothing_is_done(tmp_path: Path) -> None:
    directory = Directory(tmp_path / "local")
    directory.prepare()
    with directory.begin(LAYER) as partial, Hosting(partial, lambda _first, _end: None) as host:
        assert partial.wishes is None
        host.note()
        assert not host._thread.is_alive()
