from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from uenvd.errors import DispatchFailed
from uenvd.publish.pipeline.executors import JobState, Output, Phase
from uenvd.publish.pipeline.runner import Progress, Runner, exit_status
from uenvd.publish.pipeline.tasks import Failure, StageResult, State, Task
from uenvd.publish.pipeline.waiting import Waker
from uenvd.publish.plan import STAGES, Cell, Stage

DIGEST = "sha256:" + "1" * 64


def cell(name: str) -> Cell:
    return Cell(name, "1", "alpha", "zen3", Path("/recipes") / name / "1")


def tasks(*names: str) -> list[Task]:
    return [Task(cell(name), stage, f"content-{name}", "s") for name in names for stage in STAGES]


def result(task: Task, *, failure: Failure | None = None, digest: str = DIGEST) -> StageResult:
    return StageResult(task.cell.id, task.stage, "r", task.tag, digest, False, 1.0, "", failure)


@dataclass
class Scripted:
    """An executor whose jobs run for one question and then end as `ends` says: a result, or a state without one."""

    queues: bool = False
    room: int = 2
    ends: dict[str, StageResult | JobState] = field(default_factory=dict)
    there: dict[str, str] = field(default_factory=dict)
    refused: frozenset[str] = frozenset()
    name: str = "scripted"
    poll_s: float = 0.0
    started: list[tuple[str, str | None]] = field(default_factory=list)
    running: dict[str, int] = field(default_factory=dict)
    most: int = 0
    cancelled: list[str] = field(default_factory=list)

    def find(self, tasks: Sequence[Task]) -> Mapping[str, str]:
        return {task.key: self.there[task.name] for task in tasks if task.name in self.there}

    def free(self) -> bool:
        return self.queues or sum(asked < 2 for asked in self.running.values()) < self.room

    def start(self, task: Task, after: str | None) -> str:
        if task.name in self.refused:
            raise DispatchFailed("no such partition")
        self.started.append((task.name, after))
        self.running[task.name] = 0
        self.most = max(self.most, sum(asked < 2 for asked in self.running.values()))
        return task.name

    def states(self, jobs: Mapping[str, Task]) -> Mapping[str, JobState]:
        found = {}
        for job, task in jobs.items():
            asked = self.running[job] = self.running.get(job, 0) + 1
            end = self.ends.get(task.name)
            over = JobState(Phase.ENDED, 0) if end is None or isinstance(end, StageResult) else end
            found[job] = over if asked >= 2 else JobState(Phase.RUNNING)
        return found

    def output(self, job: str, task: Task) -> Output:
        del job
        end = self.ends.get(task.name, result(task))
        text = end.encode() if isinstance(end, StageResult) else ""
        return Output(f"Welcome to alpha\n{text}\n", "/log", "last words")

    def cancel(self, jobs: Mapping[str, Task]) -> None:
        self.cancelled += jobs

    waits: int = 0

    def wait(self, seconds: float) -> None:
        del seconds
        self.waits += 1

    def close(self) -> None:
        return


def never(_cell: Cell, _stage: Stage) -> StageResult | None:
    return None


def runner(executor: Scripted, names: Sequence[str], **how: object) -> Runner:
    settings = {"done": {}, "look_again": never, **how}
    return Runner(tasks(*names), executor, Waker(), **settings)  # type: ignore[arg-type]


def states(runner: Runner) -> dict[str, State]:
    return {one.task.name: one.state for one in runner.all}


@pytest.mark.parametrize("queues", [False, True])
def test_all_pass_in_order(queues: bool) -> None:
    executor = Scripted(queues=queues)
    seen: list[tuple[str, State]] = []
    one = runner(executor, ["a", "b", "c"], listeners=[lambda p: seen.append((p.task.name, p.state))])
    one.run()
    assert set(states(one).values()) == {State.PASSED}
    assert executor.most <= 2 or queues
    order = [name for name, state in seen if state is State.PASSED and "a/1" in name]
    assert order == [f"{stage}-a/1-alpha/zen3" for stage in STAGES]
    assert exit_status(one.all, 104, None) == 0
    if queues:
        assert ("test-a/1-alpha/zen3", "build-a/1-alpha/zen3") in executor.started


