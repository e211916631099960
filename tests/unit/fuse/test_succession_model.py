"""All interleavings of an active supervisor, its workers and its standbys with SIGKILLs at every step: `uenvd.fuse.standby` on paper.

Each process is where it is between two system calls that others can notice. Explored from the first moment on, with up to ``kills`` kills.
What must hold: nobody uses the slots beside another, no process waits for ever beside nobody who serves, one kill leaves somebody who serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import pytest

Step = Literal["forked", "numbered", "waiting", "active", "dead"]
MAX_FORKS = 5


class Process(NamedTuple):
    """A supervisor; its number is its place in the state. ``forked`` and ``numbered`` ones hold the writing end of ``pipe``, too."""

    step: Step
    pipe: int
    """The life pipe that it waits on, or, once active, whose writing end it has; pipes bear the number of who made them."""
    standby: int = -1
    """Of an active one: its standby."""
    former: int = -1
    """Of an active one: a standby that has a successor, and is to be killed."""
    workers: bool = False
    """Of an active one: they run. They die some time after it."""


class State(NamedTuple):
    processes: tuple[Process, ...]
    numbers: tuple[int, int]
    """The last even and the last odd one that a standby has written."""
    kills: int

    def put(self, number: int, process: Process) -> State:
        changed = (*self.processes[:number], process, *self.processes[number + 1 :])
        return self._replace(processes=changed)

    def hung_up(self, pipe: int) -> bool:
        """Tell whether nobody has the writing end of a pipe any more."""
        for number, one in enumerate(self.processes):
            if one.step in ("forked", "numbered") and one.pipe == pipe:
                return False
            if number == pipe and (one.step == "active" or one.workers):
                return False
        return True

    def using_slots(self) -> list[int]:
        return [number for number, one in enumerate(self.processes) if one.step == "active" or one.workers]


START = State((Process("active", 0, workers=True),), (0, 0), 0)


def steps(state: State, *, may_fork: bool = True) -> Iterator[State]:
    """Yield what may happen next but for kills."""
    for number, one in enumerate(state.processes):
        match one.step:
            case "active":
                if not one.workers:
                    yield state.put(number, one._replace(workers=True))
                if one.former >= 0:
                    former = state.processes[one.former]
                    ended = state.put(one.former, former._replace(step="dead"))
                    yield ended.put(number, one._replace(former=-1))
                elif len(state.processes) < MAX_FORKS and may_fork:
                    new = len(state.processes)
                    forked = state._replace(processes=(*state.processes, Process("forked", one.pipe)))
                    yield forked.put(number, one._replace(standby=new, former=one.standby))
            case "forked":
                even, odd = state.numbers
                numbers = (even, number) if number % 2 else (number, odd)
                yield state.put(number, one._replace(step="numbered"))._replace(numbers=numbers)
            case "numbered":
                yield state.put(number, one._replace(step="waiting"))
            case "waiting" if state.hung_up(one.pipe):
                if max(state.numbers) == number:
                    yield state.put(number, Process("active", number))
                else:
                    yield state.put(number, one._replace(step="dead"))
            case "dead" if one.workers:
                yield state.put(number, one._replace(workers=False))
            case _:
                pass


def deaths(state: State, limit: int) -> Iterator[State]:
    """Yield what one more SIGKILL leaves."""
    if state.kills < limit:
        for number, one in enumerate(state.processes):
            if one.step != "dead":
                killed = one._replace(step="dead", standby=-1, former=-1)
                yield state.put(number, killed)._replace(kills=state.kills + 1)


def explore(kills: int) -> set[State]:
    """Return all states that can be reached."""
    found, todo = {START}, [START]
    while todo:
        state = todo.pop()
        for following in (*steps(state), *deaths(state, kills)):
            if following not in found:
                found.add(following)
                todo.append(following)
    return found


def serving(state: State) -> list[int]:
    return [number for number, one in enumerate(state.processes) if one.step == "active"]


def alive(state: State) -> list[int]:
    return [number for number, one in enumerate(state.processes) if one.step != "dead" or one.workers]


def at_rest(state: State) -> bool:
    return not any(steps(state, may_fork=False))


def has_standby(state: State) -> bool:
    """Tell whether the active supervisor has had the time to fork a standby."""
    return any(one.standby >= 0 for one in state.processes if one.step == "active")


@pytest.mark.parametrize("kills", [1, 2, 3])
def test_nobody_uses_the_slots_beside_another(kills: int) -> None:
    for state in explore(kills):
        assert len(state.using_slots()) <= 1, state


@pytest.mark.parametrize("kills", [1, 2, 3])
def test_nobody_waits_beside_nobody_who_serves(kills: int) -> None:
    """So a connection is served, or all processes of it are gone: then its socket refuses, and the daemon knows what to do."""
    for state in explore(kills):
        if at_rest(state):
            assert serving(state) or not alive(state), state


def test_one_kill_leaves_somebody_who_serves() -> None:
    before = [state for state in explore(0) if has_standby(state)]
    assert len(before) > 10
    for state in before:
        for killed in deaths(state, 1):
            found, todo = {killed}, [killed]
            while todo:
                now = todo.pop()
                if at_rest(now):
                    assert serving(now), (state, killed, now)
                for following in steps(now, may_fork=False):
                    if following not in found:
                        found.add(following)
                        todo.append(following)
