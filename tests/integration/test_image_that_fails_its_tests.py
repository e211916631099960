"""uenvd-publish test with real ReFrame: an image passes or fails, and the registry knows which; nothing that goes wrong passes by mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.daemon import running_daemon
from support.fusetools import until
from support.publishing import Publisher
from support.reframetests import (
    CRASHES,
    FAILS,
    HANGS,
    HOST,
    MEASURES,
    SAYS,
    UNLOADABLE,
    WITH_HOST,
    image_with_tests,
)
from support.users import TestUser, ordinary_user
from uenvd.oci.attach import REFRAME_TYPE, VERDICT, attachments
from uenvd.oci.manifest import Manifest
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import open_remote
from uenvd.publish.reframe.report import TESTED, WAIVED, judge

PUBLISH = str(Path(sys.executable).parent / "uenvd-publish")
FAILED = 105
DEADLINE_S = 60.0

pytestmark = pytest.mark.usefixtures("node")


@dataclass
class Pipeline:
    """An ordinary user with a registry of his own, on a machine without daemon."""

    user: TestUser
    directory: Path
    images: int = 0

    @property
    def registry(self) -> str:
        return f"oci-layout:{self.directory / 'registry'}"

    @property
    def environ(self) -> dict[str, str]:
        return {
            **self.user.environ(),
            "UENVD_SOCKET": str(self.directory / "no-socket"),
            "UENVD_REGISTRY": self.registry,
            "TMPDIR": str(self.user.home),
            "SECRET_TOKEN": "hunter2",
        }

    def push(self, **how: Any) -> str:
        """Push an image with these tests under build/demo/zen3/app/1:N; return its digest."""
        self.images += 1
        image = image_with_tests(self.directory / "app.squashfs", **how)
        digest = Publisher(self.registry, namespace="build").push(image, "app/1", str(self.images))
        for path in (self.directory / "registry").rglob("*"):
            os.chown(path, self.user.uid, self.user.gid)
        os.chown(self.directory / "registry", self.user.uid, self.user.gid)
        return digest

    def start(self, *words: str, image: str = "", **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [PUBLISH, "test", image or f"app/1:{self.images}@demo%zen3", *words],
            env={**self.environ, **environ},
            cwd=self.user.home,
            user=self.user.uid,
            group=self.user.gid,
            extra_groups=[],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def test(self, *words: str, image: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        with self.start(*words, image=image, **environ) as process:
            try:
                out, err = process.communicate(timeout=DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def report(self, digest: str) -> tuple[Manifest, bytes]:
        """Return the newest report that is attached to a digest."""
        remote = open_remote(parse_registry(self.registry))
        manifest = attachments(remote, "build/demo/zen3/app/1", digest, REFRAME_TYPE)[0]
        return manifest, remote.small_blob("build/demo/zen3/app/1", manifest.layers[0], 1 << 24)


@pytest.fixture(scope="module")
def pipeline_for_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    del tmp_path_factory  # its directories are closed to others
    import shutil
    import tempfile

    directory = Path(tempfile.mkdtemp(prefix="uenvd-test-", dir="/var/tmp"))
    directory.chmod(0o755)
    try:
        with ordinary_user(directory) as user:
            yield Pipeline(user, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def pipeline(node: None, pipeline_for_all: Pipeline) -> Iterator[Pipeline]:
    yield pipeline_for_all

    def nothing_left() -> bool:
        command = ["ps", "-o", "stat=", "-u", str(pipeline_for_all.user.uid)]
        states = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        return all(state.startswith("Z") for state in states)  # zombies wait for init

    until(nothing_left, "the end of the user's processes")
    table = Path("/proc/self/mountinfo").read_text()
    assert "/user-environment" not in [line.split()[4] for line in table.splitlines()]
    assert str(pipeline_for_all.directory) not in table


def test_a_passing_image_is_attested_by_digest(pipeline: Pipeline) -> None:
    digest = pipeline.push(environments=WITH_HOST, says=SAYS, host=HOST)
    done = pipeline.test("--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["digest"], result["passing"], result["passed"], result["built_in"]) == (digest, True, 3, 1)
    manifest, report = pipeline.report(digest)
    assert manifest.digest == result["report"]
    assert manifest.subject is not None
    assert manifest.subject.digest == digest
    assert manifest.annotations[TESTED] == digest
    assert manifest.annotations[VERDICT] == "pass"
    assert sorted(case.environment for case in judge(report).cases) == ["app_default", "app_default", "host"]
    # With the image and, as reframe.yaml says, without.
    assert "with the image in a mount of the user's own" in done.stderr
    assert "without any uenv" in done.stderr
    # Nothing private is published, and nothing is left.
    for private in (str(pipeline.directory), pipeline.user.name, os.uname().nodename + '"', sys.prefix):
        assert private not in report.decode(), private
    assert list(pipeline.user.home.glob("uenv-test-*")) == []


def test_a_failing_image_is_reported_as_such(pipeline: Pipeline) -> None:
    digest = pipeline.push(says=SAYS, fails=FAILS)
    done = pipeline.test()
    assert done.returncode == FAILED
    assert "1 of 3 tests failed" in done.stderr
    assert "pattern 'something else' not found" in done.stderr
    manifest, report = pipeline.report(digest)
    assert done.stdout.strip() == manifest.digest
    assert manifest.annotations[VERDICT] == "fail"
    assert judge(report).failed == 1
    (kept,) = pipeline.user.home.glob("uenv-test-*")
    assert str(kept) in done.stderr
    assert (kept / "uenv/reframe.out").exists()


def test_no_selected_test_is_a_failure_unless_waived(pipeline: Pipeline) -> None:
    digest = pipeline.push(environments="default: {features: [mute]}\n", says=SAYS)
    done = pipeline.test()
    assert done.returncode == FAILED
    assert "no test was selected for 'default'" in done.stderr
    manifest, report = pipeline.report(digest)
    assert manifest.annotations[VERDICT] == "fail"
    assert (
        judge(report).of_environment("app_default") == 0
    )  # the built-in test that was run there is no test of it
    done = pipeline.test("--waive-tests", "holds data only")
    assert done.returncode == 0, done.stderr
    manifest, report = pipeline.report(digest)
    assert (manifest.annotations[VERDICT], manifest.annotations[WAIVED]) == ("pass", "holds data only")
    assert (judge(report).own, judge(report).passed) == (0, 1)


def test_tests_without_an_environment_are_a_failure(pipeline: Pipeline) -> None:
    digest = pipeline.push(environments=None, says=SAYS)
    done = pipeline.test()
    assert done.returncode == FAILED
    assert "there are tests, and no environment to run them in" in done.stderr
    assert not judge(pipeline.report(digest)[1]).passing


def test_an_environment_without_tests_is_a_failure(pipeline: Pipeline) -> None:
    digest = pipeline.push(environments=WITH_HOST, says=SAYS)
    done = pipeline.test()
    assert done.returncode == FAILED
    assert "no test was selected for 'host'" in done.stderr
    assert not judge(pipeline.report(digest)[1]).passing


def test_a_test_file_that_cannot_be_loaded_is_a_failure(pipeline: Pipeline) -> None:
    digest = pipeline.push(says=SAYS, broken=UNLOADABLE)
    done = pipeline.test()
    assert done.returncode == FAILED
    assert "broken.py" in done.stderr
    assert "no_such_module" in done.stderr
    verdict = judge(pipeline.report(digest)[1])
    assert (verdict.passed, verdict.failed) == (2, 1)


def test_a_crash_of_reframe_is_a_failure_with_its_log(pipeline: Pipeline) -> None:
    digest = pipeline.push(says=SAYS, crash=CRASHES)
    done = pipeline.test()
    assert done.returncode == FAILED
    assert "ReFrame ended with status 77 before it wrote a report" in done.stderr
    assert "[ReFrame Setup]" in done.stderr
    assert not judge(pipeline.report(digest)[1]).passing


def test_a_session_that_hangs_is_ended_with_all_its_processes(pipeline: Pipeline) -> None:
    flag = pipeline.user.home / "hangs"
    digest = pipeline.push(says=SAYS, hangs=HANGS.replace("{flag}", str(flag)))
    began_s = time.monotonic()
    done = pipeline.test("--timeout", "10s")
    assert time.monotonic() - began_s < 40
    assert flag.exists()
    assert done.returncode == FAILED
    assert "did not end within 10 s" in done.stderr
    assert not judge(pipeline.report(digest)[1]).passing


def test_a_single_test_that_hangs_fails_at_its_limit(pipeline: Pipeline) -> None:
    pipeline.push(says=SAYS, hangs=HANGS.replace("{flag}", str(pipeline.user.home / "hangs2")))
    done = pipeline.test("--test-timeout", "2s")
    assert done.returncode == FAILED
    assert "1 of 3 tests failed" in done.stderr


def test_an_interrupted_test_leaves_no_process_and_no_report(pipeline: Pipeline) -> None:
    flag = pipeline.user.home / "hangs3"
    digest = pipeline.push(hangs=HANGS.replace("{flag}", str(flag)))
    with pipeline.start() as process:
        until(flag.exists, "the test to run", DEADLINE_S)
        process.send_signal(2)
        _out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, err
    with pytest.raises(IndexError):
        pipeline.report(digest)


def test_tests_do_not_see_secrets_nor_the_tools_python(pipeline: Pipeline) -> None:
    own = pipeline.user.home / "own"
    own.mkdir()
    (own / "env.py").write_text(
        SAYS.replace("class Says", "class Env")
        .replace("say; echo word is $WORD; command -v python3", "env")
        .split("@sanity_function")[0]
        + """@sanity_function
    def clean(self):
        return sn.all([sn.assert_not_found('hunter2|VIRTUAL_ENV|PYTHONPATH', self.stdout), sn.assert_found('^KEPT=1$', self.stdout)])
