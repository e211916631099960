"""Posts the status of each cell while a run goes on, without making it wait: of several that wait for one cell only the newest is posted.

What a forge did not take is posted once more at the end of the run, unless something newer was: a cell shall not look as if it still ran.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

from uenvd.errors import UenvError
from uenvd.publish.console import say
from uenvd.publish.pipeline.runner import Progress
from uenvd.publish.pipeline.tasks import State
from uenvd.publish.pipeline.view import seconds_text
from uenvd.publish.plan import Cell
from uenvd.publish.plan.forges import Forge, Status, post_status
from uenvd.publish.plan.forges import State as Posted
from uenvd.publish.status import status_of

DRAIN_S: Final = 90.0
"""How long the end of a run waits for the statuses that were not posted yet."""


def cell_status(cell: Cell, stages: Sequence[Progress], site: str) -> Status:
    """Return the status of a cell from where its stages are. Pure but for the CI job's address."""
    current = next((one for one in stages if one.state is not State.PASSED), stages[-1])
    state: Posted
    if current.state is State.PASSED:
        state = "success"
    elif current.state is State.FAILED:
        state = "failure"
    elif current.state in (State.CANCELLED, State.SKIPPED):
        state = "canceled"
    elif current.state is State.RUNNING or any(one.state is State.PASSED for one in stages):
        state = "running"
    else:
        state = "pending"
    words = str(current.state)
    if current.state is State.PASSED:
        words = "was done before" if all(one.result and one.result.reused for one in stages) else "passed"
        total_s = sum(one.seconds for one in stages)
        words += f" in {seconds_text(total_s)}" if total_s >= 1 else ""
    if current.detail and current.state in (State.FAILED, State.PASSED):
        words += f": {current.detail}"
    return status_of(cell, state, words, current.task.stage, site=site)


class Poster:
    """Posts from a thread of its own. A forge that does not answer is said once, and stops nothing."""

    def __init__(self, forge: Forge, everything: Sequence[Progress], site: str) -> None:
        self._forge = forge
        self._site = site
        self._stages: dict[str, list[Progress]] = {}
        for one in everything:
            self._stages.setdefault(one.task.cell.id, []).append(one)
        self._pending: dict[str, Status] = {}
        self._said: dict[str, Status] = {}
        self._refused: dict[str, Status] = {}
        self._in_hand = 0
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="statuses", daemon=True)
        self._thread.start()

    def changed(self, one: Progress) -> None:
        """Note the status that a cell has now."""
        cell = one.task.cell
        status = cell_status(cell, self._stages[cell.id], self._site)
        with self._changed:
            if self._said.get(cell.id) != status:
                self._said[cell.id] = self._pending[cell.id] = status
                self._refused.pop(cell.id, None)
                self._changed.notify()

    def close(self) -> None:
        """Post what is left, for `DRAIN_S` at most."""
        with self._changed:
            self._closing = True
            self._pending |= self._refused
            self._changed.notify()
        self._thread.join(DRAIN_S)
        with self._changed:
            left = len(self._pending) + self._in_hand
        if left:
            say(f"note: {left} {'status' if left == 1 else 'statuses'} could not be posted in time")

    def _work(self) -> None:
        complained = False
        while True:
            with self._changed:
                while not self._pending and not self._closing:
                    self._changed.wait()
                if not self._pending:
                    return
                cell = next(iter(self._pending))
                status = self._pending.pop(cell)
                self._in_hand = 1
            fault = ""
            try:
                post_status(self._forge, status)
            except UenvError as error:
                fault = error.message
            with self._changed:
                self._in_hand = 0
                if fault and self._said.get(cell) == status:
                    self._refused[cell] = status
            if fault and not complained:
                say(f"note: {fault}")
            complained = complained or bool(fault)
