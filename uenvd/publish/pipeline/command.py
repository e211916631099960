"""``uenvd-publish run`` of a plan, and of one stage of one cell: options -> work, tasks, executor, views."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import Final

from uenvd.errors import InternalError, PlanFailed, UenvError, UsageError
from uenvd.oci.remote import Remote
from uenvd.publish.console import reporter, say, show, show_table
from uenvd.publish.options import BUILD, open_registry
from uenvd.publish.pipeline.executors import Executor
from uenvd.publish.pipeline.executors.local import LocalExecutor, follow_parent, stage_command
from uenvd.publish.pipeline.executors.slurm import SlurmExecutor
from uenvd.publish.pipeline.files import JobFiles, load_state, owned, save_state
from uenvd.publish.pipeline.posting import Poster
from uenvd.publish.pipeline.runner import Listener, Progress, Runner, exit_status
from uenvd.publish.pipeline.stages import (
    IMAGES,
    Work,
    build_stage,
    deploy_stage,
    failure_of,
    identify,
    repository,
    survey,
    test_stage,
)
from uenvd.publish.pipeline.tasks import StageResult, State, Task
from uenvd.publish.pipeline.view import (
    JsonEvents,
    Lines,
    Table,
    is_terminal,
    summary_rows,
    write_dotenv,
    write_junit,
)
from uenvd.publish.pipeline.waiting import Waker, terminable
from uenvd.publish.plan import STAGES, Cell, Plan, Stage
from uenvd.publish.plan.forges import Forge
from uenvd.publish.plan.show import require_none, say_problems
from uenvd.publish.push import check_tag
from uenvd.publish.release import Order, check_waiver, order_of, policy_path, require_who
from uenvd.publish.status import FORGE_OPTIONS, forge_of, need_forge
from uenvd.publish.test import clean, tell, wishes_of

DEFAULT_WORK: Final = Path(".uenv-run")
POLICY_FILE: Final = "policy.yaml"
"""What a policy is called beside the inputs of a stage that runs elsewhere."""
TESTS: Final = "tests"
"""Directory below it in which images are tested."""
_FORWARDED: Final = (
    *("registry", "auth_file", "username", "token_file", "ca_file"),
    *("cache", "pipeline", "deploy", "policy", "sign"),
    *("waive_tests", "through", "partition", "timeout", "test_timeout"),
)
"""Options with a value that a run passes on to the commands of its stages."""
_FORWARDED_LISTS: Final = ("tests", "slurm_option", "pass_env")
_FORWARDED_FLAGS: Final = ("slurm", "keep", "no_latest", "retest")


def stages_of(arguments: argparse.Namespace, cell: Cell) -> tuple[Stage, ...]:
    """Return the stages of a cell that a run has."""
    if arguments.stage is not None:
        return (arguments.stage,)
    return STAGES if arguments.deploy is not None and cell.deploy else STAGES[:2]


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be meant before anything is done. Raises `UsageError`."""
    if arguments.pipeline is not None:
        check_tag(arguments.pipeline)
    if arguments.stage == "deploy" and arguments.deploy is None:
        raise UsageError("a release needs a tag", hint="say --deploy v1")
    check_waiver(arguments.waive_tests)
    if arguments.dotenv is not None and arguments.cell is None:
        raise UsageError("--dotenv is for one cell", hint="say --cell ID --stage build")


# --- one stage, here ----------------------------------------------------------------------------------------------------------------


def run_stage(plan: Plan, arguments: argparse.Namespace) -> int:
    """Run one stage of one cell in this process; its digest, or with ``--json`` its result, goes to stdout."""
    check(arguments)
    cell, stage = plan.cell(arguments.cell), arguments.stage
    # The run that started this has checked the plan; here only the cell's own recipe matters, and it is read again.
    with terminable(), contextlib.ExitStack() as stack:
        follow_parent()
        for name, value in cell.variables.items():
            os.environ.setdefault(name, value)
        try:
            order = run_order(arguments) if stage == "deploy" else None
            remote = stack.enter_context(closing(open_registry(arguments)))
            result = _stage(_work(arguments, remote, stack, order), cell, stage, arguments)
        except UenvError as error:
            result = _failed(cell, stage, error)
            _finish_stage(arguments, cell, result)
            raise
    _finish_stage(arguments, cell, result)
    if result.failure is not None:
        # Its message has been told with the tests.
        return result.failure.status
    return 0