"""
    )
    pipeline.push(says=SAYS)
    done = pipeline.test(
        "--tests", str(own), "--pass-env", "KEPT", KEPT="1", VIRTUAL_ENV="/x", PYTHONPATH="/y",
        PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 of 3 tests passed (1 built in)" in done.stderr


def test_an_image_is_found_by_its_digest_alone(pipeline: Pipeline) -> None:
    digest = pipeline.push(environments=None)
    done = pipeline.test(image=digest)
    assert (done.returncode, "no system was named" in done.stderr) == (66, True)
    done = pipeline.test("--system", "demo", "--waive-tests", "x", image=digest)
    assert done.returncode == 0, done.stderr
    assert (
        pipeline.report(digest)[0].annotations[VERDICT] == "pass"
    )  # by the built-in test: there was nothing to waive
    done = pipeline.test("--system", "demo", "--waive-tests", " ", image=digest)
    assert (done.returncode, "--waive-tests needs a reason" in done.stderr) == (66, True)
    done = pipeline.test("--system", "demo", image="sha256:" + 64 * "0")
    assert done.returncode == 68
    assert list(pipeline.user.home.glob("uenv-test-*/store")) == []


def test_the_images_default_view_does_not_reach_reframe(pipeline: Pipeline) -> None:
    """It is loaded in every session that names no view; the tool's interpreter must not start in it, nor tests of other views."""
    checked = SAYS.replace(
        "say; echo word is $WORD", "say; echo word is $WORD; echo [$PYTHONPATH$PYTHONHOME$HOSTILE]"
    ).replace("return sn.all([", "return sn.all([sn.assert_found(r'^\\[\\]$', self.stdout),")
    pipeline.push(
        says=checked,
        default_view={
            "PYTHONPATH": "/user-environment/python",
            "PYTHONHOME": "/user-environment/python",
            "HOSTILE": "1",
            "RFM_CHECK_SEARCH_PATH": "/nowhere",
        },
    )
    done = pipeline.test()
    assert done.returncode == 0, done.stderr
    assert "3 of 3 tests passed (2 built in)" in done.stderr


