from hypothesis import given
from hypothesis import strategies as st

from uenvd.cache.policy import Candidate, Room, victims


def candidate(
    layer: str, size_bytes: int = 10, last_use_s: float = 0.0, kept: str | None = None
) -> Candidate:
    return Candidate(layer, (layer,), (layer,), size_bytes, last_use_s, kept)


def test_the_least_recently_used_go_first_and_no_more_than_needed() -> None:
    images = [
        candidate("new", last_use_s=3),
        candidate("old", last_use_s=1),
        candidate("middle", last_use_s=2),
    ]
    assert [one.layer for one in victims(images, 11)] == ["old", "middle"]
    assert [one.layer for one in victims(images, 10)] == ["old"]
    assert victims(images, 0) == []


def test_what_is_used_or_pinned_stays() -> None:
    images = [candidate("a", kept="pinned"), candidate("b", kept="in use"), candidate("c", last_use_s=9)]
    assert [one.layer for one in victims(images, 1000)] == ["c"]


def test_a_quota_is_brought_down_to_its_low_water_mark() -> None:
    room = Room(used_bytes=96, free_bytes=1000, quota_bytes=100, high=0.95, low=0.8)
    assert room.excess_bytes() == 16
    assert Room(95, 1000, 100, 0.95, 0.8).excess_bytes() == 0
    assert Room(90, 1000, 100, 0.95, 0.8).excess_bytes(10) == 20
    assert room.room_bytes == 4


def test_without_a_quota_only_what_the_newcomer_lacks_goes() -> None:
    room = Room(used_bytes=500, free_bytes=30, quota_bytes=None)
    assert (room.excess_bytes(), room.excess_bytes(30), room.excess_bytes(31)) == (0, 0, 1)
    assert room.room_bytes == 30


@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(0, 9), st.sampled_from([None, "pinned", "in use"]))),
    st.integers(0, 2000),
)
def test_nothing_that_is_kept_goes_and_no_victim_is_superfluous(
    images: list[tuple[int, int, str | None]], excess_bytes: int
) -> None:
    candidates = [candidate(f"{n}", size, used, kept) for n, (size, used, kept) in enumerate(images)]
    chosen = victims(candidates, excess_bytes)
    assert all(one.kept is None for one in chosen)
    assert sum(one.size_bytes for one in chosen[:-1]) < excess_bytes or not chosen
    free = sum(one.size_bytes for one in candidates if one.kept is None)
    assert sum(one.size_bytes for one in chosen) >= min(excess_bytes, free)
    used = [one.last_use_s for one in chosen]
    assert used == sorted(used)


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 1000), st.integers(0, 1000))
def test_the_excess_is_never_more_than_what_is_there(used: int, free: int, quota: int, needed: int) -> None:
    excess = Room(used, free, quota, 0.9, 0.5).excess_bytes(needed)
    assert excess >= 0
    assert excess <= max(used, needed)
