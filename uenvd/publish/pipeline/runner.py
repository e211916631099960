"""Runs the stages of all cells: what can begin begins, a cell that fails stops only itself, and everything is told as it happens.

One thread. The registry is the truth of what is done; the executor is the truth of what runs; this remembers only what it waits for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from uenvd.errors import DispatchFailed, UenvError
from uenvd.publish.pipeline.executors import Executor, JobState, Phase
from uenvd.publish.pipeline.tasks import Failure, StageResult, State, Task, find_result
from uenvd.publish.pipeline.waiting import Waker
from uenvd.publish.plan import Cell, Stage

_FAST_S: Final = 0.2
_NO_RESULT_STATUS: Final = 1
EventKind = Literal["state", "detail"]


@dataclass
class Progress:
    """A task and what is known of it now."""

    task: Task
    state: State = State.WAITING
    job: str | None = None
    attached: bool = False
    """Whether an earlier run started the job."""
    began_s: float | None = None
    """Monotonic, when it began to run."""
    seconds: float = 0.0
    result: StageResult | None = None
    detail: str = ""
    """What it waits for, or why it failed, in a line."""
    log: str = ""
    tail: str = ""


Listener = Callable[[Progress], None]
"""Is told each change of state, after it."""


class Runner:
    """Runs ``tasks``, which lists the stages of each cell in their order, until all are final or a signal asks to stop."""

    def __init__(
        self,
        tasks: Sequence[Task],
        executor: Executor,
        waker: Waker,
        *,
        done: Mapping[tuple[str, Stage], StageResult],
        look_again: Callable[[Cell, Stage], StageResult | None],
        listeners: Sequence[Listener] = (),
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare.

        Args:
            tasks: grouped by cell.
            executor: runs them.
            waker: notices signals.
            done: results of stages that need not run, by cell id and stage.
            look_again: asks the registry for a stage whose job is lost.
            listeners: are told each change; more may be added to the list before `run`.
            tick: is called at least every second or so, for a live view.

        """
        self.all = [Progress(task) for task in tasks]
        self._executor = executor
        self._waker = waker
        self._done = done
        self._look_again = look_again
        self._listeners = listeners
        self._tick = tick
        self._before: dict[int, Progress] = {}
        previous: Progress | None = None
        for one in self.all:
            if previous is not None and previous.task.cell.id == one.task.cell.id:
                self._before[id(one)] = previous
            previous = one

    def run(self) -> None:
        """Run to the end. Raises `DispatchFailed` where the executor cannot go on; then, and after a signal, no job of it is left."""
        try:
            self._reuse()
            self._attach()
            while not all(one.state.final for one in self.all):
                if self._waker.asked is not None:
                    self._stop(f"stopped by {self._waker.asked.name}")
                    return
                self._skip()
                began = self._start()
                ended = self._observe()
                self._tick()
                # What ended makes room, and lets the next stage begin: at once.
                if not ended and not all(one.state.final for one in self.all):
                    self._executor.wait(_FAST_S if began else min(1.0, self._executor.poll_s))
        except BaseException:
            self._stop("the run was broken off")
            raise

    # --- steps -----------------------------------------------------------------------------------------------------------------

    def _reuse(self) -> None:
        for one in self.all:
            result = self._done.get((one.task.cell.id, one.task.stage))
            before = self._before.get(id(one))
            if result is not None and (before is None or before.state is State.PASSED):
                self._finish(one, result)

    def _attach(self) -> None:
        open_tasks = [one.task for one in self.all if not one.state.final]
        if not open_tasks:
            return
        found = self._executor.find(open_tasks)
        for one in self.all:
            job = found.get(one.task.key)
            if job is not None and not one.state.final:
                one.job, one.attached = job, True
                self._change(one, State.QUEUED, "found again: an earlier run submitted it")

    def _skip(self) -> None:
        for one in self.all:
            before = self._before.get(id(one))
            if before is None or one.state.final or not before.state.final or before.state is State.PASSED:
                continue
            if one.job is not None:
                self._executor.cancel({one.job: one.task})
            state = State.CANCELLED if before.state is State.CANCELLED else State.SKIPPED
            self._change(one, state, f"{before.task.stage} {before.state}")

    def _start(self) -> bool:
        """Start what can start; tell whether anything did."""
        began = False
        for one in self.all:
            if one.state is not State.WAITING or self._waker.asked is not None:
                continue
            before = self._before.get(id(one))
            ready = before is None or before.state is State.PASSED
            if not ready and not (self._executor.queues and before is not None and before.job is not None):
                continue
            if not self._executor.free():
                break
            after = before.job if before is not None and not ready else None
            try:
                one.job = self._executor.start(one.task, after)
            except DispatchFailed as error:
                self._fail(one, Failure(error.code, error.message, error.hint, error.exit_status))
                continue
            began = True
            self._change(one, State.QUEUED if self._executor.queues else State.RUNNING)
        return began

    def _observe(self) -> bool:
        """Look where the jobs are; tell whether one came to its end."""
        active = {
            one.job: one
            for one in self.all
            if one.job is not None and one.state in (State.QUEUED, State.RUNNING)
        }
        if not active:
            return False
        states = self._executor.states({job: one.task for job, one in active.items()})
        for job, one in active.items():
            state = states[job]
            if state.phase is Phase.ENDED:
                self._conclude(one, state)
            elif state.phase is Phase.RUNNING and one.state is not State.RUNNING:
                self._change(one, State.RUNNING)
            elif state.phase is Phase.QUEUED and (one.state, one.detail) != (State.QUEUED, state.reason):
                if one.state is State.QUEUED and not state.reason:
                    continue
                self._change(one, State.QUEUED, state.reason)
        return any(one.state.final for one in active.values())

    def _conclude(self, one: Progress, state: JobState) -> None:
        """Say what came of a job that has ended: by its result, else by what the registry has, else by how it ended."""
        assert one.job is not None
        before = self._before.get(id(one))
        if before is not None and before.state is not State.PASSED:
            return  # looked at again when that is known: it is skipped if that failed
        output = self._executor.output(one.job, one.task)
        one.log, one.tail = output.log, output.tail
        result = find_result(output.stdout, one.task)
        if result is None:
            result = self._registry_says(one)
        if result is not None:
            self._finish(one, result)
            return
        how = state.reason or f"it ended with status {state.status} and without a result"
        self._fail(one, Failure(DispatchFailed.code, how, "", state.status or DispatchFailed.exit_status))

    def _registry_says(self, one: Progress) -> StageResult | None:
        try:
            return self._look_again(one.task.cell, one.task.stage)
        except UenvError:
            return None

    def _stop(self, why: str) -> None:
        jobs = {one.job: one.task for one in self.all if one.job is not None and not one.state.final}
        try:
            if jobs:
                self._executor.cancel(jobs)
        finally:
            for one in self.all:
                if not one.state.final:
                    self._change(one, State.CANCELLED, why)

    # --- changes ---------------------------------------------------------------------------------------------------------------

    def _finish(self, one: Progress, result: StageResult) -> None:
        one.result = result
        if result.failure is not None:
            self._fail(one, result.failure)
            return
        before = self._before.get(id(one))
        if before is not None and before.result is not None and result.digest != before.result.digest:
            self._fail(
                one,
                Failure(
                    DispatchFailed.code,
                    f"it was about another image: {result.digest}, not {before.result.digest}",
                    "is the recipe being changed, or do the machines have different versions of uenvd-publish?",
                    DispatchFailed.exit_status,
                ),
            )
            return
        self._change(one, State.PASSED, result.remark)

    def _fail(self, one: Progress, failure: Failure) -> None:
        if one.result is None or one.result.failure is None:
            one.result = StageResult(
                one.task.cell.id, one.task.stage, "", one.task.tag, None, False, 0.0, "", failure
            )
        self._change(one, State.FAILED, failure.message.splitlines()[0] if failure.message else "")

    def _change(self, one: Progress, state: State, detail: str = "") -> None:
        now_s = time.monotonic()
        if state is State.RUNNING:
            one.began_s = now_s
        if state.final:
            if one.result is not None and (one.result.seconds or one.result.reused):
                one.seconds = one.result.seconds
            elif one.began_s is not None:
                one.seconds = now_s - one.began_s
            if one.result is not None and not one.result.seconds:
                one.result = replace(one.result, seconds=one.seconds)
        one.state, one.detail = state, detail
        for listener in self._listeners:
            listener(one)


def exit_status(all_progress: Sequence[Progress], failed: int, stopped: int | None) -> int:
    """Return what a run ends with: 0 if everything passed, ``128 + signal`` if it was stopped, the failures' own status if all
    have the same, else ``failed``.
    """
    if stopped is not None:
        return 128 + stopped
    statuses = {
        one.result.failure.status
        for one in all_progress
        if one.state is State.FAILED and one.result is not None and one.result.failure is not None
    }
    if not statuses:
        return 0 if all(one.state is State.PASSED for one in all_progress) else failed
    return statuses.pop() if len(statuses) == 1 else failed
