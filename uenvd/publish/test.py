"""``uenvd-publish test``: test a published image by its digest, with ReFrame, and attach the report."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from contextlib import closing
from pathlib import Path

from uenvd.errors import UsageError
from uenvd.label import parse_namespaced_label
from uenvd.oci.reference import is_digest
from uenvd.oci.remote import Remote
from uenvd.publish.console import reporter, say, show, show_json
from uenvd.publish.deploy import find_digest
from uenvd.publish.options import (
    BUILD,
    add_registry_options,
    add_site_options,
    need_system,
    open_registry,
    parse_site_label,
    refuse,
)
from uenvd.publish.push import Target, target_of
from uenvd.publish.reframe.environments import TestEnvironment, parse_environments
from uenvd.publish.release import check_waiver
from uenvd.publish.smoke import SmokeTests, parse_smoke
from uenvd.publish.testing import Tested, Wishes, examine, require_pass

_REPORT_LIMIT_CHARS = 20_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "image",
        metavar="LABEL|DIGEST",
        help="[namespace::]name/version:tag@system%%uarch, with @sha256:… for :tag, or a bare sha256:…",
    )
    parser.add_argument("--namespace", metavar="NS", help=f"of the label, where it has none; default {BUILD}")
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="DIR",
        help="take environments and tests from this recipe's extra/ instead of the image",
    )
    parser.add_argument("--json", action="store_true", help="say the result as JSON")
    add_test_options(parser)
    add_site_options(parser)
    add_registry_options(parser)


def add_test_options(parser: argparse.ArgumentParser) -> None:
    """Add how to test; `uenvd.publish.run` has the same."""
    group = parser.add_argument_group("tests")
    group.add_argument(
        "--tests",
        action="append",
        default=[],
        type=Path,
        metavar="PATH",
        help="one more test file, or directory of them; may be repeated",
    )
    group.add_argument(
        "--waive-tests", metavar="REASON", help="accept that there are no tests, or none for an environment"
    )
    group.add_argument(
        "--through",
        choices=("auto", "uenvd", "file"),
        default="auto",
        help="mount by the uenvd of this machine or as a file of one's own; default: by uenvd if it can",
    )
    group.add_argument("--slurm", action="store_true", help="run the tests as jobs, with --uenv and --view")
    group.add_argument(
        "--slurm-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="of each job, such as --slurm-option=--account=x; may be repeated",
    )
    group.add_argument(
        "--partition", metavar="NAME", default="slurm", help="what tests call where jobs run; default slurm"
    )
    group.add_argument(
        "--timeout", type=duration, default=3600.0, metavar="TIME", help="of all tests together; default 1h"
    )
    group.add_argument(
        "--test-timeout",
        type=duration,
        default=600.0,
        metavar="TIME",
        help="of a test that says no time limit itself; default 10m",
    )
    group.add_argument(
        "--pass-env",
        action="append",
        default=[],
        metavar="NAME",
        help="a variable that tests shall see (else they start as after a plain login); may be repeated",
    )
    group.add_argument(
        "--workdir",
        type=Path,
        metavar="DIR",
        help="where a directory for this test is made, on Slurm one that all nodes see; default $TMPDIR, with --slurm here",
    )
    group.add_argument("--keep", action="store_true", help="keep that directory also if all tests pass")


def check_test_options(arguments: argparse.Namespace) -> None:
    """Refuse options of tests that have no effect beside the others, and a waiver without a reason. Raises `UsageError`."""
    check_waiver(arguments.waive_tests)
    if arguments.slurm:
        refuse(arguments, ("through",), "is for tests on this machine: jobs have the image by --uenv")
    else:
        refuse(arguments, ("slurm-option", "partition"), "is for jobs", hint="say --slurm, too")


def duration(text: str) -> float:
    """Convert ``90``, ``90s``, ``10m``, ``1h`` to seconds, for argparse."""
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:])
    try:
        seconds = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 7 * 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no time (for example 90s, 10m, 1h)")
    return seconds


def wishes_of(arguments: argparse.Namespace, workdir: Path, recipe: Path | None) -> Wishes:
    """Return what the options say. Raises `ConfigError`, `UsageError`."""
    check_waiver(arguments.waive_tests)
    environments: tuple[TestEnvironment, ...] | None = None
    own_tests: Path | None = None
    smoke: SmokeTests | None = None
    if recipe is not None:
        settings, own_tests = recipe / "extra/reframe.yaml", recipe / "extra/reframe"
        if not recipe.is_dir():
            raise UsageError(f"there is no recipe {recipe}")
        environments = ()
        if settings.is_file():
            environments = parse_environments(settings.read_text(errors="replace"), str(settings))
        own_tests = own_tests if own_tests.is_dir() else None
        extra = recipe / "extra/smoke.yaml"
        smoke = (
            parse_smoke(extra.read_text(errors="replace"), str(extra)) if extra.is_file() else SmokeTests()
        )
    return Wishes(
        workdir=workdir,
        tests=tuple(arguments.tests),
        environments=environments,
        own_tests=own_tests,
        smoke=smoke,
        through=arguments.through,
        slurm=arguments.slurm,
        slurm_options=tuple(arguments.slurm_option),
        partition=arguments.partition,
        limit_s=arguments.timeout,
        test_limit_s=arguments.test_timeout,
        waiver=arguments.waive_tests,
        passed_variables=tuple(arguments.pass_env),
    )


def make_workdir(arguments: argparse.Namespace) -> Path:
    """Make the directory of one test. Raises `UsageError`."""
    base = arguments.workdir or (Path.cwd() if arguments.slurm else None)
    try:
        return Path(tempfile.mkdtemp(prefix="uenv-test-", dir=base)).resolve()
    except OSError as error:
        raise UsageError(
            f"no directory can be made in {base or tempfile.gettempdir()}: {error.strerror}"
        ) from error


def tell(tested: Tested) -> None:
    """Say what came of a test."""
    if tested.failures:
        say(tested.failures[:_REPORT_LIMIT_CHARS])
    for case in tested.verdict.retried:
        say(f"note: {case} needed {case.attempts} attempts")
    if tested.waived is not None:
        say(f"note: missing tests were waived: {tested.waived}")
    for line in tested.compared.lines() if tested.compared is not None else ():
        say(line)
    say(f"{tested.verdict}; the report is attached to {tested.digest}")


def run(arguments: argparse.Namespace) -> int:
    """Test; the digest of the attached report goes to stdout."""
    check_test_options(arguments)
    workdir = make_workdir(arguments)
    passing = False
    try:
        with closing(open_registry(arguments)) as remote:
            target = image_target(arguments, remote)
            wishes = wishes_of(arguments, workdir, arguments.recipe)
            tested = examine(remote, target, wishes, say=say, progress=reporter("pulling"))
        tell(tested)
        if arguments.json:
            show_json(summary(tested))
        else:
            show(tested.attachment)
        passing = tested.passing
    finally:
        clean(workdir, keep=arguments.keep or not passing)
    require_pass(tested)
    return 0


def clean(workdir: Path, *, keep: bool) -> None:
    """Remove the directory of a test, or only the copy of the image in it and say where the rest is."""
    if keep and any(workdir.glob("*/reframe.out")):
        shutil.rmtree(workdir / "store", ignore_errors=True)
        say(f"everything that ReFrame wrote is in {workdir}")
    else:
        shutil.rmtree(workdir, ignore_errors=True)


def summary(tested: Tested) -> dict[str, object]:
    """Return the result for ``--json``."""
    verdict = tested.verdict
    return {
        "digest": tested.digest,
        "report": tested.attachment,
        "passing": tested.passing,
        "passed": verdict.passed,
        "failed": verdict.failed,
        "skipped": verdict.skipped,
        "built_in": verdict.ran - verdict.own,
        "waived": tested.waived,
        "mounted": tested.mounted,
        "problems": list(verdict.problems),
        "retried": [case.name for case in verdict.retried],
        "performance": tested.compared.to_json() if tested.compared is not None else None,
        "cases": [
            {"name": case.name, "environment": case.environment, "result": case.result, "reason": case.reason}
            for case in verdict.cases
        ],
    }


def image_target(arguments: argparse.Namespace, remote: Remote) -> Target:
    """Return where the image is. Raises `UsageError`, `LabelError`, `UnknownLabel` and, for a bare digest, the remote's errors."""
    text, recipe = arguments.image, arguments.recipe
    namespace = arguments.namespace or BUILD
    if is_digest(text) and recipe is None:
        return find_digest(remote, namespace, need_system(arguments), text)
    label = parse_site_label(arguments, f"@{text}" if is_digest(text) else text)
    if label.name is None and recipe is not None:
        named = parse_namespaced_label("/".join(recipe.resolve().parts[-2:]))
        label = label._replace(name=named.name, version=label.version or named.version)
    return target_of(str(label), None if label.namespace else namespace, digest_allowed=True)
