"""Stages through a FirecREST that fails for a while, is behind with its lists, or forgets: no job is lost or given up, none is run twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import firecrest
import pytest

from support.firecrestdouble import CLIENT, SECRET, Double, firecrest_double
from support.fusetools import until
from uenvd.errors import DispatchFailed
from uenvd.publish.pipeline.executors import JobState, Phase
from uenvd.publish.pipeline.executors import firecrest as module
from uenvd.publish.pipeline.executors.firecrest import FirecrestExecutor
from uenvd.publish.pipeline.files import JobFiles
from uenvd.publish.pipeline.tasks import Task
from uenvd.publish.pipeline.waiting import Waker
from uenvd.publish.plan import Cell, Plan, load_plan

DEADLINE_S = 20.0


@pytest.fixture
def double() -> Iterator[Double]:
    with firecrest_double() as double:
        yield double


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    recipe = tmp_path / "recipes/app/1.0"
    recipe.mkdir(parents=True)
    (recipe / "config.yaml").write_text("name: app\n")
    config = tmp_path / "config.yaml"
    config.write_text(
        "clusters: {alpha: {targets: [{uarch: zen3}], runner: f7t}}\n"
        "uenvs: {app: {'1.0': {recipes: {zen3: '1.0'}, deploy: {alpha: [zen3]}}}}\n"
    )
    return load_plan(config)


def made(double: Double, plan: Plan, directory: Path, command: str) -> FirecrestExecutor:
    """An executor whose stages are a command of a shell."""
    authorization = firecrest.ClientCredentialsAuth(CLIENT, SECRET, f"{double.url}/token")
    api = firecrest.v2.Firecrest(double.url, authorization)
    api.disable_client_logging = True
    files = JobFiles(directory / "work")
    files.prepare()
    return FirecrestExecutor(
        api,
        plan,
        files,
        Waker(),
        lambda _task, _place: ["-c", command],
        directory=str(directory / "remote"),
        command="bash",
        poll_s=0.05,
    )


@pytest.fixture
def task(plan: Plan) -> Task:
    cell: Cell = plan.cells[0]
    return Task(cell, "build", "content-1", "s")


def ended(executor: FirecrestExecutor, job: str, task: Task) -> JobState:
    def look() -> JobState | None:
        state = executor.states({job: task})[job]
        return state if state.phase is Phase.ENDED else None

    found: JobState = until(look, "the job to end", DEADLINE_S)
    return found


def test_the_way_of_a_job(double: Double, plan: Plan, task: Task, tmp_path: Path) -> None:
    with closing(made(double, plan, tmp_path, "echo result; echo said >&2; exit 4")) as executor:
        job = executor.start(task, None)
        assert ended(executor, job, task) == JobState(Phase.ENDED, 4)
        output = executor.output(job, task)
        assert (output.stdout, output.tail) == ("result\n", "said")
        assert Path(output.log).read_text() == "said\n"


def test_a_list_that_cannot_be_had(double: Double, plan: Plan, task: Task, tmp_path: Path) -> None:
    with closing(made(double, plan, tmp_path, "true")) as executor:
        job = executor.start(task, None)
        double.faults = [("GET /compute/alpha/jobs", 503)]
        state = executor.states({job: task})[job]
        assert state == JobState(Phase.QUEUED, None, "FirecREST does not answer")
        assert ended(executor, job, task) == JobState(Phase.ENDED, 0)


def test_accounting_that_is_behind(double: Double, plan: Plan, task: Task, tmp_path: Path) -> None:
    """A job that was submitted a moment ago is in no list, and asking for it says 404: it is not lost."""
    with closing(made(double, plan, tmp_path, "true")) as executor:
        double.late = 2
        job = executor.start(task, None)
        assert executor.states({job: task})[job] == JobState(
            Phase.QUEUED, None, "FirecREST does not list it yet"
        )
        assert double.late == 0, "it asked for the list, and for the job"
        assert ended(executor, job, task) == JobState(Phase.ENDED, 0)


def test_a_job_that_is_in_no_list_any_more(
    double: Double, plan: Plan, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(made(double, plan, tmp_path, "exit 5")) as executor:
        job = executor.start(task, None)
        number = int(job.partition(":")[2])
        double.forgotten.add(number)
        # That it cannot be asked for says nothing of the job.
        double.faults = [(f"GET /compute/alpha/jobs/{number}", 500)]
        state = executor.states({job: task})[job]
        assert state.phase is Phase.QUEUED and "500 a fault on demand" in state.reason
        assert ended(executor, job, task) == JobState(Phase.ENDED, 5)
    with closing(made(double, plan, tmp_path, "true")) as executor:
        monkeypatch.setattr(module, "NOT_LISTED_S", 0.0)
        other = executor.start(task, None)
        double.cancel(double.jobs.pop(int(other.partition(":")[2])))
        lost = executor.states({other: task})[other]
        assert lost == JobState(Phase.ENDED, None, "FirecREST does not know the job any more")


def test_patience_has_an_end(
    double: Double, plan: Plan, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(made(double, plan, tmp_path, "true")) as executor:
        job = executor.start(task, None)
        monkeypatch.setattr(module, "PATIENCE_S", 0.0)
        double.faults = [("GET /compute/", 503)]
        with pytest.raises(DispatchFailed, match="503"):
            executor.states({job: task})


def test_jobs_of_a_run_that_died_are_found(double: Double, plan: Plan, task: Task, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    wait = f"until [ -e {gate} ]; do sleep 0.02; done"
    with closing(made(double, plan, tmp_path, wait)) as executor:
        job = executor.start(task, None)
        after = Task(task.cell, "test", task.tag, task.scope)
        second = executor.start(after, job)
    with closing(made(double, plan, tmp_path, wait)) as executor:
        assert executor.find([task, after]) == {task.key: job, after.key: second}
        gate.touch()
        assert ended(executor, second, after) == JobState(Phase.ENDED, 0)
        assert executor.find([task, after]) == {}, "what has ended is not followed"


def test_cancelled_jobs_have_ended(double: Double, plan: Plan, task: Task, tmp_path: Path) -> None:
    with closing(made(double, plan, tmp_path, "exec sleep 1000")) as executor:
        job = executor.start(task, None)
        executor.cancel({job: task})
        assert ended(executor, job, task).status is None
    assert all(one.process is None or one.process.poll() is not None for one in double.jobs.values())


def test_a_log_that_cannot_be_read(double: Double, plan: Plan, task: Task, tmp_path: Path) -> None:
    with closing(made(double, plan, tmp_path, "echo result")) as executor:
        job = executor.start(task, None)
        ended(executor, job, task)
        double.faults = [("GET /filesystem/alpha/ops/tail", 503)] * 2
        output = executor.output(job, task)
        assert output.stdout == ""
        assert "the log cannot be read" in output.tail
        assert executor.output(job, task).stdout == "result\n"