def test_a_recipe_replaces_the_images_tests_and_views_are_checked_first(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    del tmp_path
    pipeline.push(fails=FAILS)
    recipe = pipeline.user.home / "recipe"
    (recipe / "extra/reframe").mkdir(parents=True)
    (recipe / "extra/reframe/says.py").write_text(SAYS.replace("{word}", "hello"))
    settings = recipe / "extra/reframe.yaml"
    settings.write_text("default:\n  features: [speaks]\n  views: [default]\n")
    assert pipeline.test("--recipe", str(recipe)).returncode == 0
    settings.write_text("default:\n  features: [speaks]\n  views: [other]\n")
    done = pipeline.test("--recipe", str(recipe))
    assert done.returncode == 70
    assert "there is no view 'other'" in done.stderr
    settings.write_text("default:\n  features: [speaks]\n  veiws: [default]\n")
    done = pipeline.test("--recipe", str(recipe))
    assert done.returncode == 86
    assert f"{settings}:3: default.veiws" in done.stderr


def test_through_a_running_uenvd(pipeline: Pipeline) -> None:
    digest = pipeline.push(says=SAYS)
    with running_daemon(
        pipeline.directory / "uenvd", pipeline.registry, extra="namespaces: [deploy, build]\n"
    ) as daemon:
        done = pipeline.test("--through", "uenvd", "--json", UENVD_SOCKET=str(daemon.socket_path))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["mounted"] == "a mount of uenvd"
        assert digest in daemon.log
    done = pipeline.test("--through", "uenvd")
    assert done.returncode == 95
    assert "uenvd cannot mount this image" in done.stderr


def test_one_test_with_and_without_uenv_on_two_systems(pipeline: Pipeline) -> None:
    """References are those of the system in the label; figures are compared with what is released there."""
    user = pipeline.user

    def publish(*words: str) -> None:
        command = [PUBLISH, *words]
        how: dict[str, Any] = {"user": user.uid, "group": user.gid, "extra_groups": [], "cwd": user.home}
        subprocess.run(command, check=True, capture_output=True, env=pipeline.environ, **how)

    pipeline.push(environments=WITH_HOST, measures=MEASURES.replace("{rate}", "100"))
    label = f"app/1:{pipeline.images}"
    done = pipeline.test("--json", image=f"{label}@demo%zen3")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["performance"] is None
    publish("copy", f"build::{label}@demo%zen3", f"build::{label}@other%zen3")
    done = pipeline.test("--json", image=f"{label}@other%zen3")
    assert done.returncode == 0, done.stderr
    cases = [case for case in json.loads(done.stdout)["cases"] if case["name"] == "Measures"]
    assert sorted(case["environment"] for case in cases) == ["app_default", "host"]
    publish("deploy", f"{label}@demo%zen3", "--tag", "v1")
    pipeline.push(environments=WITH_HOST, measures=MEASURES.replace("{rate}", "40"))
    done = pipeline.test("--json")
    assert done.returncode == 0, done.stderr
    assert "2 figures compared with app/1:latest: 2 worse" in done.stderr
    figure = json.loads(done.stdout)["performance"]["figures"][0]
    assert (figure["system"], figure["variable"], figure["before"], figure["after"]) == (
        "demo:local",
        "rate",
        100.0,
        40.0,
    )


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"bin/py": "#!/opt/builder/python3\n"}, "bin/py: there is no /opt/builder/python3"),
        (
            {"meta/extra/smoke.yaml": "commands: {default: [say, 'say | grep -q bye']}\n"},
            "grep -q bye: status 1",
        ),
    ],
)
def test_an_image_without_tests_is_tested_all_the_same(
    pipeline: Pipeline, files: dict[str, str], said: str
) -> None:
    digest = pipeline.push(environments=None, files=files)
    done = pipeline.test()
    assert done.returncode == FAILED
    assert said in done.stderr
    verdict = judge(pipeline.report(digest)[1])
    assert [(case.name, case.result) for case in verdict.cases] == [("UenvSmoke %view=default", "fail")]


def test_smoke_tests_of_a_view_that_is_not_there(pipeline: Pipeline) -> None:
    pipeline.push(environments=None, files={"meta/extra/smoke.yaml": "commands: {other: [say]}\n"})
    done = pipeline.test()
    assert (done.returncode, "name the view 'other', which the image has not" in done.stderr) == (86, True)
