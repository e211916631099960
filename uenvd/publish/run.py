"""``uenvd-publish run``: a recipe, or each cell of a site's plan, becomes a tested and, if asked, released image, in one command.

With a recipe's directory all happens in this process, and nothing but the recipe is needed. Otherwise the plan of a configuration runs
(`uenvd.publish.pipeline`), or one stage of one of its cells.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from uenvd.errors import UsageError
from uenvd.oci.reference import repository_of
from uenvd.oci.remote import Remote
from uenvd.publish.build import Built, build
from uenvd.publish.built import publish_built
from uenvd.publish.console import reporter, say, show, show_json
from uenvd.publish.deploy import Deployed
from uenvd.publish.options import (
    BUILD,
    SITE_OPTIONS,
    add_registry_options,
    add_site_options,
    need_system,
    need_uarch,
    open_registry,
    refuse,
)
from uenvd.publish.pipeline.command import run_order, run_plan, run_stage
from uenvd.publish.pipeline.executors.local import DEFAULT_MEMORY_BYTES
from uenvd.publish.plan import DEFAULT_SITE, STAGES, load_plan
from uenvd.publish.plan.jobs import EXECUTORS
from uenvd.publish.plan_command import add_plan_options, select
from uenvd.publish.push import Target, check_tag
from uenvd.publish.recipe import Recipe, load_recipe
from uenvd.publish.release import add_release_options, release
from uenvd.publish.status import FORGE_OPTIONS, add_forge_options
from uenvd.publish.test import (
    add_test_options,
    check_test_options,
    clean,
    duration,
    make_workdir,
    summary,
    tell,
    wishes_of,
)
from uenvd.publish.testing import Tested, examine, require_pass

RECIPE_FILES: Final = ("config.yaml", "environments.yaml")
_SHORT_DIGITS: Final = 16
_OF_EXECUTORS: Final[dict[tuple[str, ...], tuple[str, ...]]] = {
    ("local",): ("jobs", "memory-per-job"),
    ("slurm", "firecrest"): ("sbatch-option", "poll"),
    ("firecrest",): ("remote-dir", "remote-command", "remote-system"),
}
"""Options that only some executors have."""
_OF_PLANS: Final = (
    *("config", "recipes", "changed", "deployed"),
    *("executor", "stage", "work", "retest", "junit", "dotenv", "site"),
    *(option for options in _OF_EXECUTORS.values() for option in options),
    *FORGE_OPTIONS,
)
"""Options that a recipe's directory has no use for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "patterns",
        metavar="RECIPE|PATTERN",
        nargs="*",
        help="a recipe's directory, NAME/VERSION; or cells of the plan: name, name/version, name/version@system%%uarch in parts, ids; "
        "default: the whole plan",
    )
    parser.add_argument(
        "--pipeline",
        metavar="ID",
        help=f"tag in the namespace {BUILD}, never overwritten; default $CI_PIPELINE_ID, else one made of the image's digest",
    )
    parser.add_argument("--deploy", metavar="TAG", help="release the image under this tag if its tests pass")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="keep the image here, and do not build again what is here already; default: nothing is kept",
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where downloads are kept")
    parser.add_argument(
        "--json", action="store_true", help="say what was done as JSON; of a plan: a line for each event"
    )
    add_plan_options(parser)
    _add_pipeline_options(parser)
    add_release_options(parser, moving=False)
    add_test_options(parser)
    add_site_options(parser)
    add_registry_options(parser)
    add_forge_options(parser)


