"""A blob over several connections, and what registries, proxies and networks do to its ranges: nothing wrong is kept, nothing waits for ever."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.blobpull import REPOSITORY, Blob, new_store, retry_quickly
from support.registry import PASSWORD, USER, FakeRegistry
from uenvd.cache import pace as pace_module
from uenvd.cache import transfer as transfer_module
from uenvd.cache.pull import pull_blob
from uenvd.cache.store import Store
from uenvd.cache.transfer import Transfer, Tuning
from uenvd.errors import Cancelled, DigestMismatch, RegistryError, RegistryUnreachable
from uenvd.oci.credentials import Credential
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import Remote, never, no_progress, open_remote

PIECE = 64 << 10
TUNING = Tuning(connections=4, piece_bytes=PIECE)
BLOB = Blob(24 * PIECE + 12_345, TUNING)
DATA, LAYER = BLOB.data, BLOB.layer
pull, content = BLOB.pull, BLOB.content


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        registry.put_blob(DATA)
        yield registry


@pytest.fixture
def remote(fake: FakeRegistry) -> Iterator[Remote]:
    opened = open_remote(parse_registry(fake.url), timeout_connect_s=1, timeout_read_s=0.4)
    yield opened
    opened.close()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "cache")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    retry_quickly(monkeypatch)


def asked(fake: FakeRegistry) -> list[str]:
    return [seen.headers.get("Range", "") for seen in fake.seen if "/blobs/" in seen.path]


def asked_bytes(fake: FakeRegistry) -> int:
    total = 0
    for one in asked(fake):
        first, _, last = one.removeprefix("bytes=").partition("-")
        total += int(last) - int(first) + 1
    return total


def test_pieces_are_closed_ranges_and_each_byte_is_asked_for_once(
    fake: FakeRegistry, remote: Remote, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace_module, "WARM_S", 60.0)  # nothing is tried that would give up a piece
    pull(remote, store)
    assert content(store) == DATA
    assert len(asked(fake)) == 25 and all(one.startswith("bytes=") for one in asked(fake))
    assert asked_bytes(fake) == len(DATA)


def test_several_connections_carry_more_than_one_that_is_limited(
    fake: FakeRegistry, remote: Remote, store: Store
) -> None:
    fake.spoil("/blobs/", bytes_per_s=400_000)
    begin = time.monotonic()
    pull(remote, store)
    assert content(store) == DATA
    alone = len(DATA) / 400_000
    assert time.monotonic() - begin < 0.75 * alone


@pytest.mark.parametrize(
    "how",
    [
        {"truncate_bytes": 10_000},
        {"truncate_bytes": 0},
        {"reset": True},
        {"stall_bytes": 20_000},
        {"status": 500},
        {"status": 503, "headers": {"Retry-After": "0"}},
        {"status": 429},
        {"shorter_bytes": 17_000},
        {"extra_bytes": 5000},
        {"ignore_range": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("times", [1, 4])
def test_a_piece_is_repeated_alone(
    fake: FakeRegistry, remote: Remote, store: Store, how: dict[str, Any], times: int
) -> None:
    fake.spoil(f"/blobs/{LAYER.digest}", times=0)
    spoilt = fake.spoil("/blobs/", **how, times=times)
    fake.spoils.remove(spoilt)

    def after_some() -> None:
        # Not the first pieces: those decide how the transfer begins.
        end = time.monotonic() + 10
        while len(fake.seen) < 3 and time.monotonic() < end:
            time.sleep(0.001)
        fake.spoils.append(spoilt)

    thread = threading.Thread(target=after_some)
    thread.start()
    pull(remote, store)
    thread.join()
    assert content(store) == DATA
    assert asked_bytes(fake) <= len(DATA) + (times + 4) * PIECE


@pytest.mark.parametrize("how", [{"swap_bytes": 4096}, {"corrupt": True}], ids=str)
def test_wrong_bytes_of_one_piece_are_never_kept(
    fake: FakeRegistry, remote: Remote, store: Store, how: dict[str, Any]
) -> None:
    fake.spoil(rf"/blobs/{LAYER.digest}", **how, times=2)
    with pytest.raises(DigestMismatch):
        pull(remote, store)
    assert not store.has(LAYER.digest)
    pull(remote, store)
    assert content(store) == DATA


def test_a_registry_without_ranges_sends_the_blob_once(
    fake: FakeRegistry, remote: Remote, store: Store
) -> None:
    fake.spoil("/blobs/", ignore_range=True)
    pull(remote, store)
    assert content(store) == DATA
    assert len(asked(fake)) == 1


def test_a_stream_without_ranges_that_breaks_off_is_begun_again_and_ends(
    fake: FakeRegistry, remote: Remote, store: Store
) -> None:
    fake.spoil("/blobs/", ignore_range=True, truncate_bytes=700_000, times=1)
    fake.spoil("/blobs/", ignore_range=True)
    pull(remote, store)
    assert content(store) == DATA
    assert len(asked(fake)) == 2


def test_a_proxy_that_learns_ranges_is_used_with_ranges(
    fake: FakeRegistry, remote: Remote, store: Store
) -> None:
    """Harbor's proxy cache ignores ranges until it has the blob."""
    fake.spoil("/blobs/", ignore_range=True, truncate_bytes=5 * PIECE, times=1)
    pull(remote, store)
    assert content(store) == DATA
    assert asked(fake)[1] == f"bytes={5 * PIECE}-{6 * PIECE - 1}"


