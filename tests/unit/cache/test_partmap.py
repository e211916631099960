"""The map of a part, read while it grows."""

import random

import pytest

from uenvd.cache.partmap import DURABLE, MAX_MAP_BYTES, MapReader, durable_before, whole, written

TEXT = whole(1000, [(0, 10)], [(20, 30)]) + written([(30, 40), (100, 200)]) + DURABLE + written([(500, 600)])


@pytest.mark.parametrize("seed", range(5))
def test_pieces_say_what_the_whole_says(seed: int) -> None:
    chance = random.Random(seed)
    reader, text, news = MapReader(), TEXT, 0
    while text:
        size = chance.randrange(1, 12)
        news += reader.feed(text[:size])
        text = text[size:]
    assert list(reader.durable) == [(0, 10), (20, 40), (100, 200)]
    assert list(reader.held) == [(0, 10), (20, 40), (100, 200), (500, 600)]
    assert (reader.size_bytes, reader.damaged, reader.fed_bytes) == (1000, False, len(TEXT))
    assert news == 2, "only when more is durable"


def test_lines_that_came_while_others_were_made_durable_are_not_durable() -> None:
    text = whole(1000, [], []) + written([(0, 10)])
    reader = MapReader()
    reader.feed(text + written([(10, 20)]) + durable_before(len(text)))
    assert list(reader.durable) == [(0, 10)]
    reader.feed(durable_before(len(text) + 1))
    assert list(reader.durable) == [(0, 20)]


@pytest.mark.parametrize(
    "line",
    [
        b"\0\0\0\n",
        b"d -1\n",
        b"d 1 2\n",
        b"w 1\n",
        b"w 5 5\n",
        b"w 0 1001\n",
        b"w -1 5\n",
        b"uenvd-map-1 1000 b\n",
        b"x" * 1000,
    ],
)
def test_nothing_behind_damage_counts(line: bytes) -> None:
    reader = MapReader()
    reader.feed(TEXT)
    assert not reader.feed(line + written([(700, 800)]) + DURABLE)
    assert reader.damaged
    assert not reader.durable.covers(700, 701)


@pytest.mark.parametrize(
    "text", [b"w 0 1\nd\n", b"d\n", b"uenvd-map-2 10 b\nw 0 1\nd\n", b"uenvd-map-1 x b\n"]
)
def test_what_is_no_map_says_nothing(text: bytes) -> None:
    reader = MapReader()
    reader.feed(text)
    assert reader.damaged
    assert not reader.held.total_bytes


def test_a_map_without_end_is_damaged() -> None:
    reader = MapReader()
    reader.feed(TEXT)
    reader.fed_bytes = MAX_MAP_BYTES
    reader.feed(DURABLE)
    assert reader.damaged
    assert not reader.durable.covers(500, 600)
