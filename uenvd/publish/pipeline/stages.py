"""The stages of a cell, each a command that may be killed and repeated: what the registry has already is not done again.

Order within a stage makes that safe. An image gets its blobs, its manifest by digest only, its attachments, and its tags last, the content
tag after all others: who finds that tag finds everything.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from uenvd.errors import DeployRefused, ManifestError, NotFound, UenvError, UnknownLabel
from uenvd.oci.files import locked
from uenvd.oci.index import read_index
from uenvd.oci.reference import repository_of
from uenvd.oci.remote import Progress, Remote, no_progress
from uenvd.publish.build import Built, build
from uenvd.publish.built import publish_built
from uenvd.publish.explain import why_not_there
from uenvd.publish.gate import check_tested
from uenvd.publish.options import BUILD, DEPLOY
from uenvd.publish.pipeline.identity import build_environment, content_tag, expanded
from uenvd.publish.pipeline.tasks import Failure, StageResult
from uenvd.publish.plan import Cell, Stage
from uenvd.publish.push import Target, give_tag
from uenvd.publish.recipe import Recipe, load_recipe
from uenvd.publish.release import Order, release
from uenvd.publish.testing import Tested, Wishes, examine, require_pass

IMAGES: Final = "images"
"""Directory of built images below the working directory, one for each content tag."""
_BUILD_PATIENCE_S: Final = 8 * 3600.0
"""How long a build waits for another cell's build of the same image."""
_SURVEYORS: Final = 8
Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """What the stages of a run have in common."""

    remote: Remote
    directory: Path
    """Where images are kept between build and push; on a cluster one that all nodes see."""
    cache: Path | None = None
    pipeline: str | None = None
    """One more tag for what is built."""
    order: Order | None = None
    """How to release; None: nothing is released."""
    retest: bool = False
    """Whether an image whose report passes is tested all the same."""
    say: Say = field(default=lambda _text: None)
    hashing: Progress = no_progress
    pushing: Progress = no_progress
    pulling: Progress = no_progress
    copying: Progress = no_progress


def repository(cell: Cell, namespace: str = BUILD) -> str:
    """Return where a cell's images are."""
    return repository_of(namespace, cell.system, cell.uarch, cell.name, cell.version)


def build_stage(work: Work, cell: Cell) -> StageResult:
    """Build, push and describe the image, unless it is there. Raises what the builder, the audit and the registry raise."""
    began_s = time.monotonic()
    recipe, tag = identify(cell)
    place = repository(cell)
    digest = find_digest(work.remote, place, tag)
    if digest is not None:
        if work.pipeline is not None:
            manifest = work.remote.manifest(place, digest)
            give_tag(work.remote, place, work.pipeline, manifest.raw, manifest.media_type)
        return StageResult(cell.id, "build", place, tag, digest, True, time.monotonic() - began_s)
    for reason in why_not_there(
        recipe, work.remote, place, environment=expanded(build_environment(cell), os.environ)
    ):
        work.say(f"because {reason}")
    built = _build(work, recipe, cell, tag)
    tags = [tag] if work.pipeline is None else [work.pipeline, tag]
    done = publish_built(work.remote, place, built, tags, hashing=work.hashing, pushing=work.pushing)
    for note in done.notes:
        work.say(f"note: {note}")
    size = f"{done.size_bytes / 1e6:.1f} MB"
    return StageResult(cell.id, "build", place, tag, done.digest, False, time.monotonic() - began_s, size)


def _build(work: Work, recipe: Recipe, cell: Cell, tag: str) -> Built:
    """Build, or take what another cell or a run that was killed built of the same inputs."""
    directory = work.directory / IMAGES
    directory.mkdir(parents=True, exist_ok=True)
    environment = expanded(build_environment(cell), os.environ)
    with locked(directory / f"{tag}.lock", _BUILD_PATIENCE_S):
        return build(
            recipe,
            directory / tag,
            cache=work.cache,
            say=work.say,
            environment=environment or None,
        )