@pytest.mark.parametrize(
    "content_range", ["bytes 0-99/99", f"bytes 1-{PIECE}/{len(DATA)}", "pages 1-2/3", "bytes 9-5/*", ""]
)
def test_another_range_than_asked_for_is_refused(
    fake: FakeRegistry, remote: Remote, store: Store, content_range: str
) -> None:
    fake.spoil("/blobs/", headers={"Content-Range": content_range})
    with pytest.raises(RegistryError):
        pull(remote, store)
    assert not store.has(LAYER.digest)


def test_a_connection_that_drips_is_given_up(
    fake: FakeRegistry, remote: Remote, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_module, "RATE_WINDOW_S", 0.4)
    fake.spoil("/blobs/", bytes_per_s=200, times=1)
    tuning = Tuning(connections=4, piece_bytes=PIECE, min_rate_bytes_per_s=20_000)
    pull_blob(remote, REPOSITORY, LAYER, store, progress=no_progress, cancelled=never, tuning=tuning)
    assert content(store) == DATA


def test_a_registry_that_only_drips_is_given_up(
    fake: FakeRegistry, remote: Remote, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_module, "RATE_WINDOW_S", 0.2)
    fake.spoil("/blobs/", bytes_per_s=200)
    tuning = Tuning(connections=4, piece_bytes=PIECE, min_rate_bytes_per_s=20_000)
    begin = time.monotonic()
    with pytest.raises(RegistryUnreachable, match="too slow"):
        pull_blob(remote, REPOSITORY, LAYER, store, progress=no_progress, cancelled=never, tuning=tuning)
    assert time.monotonic() - begin < 10


def test_retry_after_holds_all_connections_back(fake: FakeRegistry, remote: Remote, store: Store) -> None:
    times: list[float] = []
    rule = fake.spoil("/blobs/", status=429, headers={"Retry-After": "1"}, times=1)
    begin = time.monotonic()
    pull(remote, store)
    times.append(time.monotonic() - begin)
    assert rule.times == 0 and times[0] >= 1.0
    assert content(store) == DATA


def test_a_token_that_is_withdrawn_in_the_middle_is_replaced(store: Store) -> None:
    with FakeRegistry(auth="bearer") as fake:
        fake.put_blob(DATA)
        fake.put_manifest(REPOSITORY, "v1", b"x", "x")
        remote = open_remote(
            parse_registry(fake.url), credential=Credential(USER, PASSWORD), timeout_read_s=2
        )
        fake.spoil("/blobs/", bytes_per_s=2_000_000)
        stop = threading.Event()

        def withdraw() -> None:
            while not stop.wait(0.25):
                fake.tokens.clear()

        thread = threading.Thread(target=withdraw)
        thread.start()
        try:
            pull(remote, store)
        finally:
            stop.set()
            thread.join()
        assert content(store) == DATA
        assert fake.count("GET", "^/token") >= 2
        remote.close()


