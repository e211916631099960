"""Statuses of cells while a run goes on: what is said of each, and that a forge in trouble neither stops a run nor is left with old news."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from support.forgedouble import PROJECT, SHA, TOKEN, ForgeDouble
from support.fusetools import until
from uenvd.errors import StatusNotPosted
from uenvd.publish.pipeline import posting
from uenvd.publish.pipeline.posting import Poster, cell_status
from uenvd.publish.pipeline.runner import Progress
from uenvd.publish.pipeline.tasks import StageResult, State, Task
from uenvd.publish.plan import STAGES, Cell
from uenvd.publish.plan.forges import KINDS, Forge, Status

DEADLINE_S = 20.0
P, F, R, W, Q, S, C = (
    State.PASSED,
    State.FAILED,
    State.RUNNING,
    State.WAITING,
    State.QUEUED,
    State.SKIPPED,
    State.CANCELLED,
)


@pytest.fixture(autouse=True)
def no_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI_JOB_URL", "GITHUB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


def stages(name: str, *states: State) -> list[Progress]:
    """Return the stages of a cell, each in a state."""
    cell = Cell(name, "1", "alpha", "zen3", Path("/recipes") / name / "1")
    return [
        Progress(Task(cell, stage, "content-x", "s"), state=state)
        for stage, state in zip(STAGES, states, strict=False)
    ]


def forge(double: ForgeDouble, token: str = TOKEN) -> Forge:
    return Forge(double.kind, double.api, PROJECT, SHA, token)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("states", "posted", "words"),
    [
        ((W, W, W), "pending", "build: waiting"),
        ((Q, Q, Q), "pending", "build: queued"),
        ((R, W, W), "running", "build: running"),
        ((P, W, W), "running", "test: waiting"),
        ((P, Q, Q), "running", "test: queued"),
        ((P, R, W), "running", "test: running"),
        ((F, S, S), "failure", "build: failed"),
        ((P, F, S), "failure", "test: failed"),
        ((P, C, C), "canceled", "test: cancelled"),
        ((S, S, S), "canceled", "build: skipped"),
        ((P, P, P), "success", "deploy: passed"),
        ((P, P), "success", "test: passed"),
    ],
)
def test_what_is_said_of_a_cell(states: Sequence[State], posted: str, words: str) -> None:
    status = cell_status(stages("app", *states)[0].task.cell, stages("app", *states), "cscs")
    assert (status.context, status.state, status.description) == ("cscs/alpha-zen3-app:1", posted, words)


def test_why_it_failed_and_how_long_it_took() -> None:
    failed = stages("app", P, F)
    failed[1].detail = "2 of 9 tests failed"
    assert cell_status(failed[0].task.cell, failed, "x").description == "test: failed: 2 of 9 tests failed"
    passed = stages("app", P, P)
    passed[0].seconds, passed[1].seconds, passed[1].detail = 61.0, 2.0, "9 of 9 tests passed"
    assert (
        cell_status(passed[0].task.cell, passed, "x").description
        == "test: passed in 1:03: 9 of 9 tests passed"
    )
    for one in passed:
        one.seconds = 0.0
        one.result = StageResult(one.task.cell.id, one.task.stage, "r", "t", None, reused=True, seconds=0.0)
    passed[1].detail = ""
    assert cell_status(passed[0].task.cell, passed, "x").description == "test: was done before"


@pytest.fixture(params=KINDS)
def double(request: pytest.FixtureRequest) -> Iterator[ForgeDouble]:
    with ForgeDouble(request.param) as double:
        yield double


def tell(poster: Poster, one: Progress, state: State) -> None:
    one.state = state
    poster.changed(one)


def test_every_cell_ends_with_its_own_verdict(double: ForgeDouble) -> None:
    good, bad = stages("good", W, W), stages("bad", W, W)
    poster = Poster(forge(double), [*good, *bad], "cscs")
    for one, state in (
        (good[0], R),
        (bad[0], R),
        (bad[0], F),
        (bad[1], S),
        (good[0], P),
        (good[1], R),
        (good[1], P),
    ):
        tell(poster, one, state)
    poster.close()
    failed = "failed" if double.kind == "gitlab" else "failure"
    assert double.states == {"cscs/alpha-zen3-good:1": "success", "cscs/alpha-zen3-bad:1": failed}


class Held:
    """`post_status` with a gate: nothing is posted before it is opened."""

    def __init__(self) -> None:
        self.posted: list[Status] = []
        self.asked = threading.Event()
        self.gate = threading.Event()
        self.faults = 0

    def __call__(self, _forge: Forge, status: Status) -> None:
        self.asked.set()
        assert self.gate.wait(DEADLINE_S)
        if self.faults:
            self.faults -= 1
            raise StatusNotPosted("the forge did not take it: 503")
        self.posted.append(status)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    held = Held()
    monkeypatch.setattr(posting, "post_status", held)
    return held


ANY = Forge("github", "https://forge.example", "a/b", SHA, "t")


def test_a_slow_forge_gets_only_the_newest(held: Held) -> None:
    one, two = stages("one", W, W), stages("two", W, W)
    poster = Poster(ANY, [*one, *two], "x")
    tell(poster, one[0], R)
    assert held.asked.wait(DEADLINE_S)
    # All of this while the first one is under way; nothing here waits.
    for stage, state in ((two[0], R), (one[0], P), (one[1], R), (two[0], F), (one[1], P)):
        tell(poster, stage, state)
    held.gate.set()
    poster.close()
    assert [(status.context, status.state) for status in held.posted] == [
        ("x/alpha-zen3-one:1", "running"),
        ("x/alpha-zen3-two:1", "failure"),
        ("x/alpha-zen3-one:1", "success"),
    ]


def test_what_did_not_change_is_not_posted_again(held: Held) -> None:
    one = stages("one", W, W)
    poster = Poster(ANY, one, "x")
    held.gate.set()
    for _time in range(3):
        tell(poster, one[0], R)
    poster.close()
    assert len(held.posted) == 1


def test_a_forge_in_trouble_is_said_once(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = stages("one", W, W), stages("two", W, W)
    poster = Poster(ANY, [*one, *two], "x")
    held.faults = 100
    held.gate.set()
    tell(poster, one[1], F)
    tell(poster, two[1], C)
    poster.close()
    assert capsys.readouterr().err == "note: the forge did not take it: 503\n"


def test_what_a_forge_did_not_take_is_posted_at_the_end(held: Held) -> None:
    failed, other = stages("failed", F, S), stages("other", W, W)
    poster = Poster(ANY, [*failed, *other], "x")
    held.faults = 1
    held.gate.set()
    poster.changed(failed[0])
    tell(poster, other[0], R)
    until(lambda: bool(held.posted), "the next status to be posted", DEADLINE_S)
    assert [status.state for status in held.posted] == ["running"]
    poster.close()
    assert [status.state for status in held.posted] == ["running", "failure"]


def test_the_end_of_a_run_does_not_wait_for_ever(
    held: Held, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(posting, "DRAIN_S", 0.05)
    one, two, three = stages("one", W), stages("two", W), stages("three", W)
    poster = Poster(ANY, [*one, *two, *three], "x")
    tell(poster, one[0], R)
    assert held.asked.wait(DEADLINE_S)
    tell(poster, two[0], R)
    tell(poster, three[0], R)
    poster.close()
    assert capsys.readouterr().err == "note: 3 statuses could not be posted in time\n"
    held.gate.set()


def test_a_token_that_may_not(capsys: pytest.CaptureFixture[str]) -> None:
    """Against the double: refused, said once, and the token is nowhere in it."""
    with ForgeDouble("gitlab") as double:
        cells = [stages(name, W, W) for name in ("a", "b", "c")]
        poster = Poster(forge(double, token="wrong-token"), [one for cell in cells for one in cell], "x")
        for cell in cells:
            tell(poster, cell[0], R)
        poster.close()
        said = capsys.readouterr().err
        assert said.count("note: ") == 1
        assert "401" in said and "is the token allowed" in said and "wrong-token" not in said
        assert double.posted == []
