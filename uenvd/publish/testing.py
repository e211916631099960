"""Test a published image: pull it back by digest, mount it, run ReFrame in it, attach the report. The library of ``uenvd-publish test``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from uenvd.cache.pull import pull_blob
from uenvd.cache.store import Store
from uenvd.errors import ConfigError, ResourceMissing, TestsFailed, UnknownLabel, UsageError
from uenvd.errors import NotFound as NotInRegistry
from uenvd.oci.attach import REFRAME_TYPE, VERDICT, attach, json_content
from uenvd.oci.manifest import Manifest, squashfs_layer
from uenvd.oci.reference import split_repository
from uenvd.oci.remote import Progress, Remote, never
from uenvd.publish import mountpoint
from uenvd.publish.comparison import Compared, performance_of
from uenvd.publish.push import Target
from uenvd.publish.reframe.builtin import OWN_ENVIRONMENT, write_tests
from uenvd.publish.reframe.environments import IMAGE_FILE, TESTS_DIRECTORY, TestEnvironment
from uenvd.publish.reframe.extras import Extras, read_extras
from uenvd.publish.reframe.report import TESTED, WAIVED, Verdict, cleaned, join, judge, with_problem
from uenvd.publish.reframe.session import Outcome, failure_info, login_environ, require_reframe, run_session
from uenvd.publish.reframe.site import Site, SlurmJobs, environment_name, wanted_views
from uenvd.publish.smoke import SmokeTests, check_views, scripts
from uenvd.views import ImageMeta

Through = Literal["auto", "uenvd", "file"]
COVERAGE_CASE: Final = "reframe-coverage"
"""Name of the made-up test case that stands for an environment without tests."""
DEFAULT_MOUNT: Final = "/user-environment"
REPORT_TITLE: Final = "report.json"
_ASK_S: Final = 30.0


@dataclass(frozen=True)
class Wishes:
    """How an image is to be tested."""

    workdir: Path
    """An empty directory of this test's own; on Slurm one that all nodes see."""
    tests: tuple[Path, ...] = ()
    """Test files and directories besides the image's own."""
    environments: tuple[TestEnvironment, ...] | None = None
    """Instead of the image's own; None: the image's."""
    own_tests: Path | None = None
    """Directory of test files instead of the image's own."""
    smoke: SmokeTests | None = None
    """What the recipe adds to the built-in tests, instead of what the image says."""
    through: Through = "auto"
    slurm: bool = False
    slurm_options: tuple[str, ...] = ()
    partition: str = "slurm"
    limit_s: float = 3600.0
    test_limit_s: float = 600.0
    waiver: str | None = None
    """Why it does not matter that there are no tests, or none for an environment."""
    passed_variables: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))


@dataclass(frozen=True)
class Tested:
    """What came of a test."""

    digest: str
    """Of the manifest that was tested."""
    verdict: Verdict
    waived: str | None
    """The reason, if it was needed."""
    report: bytes
    """As it was attached."""
    attachment: str
    """Digest of the report's manifest."""
    mounted: str
    """How the image was mounted, for humans."""
    failures: str
    """ReFrame's own account of the failed tests."""
    compared: Compared | None = None
    """Its performance against the release before it; None where there is nothing to compare."""

    @property
    def passing(self) -> bool:
        """Whether the image may be deployed as far as tests are concerned."""
        return self.verdict.passing or (
            self.verdict.empty and not self.verdict.failed and self.waived is not None
        )


def resolve(remote: Remote, target: Target) -> Manifest:
    """Return the manifest of a target; whatever its tag means later, this is what is tested. Raises `UnknownLabel`, `ManifestError`."""
    try:
        manifest = remote.manifest(target.repository, target.reference)
    except NotInRegistry as error:
        raise UnknownLabel(
            f"there is no such image: {error.message}", hint="check the label and the registry"
        ) from error
    squashfs_layer(manifest)
    return manifest


