"""A worker goes to the processor of the one who asks alone, stays where that is faster, and comes back when it is not."""

from __future__ import annotations

import os

import pytest

from uenvd.fuse.placement import STRIDE, Placement

GIVEN = {0, 1, 2}
ASKER = 77


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[int, set[int]]:
    """Processors of the worker (thread 0) and of who asks; nothing is really moved."""
    bound = {0: set(GIVEN), ASKER: {1}}

    def get(thread: int) -> set[int]:
        if thread not in bound:
            raise ProcessLookupError
        return set(bound[thread])

    def put(thread: int, processors: set[int]) -> None:
        assert thread == 0
        bound[0] = set(processors)

    monkeypatch.setattr(os, "sched_getaffinity", get)
    monkeypatch.setattr(os, "sched_setaffinity", put)
    return bound


def strides(place: Placement, count: int, gap_ns: int, asker: int = ASKER) -> None:
    for _ in range(count * STRIDE):
        place.note(asker, gap_ns)


def test_goes_there_and_stays_while_it_is_faster(machine: dict[int, set[int]]) -> None:
    place = Placement()
    strides(place, 2, 60_000)
    assert (place.beside, machine[0]) == (True, {1})
    strides(place, 100, 4_000)
    assert place.beside
    place.leave()
    assert (place.beside, machine[0]) == (False, GIVEN)


def test_comes_back_when_it_is_not_faster_and_tries_less_and_less_often(machine: dict[int, set[int]]) -> None:
    place = Placement()
    there = 0
    for _ in range(1000):
        strides(place, 1, 50_000)
        there += place.beside
    assert 2 <= there <= 15
    strides(place, 1, 200_000)
    assert place.beside, "much slower than when it was compared last"


@pytest.mark.parametrize("processors", [{0, 1}, {9}, set()], ids=["not bound", "not given to us", "ended"])
def test_stays_when_the_asker_cannot_be_followed(machine: dict[int, set[int]], processors: set[int]) -> None:
    if processors:
        machine[ASKER] = processors
    else:
        del machine[ASKER]
    place = Placement()
    strides(place, 100, 60_000)
    assert (place.beside, machine[0]) == (False, GIVEN)


def test_requests_that_queue_are_work_for_two_processors(machine: dict[int, set[int]]) -> None:
    place = Placement()
    strides(place, 2, 60_000)
    strides(place, 1, 500)
    assert (place.beside, machine[0]) == (False, GIVEN)


def test_another_asker_is_looked_at_anew(machine: dict[int, set[int]]) -> None:
    machine[78] = {2}
    place = Placement()
    strides(place, 2, 60_000)
    strides(place, 1, 60_000, 78)
    assert machine[0] == GIVEN
    strides(place, 1, 60_000, 78)
    assert machine[0] == {2}


def test_nothing_to_choose(machine: dict[int, set[int]]) -> None:
    assert not Placement(wanted=False).possible
    machine[0] = {1}
    assert not Placement().possible


def test_a_refusal_of_the_kernel_is_no_failure(
    machine: dict[int, set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_thread: int, _processors: set[int]) -> None:
        raise OSError(22, "not in the cpuset any more")

    place = Placement()
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    strides(place, 10, 60_000)
    assert not place.beside
