"""The smallest piece of a site's plan: one image to build, test and publish; and what is wrong with a plan. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

from uenvd.publish.recipe.model import DEFAULT_MOUNT

Stage = Literal["build", "test", "deploy"]
STAGES: Final[tuple[Stage, ...]] = ("build", "test", "deploy")
DEFAULT_SITE: Final = "cscs"
"""First part of status contexts, as branch protection rules of existing repositories have it."""

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Runner:
    """Who runs a cluster's jobs: tags of CI runners, or FirecREST where there are none (``runner: f7t``)."""

    firecrest: bool = True
    slurm_tag: str | None = None
    baremetal_tag: str | None = None


@dataclass(frozen=True)
class Cell:
    """One image: name x version x system x uarch.

    `variables` are those of the cluster's target (``SLURM_*`` and others), read-only.
    """

    name: str
    version: str
    system: str
    uarch: str
    recipe: Path
    """The recipe's directory, absolute."""
    mount: str = DEFAULT_MOUNT
    deploy: bool = False
    """Whether the site's configuration lists it under ``deploy``."""
    partition: str | None = None
    variables: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    no_bwrap: bool = False
    """Whether the cluster cannot run bubblewrap."""
    runner: Runner = field(default_factory=Runner)

    @property
    def uenv(self) -> str:
        """``name/version``."""
        return f"{self.name}/{self.version}"

    @property
    def label(self) -> str:
        """``name/version@system%uarch``."""
        return f"{self.name}/{self.version}@{self.system}%{self.uarch}"

    @property
    def id(self) -> str:
        """``name/version-system/uarch``: unique in a plan, and the tail of its job names."""
        return f"{self.name}/{self.version}-{self.system}/{self.uarch}"

    def job_name(self, stage: Stage) -> str:
        """Return ``build-prgenv-gnu/23.11-clariden/a100``."""
        return f"{stage}-{self.id}"

    def context(self, site: str = DEFAULT_SITE) -> str:
        """Return the context of the commit status: ``cscs/eiger-zen2-prgenv-gnu:23.11``."""
        return f"{site}/{self.system}-{self.uarch}-{self.name}:{self.version}"


@dataclass(frozen=True)
class Problem:
    """Something wrong in the configuration or in a recipe.

    `about` names what it concerns: cell ids, or ``name/version`` where no cell could be made; empty for the plan as a whole.
    """

    file: str
    line: int
    """From 1; 0 where the file as a whole is meant."""
    key: str
    """Dotted, ``uenvs.app.1.0.deploy.daint``; empty for the file as a whole."""
    text: str
    severity: Severity = "error"
    hint: str = ""
    about: tuple[str, ...] = ()

    def __str__(self) -> str:
        """``file:line: key: text``, as compilers write it."""
        place = f"{self.file}:{self.line}" if self.line else self.file
        words = [place] + ([self.key] if self.key else []) + [self.text]
        return ": ".join(words)