def _add_pipeline_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running a plan")
    group.add_argument(
        "--executor",
        choices=EXECUTORS,
        default="local",
        help="where the stages run; default: on this machine",
    )
    group.add_argument("--cell", metavar="ID", help="only this cell, name/version-system/uarch")
    group.add_argument("--stage", choices=STAGES, help="only this stage")
    group.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="logs and state, and images until they are pushed; with Slurm a directory that all nodes see; default: .uenv-run, "
        "for one stage a temporary one",
    )
    group.add_argument("--retest", action="store_true", help="test also what has passed its tests")
    group.add_argument("--junit", type=Path, metavar="FILE", help="write a report in JUnit's form")
    group.add_argument(
        "--dotenv", type=Path, metavar="FILE", help="write UENV_DIGEST and UENV_LABEL of a cell"
    )
    group.add_argument(
        "--jobs", type=_number, metavar="N", help="stages at a time here; default: by cores and memory"
    )
    group.add_argument(
        "--memory-per-job",
        type=_size,
        default=DEFAULT_MEMORY_BYTES,
        metavar="SIZE",
        help="what a stage here is thought to need, such as 8G: images are built in memory; default 2G",
    )
    group.add_argument(
        "--sbatch-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="of each job, such as --sbatch-option=--account=x; may be repeated",
    )
    group.add_argument(
        "--poll",
        type=duration,
        metavar="TIME",
        help="how often the batch system is asked; default 5s, FirecREST 10s",
    )
    group.add_argument(
        "--remote-dir",
        metavar="DIR",
        help="with FirecREST: a directory there that the nodes see, for jobs and logs",
    )
    group.add_argument(
        "--remote-command",
        default="uenvd-publish",
        metavar="COMMAND",
        help="what uenvd-publish is called there",
    )
    group.add_argument(
        "--remote-system", metavar="NAME", help="what FirecREST calls the cluster; default: as the plan does"
    )
    group.add_argument("--site", default=DEFAULT_SITE, metavar="NAME", help="first part of status contexts")


def _number(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 1024")
    return int(text)


def _size(text: str) -> int:
    unit = {"M": 20, "G": 30, "T": 40}.get(text[-1:].upper())
    if unit is None or not text[:-1].isdigit() or int(text[:-1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size (for example 500M, 8G)")
    return int(text[:-1]) << unit


@dataclass
class Steps:
    """Tells the steps and how long each took."""

    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str, text: str) -> Iterator[None]:
        """Announce a step."""
        self.say(f"{len(self.seconds) + 1}. {text}")
        began_s = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - began_s, 1)
        self.say(f"   {self.seconds[name]:.1f} s")


def run(arguments: argparse.Namespace) -> int:
    """Run a recipe or a plan; digests go to stdout."""
    recipe = _recipe(arguments)
    _refuse_without_effect(arguments, recipe)
    if recipe is not None:
        return _run_recipe(arguments, recipe)
    plan = load_plan(arguments.config, recipes=arguments.recipes)
    if arguments.cell is None:
        return run_plan(select(arguments, plan)[0], arguments)
    if arguments.patterns:
        raise UsageError("--cell names one cell, and further patterns say others", hint="say one of the two")
    if _is_one_stage(arguments):
        return run_stage(plan, arguments)
    return run_plan(plan.narrowed([plan.cell(arguments.cell)]), arguments)


def _refuse_without_effect(arguments: argparse.Namespace, recipe: Path | None) -> None:
    """Refuse options that mean nothing for what is run. Raises `UsageError`."""
    check_test_options(arguments)
    if arguments.deploy is None:
        refuse(arguments, ("policy", "sign", "no-latest"), "is for a release", hint="say --deploy TAG, too")
    if recipe is not None:
        refuse(
            arguments,
            _OF_PLANS,
            f"is for a plan, and {recipe} is the directory of one recipe",
            hint="leave out the option, or name cells: NAME/VERSION@SYSTEM",
        )
        return
    refuse(
        arguments, ("out",), "is for the directory of one recipe", hint="images of a plan are in --work DIR"
    )
    if arguments.cell is not None:
        refuse(arguments, ("changed", "deployed", *SITE_OPTIONS), "chooses cells, and --cell names one")
    for executors, options in _OF_EXECUTORS.items():
        if arguments.executor not in executors:
            refuse(arguments, options, f"is for --executor {' and '.join(executors)}")
    if not _is_one_stage(arguments):
        # One that is carried out here may be a part of a run, whose options it gets.
        if arguments.stage in ("build", "test"):
            refuse(
                arguments, ("deploy",), f"is for the stage deploy, and only {arguments.stage} is asked for"
            )
    else:
        refuse(
            arguments,
            (*_OF_EXECUTORS["local",], "site", *FORGE_OPTIONS),
            "is for a run of several stages",
            hint="of one stage: uenvd-publish status posts its state",
        )


def _is_one_stage(arguments: argparse.Namespace) -> bool:
    """Tell whether this very process is to carry out a stage."""
    return arguments.cell is not None and arguments.stage is not None and arguments.executor == "local"


def _recipe(arguments: argparse.Namespace) -> Path | None:
    """Return the directory of a recipe, if that is what the arguments name."""
    if len(arguments.patterns) != 1 or arguments.cell is not None:
        return None
    path = Path(arguments.patterns[0])
    return path if path.is_dir() and any((path / name).exists() for name in RECIPE_FILES) else None


def _run_recipe(arguments: argparse.Namespace, directory: Path) -> int:
    recipe = load_recipe(directory)
    system, uarch = need_system(arguments), need_uarch(arguments)
    repository = repository_of(BUILD, system, uarch, recipe.name, recipe.version)
    pipeline = arguments.pipeline or os.environ.get("CI_PIPELINE_ID")
    if pipeline is not None:
        check_tag(pipeline)
    order = run_order(arguments)
    steps = Steps(say)
    tested: Tested
    deployed: Deployed | None = None
    with closing(open_registry(arguments)) as remote, contextlib.ExitStack() as stack:
        if remote.address.kind == "http":
            # A registry that does not answer or lets nobody in is told before the build.
            remote.tags(repository)
        out = arguments.out or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="uenv-build-", ignore_cleanup_errors=True))
        )
        with steps.step("build", f"Build {recipe.label} for %{uarch}"):
            built = _build(recipe, out, arguments.cache)
            say(f"   {built.image.name}: {built.image.stat().st_size / 1e6:.1f} MB, {built.digest}")
        tag = pipeline or f"local-{built.digest.removeprefix('sha256:')[:_SHORT_DIGITS]}"
        with steps.step(
            "push", f"Push it to {remote.address}, {repository}:{tag}, with what is known of the build"
        ):
            digest = _push(remote, built, Target(repository, tag))
        with steps.step("test", "Pull it back by this digest and test it"):
            tested = _test(arguments, remote, Target(repository, digest))
        require_pass(tested)
        if order is not None:
            with steps.step("deploy", f"Release it as :{order.tag}"):
                deployed = release(
                    remote,
                    Target(repository, digest),
                    order,
                    action="deploy",
                    progress=reporter("copying"),
                    say=lambda text: say(f"   {text}"),
                ).deployed
    if arguments.json:
        show_json(_account(built, repository, tag, tested, deployed, steps))
    else:
        show(digest)
    return 0


