"""The turn to wait for requests: it passes on when given, when its owner is killed, and around an owner that is stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from uenvd.fuse import turn
from uenvd.fuse.turn import Turn


@pytest.fixture
def fds() -> Iterator[tuple[int, int, int]]:
    """A file to lock, and a pipe in place of /dev/fuse."""
    lock = os.memfd_create("turn")
    requests, ask = os.pipe()
    before = signal.getsignal(signal.SIGALRM)
    yield lock, requests, ask
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    for fd in (lock, requests, ask):
        os.close(fd)


def owner(lock: int, requests: int) -> int:
    """Fork a process that has the turn."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        own = Turn(lock, requests)
        own.take()
        os.write(tell, b"x")
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        signal.sigwait({signal.SIGUSR1})
        own.give()
        signal.pause()
    os.read(told, 1)
    os.close(told)
    os.close(tell)
    return pid


def test_a_lone_worker_always_has_it(fds: tuple[int, int, int]) -> None:
    alone = Turn(None, fds[1])
    assert alone.mine
    alone.give()
    assert alone.mine
    assert not alone.requested()
    os.write(fds[2], b"x")
    assert alone.requested()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_given_away_or_left_by_a_killed_owner(fds: tuple[int, int, int], number: signal.Signals) -> None:
    pid = owner(fds[0], fds[1])
    mine = Turn(fds[0], fds[1])
    assert not mine.mine
    os.kill(pid, number)
    mine.take()
    assert mine.mine
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_stopped_owner_does_not_hold_up_requests(
    fds: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn, "_PATIENCE_S", 0.05)
    pid = owner(fds[0], fds[1])
    os.kill(pid, signal.SIGSTOP)
    os.write(fds[2], b"a request")
    mine = Turn(fds[0], fds[1])
    mine.take()
    assert not mine.mine, "it is his, but a request waits"
    mine.give()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    mine.take()
    assert mine.mine
