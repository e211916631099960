"""What is to be done and what came of it, as values. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from uenvd.publish.plan import Cell, Stage

RESULT_MARK: Final = "uenvd-stage"
"""First key of a stage's result, which is one line of JSON: what else a login shell prints is told from it."""
SCHEMA: Final = 1
_KEY_DIGITS: Final = 20


class State(StrEnum):
    """Where a stage of a cell is. The last five are final."""

    WAITING = "waiting"
    """For the stage before it, or for room."""
    QUEUED = "queued"
    """At the batch system."""
    RUNNING = "running"
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    """Not begun: a stage before it failed."""
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether nothing more happens to it in this run."""
        return self not in (State.WAITING, State.QUEUED, State.RUNNING)


@dataclass(frozen=True)
class Task:
    """One stage of one cell."""

    cell: Cell
    stage: Stage
    tag: str
    """Content tag of the image."""
    scope: str
    """What else makes two tasks of one name different: the registry, the release's tag."""

    @property
    def name(self) -> str:
        """As in CI and in the queue: ``build-prgenv-gnu/23.11-clariden/a100``."""
        return self.cell.job_name(self.stage)

    @property
    def key(self) -> str:
        """20 hex digits by which the job of an earlier run is recognised."""
        text = "\0".join((self.name, self.tag, self.scope))
        return hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]

    @property
    def file_stem(self) -> str:
        """A file name of its own."""
        return self.name.replace("/", "_")


@dataclass(frozen=True)
class Failure:
    """Why a stage failed."""

    code: str
    """Of `uenvd.errors`."""
    message: str
    hint: str = ""
    status: int = 1
    """Exit status, 1..255."""


@dataclass(frozen=True)
class StageResult:
    """What a stage did, as its command prints it."""

    cell: str
    """Its id."""
    stage: Stage
    repository: str
    tag: str
    digest: str | None
    """Of the image's manifest; None where there is none yet."""
    reused: bool
    """Whether the registry had it already."""
    seconds: float
    remark: str = ""
    """For humans: size, number of tests, release."""
    failure: Failure | None = None
    cases: tuple[tuple[str, str, str], ...] = ()
    """Of the stage test: (name, result, reason) of each test case."""

    @property
    def passed(self) -> bool:
        """Whether the next stage may begin."""
        return self.failure is None

    def encode(self) -> str:
        """Return one line of JSON."""
        body: dict[str, Any] = {
            RESULT_MARK: SCHEMA,
            "cell": self.cell,
            "stage": self.stage,
            "passed": self.passed,
            "repository": self.repository,
            "tag": self.tag,
            "digest": self.digest,
            "reused": self.reused,
            "seconds": round(self.seconds, 1),
            "remark": self.remark,
            "failure": None if self.failure is None else vars(self.failure),
            "cases": [list(case) for case in self.cases],
        }
        return json.dumps(body)


def find_result(output: str, task: Task) -> StageResult | None:
    """Return the last result of this task in what a job printed; None if there is none that can be believed."""
    for line in reversed(output.splitlines()):
        if not line.startswith('{"' + RESULT_MARK):
            continue
        try:
            result = _decode(json.loads(line))
        except (ValueError, KeyError, TypeError):
            continue
        if (result.cell, result.stage) == (task.cell.id, task.stage):
            return result
    return None


def _decode(body: Mapping[str, Any]) -> StageResult:
    if body[RESULT_MARK] != SCHEMA or body["stage"] not in ("build", "test", "deploy"):
        raise ValueError("another kind of result")
    failure = body["failure"]
    digest = body["digest"]
    return StageResult(
        str(body["cell"]),
        body["stage"],
        str(body["repository"]),
        str(body["tag"]),
        None if digest is None else str(digest),
        bool(body["reused"]),
        float(body["seconds"]),
        str(body["remark"]),
        None
        if failure is None
        else Failure(
            str(failure["code"]), str(failure["message"]), str(failure["hint"]), int(failure["status"])
        ),
        tuple((str(name), str(result), str(reason)) for name, result, reason in body["cases"]),
    )