def _build(recipe: Recipe, out: Path, cache: Path | None) -> Built:
    built = build(recipe, out, cache=cache, say=lambda text: say(f"   {text}"))
    if built.reused:
        say(f"   it was built from the same recipe already: {built.image}")
    return built


def _push(remote: Remote, built: Built, target: Target) -> str:
    done = publish_built(
        remote,
        target.repository,
        built,
        [target.reference],
        hashing=reporter("hashing"),
        pushing=reporter("pushing"),
    )
    for note in done.notes:
        say(f"   note: {note}")
    return done.digest


def _test(arguments: argparse.Namespace, remote: Remote, target: Target) -> Tested:
    workdir = make_workdir(arguments)
    passing = False
    try:
        wishes = wishes_of(arguments, workdir, None)
        tested = examine(
            remote, target, wishes, say=lambda text: say(f"   {text}"), progress=reporter("pulling")
        )
        tell(tested)
        passing = tested.passing
    finally:
        clean(workdir, keep=arguments.keep or not passing)
    return tested


def _account(
    built: Built, repository: str, tag: str, tested: Tested, deployed: Deployed | None, steps: Steps
) -> dict[str, object]:
    return {
        "repository": repository,
        "tag": tag,
        "digest": tested.digest,
        "image": built.digest,
        "tests": summary(tested),
        "deployed": None if deployed is None else {"repository": deployed.repository, "tag": deployed.tag},
        "seconds": steps.seconds,
    }