def examine(
    remote: Remote, target: Target, wishes: Wishes, *, say: Callable[[str], None], progress: Progress
) -> Tested:
    """Test an image and attach the report, whatever it says.

    Raises `UnknownLabel`, `ManifestError`, `ResourceMissing`, `UnknownView` and `ConfigError` (the image's tests cannot be used),
    `UsageError`, and the remote's errors: then nothing was tested and nothing is attached.
    """
    require_reframe()
    manifest = resolve(remote, target)
    image = pull_back(remote, target.repository, manifest, wishes.workdir / "store", progress)
    plan = _plan(target, manifest, image, wishes)
    mounted, outcomes = _run(remote, plan, wishes, say)
    report = join([outcome.report for outcome in outcomes])
    report, waived = _covered(plan, report, wishes.waiver)
    verdict = judge(report)
    if verdict.empty and not verdict.failed:
        waived = wishes.waiver
    report = cleaned(report, _private(plan))
    word = "pass" if verdict.passing else "waived" if verdict.empty and waived is not None else "fail"
    notes = {TESTED: manifest.digest, VERDICT: word} | ({WAIVED: waived} if waived is not None else {})
    attachment = attach(
        remote, target.repository, manifest.digest, REFRAME_TYPE, [json_content(REPORT_TITLE, report)], notes
    )
    failures = "\n\n".join(filter(None, map(failure_info, outcomes)))
    compared = performance_of(remote, target.repository, manifest.digest, report=report)
    return Tested(manifest.digest, judge(report), waived, report, attachment, mounted, failures, compared)


def require_pass(tested: Tested) -> None:
    """Raise `TestsFailed` unless the image passed."""
    if tested.passing:
        return
    lines = "\n".join(f"  {problem}" for problem in tested.verdict.problems)
    if tested.verdict.empty and not tested.verdict.failed:
        raise TestsFailed(
            f"no test was run on {tested.digest}:\n{lines}",
            hint=f"put tests into {TESTS_DIRECTORY.removeprefix('meta/')} of the recipe and what they need into "
            f"{IMAGE_FILE.removeprefix('meta/')}, or say why there are none: --waive-tests REASON",
        )
    raise TestsFailed(f"{tested.verdict.failed} of {len(tested.verdict.cases)} tests failed:\n{lines}")


# --- the image ----------------------------------------------------------------------------------------------------------------------


def pull_back(remote: Remote, repository: str, manifest: Manifest, root: Path, progress: Progress) -> Path:
    """Return the image's squashfs file in a store of its own: pulled by digest, verified. Raises the remote's errors, `StorageError`."""
    layer = squashfs_layer(manifest)
    store = Store(root)
    store.prepare()
    pull_blob(remote, repository, layer, store, progress=progress, cancelled=never)
    store.put_manifest(repository, manifest, layer)
    return root / "blobs" / layer.digest.replace(":", "/")


# --- what is tested -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Everything that is known before ReFrame starts."""

    target: Target
    manifest: Manifest
    image: Path
    name: str
    system: str
    uarch: str
    label: str
    """With the digest: a description for uenvd."""
    mount: str
    meta: ImageMeta | None
    environments: tuple[TestEnvironment, ...]
    tests: tuple[Path, ...]
    smoke: SmokeTests
    environ: Mapping[str, str]
    workdir: Path


def _plan(target: Target, manifest: Manifest, image: Path, wishes: Wishes) -> _Plan:
    parts = split_repository(target.repository)
    if parts is None:
        raise UsageError(f"{target.repository} is no repository of images")
    namespace, system, uarch, name, version = parts
    extras: Extras = read_extras(image, wishes.workdir / "tests", f"{name}/{version}")
    environments = wishes.environments if wishes.environments is not None else extras.environments
    own = wishes.own_tests if wishes.own_tests is not None else extras.tests
    tests = [path.absolute() for path in ((own, *wishes.tests) if own is not None else wishes.tests)]
    for path in tests:
        if not path.exists():
            raise UsageError(
                f"{path} does not exist", hint="--tests names a test file or a directory of them"
            )
    meta = extras.meta
    smoke = wishes.smoke if wishes.smoke is not None else extras.smoke
    unknown = check_views(smoke, meta)
    if unknown is not None:
        raise ConfigError(
            f"the smoke tests of {name}/{version} name the view {unknown!r}, which the image has not"
        )
    return _Plan(
        target=target,
        manifest=manifest,
        image=image,
        name=name,
        system=system,
        uarch=uarch,
        label=f"{namespace}::{name}/{version}@{system}%{uarch}@{manifest.digest}",
        mount=(meta.mount if meta is not None else None) or DEFAULT_MOUNT,
        meta=meta,
        environments=environments or (),
        tests=tuple(tests),
        smoke=smoke,
        environ=login_environ(wishes.environ, wishes.passed_variables),
        workdir=wishes.workdir,
    )


