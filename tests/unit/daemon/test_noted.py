"""What is remembered of the disk for a moment: asked once, asked again in time, and never instead of an error."""

from __future__ import annotations

from typing import Any, cast

import pytest
import trio.testing

from uenvd.daemon import noted
from uenvd.daemon.noted import Noted, Presence, Recent
from uenvd.daemon.question import Image
from uenvd.daemon.resolution import Found, Repository
from uenvd.errors import StorageError

REPOSITORY = Repository.parse("deploy/demo/zen3/app/1.0")


class FakeStore:
    def __init__(self) -> None:
        self.asked = 0
        self.put: list[str] = []
        self.here: set[str] = set()
        self.failing = False

    def has(self, digest: str) -> bool:
        self.asked += 1
        return digest in self.here

    def image(self, digest: str) -> object | None:
        self.asked += 1
        if self.failing:
            raise StorageError("the disk is away")
        return digest if digest in self.put else None

    def put_manifest(self, *_args: object, tag: str) -> None:
        self.put.append(tag)


def image(digest: str) -> Image:
    assert REPOSITORY is not None
    anything = cast("Any", None)
    return Image(Found(REPOSITORY, digest, digest), anything, anything, None, None)


async def test_presence_is_looked_up_again_after_a_while(mock_clock: trio.testing.MockClock) -> None:
    store = FakeStore()
    presence = Presence(cast("Any", store))
    assert not await presence.has("a")
    store.here.add("a")
    assert await presence.has("a")  # absence is not remembered
    assert await presence.has("a")
    assert store.asked == 2
    store.here.clear()
    mock_clock.jump(noted.PRESENT_S + 1)
    assert not await presence.has("a")


async def test_presence_is_forgotten_when_something_is_evicted() -> None:
    store = FakeStore()
    presence = Presence(cast("Any", store))
    store.here.add("a")
    assert await presence.has("a")
    store.here.clear()
    presence.forget()
    assert not await presence.has("a")


async def test_an_image_is_noted_once_and_again_when_the_cache_has_forgotten_it(
    mock_clock: trio.testing.MockClock,
) -> None:
    store = FakeStore()
    keeper = Noted(cast("Any", store))
    await keeper.note(image("a"))
    await keeper.note(image("a"))
    assert (store.put, store.asked) == (["a"], 1)
    store.put.clear()
    mock_clock.jump(noted.NOTED_S + 1)
    await keeper.note(image("a"))
    assert store.put == ["a"]


async def test_a_disk_that_is_away_is_tried_again_and_is_no_error() -> None:
    store = FakeStore()
    store.failing = True
    keeper = Noted(cast("Any", store))
    await keeper.note(image("a"))
    store.failing = False
    await keeper.note(image("a"))
    assert store.put == ["a"]


@pytest.mark.parametrize("count", [noted._MAX_ENTRIES, noted._MAX_ENTRIES + 1])
async def test_only_so_many_are_remembered(count: int) -> None:
    recent = Recent(100.0)
    for number in range(count):
        recent.add(str(number))
    assert ("0" in recent) == (count == noted._MAX_ENTRIES)
    assert str(count - 1) in recent