def _failed(cell: Cell, stage: Stage, error: UenvError) -> StageResult:
    tag = ""
    with contextlib.suppress(UenvError):
        _recipe, tag = identify(cell)
    return StageResult(cell.id, stage, repository(cell), tag, None, False, 0.0, "", failure_of(error))


def _stage(work: Work, cell: Cell, stage: Stage, arguments: argparse.Namespace) -> StageResult:
    if stage == "build":
        return build_stage(work, cell)
    if stage == "deploy":
        return deploy_stage(work, cell)
    base = arguments.workdir or (work.directory / TESTS if arguments.work is not None else None)
    stem = cell.job_name(stage).replace("/", "_")
    if base is not None:
        base.mkdir(parents=True, exist_ok=True)
        _forget_tests(base, stem)
    workdir = Path(tempfile.mkdtemp(prefix=f"{stem}@", dir=base)).resolve()
    passing = False
    try:
        result, tested = test_stage(work, cell, wishes_of(arguments, workdir, None))
        if tested is not None:
            tell(tested)
        passing = result.passed
    finally:
        clean(workdir, keep=arguments.keep or not passing)
    return result


def run_order(arguments: argparse.Namespace) -> Order | None:
    """Return the release that a run is to end with. Raises what `order_of` raises, and `DeployRefused` for who may not: nothing is built in vain."""
    if arguments.deploy is None:
        return None
    order = order_of(arguments, arguments.deploy, "--deploy")
    require_who(order)
    return order


def _work(
    arguments: argparse.Namespace, remote: Remote, stack: contextlib.ExitStack, order: Order | None
) -> Work:
    directory = arguments.work
    if directory is None:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="uenv-run-", ignore_cleanup_errors=True))
        )
    return Work(
        remote,
        directory.absolute(),
        cache=arguments.cache,
        pipeline=arguments.pipeline,
        order=order,
        retest=arguments.retest,
        say=say,
        hashing=reporter("hashing"),
        pushing=reporter("pushing"),
        pulling=reporter("pulling"),
        copying=reporter("copying"),
    )


def _finish_stage(arguments: argparse.Namespace, cell: Cell, result: StageResult) -> None:
    """Tell what came of it: to whoever reads stdout, and to the CI system."""
    if arguments.junit is not None:
        state = State.PASSED if result.passed else State.FAILED
        write_junit(arguments.junit, [(cell.job_name(result.stage), state, result, "")])
    if arguments.dotenv is not None and result.digest is not None:
        write_dotenv(arguments.dotenv, result, f"{BUILD}::{cell.label}@{result.digest}")
    if arguments.json:
        show(result.encode())
    elif result.digest is not None:
        if result.reused:
            say(f"{cell.job_name(result.stage)}: it is there already, nothing was done")
        show(result.digest)


# --- a plan -------------------------------------------------------------------------------------------------------------------------


def run_plan(plan: Plan, arguments: argparse.Namespace) -> int:
    """Run the stages of all cells of a plan; the exit status is 0 if all passed. Raises what stops a run as a whole."""
    check(arguments)
    say_problems(plan.errors)
    require_none(plan.errors)
    if not plan.cells:
        say("nothing to do")
        return 0
    order = run_order(arguments)
    if order is not None:
        arguments.policy = policy_path(arguments)
    forge = _forge(arguments)
    directory = (arguments.work or DEFAULT_WORK).absolute()
    waker = Waker()
    with (
        waker.listening(),
        owned(directory),
        closing(open_registry(arguments)) as remote,
        contextlib.ExitStack() as stack,
    ):
        _sweep(directory)
        arguments.work = directory
        work = _work(arguments, remote, stack, order)
        files = JobFiles(directory)
        files.prepare()
        done = survey(work, plan.cells, STAGES)
        tasks = [
            _task(cell, stage, arguments, remote)
            for cell in plan.cells
            for stage in stages_of(arguments, cell)
        ]
        executor = stack.enter_context(closing(_executor(plan, arguments, files, waker)))
        return _drive(plan, arguments, work, tasks, executor, waker, done, files, forge)


def _forge(arguments: argparse.Namespace) -> Forge | None:
    """Return where statuses go; who names a forge wants them posted. Raises `UsageError`, `ConfigError`."""
    named = any(getattr(arguments, name.replace("-", "_")) is not None for name in FORGE_OPTIONS)
    return need_forge(arguments) if named else forge_of(arguments)


