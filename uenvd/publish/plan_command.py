"""``uenvd-publish plan``: what a site's configuration asks to be built, tested and deployed; the same for a CI system to run."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from uenvd.errors import StorageError, UsageError
from uenvd.publish.console import say, show, show_json, show_table
from uenvd.publish.options import refuse
from uenvd.publish.plan import DEFAULT_SITE, Plan, load_plan
from uenvd.publish.plan.changes import Changes, changes_since
from uenvd.publish.plan.github import github_workflow
from uenvd.publish.plan.gitlab import gitlab_pipeline
from uenvd.publish.plan.jobs import EXECUTORS, JobOptions
from uenvd.publish.plan.show import cell_as_json, problem_as_json, require_none, say_problems
from uenvd.publish.release import check_release_tag

WRITERS = {"gitlab": gitlab_pipeline, "github": github_workflow}


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add which configuration is read, and which of its cells are meant."""
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--config", type=Path, default=Path("config.yaml"), metavar="FILE", help="the site's clusters and uenvs; default: config.yaml"
    )  # fmt: skip
    group.add_argument(
        "--recipes", type=Path, metavar="DIR", help="the recipes; default: recipes beside the configuration"
    )
    group.add_argument(
        "--changed",
        metavar="BASE",
        help="only what differs from where HEAD left BASE, a branch or commit of git",
    )
    group.add_argument(
        "--deployed", action="store_true", help="only what the configuration lists under deploy"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "patterns",
        metavar="PATTERN",
        nargs="*",
        help="name, name/version, name/version@system%%uarch in parts, or a cell's id; with * and ?",
    )
    add_plan_options(parser)
    parser.add_argument("--system", metavar="SYSTEM", help="only this cluster")
    parser.add_argument("--uarch", metavar="UARCH", help="only this microarchitecture")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--site",
        default=DEFAULT_SITE,
        metavar="NAME",
        help=f"first part of status contexts; default: {DEFAULT_SITE}",
    )
    group = parser.add_argument_group("for a CI system")
    group.add_argument(
        "--write",
        nargs=2,
        metavar=("SYSTEM", "FILE"),
        help="write it as a pipeline of gitlab or github; FILE - is stdout",
    )
    group.add_argument("--deploy", metavar="TAG", help="with jobs that release under this tag")
    group.add_argument(
        "--policy",
        metavar="FILE",
        help="what these demand of an image, a file of the repository (uenvd-publish promote)",
    )
    group.add_argument(
        "--executor", choices=EXECUTORS, help="where jobs run their stage; default: as the configuration says"
    )
    group.add_argument(
        "--before",
        action="append",
        default=[],
        metavar="COMMAND",
        help="a shell command at the beginning of each job",
    )
    group.add_argument("--image", metavar="IMAGE", help="the container image of the jobs")
    group.add_argument(
        "--runner", action="append", default=[], metavar="TAG", help="tag or label of the runners, where the configuration has none"
    )  # fmt: skip


def select(arguments: argparse.Namespace, plan: Plan) -> tuple[Plan, Changes | None]:
    """Return the plan of the cells that the options ask for. Raises `UsageError` where a pattern matches none."""
    for pattern in arguments.patterns:
        chosen = plan.select([pattern])
        if not chosen.cells:
            say_problems([problem for problem in chosen.problems if problem.severity == "error"])
            raise UsageError(
                f"{pattern!r} matches nothing in {plan.config}",
                hint="uenvd-publish plan lists all: name/version@system%uarch",
            )
    changes = None
    if arguments.changed is not None:
        changes = changes_since(plan, arguments.changed)
        plan = changes.plan
    plan = plan.select(arguments.patterns, system=arguments.system, uarch=arguments.uarch)
    if arguments.deployed:
        plan = plan.narrowed((cell for cell in plan.cells if cell.deploy), arguments.patterns)
    return plan, changes


def run(arguments: argparse.Namespace) -> int:
    """Show or write the plan; errors of its cells are told, and refuse it at the end."""
    if arguments.write is None:
        refuse(arguments, ("deploy", "policy", "executor", "before", "image", "runner"), "is for --write")
    else:
        refuse(arguments, ("json",), "shows the plan, and --write writes it", hint="leave out one of the two")
    if arguments.deploy is None:
        refuse(arguments, ("policy",), "is for releases", hint="say --deploy TAG, too")
    if arguments.write is not None and arguments.write[0] not in WRITERS:
        raise UsageError(f"{arguments.write[0]!r} is no CI system", hint=f"there are: {', '.join(WRITERS)}")
    if arguments.deploy is not None:
        check_release_tag(arguments.deploy, "--deploy")
    plan, changes = select(arguments, load_plan(arguments.config, recipes=arguments.recipes))
    say_problems([problem for problem in plan.problems if problem.severity == "error"])
    if arguments.write is not None:
        require_none(plan.errors)
        _write(arguments, plan)
        return 0
    if arguments.json:
        document: dict[str, Any] = {
            "config": os.path.relpath(plan.config),
            "cells": [cell_as_json(cell, arguments.site) for cell in plan.cells],
            "problems": [problem_as_json(problem) for problem in plan.problems],
        }
        if changes is not None:
            document["base"] = changes.base
            document["reasons"] = {cell.id: changes.reasons[cell.id] for cell in plan.cells}
            document["removed"] = list(changes.removed)
        show_json(document)
    else:
        _show(plan, changes)
    require_none(plan.errors)
    return 0


def _show(plan: Plan, changes: Changes | None) -> None:
    if plan.cells:
        header = ["cell", "partition", "deploy", "mount", "recipe"]
        show_table(
            header if changes is None else [*header, "changed"],
            [
                [
                    cell.id,
                    cell.partition or "-",
                    "yes" if cell.deploy else "-",
                    cell.mount,
                    os.path.relpath(cell.recipe),
                    *([] if changes is None else [changes.reasons[cell.id]]),
                ]
                for cell in plan.cells
            ],
        )
    else:
        say("nothing to do")
    if changes is not None:
        for cell_id in changes.removed:
            say(f"no longer in the configuration: {cell_id}")


def _write(arguments: argparse.Namespace, plan: Plan) -> None:
    system, name = arguments.write
    options = JobOptions(
        config=os.path.relpath(arguments.config),
        recipes=None if arguments.recipes is None else os.path.relpath(arguments.recipes),
        deploy=arguments.deploy,
        policy=None if arguments.policy is None else os.path.relpath(arguments.policy),
        executor=arguments.executor,
        before=tuple(arguments.before),
        image=arguments.image,
        runners=tuple(arguments.runner),
        site=arguments.site,
    )
    text = WRITERS[system](plan, options)
    if name == "-":
        show(text.rstrip("\n"))
        return
    path = Path(name)
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                file.write(text)
                os.fchmod(file.fileno(), 0o644)
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink()
                raise
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}") from error
    say(f"{path}: {len(plan.cells)} cells for {system}")
