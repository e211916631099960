import itertools

from hypothesis import given
from hypothesis import strategies as st

from uenvd.cache.ranges import Ranges

SIZE = 40
spans = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE))
changes = st.lists(st.tuples(st.booleans(), spans), max_size=30)


@given(changes, spans)
def test_it_is_a_set_of_positions(
    history: list[tuple[bool, tuple[int, int]]], asked: tuple[int, int]
) -> None:
    ranges, model = Ranges(), set[int]()
    for add, (first, end) in history:
        if add:
            ranges.add(first, end)
            model |= set(range(first, end))
        else:
            ranges.remove(first, end)
            model -= set(range(first, end))
        assert ranges.total_bytes == len(model)
    found = list(ranges)
    assert {at for first, end in found for at in range(first, end)} == model
    assert all(end < first for (_, end), (first, _) in itertools.pairwise(found)), "sorted, apart"
    first, end = asked
    assert ranges.covers(first, end) == (set(range(first, end)) <= model)
    gaps = list(ranges.gaps(first, end))
    assert {at for a, b in gaps for at in range(a, b)} == set(range(first, end)) - model
    assert all(a < b for a, b in gaps)
    run = ranges.run_from(first)
    assert set(range(first, run)) <= model and run not in model
    assert list(Ranges(ranges)) == found
    assert len(ranges) == len(found)