def _drive(
    plan: Plan,
    arguments: argparse.Namespace,
    work: Work,
    tasks: Sequence[Task],
    executor: Executor,
    waker: Waker,
    done: dict[tuple[str, Stage], StageResult],
    files: JobFiles,
    forge: Forge | None,
) -> int:
    def look_again(cell: Cell, stage: Stage) -> StageResult | None:
        return survey(work, [cell], STAGES).get((cell.id, stage))

    listeners: list[Listener] = []
    view: Lines | Table | None = None

    def tick() -> None:
        if view is not None:
            view.tick()

    runner = Runner(tasks, executor, waker, done=done, look_again=look_again, listeners=listeners, tick=tick)
    known = {
        one.task.key: entry
        for one in runner.all
        if isinstance(entry := load_state(work.directory).get(one.task.key), dict)
    }

    def remember(one: Progress) -> None:
        known[one.task.key] = _entry(one)
        save_state(work.directory, known)

    def forget(one: Progress) -> None:
        if one.task.stage == "build" and one.state is State.PASSED:
            _forget_images(work.directory, runner.all, one.task.tag)
        if one.task.stage == "test" and one.state is State.PASSED:
            _forget_tests(work.directory / TESTS, one.task.file_stem)

    if is_terminal() and not arguments.json:
        view = Table(lambda: runner.all, lambda one: files.last_line(one.task), sys.stderr)
    elif not arguments.json:
        view = Lines()
    events = JsonEvents() if arguments.json else None
    poster = Poster(forge, runner.all, arguments.site) if forge is not None else None
    for listener in (view, events, poster):
        if listener is not None:
            listeners.append(listener.changed)
    listeners += [remember, forget]
    try:
        runner.run()
    finally:
        if view is not None:
            view.close()
        if poster is not None:
            poster.close()
        if arguments.junit is not None:
            write_junit(
                arguments.junit, [(one.task.name, one.state, one.result, one.tail) for one in runner.all]
            )
    status = exit_status(runner.all, PlanFailed.exit_status, waker.asked)
    _tell_failures(runner.all)
    if arguments.dotenv is not None:
        _note_one(arguments.dotenv, runner.all)
    if events is not None:
        events.finish(runner.all, status)
    elif len(plan.cells) == 1 and arguments.cell is not None:
        _tell_one(runner.all)
    else:
        width = max(len(stages_of(arguments, cell)) for cell in plan.cells)
        rows = [row[:-1] + ["-"] * (width + 2 - len(row)) + row[-1:] for row in summary_rows(runner.all)]
        names = [arguments.stage] if arguments.stage is not None else list(STAGES[:width])
        show_table(["cell", *names, "digest"], rows)
    return status


def _tell_one(everything: Sequence[Progress]) -> None:
    result = everything[-1].result
    if result is not None and result.digest is not None:
        show(result.digest)


def _note_one(path: Path, everything: Sequence[Progress]) -> None:
    result = everything[-1].result
    if result is not None and result.digest is not None:
        write_dotenv(path, result, f"{BUILD}::{everything[-1].task.cell.label}@{result.digest}")


def _tell_failures(everything: Sequence[Progress]) -> None:
    """Say why, in full: the table has one line for each."""
    for one in everything:
        if one.state is not State.FAILED or one.result is None or one.result.failure is None:
            continue
        failure = one.result.failure
        say(f"\n{one.task.name} failed: {failure.message}")
        if failure.hint:
            say(f"hint: {failure.hint}")
        if one.log:
            say(f"log: {one.log}")
        if one.tail and failure.message not in one.tail:
            say("\n".join(f"  | {line}" for line in one.tail.splitlines()))


def _entry(one: Progress) -> dict[str, object]:
    return {
        "job": one.task.name,
        "state": one.state,
        "id": one.job,
        "seconds": round(one.seconds, 1),
        "digest": one.result.digest if one.result is not None else None,
        "detail": one.detail,
        "time": round(time.time(), 3),
    }


