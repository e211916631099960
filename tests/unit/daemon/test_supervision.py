"""How often a daemon starts a supervisor anew whose processes are all gone."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from uenvd.daemon.rundir import ImageDirectory
from uenvd.daemon.supervision import Supervision
from uenvd.daemon.workers import WorkerPool
from uenvd.errors import NotFound, StorageError, UenvError
from uenvd.handover import Duty, Message, SupervisorState


class Dying(Supervision):
    """Its processes live for ``lives_s`` each, and there is no more of them afterwards."""

    def live(self, lives_s: list[float], errors: dict[int, UenvError]) -> None:
        self.lives_s, self.errors, self.starts_s = lives_s, errors, list[float]()
        self.take_over(None, SupervisorState("serving", 1, negotiated={}), None)

    async def _reconnect(self) -> bool:
        await trio.sleep(self.lives_s[len(self.starts_s)])
        return False

    async def _start_again(self) -> None:
        self.starts_s.append(trio.current_time())
        if error := self.errors.get(len(self.starts_s)):
            raise error

    def _is_over(self) -> bool:
        return len(self.starts_s) == len(self.lives_s) - 1


@pytest.fixture
def dying(tmp_path: Path) -> Iterator[Dying]:
    async def none() -> list[int]:
        return []

    async def image() -> int:
        raise AssertionError

    directory = ImageDirectory(tmp_path / "images")
    fuse, slots = (os.open("/dev/null", os.O_RDWR) for _ in range(2))
    yield Dying(
        Duty(name="one", label="app/1.0", source="uenvd:app", blob="sha256:0"),
        directory=directory,
        pool=WorkerPool(),
        fuse_fd=fuse,
        slots_fd=slots,
        namespace_fd=-1,
        spares=none,
        open_image=image,
    )
    directory.close()


def gaps_s(dying: Dying) -> list[float]:
    return [
        round(after - before, 3) for before, after in zip(dying.starts_s, dying.starts_s[1:], strict=False)
    ]


async def test_one_that_lived_is_replaced_at_once(
    dying: Dying, autojump_clock: trio.testing.MockClock
) -> None:
    dying.live([2.0] * 12, {})
    await dying.run()
    assert gaps_s(dying) == [2.0] * 10


async def test_one_that_ends_at_its_start_is_tried_ever_more_seldom(
    dying: Dying, autojump_clock: trio.testing.MockClock
) -> None:
    dying.live([0.0] * 12, {2: StorageError("the cache is slow")})
    await dying.run()
    assert gaps_s(dying) == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]


async def test_image_that_is_gone_ends_it(dying: Dying, autojump_clock: trio.testing.MockClock) -> None:
    dying.live([0.0] * 12, {3: NotFound("the blob is not in the cache")})
    await dying.run()
    assert dying.gone
    assert len(dying.starts_s) == 3


async def hear(supervision: Dying, *states: SupervisorState) -> None:
    """Have it hear what a supervisor says."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        supervision._channel = trio.socket.from_stdlib_socket(ours)
        for state in states:
            theirs.send(Message("state", {"state": state.to_wire()}).encode())
            assert await supervision._hear()
    supervision._channel.close()
    supervision._channel = None


async def test_kernel_is_asked_again_until_a_supervisor_has_done_it(dying: Dying) -> None:
    """All of them may be killed before one comes so far: the next has to be told that the slots were lost."""
    serving = SupervisorState("serving", 1, negotiated={})
    dying.take_over(None, serving, None, slots_lost=True)
    await hear(dying, replace(serving, phase="starting", slots_lost=True), replace(serving, slots_lost=True))
    assert dying._slots_lost
    await hear(dying, serving)
    assert not dying._slots_lost
    dying.close()


async def test_one_that_refuses_is_left_to_its_users(dying: Dying) -> None:
    dying.live([0.0], {})
    await hear(dying, SupervisorState("refusing", 1, negotiated={}))
    await dying.run()
    assert dying.gone
    assert dying.starts_s == []


async def test_own_file_is_opened_again_only_if_it_is_known(dying: Dying) -> None:
    dying.duty = replace(dying.duty, blob=None, path="/home/user/app.squashfs")
    state = SupervisorState("serving", 1, negotiated={})
    for file in (None, (1, 2, 3, 4, 5)):
        dying.take_over(None, replace(state, file=file), None)
        assert dying._can_start_again() == (file is not None)
    dying.close()