def test_stage(work: Work, cell: Cell, wishes: Wishes) -> tuple[StageResult, Tested | None]:
    """Test the image and attach the report, unless one that passes is attached. Also returns what came of the tests, if they ran.

    A test that fails is a result with a failure, not an exception. Raises `UnknownLabel` where there is no image yet, and what `examine` raises.
    """
    began_s = time.monotonic()
    _recipe, tag = identify(cell)
    place = repository(cell)
    digest = find_digest(work.remote, place, tag)
    if digest is None:
        raise UnknownLabel(
            f"{place} has no image of this recipe ({tag})", hint="build it first: --stage build"
        )
    result = StageResult(cell.id, "test", place, tag, digest, True, 0.0)
    if not work.retest:
        remark = passed_before(work.remote, place, digest)
        if remark is not None:
            return replace(result, remark=remark, seconds=time.monotonic() - began_s), None
    tested = examine(work.remote, Target(place, digest), wishes, say=work.say, progress=work.pulling)
    failure = None
    try:
        require_pass(tested)
    except UenvError as error:
        failure = failure_of(error)
    return (
        replace(
            result,
            reused=False,
            seconds=time.monotonic() - began_s,
            remark=str(tested.verdict) if tested.waived is None else f"waived: {tested.waived}",
            failure=failure,
            cases=tuple((case.name, case.result, case.reason or "") for case in tested.verdict.cases),
        ),
        tested,
    )


def deploy_stage(work: Work, cell: Cell) -> StageResult:
    """Release the image as ``work.order`` says. Raises `DeployRefused`, and what `release` raises."""
    began_s = time.monotonic()
    assert work.order is not None
    _recipe, tag = identify(cell)
    place = repository(cell)
    digest = find_digest(work.remote, place, tag)
    if digest is None:
        raise UnknownLabel(
            f"{place} has no image of this recipe ({tag})", hint="build and test it first: --stage build"
        )
    result = StageResult(cell.id, "deploy", place, tag, digest, True, 0.0, f":{work.order.tag}")
    if released_before(work.remote, cell, digest, work.order.tag):
        return replace(result, seconds=time.monotonic() - began_s)
    release(
        work.remote, Target(place, digest), work.order, action="deploy", progress=work.copying, say=work.say
    )
    return replace(result, reused=False, seconds=time.monotonic() - began_s)


def identify(cell: Cell) -> tuple[Recipe, str]:
    """Return a cell's recipe and content tag. Raises `RecipeError`, `ConfigError`."""
    recipe = load_recipe(cell.recipe)
    return recipe, content_tag(cell, recipe)


def failure_of(error: UenvError) -> Failure:
    """Return an error as a value."""
    return Failure(error.code, error.message, error.hint, error.exit_status)


# --- what the registry has ----------------------------------------------------------------------------------------------------------


def find_digest(remote: Remote, place: str, tag: str) -> str | None:
    """Return the image of a tag, if there is one."""
    try:
        return remote.resolve(place, tag)
    except NotFound:
        return None


def passed_before(remote: Remote, place: str, digest: str) -> str | None:
    """Return how many tests passed by the newest report of an image, or why they were waived; None unless the image may pass."""
    try:
        return check_tested(remote, place, digest).remark
    except DeployRefused:
        return None


def released_before(remote: Remote, cell: Cell, digest: str, release: str) -> bool:
    """Whether the image was released under this tag to the end: the index, which is written last, has it."""
    try:
        index = read_index(remote, DEPLOY, cell.system)
    except (NotFound, ManifestError):
        return False
    target = repository(cell, DEPLOY)
    if not any(entry.digest == digest and release in entry.tags for entry in index.of_repository(target)):
        return False
    return find_digest(remote, target, release) == digest


def survey(
    work: Work, cells: Sequence[Cell], stages: Sequence[Stage]
) -> dict[tuple[str, Stage], StageResult]:
    """Return the results of the stages that need not be run, by cell id and stage: what an earlier run, or another, did.

    Raises the registry's errors. A cell that cannot be identified has no results: its build will say why.
    """

    def one(cell: Cell) -> list[StageResult]:
        try:
            _recipe, tag = identify(cell)
        except UenvError:
            return []
        place = repository(cell)
        digest = find_digest(work.remote, place, tag)
        if digest is None or (
            work.pipeline is not None and find_digest(work.remote, place, work.pipeline) != digest
        ):
            return []
        found = [StageResult(cell.id, "build", place, tag, digest, True, 0.0)]
        remark = None if work.retest else passed_before(work.remote, place, digest)
        if remark is not None:
            found.append(StageResult(cell.id, "test", place, tag, digest, True, 0.0, remark))
            order = work.order
            if order is not None and released_before(work.remote, cell, digest, order.tag):
                found.append(StageResult(cell.id, "deploy", place, tag, digest, True, 0.0, f":{order.tag}"))
        return found

    with ThreadPoolExecutor(_SURVEYORS) as pool:
        results = [result for found in pool.map(one, cells) for result in found]
    return {(result.cell, result.stage): result for result in results if result.stage in stages}