def _task(cell: Cell, stage: Stage, arguments: argparse.Namespace, remote: Remote) -> Task:
    try:
        _recipe, tag = identify(cell)
    except UenvError:
        # The build stage says what is wrong with the recipe.
        tag = "content-unknown"
    scope = f"{remote.address}\0{arguments.deploy if stage == 'deploy' else ''}\0{arguments.pipeline or ''}"
    return Task(cell, stage, tag, hashlib.sha256(scope.encode()).hexdigest())


def _forget_images(directory: Path, everything: Sequence[Progress], tag: str) -> None:
    """Remove a built image when every cell that is made of it has been pushed."""
    waiting = any(
        one.task.stage == "build" and one.task.tag == tag and not one.state.final for one in everything
    )
    if not waiting:
        shutil.rmtree(directory / IMAGES / tag, ignore_errors=True)


def _forget_tests(directory: Path, stem: str) -> None:
    """Remove what tests of a cell left that were killed, or that failed before."""
    for left in directory.glob(f"{stem}@*"):
        shutil.rmtree(left, ignore_errors=True)


def _sweep(directory: Path) -> None:
    """Remove what writers that were killed left."""
    for path in directory.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _executor(plan: Plan, arguments: argparse.Namespace, files: JobFiles, waker: Waker) -> Executor:
    def command(task: Task) -> Sequence[str]:
        return stage_command(stage_words(plan, arguments, task))

    if arguments.executor == "slurm":
        return SlurmExecutor(
            command,
            files,
            waker,
            options=arguments.sbatch_option,
            **({} if arguments.poll is None else {"poll_s": arguments.poll}),
        )
    if arguments.executor == "firecrest":
        # Imported only where it is wanted: pyfirecrest is an extra.
        from uenvd.publish.pipeline.executors.firecrest import firecrest_executor

        extras = {} if arguments.policy is None else {POLICY_FILE: arguments.policy}
        return firecrest_executor(
            plan, files, waker, lambda task, place: remote_words(arguments, task, place), arguments, extras
        )
    if arguments.executor == "local":
        return LocalExecutor(
            command, files, waker, jobs=arguments.jobs, memory_bytes=arguments.memory_per_job
        )
    raise InternalError(f"no executor {arguments.executor!r}")


def stage_words(plan: Plan, arguments: argparse.Namespace, task: Task) -> list[str]:
    """Return the words of the command that runs one stage on a machine that sees this one's files."""
    words = ["run", "--config", str(plan.config)]
    if arguments.recipes is not None:
        words += ["--recipes", str(arguments.recipes.absolute())]
    words += ["--cell", task.cell.id, "--stage", task.stage, "--json", "--work", str(arguments.work)]
    if arguments.workdir is not None:
        words += ["--workdir", str(arguments.workdir.absolute())]
    return words + _options(arguments)


def remote_words(arguments: argparse.Namespace, task: Task, place: str) -> list[str]:
    """Return the words for a machine that sees none of this one's files: what is a file here is taken from its own places there.

    ``place`` is where the configuration and the recipe are unpacked.
    """
    for name in ("auth_file", "token_file", "ca_file", "tests", "sign"):
        if getattr(arguments, name):
            raise UsageError(
                f"--{name.replace('_', '-')} names a file of this machine",
                hint="through FirecREST a stage takes credentials from docker's places of its own machine, tests from the image; "
                "sign with: uenvd-publish promote",
            )
    there = {} if arguments.policy is None else {"policy": f"{place}/{POLICY_FILE}"}
    return [
        *("run", "--config", f"{place}/config.yaml", "--cell", task.cell.id, "--stage", task.stage, "--json"),
        *_options(arguments, there),
    ]


def _options(arguments: argparse.Namespace, instead: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """Return the options that a run passes on; ``instead``: values of options that are others where the stage runs."""
    words: list[str] = []
    value: object
    registry = arguments.registry or os.environ.get("UENVD_REGISTRY")
    for name in _FORWARDED:
        value = registry if name == "registry" else instead.get(name, getattr(arguments, name))
        if value is not None:
            text = str(value.absolute()) if isinstance(value, Path) else str(value)
            words.append(f"--{name.replace('_', '-')}={text}")
    for name in _FORWARDED_LISTS:
        for value in getattr(arguments, name):
            words.append(
                f"--{name.replace('_', '-')}={value.absolute() if isinstance(value, Path) else value}"
            )
    words += [f"--{name.replace('_', '-')}" for name in _FORWARDED_FLAGS if getattr(arguments, name)]
    return words