@dataclass(frozen=True)
class _Session:
    """One run of ReFrame."""

    site: Site
    environments: Sequence[TestEnvironment]
    tests: tuple[Path, ...]
    entry: tuple[str, ...] = ()
    source: str | None = None


def _run(
    remote: Remote, plan: _Plan, wishes: Wishes, say: Callable[[str], None]
) -> tuple[str, list[Outcome]]:
    """Run the sessions: with the image and, where environments say so, without; return how it was mounted and what came of them."""
    with_uenv = [one for one in plan.environments if one.uenv]
    without = [one for one in plan.environments if not one.uenv]
    sessions: list[_Session]
    if wishes.slurm:
        jobs = SlurmJobs(
            plan.label,
            f"uenvd:{plan.manifest.digest}",
            wishes.slurm_options,
            wishes.partition,
            _slurm_backend(plan.environ),
        )
        site = _site(plan, wishes, "slurm", jobs)
        sessions = []
        if with_uenv:
            sessions = [
                _Session(site, plan.environments, (*plan.tests, _smoke_tests(plan, site, with_uenv[0])))
            ]
        else:
            if without:
                sessions.append(_Session(site, without, plan.tests))
            site = _site(plan, wishes, "slurm-smoke", jobs)
            sessions.append(_Session(site, [OWN_ENVIRONMENT], (_smoke_tests(plan, site, OWN_ENVIRONMENT),)))
        mounted = f"--uenv={plan.label}"
    else:
        sessions = []
        site = _site(plan, wishes, "uenv", None)
        entry, source, mounted = _entry(remote, plan, wishes, say)
        # Tests that name no environment do not run in the one that is made up for the built-in ones.
        environments = with_uenv or [OWN_ENVIRONMENT]
        tests = plan.tests if with_uenv else ()
        tests = (*tests, _smoke_tests(plan, site, environments[0]))
        sessions.append(_Session(site, environments, tests, entry, source))
        if without:
            sessions.append(_Session(_site(plan, wishes, "host", None), without, plan.tests))
    for session in sessions:
        for environment in session.environments:
            wanted_views(session.site, environment)
    outcomes = []
    for session in sessions:
        inside = session.source is not None or session.site.slurm is not None
        say(f"running ReFrame with the image in {mounted}" if inside else "running ReFrame without any uenv")
        outcomes.append(
            run_session(
                session.site,
                session.environments,
                session.tests,
                entry=session.entry,
                source=session.source,
                limit_s=wishes.limit_s,
                say=say,
            )
        )
    return mounted, outcomes


def _smoke_tests(plan: _Plan, site: Site, environment: TestEnvironment) -> Path:
    """Write the built-in tests, to be run in an environment; return their file."""
    made = scripts(plan.meta, plan.mount, plan.smoke, plan.environ)
    return write_tests(site.workdir / "smoke", made, environment_name(site, environment))


def _site(plan: _Plan, wishes: Wishes, name: str, slurm: SlurmJobs | None) -> Site:
    workdir = plan.workdir / name
    workdir.mkdir()
    return Site(
        name=plan.name,
        meta=plan.meta,
        system=plan.system,
        uarch=plan.uarch,
        environ=plan.environ,
        workdir=workdir,
        test_limit_s=wishes.test_limit_s,
        slurm=slurm,
    )


def _covered(plan: _Plan, report: bytes, waiver: str | None) -> tuple[bytes, str | None]:
    """Return the report with a failed case for each environment in which no test was run; or the waiver, if that was needed.

    A report of no tests at all is left as it is: it fails for itself.
    """
    verdict = judge(report)
    if verdict.empty or verdict.failed:
        return report, None
    site = Site(plan.name, plan.meta, plan.system, plan.uarch, {}, plan.workdir, 0)
    missing = [one for one in plan.environments if not verdict.of_environment(environment_name(site, one))]
    if plan.tests and not plan.environments and not verdict.own:
        missing = [OWN_ENVIRONMENT]
    if not missing or waiver is not None:
        return report, waiver if missing else None
    for environment in missing:
        what = (
            f"no test was selected for '{environment.name}'"
            if environment is not OWN_ENVIRONMENT
            else f"there are tests, and no environment to run them in ({IMAGE_FILE})"
        )
        report = with_problem(report, f"{COVERAGE_CASE}-{environment.name}", what)
    return report, None


