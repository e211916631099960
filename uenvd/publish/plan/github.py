"""A plan -> a GitHub Actions workflow with one matrix a stage. Pure.

A matrix as a whole is what a later job can wait for, so the later stages run whenever they are not cancelled, and each cell finds out by its
artifact whether the stage before it passed: one failing cell stops no other. Source: GitHub's workflow syntax and the JSON schema at SchemaStore.
"""

from __future__ import annotations

import re
import shlex
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
    secrets_of,
    stages_of,
)
from uenvd.publish.plan.model import Plan

MAX_CELLS: Final = 256
"""Jobs that GitHub makes of one matrix."""
CHECKOUT: Final = "actions/checkout@v4"
UPLOAD: Final = "actions/upload-artifact@v4"
DOWNLOAD: Final = "actions/download-artifact@v4"
AUTH_SECRET: Final = "UENVD_REGISTRY_AUTH"  # noqa: S105  # a name
"""The repository's secret with the credentials of the registry, in docker's format."""
_SELF_HOSTED: Final = "self-hosted"
_LOG_IN: Final = (
    f'if [ -n "${AUTH_SECRET}" ]; then\n'
    '  export REGISTRY_AUTH_FILE="$RUNNER_TEMP/auth.json"\n'
    f"""  (umask 077 && printf %s "${AUTH_SECRET}" > "$REGISTRY_AUTH_FILE")\n"""
    f"fi\nunset {AUTH_SECRET}\n"
)


def github_workflow(plan: Plan, options: JobOptions) -> str:
    """Return the YAML text. Raises `UsageError` for no cells, or more than `MAX_CELLS`."""
    require_cells(plan.cells, MAX_CELLS, "GitHub")
    jobs: dict[str, Any] = {}
    before: Stage | None = None
    for stage in STAGES:
        cells = [cell for cell in plan.cells if stage in stages_of(cell, options)]
        if cells:
            jobs[stage] = _job(stage, before, cells, options)
            before = stage
    document = {
        "name": "uenv",
        # Not for every push or pull request: whoever may write to a branch would get a shell on the clusters.
        "on": {"workflow_dispatch": {}, "workflow_call": {}},
        "permissions": {"contents": "read"},
        "concurrency": {"group": "uenv-${{ github.ref }}", "cancel-in-progress": False},
        "env": {"UENVD_REGISTRY": "${{ vars.UENVD_REGISTRY }}"},
        "jobs": jobs,
    }
    return HEADER + yaml.dump(
        document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000, default_flow_style=False
    )


class _Dumper(yaml.SafeDumper):
    """No anchors: GitHub refuses them in places, and people read this."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def slug(cell: Cell) -> str:
    """Return a cell's name for artifacts, which can have no ``/``; unique, as a name of the configuration can have no ``+``."""
    return re.sub("/", "+", cell.id)


def _job(stage: Stage, before: Stage | None, cells: list[Cell], options: JobOptions) -> dict[str, Any]:
    job: dict[str, Any] = {"name": "${{ matrix.job }}"}
    if before is not None:
        job["needs"] = [before]
        job["if"] = "${{ !cancelled() }}"
    if stage == "deploy":
        job["if"] = (
            "${{ !cancelled() && github.event_name == 'workflow_dispatch' && github.ref_name == github.event.repository.default_branch }}"
        )
        job["environment"] = {"name": "deploy"}
    job["runs-on"] = "${{ matrix.runner }}"
    if options.image:
        job["container"] = {"image": options.image}
    job["timeout-minutes"] = TIMEOUT_H * 60
    job["strategy"] = {
        "fail-fast": False,
        "matrix": {"include": [_row(cell, stage, options) for cell in cells]},
    }
    job["env"] = {"UENV_CELL": "${{ matrix.cell }}", "UENV_EXECUTOR": "${{ matrix.executor }}"}
    job["steps"] = _steps(stage, before, options, secrets_of(cells))
    return job


def _row(cell: Cell, stage: Stage, options: JobOptions) -> dict[str, Any]:
    own = cell.runner.baremetal_tag if stage == "test" else None
    tag = own or cell.runner.slurm_tag
    runner = [_SELF_HOSTED, tag] if tag else list(options.runners) or [_SELF_HOSTED, cell.system]
    return {
        "job": cell.job_name(stage),
        "cell": cell.id,
        "artifact": slug(cell),
        "executor": executor_of(cell, options),
        "runner": runner,
    }


def _steps(
    stage: Stage, before: Stage | None, options: JobOptions, secrets: tuple[str, ...]
) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        {"uses": CHECKOUT, "with": {"fetch-depth": 0, "persist-credentials": False}},
    ]
    if before is not None:
        steps.append(
            {
                "name": f"Did the {before} pass",
                "uses": DOWNLOAD,
                "with": {"name": f"{before}-${{{{ matrix.artifact }}}}"},
            }
        )
    if options.before:
        steps.append({"name": "Prepare", "run": "\n".join(options.before)})
    words = [
        word if word.startswith('"$') else shlex.quote(word)
        for word in command(stage, '"$UENV_EXECUTOR"', '"$UENV_CELL"', options)
    ]
    steps.append(
        {
            "name": stage.capitalize(),
            "env": {name: f"${{{{ secrets.{name} }}}}" for name in (AUTH_SECRET, *secrets)},
            "run": f"{_LOG_IN}{' '.join(words)}\n",
        }
    )
    if stage == "build":
        steps.append(
            {
                "name": "Hand on the digest",
                "uses": UPLOAD,
                "with": {
                    "name": "build-${{ matrix.artifact }}",
                    "path": DOTENV_FILE,
                    "if-no-files-found": "error",
                    "overwrite": True,
                },
            }
        )
        steps.append(
            {
                "name": "Summary",
                "run": f'{{ echo "### $UENV_CELL"; cat {DOTENV_FILE}; }} >> "$GITHUB_STEP_SUMMARY"',
            }
        )
    elif stage == "test":
        steps += [
            {
                "name": "Report",
                "if": "${{ !cancelled() }}",
                "uses": UPLOAD,
                "with": {
                    "name": "report-${{ matrix.artifact }}",
                    "path": JUNIT_FILE,
                    "if-no-files-found": "ignore",
                    "overwrite": True,
                },
            },
            {
                "name": "It passed",
                "uses": UPLOAD,
                "with": {
                    "name": "test-${{ matrix.artifact }}",
                    "path": DOTENV_FILE,
                    "if-no-files-found": "error",
                    "overwrite": True,
                },
            },
        ]
    return steps