@pytest.mark.parametrize("how", [{"bytes_per_s": 100_000}, {"stall_bytes": 1000}, {"silent": True}], ids=str)
def test_cancelling_takes_a_moment(fake: FakeRegistry, store: Store, how: dict[str, Any]) -> None:
    fake.spoil("/blobs/", **how)
    remote = open_remote(parse_registry(fake.url), timeout_read_s=30)
    cancelled_at = time.monotonic() + 0.3
    with pytest.raises(Cancelled):
        pull(remote, store, lambda: time.monotonic() > cancelled_at)
    assert time.monotonic() - cancelled_at < 1.0, "0.4 s on a quiet machine"
    store.begin(LAYER).abort()
    remote.close()


def test_a_demand_comes_first(fake: FakeRegistry, remote: Remote, store: Store) -> None:
    fake.spoil("/blobs/", bytes_per_s=1_000_000)
    first, end = 20 * PIECE + 100, 20 * PIECE + 5000
    arrived: list[tuple[int, int]] = []
    there = threading.Event()

    def note(begin: int, stop: int) -> None:
        arrived.append((begin, stop))
        if transfer.has(first, end):
            there.set()

    with store.begin(LAYER) as partial:
        transfer = Transfer(remote, REPOSITORY, LAYER, partial, tuning=TUNING, arrived=note)
        thread = threading.Thread(target=transfer.run)
        thread.start()
        transfer.demand(first, end)
        assert there.wait(10)
        assert partial.read_at(first, end - first) == DATA[first:end]
        assert transfer.done_bytes < len(DATA) // 2
        assert f"bytes={first}-{end - 1}" in asked(fake)
        thread.join(20)
        partial.commit()
    assert content(store) == DATA


def test_only_what_is_demanded_until_it_is_told_to_fill(
    fake: FakeRegistry, remote: Remote, store: Store
) -> None:
    with store.begin(LAYER) as partial:
        came = threading.Event()
        transfer = Transfer(
            remote, REPOSITORY, LAYER, partial, tuning=TUNING, arrived=lambda *_: came.set(), fill=False
        )
        thread = threading.Thread(target=transfer.run)
        thread.start()
        transfer.demand(len(DATA) - 100, len(DATA))
        assert came.wait(10)
        assert partial.held_bytes == 100 and asked_bytes(fake) == 100
        transfer.reject(len(DATA) - 100, len(DATA))
        assert partial.held_bytes == 0
        transfer.start_filling()
        thread.join(20)
        partial.commit()
    assert content(store) == DATA


def test_a_transfer_can_be_stopped_from_elsewhere(fake: FakeRegistry, remote: Remote, store: Store) -> None:
    fake.spoil("/blobs/", silent=True)
    with store.begin(LAYER) as partial:
        transfer = Transfer(remote, REPOSITORY, LAYER, partial, tuning=TUNING)
        threading.Timer(0.1, transfer.stop).start()
        with pytest.raises(Cancelled):
            transfer.run()


def test_what_was_wrong_in_an_earlier_pull_is_fetched_anew(
    fake: FakeRegistry, remote: Remote, store: Store
) -> None:
    with store.begin(LAYER) as partial:
        partial.write_at(5 * PIECE, bytes(PIECE))
    pull(remote, store)
    assert content(store) == DATA


def test_a_layout_is_pulled_in_pieces_too(tmp_path: Path, store: Store) -> None:
    remote = open_remote(parse_registry(f"oci-layout:{tmp_path}/layout"))
    (tmp_path / "file").write_bytes(DATA)
    remote.push_blob(REPOSITORY, tmp_path / "file", LAYER)
    pull(remote, store)
    assert content(store) == DATA
