"""Workers that end again and again are replaced, until it is clear that no successor will do better."""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Protocol, cast

import pytest

from uenvd.fuse import workforce as module
from uenvd.fuse.arrival import Board
from uenvd.fuse.protocol import Negotiated
from uenvd.fuse.shared import SharedBlocks
from uenvd.fuse.slots import Slot, Slots
from uenvd.fuse.workforce import Worker, Workforce
from uenvd.handover import SLOTS_PER_WORKER, Duty

DEADLINE_S = 20.0


class Make(Protocol):
    """Makes a workforce whose workers do what ``in_child`` does."""

    def __call__(
        self, in_child: Callable[[], None], slots: Sequence[Slot] = ..., fuse_fd: int = ...
    ) -> Workforce: ...


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:
        shared = SharedBlocks.create(1 << 20)
        stack.callback(os.close, shared.fd)
        nothing = os.memfd_create("image", os.MFD_CLOEXEC)
        stack.callback(os.close, nothing)

        def made(
            in_child: Callable[[], None], slots: Sequence[Slot] = (), fuse_fd: int = nothing
        ) -> Workforce:
            duty = Duty("x", "the image", "uenvd:x", workers=1)
            negotiated = Negotiated(41, 0, 1 << 20, 256)
            return Workforce(
                duty,
                fuse_fd=fuse_fd,
                image_fd=nothing,
                negotiated=negotiated,
                slots=slots,
                shared=shared,
                in_child=in_child,
            )

        yield made


def _see_ends(workforce: Workforce, count: int) -> list[int]:
    """Replace workers until so many have ended; return their statuses."""
    statuses: list[int] = []
    deadline_s = time.monotonic() + DEADLINE_S
    while len(statuses) < count and time.monotonic() < deadline_s:
        workforce.start_due()
        for worker in list(workforce):
            poll = select.poll()
            poll.register(worker.pidfd, select.POLLIN)
            if poll.poll(1000):
                statuses.append(workforce.ended(worker))
        due_s = workforce.next_start_s
        if due_s is not None and len(statuses) < count:
            time.sleep(max(0.0, due_s - time.monotonic()))
    return statuses


def test_workers_that_end_by_themselves_are_given_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_DELAY_S", 0.01)
    monkeypatch.setattr(module, "_HOPELESS_S", 0.0)
    workforce = make(partial(os._exit, 3))
    workforce.start(1)
    assert _see_ends(workforce, module._HOPELESS_ENDS - 1) == [3] * (module._HOPELESS_ENDS - 1)
    assert not workforce.hopeless
    assert _see_ends(workforce, 1) == [3]
    assert workforce.hopeless
    monkeypatch.setattr(module, "_HOPELESS_S", 3600.0)
    assert not workforce.hopeless


def test_killed_workers_are_not_given_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_DELAY_S", 0.01)
    monkeypatch.setattr(module, "_HOPELESS_S", 0.0)
    workforce = make(_kill_self)
    workforce.start(1)
    count = module._HOPELESS_ENDS + 1
    assert _see_ends(workforce, count) == [-signal.SIGKILL] * count
    assert not workforce.hopeless


def test_one_that_lived_on_begins_the_count_anew(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_DELAY_S", 0.01)
    monkeypatch.setattr(module, "_HOPELESS_S", 0.0)
    workforce = make(partial(os._exit, 3))
    workforce.start(1)
    _see_ends(workforce, module._HOPELESS_ENDS - 1)
    monkeypatch.setattr(module, "_SHORT_LIFE_S", 0.0)
    _see_ends(workforce, 1)
    assert not workforce.hopeless


def test_one_that_began_a_request_is_not_counted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ended it: the request is refused after a while, and it was of use."""
    monkeypatch.setattr(module, "_MAX_DELAY_S", 0.01)
    monkeypatch.setattr(module, "_HOPELESS_S", 0.0)
    slots = Slots(mmap.mmap(-1, Slots.size_bytes(SLOTS_PER_WORKER)), SLOTS_PER_WORKER)

    def begin_and_end() -> None:
        slots[3].begin()
        slots[3].clear()
        os._exit(3)

    workforce = make(begin_and_end, slots.some(0, SLOTS_PER_WORKER))
    workforce.start(1)
    _see_ends(workforce, module._HOPELESS_ENDS + 1)
    assert not workforce.hopeless


def test_workers_sleep_in_read_when_none_has_to_hear_of_bytes(make: Make) -> None:
    """Who has requests parked and sleeps there would hear of nothing; the descriptor is the same for all."""

    class Complete:
        complete = True

    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    workforce = make(partial(os._exit, 3), (), read_end)
    workforce._board = cast("Board", Complete())
    workers = [Worker(index, 0, -1, socket.socket(), 0.0, arriving=True) for index in range(2)]
    workforce._workers = dict(enumerate(workers))
    workforce.settled(workers[0])
    assert not os.get_blocking(read_end)
    workforce.settled(workers[1])
    assert os.get_blocking(read_end)
    for worker in workers:
        worker.channel.close()
    os.close(read_end)
    os.close(write_end)
