"""What the jobs of all CI systems have in common: their commands, limits, and the secrets that the configuration refers to. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from uenvd.errors import UsageError
from uenvd.publish.plan.cell import DEFAULT_SITE, Cell, Stage

Executor = Literal["local", "slurm", "firecrest"]
EXECUTORS: Final[tuple[Executor, ...]] = ("local", "slurm", "firecrest")

DOTENV_FILE: Final = "uenv.env"
"""What a build job leaves to its test job: ``UENV_DIGEST`` and ``UENV_LABEL``, one ``KEY=VALUE`` a line."""
JUNIT_FILE: Final = "uenv-junit.xml"
TIMEOUT_H: Final = 8
"""Of a job: an environment that is compiled takes half an hour to three hours, and queues are long."""
HEADER: Final = "# Written by uenvd-publish plan --write; changes are lost when it is written again.\n"

_REFERENCE = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")


@dataclass(frozen=True)
class JobOptions:
    """How jobs are to be written.

    Args:
        config: the configuration's path relative to the repository's root, as the jobs see it.
        recipes: that of the recipes, where it is not ``recipes`` beside the configuration.
        deploy: the tag of releases; None writes no stage ``deploy``.
        executor: where the stages run; None: through FirecREST where the configuration says ``f7t``, in the job itself elsewhere.
        before: shell commands at the beginning of each job.
        image: the container image of the jobs.
        runners: tags (GitLab) or labels (GitHub) of the runners of clusters that name none.
        site: first part of the status contexts.
        policy: the file with what releases must fulfil, relative to the repository's root.

    """

    config: str = "config.yaml"
    recipes: str | None = None
    deploy: str | None = None
    executor: Executor | None = None
    before: tuple[str, ...] = ()
    image: str | None = None
    runners: tuple[str, ...] = ()
    site: str = DEFAULT_SITE
    policy: str | None = None


def stages_of(cell: Cell, options: JobOptions) -> tuple[Stage, ...]:
    """Return the stages that are written for a cell."""
    return ("build", "test", "deploy") if options.deploy and cell.deploy else ("build", "test")


def executor_of(cell: Cell, options: JobOptions) -> Executor:
    """Return where a cell's stages run."""
    return options.executor or ("firecrest" if cell.runner.firecrest else "local")


def command(stage: Stage, executor: str, cell: str, options: JobOptions) -> list[str]:
    """Return the words of the one command of a job; ``executor`` and ``cell`` may be shell words that stand for them."""
    words = ["uenvd-publish", "run", "--config", options.config]
    if options.recipes is not None:
        words += ["--recipes", options.recipes]
    words += ["--cell", cell, "--stage", stage, "--executor", executor]
    if stage == "build":
        words += ["--dotenv", DOTENV_FILE]
    if stage == "test":
        words += ["--junit", JUNIT_FILE]
    if stage == "deploy" and options.deploy is not None:
        words += ["--deploy", options.deploy]
        if options.policy is not None:
            words += ["--policy", options.policy]
    return words


def secrets_of(cells: Iterable[Cell]) -> tuple[str, ...]:
    """Return the names of the variables to which values of the configuration refer (``$NAME``), sorted: they are secrets of the CI system."""
    return tuple(
        sorted(
            {
                match[1] or match[2]
                for cell in cells
                for value in cell.variables.values()
                for match in _REFERENCE.finditer(value)
            }
        )
    )


def require_cells(cells: Sequence[Cell], most: int, system: str) -> None:
    """Raise `UsageError` where a CI system would refuse so many jobs, or none."""
    if not cells:
        raise UsageError("no cell is left to write jobs for", hint="uenvd-publish plan lists the cells")
    if len(cells) > most:
        raise UsageError(
            f"{len(cells)} cells are more than {system} takes in one pipeline ({most})",
            hint="choose some: NAME/VERSION patterns, --system, --uarch, --changed BASE",
        )
