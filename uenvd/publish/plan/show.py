"""How a plan's problems are shown, and counted in an exit status; a plan as JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uenvd.errors import RecipeError
from uenvd.publish.console import say
from uenvd.publish.plan.cell import STAGES, Cell, Problem


def say_problems(problems: Sequence[Problem]) -> None:
    """Write problems to stderr as compilers do, ``FILE:LINE: error: KEY: TEXT``, paths relative to where the user is."""
    here = f"{Path.cwd()}{os.sep}"
    hints: set[str] = set()
    for problem in problems:
        place = f"{problem.file}:{problem.line}" if problem.line else problem.file
        key = f"{problem.key}: " if problem.key else ""
        text = f"{place}: {problem.severity}: {key}{problem.text}".replace(here, "")
        say(text)
        if problem.hint and problem.hint not in hints:
            hints.add(problem.hint)
            say(f"hint: {problem.hint}")


def require_none(problems: Sequence[Problem], *, strict: bool = False) -> None:
    """Raise `RecipeError` if there is an error among the problems; with ``strict``, if there are any."""
    errors = sum(problem.severity == "error" for problem in problems)
    warnings = len(problems) - errors
    if errors or (strict and warnings):
        counts = [
            f"{count} {word}{'s' if count > 1 else ''}"
            for count, word in ((errors, "error"), (warnings, "warning"))
            if count
        ]
        raise RecipeError(f"{' and '.join(counts)} (see above)", hint="docs/pipelines.md, docs/recipes.md")


def cell_as_json(cell: Cell, site: str) -> dict[str, Any]:
    """Return all that is known of a cell."""
    return {
        "id": cell.id,
        "label": cell.label,
        "name": cell.name,
        "version": cell.version,
        "system": cell.system,
        "uarch": cell.uarch,
        "recipe": os.path.relpath(cell.recipe),
        "mount": cell.mount,
        "deploy": cell.deploy,
        "partition": cell.partition,
        "variables": dict(cell.variables),
        "no_bwrap": cell.no_bwrap,
        "runner": {
            "firecrest": cell.runner.firecrest,
            "slurm-tag": cell.runner.slurm_tag,
            "baremetal-tag": cell.runner.baremetal_tag,
        },
        "jobs": {stage: cell.job_name(stage) for stage in STAGES},
        "context": cell.context(site),
    }


def problem_as_json(problem: Problem) -> dict[str, Any]:
    """Return a problem."""
    return {
        "file": os.path.relpath(problem.file) if Path(problem.file).is_absolute() else problem.file,
        "line": problem.line or None,
        "key": problem.key or None,
        "text": problem.text,
        "severity": problem.severity,
        "hint": problem.hint or None,
        "about": list(problem.about),
    }
