"""A plan -> a GitLab child pipeline. Pure.

Its jobs have the names of alps-uenv's pipelines; the digest goes from build to test as a dotenv report, results appear as JUnit in the merge
request. Source: GitLab's CI/CD YAML reference and the JSON schema that GitLab publishes.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, Final

import yaml

from uenvd.publish.plan.cell import STAGES, Cell, Stage
from uenvd.publish.plan.jobs import (
    DOTENV_FILE,
    HEADER,
    JUNIT_FILE,
    TIMEOUT_H,
    JobOptions,
    command,
    executor_of,
    require_cells,
    stages_of,
)
from uenvd.publish.plan.model import Plan

MAX_CELLS: Final = 1000
"""Three jobs each stay below what a GitLab pipeline may have at gitlab.com's higher plans; self-managed sites set their own."""


def gitlab_pipeline(plan: Plan, options: JobOptions) -> str:
    """Return the YAML text. A plan without cells has one job that does nothing, as a child pipeline needs one. Raises `UsageError` for too many."""
    if plan.cells:
        require_cells(plan.cells, MAX_CELLS, "GitLab")
    document: dict[str, Any] = {
        "stages": [
            stage for stage in STAGES if any(stage in stages_of(cell, options) for cell in plan.cells)
        ],
        "workflow": {"rules": [{"when": "always"}]},
        "default": {
            "interruptible": True,
            "timeout": f"{TIMEOUT_H} hours",
            "retry": {"max": 1, "when": ["runner_system_failure", "stuck_or_timeout_failure"]},
        },
    }
    if not plan.cells:
        document["stages"] = ["build"]
        document["nothing-to-do"] = {"stage": "build", "script": ["echo 'no image is affected'"]}
    if options.image:
        document["default"]["image"] = options.image
    if options.before:
        document["default"]["before_script"] = list(options.before)
    for cell in plan.cells:
        before: Stage | None = None
        for stage in stages_of(cell, options):
            document[cell.job_name(stage)] = _job(cell, stage, before, options)
            before = stage
    return HEADER + yaml.dump(
        document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000, default_flow_style=False
    )


class _Dumper(yaml.SafeDumper):
    """No anchors: a pipeline is read by people, too."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _job(cell: Cell, stage: Stage, before: Stage | None, options: JobOptions) -> dict[str, Any]:
    job: dict[str, Any] = {"stage": stage}
    tags = _tags(cell, stage, options)
    if tags:
        job["tags"] = tags
    job["variables"] = dict(_variables(cell, options))
    job["needs"] = [] if before is None else [{"job": cell.job_name(before), "artifacts": True}]
    if stage == "deploy":
        # The digest is the build's; a job sees the dotenv only of what it needs.
        job["needs"].insert(0, {"job": cell.job_name("build"), "artifacts": True})
        job["rules"] = [
            {"if": "$CI_COMMIT_BRANCH && $CI_COMMIT_BRANCH == $CI_DEFAULT_BRANCH", "when": "manual"}
        ]
        job["environment"] = {"name": f"deploy/{cell.system}/{cell.uarch}/{cell.name}"}
        job["resource_group"] = f"deploy/{cell.system}/{cell.uarch}/{cell.name}"
        job["interruptible"] = False
    job["script"] = [shlex.join(command(stage, executor_of(cell, options), cell.id, options))]
    if stage == "build":
        job["artifacts"] = {"reports": {"dotenv": DOTENV_FILE}, "expire_in": "4 weeks"}
    elif stage == "test":
        job["artifacts"] = {
            "when": "always",
            "paths": [JUNIT_FILE],
            "reports": {"junit": JUNIT_FILE},
            "expire_in": "4 weeks",
        }
    return job


def _tags(cell: Cell, stage: Stage, options: JobOptions) -> list[str]:
    own = cell.runner.baremetal_tag if stage == "test" else None
    tag = own or cell.runner.slurm_tag
    return [tag] if tag else list(options.runners)


def _variables(cell: Cell, options: JobOptions) -> Mapping[str, str]:
    """Return what the CI runners of alps-uenv read (resources as ``SLURM_*``), the target's own last; GitLab replaces ``$NAME`` in them."""
    ours = {
        "UENV_CELL": cell.id,
        "CSCS_NOTIFICATION_CONTEXT": cell.context(options.site).partition("/")[2],
    }
    partition = {} if cell.partition is None else {"SLURM_PARTITION": cell.partition}
    return {**ours, **partition, **cell.variables}