def _private(plan: _Plan) -> dict[str, str]:
    """Return what a report must not say, and what it says instead."""
    places = {
        plan.environ.get("HOME", ""): "HOME",
        str(Path(__file__).parents[1]): "UENVD",
        sys.prefix: "PREFIX",
        os.path.realpath(sys.prefix): "PREFIX",
        str(plan.workdir): "WORKDIR",
        **{str(path if path.is_dir() else path.parent): "TESTS" for path in plan.tests},
    }
    # /usr, /tmp and /root tell nothing, and to replace them would spoil what else is said.
    found = {place: name for place, name in places.items() if place.count("/") > 1}
    user = plan.environ.get("USER") or plan.environ.get("LOGNAME") or ""
    return found if user in ("", "root") else found | {user: "USER"}


# --- how it is mounted --------------------------------------------------------------------------------------------------------------


def _entry(
    remote: Remote, plan: _Plan, wishes: Wishes, say: Callable[[str], None]
) -> tuple[tuple[str, ...], str, str]:
    """Return the words that go before a command so that it runs in the mount, what that mount says it is, and how it is for humans."""
    uenvctl = (sys.executable, "-I", "-m", "uenvd.ctl.main", "run")
    if wishes.through != "file":
        refusal = _refusal(remote, plan)
        if refusal is None:
            # The mount point is the daemon's to know: from the same metadata.
            return (*uenvctl, plan.label, "--"), f"uenvd:{plan.manifest.digest}", "a mount of uenvd"
        if wishes.through == "uenvd":
            raise ResourceMissing(
                f"uenvd cannot mount this image: {refusal}", hint="without uenvd: --through file"
            )
        say(f"without uenvd ({refusal})")
    # A name without special characters, whatever the working directory is called.
    link = plan.workdir / "uenv" / "image.squashfs"
    link.symlink_to(plan.image) if not link.is_symlink() else None
    words = (*uenvctl, f"./image.squashfs:{plan.mount}", "--")
    return (
        (*mountpoint.words(plan.mount, plan.workdir / "root"), *words),
        f"uenvd:{os.path.realpath(plan.image)}",
        "a mount of the user's own",
    )


def _refusal(remote: Remote, plan: _Plan) -> str | None:
    """Return why uenvd on this machine cannot mount the image by its digest; None if it can."""
    command = [sys.executable, "-I", "-m", "uenvd.ctl.main", "status", "--json"]
    try:
        done = subprocess.run(
            command, env=plan.environ, capture_output=True, text=True, timeout=_ASK_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "it does not answer"
    if done.returncode != 0:
        return _said(done.stderr)
    status = json.loads(done.stdout)
    if status["daemon"] is None:
        return str(status["error"])
    if status["daemon"].get("registry") != str(remote.address):
        return "it uses another registry"
    command = [sys.executable, "-I", "-m", "uenvd.ctl.main", "image", "inspect", plan.label]
    try:
        done = subprocess.run(
            command, env=plan.environ, capture_output=True, text=True, timeout=_ASK_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "it does not answer"
    return None if done.returncode == 0 else _said(done.stderr)


def _said(stderr: str) -> str:
    """Return the first line of a program's complaint, without the program's name."""
    line = next((line for line in stderr.splitlines() if line.strip()), "it gave no reason")
    return line.partition(": ")[2] or line


def _slurm_backend(environ: Mapping[str, str]) -> Literal["slurm", "squeue"]:
    """Return how ReFrame can follow jobs. Raises `ResourceMissing` without Slurm."""
    path = environ.get("PATH")
    for program in ("sbatch", "srun", "squeue"):
        if shutil.which(program, path=path) is None:
            raise ResourceMissing(
                f"there is no {program} here", hint="tests without Slurm run without --slurm"
            )
    if shutil.which("sacct", path=path) is None:
        return "squeue"
    try:
        done = subprocess.run(
            ["sacct", "-n", "-X", "-S", "now"], env=environ, capture_output=True, timeout=_ASK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "squeue"
    return "slurm" if done.returncode == 0 else "squeue"
