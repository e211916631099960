"""uenvd-publish run without root, daemon and mount point on the machine: what fails is not released, what is there is not redone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.building import make_cache, make_recipe, make_wheel, needed_packages
from support.reframetests import HEAD
from support.registry import FakeRegistry
from support.users import TestUser, ordinary_user
from uenvd.errors import DeployRefused, TestsFailed
from uenvd.oci.attach import META_TYPE, REFRAME_TYPE, VERDICT, attachments
from uenvd.oci.blocks import BLOCKS_TYPE
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import Remote, open_remote
from uenvd.publish.history import RELEASE_TYPE
from uenvd.publish.provenance import LOG_TYPE, PROVENANCE_TYPE
from uenvd.publish.sbom import SBOM_TYPE

pytestmark = pytest.mark.usefixtures("node")

PUBLISH = str(Path(sys.executable).parent / "uenvd-publish")
MOUNT = "/no-such-place/uenv"
BUILD, DEPLOY = "build/demo/zen3/tiny/1.0", "deploy/demo/zen3/tiny/1.0"
DEADLINE_S = 120.0

TEST = (
    HEAD
    + f"""
@rfm.simple_test
class Tiny(rfm.RunOnlyRegressionTest):
    valid_systems = ['*']
    valid_prog_environs = ['+tiny']
    executable = 'tiny; command -v tiny; id -u'

    @sanity_function
    def said(self):
        return sn.all([
            sn.assert_found(r'^tiny says 42$', self.stdout),
            sn.assert_found(r'^{MOUNT}/', self.stdout),
            sn.assert_not_found(r'^0$', self.stdout),
        ])
"""
)


@dataclass
class Runner:
    """A CI runner's user."""

    user: TestUser
    directory: Path
    recipe: Path
    registry: FakeRegistry
    remote: Remote

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PUBLISH, *words, "--system", "demo", "--uarch", "zen3", "--registry", self.registry.url],
            env={**self.user.environ(), "TMPDIR": str(self.user.home), "UENVD_SOCKET": "/no/socket"},
            cwd=self.user.home,
            user=self.user.uid,
            group=self.user.gid,
            extra_groups=[],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    def pipeline(self, *words: str) -> subprocess.CompletedProcess[str]:
        cache = str(self.directory / "cache")
        return self.run(
            "run", str(self.recipe), "--cache", cache, "--out", str(self.user.home / "out"), *words
        )


@pytest.fixture
def runner(node: None, public_dir: Path) -> Iterator[Runner]:
    reason = needed_packages()
    if reason:
        pytest.skip(f"needs Debian packages to build with: {reason}")
    assert not Path(MOUNT).exists()
    wheel = make_wheel(public_dir)
    recipe = make_recipe(public_dir, wheel, mount=MOUNT)
    (recipe / "extra/reframe").mkdir(parents=True)
    (recipe / "extra/reframe.yaml").write_text("tiny: {features: [tiny], views: [default]}\n")
    (recipe / "extra/reframe/tiny.py").write_text(TEST)
    make_cache(public_dir / "cache", wheel)
    with ordinary_user(public_dir) as user, FakeRegistry() as registry:
        yield Runner(user, public_dir, recipe, registry, open_remote(parse_registry(registry.url)))
    assert not Path(MOUNT).exists()


def test_a_recipe_is_released_and_a_broken_one_is_not(runner: Runner) -> None:
    done = runner.pipeline("--pipeline", "1", "--deploy", "v1", "--json")
    assert done.returncode == 0, done.stderr
    account = json.loads(done.stdout)
    digest = account["digest"]
    assert account["seconds"].keys() == {"build", "push", "test", "deploy"}
    for repository, tag in ((BUILD, "1"), (DEPLOY, "v1"), (DEPLOY, "latest")):
        assert runner.remote.resolve(repository, tag) == digest
        types = {found.artifact_type for found in attachments(runner.remote, repository, digest)}
        evidence = {META_TYPE, REFRAME_TYPE, SBOM_TYPE, PROVENANCE_TYPE, LOG_TYPE, BLOCKS_TYPE}
        assert types == evidence | ({RELEASE_TYPE} if repository == DEPLOY else set())

    # Again: nothing is built and no image moves.
    layers = runner.registry.count("HEAD", account["image"]), runner.registry.count("POST", "/blobs/uploads")
    done = runner.pipeline("--pipeline", "1", "--deploy", "v1")
    assert done.returncode == 0, done.stderr
    assert "built from the same recipe already" in done.stderr
    assert done.stdout.strip() == digest
    assert runner.registry.count("HEAD", account["image"]) > layers[0]  # it asked
    assert (
        runner.registry.count("POST", "/blobs/uploads") - layers[1] <= 5
    )  # the reports, the index; not the image, not its metadata

    # A test that fails: reported, not released.
    (runner.recipe / "extra/reframe/tiny.py").write_text(TEST.replace("says 42", "says 43"))
    done = runner.pipeline("--pipeline", "2", "--deploy", "v2")
    assert done.returncode == TestsFailed.exit_status, done.stderr
    assert "pattern '^tiny says 43$' not found" in done.stderr
    assert "Release" not in done.stderr
    broken = runner.remote.resolve(BUILD, "2")
    (report,) = attachments(runner.remote, BUILD, broken, REFRAME_TYPE)
    assert report.annotations[VERDICT] == "fail"
    assert runner.remote.tags(DEPLOY) == ["latest", "v1"]
    assert runner.remote.resolve(DEPLOY, "latest") == digest
    refused = runner.run("deploy", f"tiny/1.0@{broken}", "--tag", "v2")
    assert refused.returncode == DeployRefused.exit_status, refused.stderr
    assert runner.remote.tags(DEPLOY) == ["latest", "v1"]
    assert sorted(path.name for path in (runner.user.home).glob("uenv-test-*/*")) == ["root", "tests", "uenv"]


def test_mistakes_are_told_before_anything_is_built(runner: Runner) -> None:
    cases = (
        (("--deploy", "latest"), 66, "is a tag that moves"),
        (("--deploy", "not a tag"), 66, "is no valid tag"),
        (("--timeout", "soon"), 66, "is no time"),
        (("--registry", "http://127.0.0.1:9"), 71, "127.0.0.1:9"),
    )
    for words, status, text in cases:
        done = runner.pipeline(*words) if "--registry" not in words else _elsewhere(runner, *words)
        assert (done.returncode, text in done.stderr) == (status, True), done.stderr
        assert not (runner.user.home / "out").exists()


def _elsewhere(runner: Runner, *words: str) -> subprocess.CompletedProcess[str]:
    command = [PUBLISH, "run", str(runner.recipe), "--system", "demo", "--uarch", "zen3", *words]
    return subprocess.run(
        command,
        env=os.environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