def test_the_next_stage_begins_when_one_has_ended() -> None:
    """Each stage here runs for one question: it is waited for once, and nothing waits between two stages."""
    executor = Scripted()
    one = runner(executor, ["a"])
    one.run()
    assert set(states(one).values()) == {State.PASSED}
    assert executor.waits == len(STAGES)


@pytest.mark.parametrize("queues", [False, True])
def test_a_failure_stops_its_own_cell_only(queues: bool) -> None:
    executor = Scripted(queues=queues)
    bad = tasks("a")[0]
    executor.ends[bad.name] = result(bad, failure=Failure("build-failed", "no compiler\nat all", "", 97))
    one = runner(executor, ["a", "b"])
    one.run()
    assert [states(one)[f"{stage}-a/1-alpha/zen3"] for stage in STAGES] == [
        State.FAILED,
        State.SKIPPED,
        State.SKIPPED,
    ]
    assert all(states(one)[f"{stage}-b/1-alpha/zen3"] is State.PASSED for stage in STAGES)
    assert exit_status(one.all, 104, None) == 97
    assert one.all[0].detail == "no compiler"


def test_what_is_done_is_not_started() -> None:
    executor = Scripted()
    build, test, _deploy = tasks("a")
    done = {(build.cell.id, "build"): result(build), (test.cell.id, "test"): result(test)}
    one = runner(executor, ["a"], done=done)
    one.run()
    assert executor.started == [("deploy-a/1-alpha/zen3", None)]


def test_jobs_of_an_earlier_run_are_followed() -> None:
    executor = Scripted(queues=True, there={"build-a/1-alpha/zen3": "77"})
    one = runner(executor, ["a"])
    one.run()
    assert executor.started == [
        ("test-a/1-alpha/zen3", "77"),
        ("deploy-a/1-alpha/zen3", "test-a/1-alpha/zen3"),
    ]
    assert one.all[0].attached
    assert set(states(one).values()) == {State.PASSED}


def test_a_lost_job_is_judged_by_the_registry() -> None:
    build, test, _ = tasks("a")
    lost = JobState(Phase.ENDED, None, "its node failed")
    one = runner(
        Scripted(ends={build.name: lost, test.name: lost}),
        ["a"],
        look_again=lambda _cell, stage: result(build) if stage == "build" else None,
    )
    one.run()
    assert [p.state for p in one.all] == [State.PASSED, State.FAILED, State.SKIPPED]
    assert one.all[1].detail == "its node failed"
    assert exit_status(one.all, 104, None) == DispatchFailed.exit_status


def test_a_stage_about_another_image_fails() -> None:
    _, test, _ = tasks("a")
    one = runner(Scripted(ends={test.name: result(test, digest="sha256:" + "2" * 64)}), ["a"])
    one.run()
    assert one.all[1].state is State.FAILED
    assert "another image" in one.all[1].detail


def test_refused_jobs_fail_and_others_go_on() -> None:
    one = runner(Scripted(queues=True, refused=frozenset({"build-a/1-alpha/zen3"})), ["a", "b"])
    one.run()
    assert states(one)["build-a/1-alpha/zen3"] is State.FAILED
    assert states(one)["deploy-b/1-alpha/zen3"] is State.PASSED


@pytest.fixture
def waker() -> Iterator[Waker]:
    waker = Waker()
    with waker.listening():
        yield waker


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_what_runs(waker: Waker, number: signal.Signals) -> None:
    executor = Scripted()

    def interrupt(one: Progress) -> None:
        if one.state is State.RUNNING and waker.asked is None:
            os.kill(os.getpid(), number)

    one = Runner(tasks("a", "b"), executor, waker, done={}, look_again=never, listeners=[interrupt])
    one.run()
    assert executor.cancelled == ["build-a/1-alpha/zen3"]
    assert set(states(one).values()) == {State.CANCELLED}
    assert exit_status(one.all, 104, waker.asked) == 128 + number
