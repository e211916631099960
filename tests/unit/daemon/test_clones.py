"""Clones made ahead of time: there when a step asks, never more than a few, gone with their image."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, cast

import pytest
import trio.testing

from support.fakedaemon import open_descriptors
from uenvd.daemon import clones
from uenvd.daemon.clones import SPARES, Clones
from uenvd.errors import MountFailed

if TYPE_CHECKING:
    from uenvd.daemon.mounter import Mounter


class FakeMounter:
    """Hands out descriptors; can be told to wait or to fail."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.gate: trio.Event | None = None
        self.failing = False

    async def clone(self, _name: str) -> int:
        await trio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        if self.failing:
            raise MountFailed("no such mount")
        self.made.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        return self.made[-1]


async def with_clones(use: Callable[[Clones, FakeMounter], Awaitable[None]]) -> None:
    """Run a test in a nursery; afterwards no descriptor may be left."""
    before = open_descriptors()
    async with trio.open_nursery() as nursery:
        mounter = FakeMounter()
        await use(Clones(nursery, cast("Mounter", mounter)), mounter)
        nursery.cancel_scope.cancel()
    assert open_descriptors() == before


async def test_spares_are_there_before_anybody_asks_and_are_replaced(autojump_clock: trio.abc.Clock) -> None:
    async def use(kept: Clones, mounter: FakeMounter) -> None:
        kept.open("a")
        kept.open("a")
        await trio.testing.wait_all_tasks_blocked()
        assert len(mounter.made) == SPARES
        mounter.gate = trio.Event()  # from here on the cloner answers nobody
        with trio.fail_after(0):
            taken = [await kept.take("a") for _ in range(SPARES)]
        assert sorted(taken) == sorted(mounter.made)
        mounter.gate.set()
        await trio.sleep(2 * clones.RESTOCK_S)
        assert len(mounter.made) == 2 * SPARES
        for one in taken:
            os.close(one)
        kept.drop("a")

    await with_clones(use)


async def test_without_a_spare_the_cloner_is_asked() -> None:
    async def use(kept: Clones, mounter: FakeMounter) -> None:
        os.close(await kept.take("unknown"))
        assert len(mounter.made) == 1

    await with_clones(use)


async def test_what_comes_after_the_image_was_let_go_is_closed() -> None:
    async def use(kept: Clones, mounter: FakeMounter) -> None:
        mounter.gate = trio.Event()
        kept.open("a")
        await trio.testing.wait_all_tasks_blocked()
        kept.drop("a")
        kept.drop("a")
        mounter.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert len(mounter.made) == 1

    await with_clones(use)


async def test_a_cloner_that_fails_costs_the_asker_his_answer_and_the_daemon_nothing() -> None:
    async def use(kept: Clones, mounter: FakeMounter) -> None:
        mounter.failing = True
        kept.open("a")
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(MountFailed):
            await kept.take("a")
        kept.drop("a")

    await with_clones(use)
