"""One plan run here, on a real Slurm cluster and through FirecREST: the same images, the same statuses; and nothing is done twice.

``UENVD_TEST_PLAN=full``: six cells of Python environments everywhere; else two of a small program.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from support.building import needed_packages
from support.cluster import missing, running_cluster
from support.firecrestdouble import SECRET, firecrest_double
from support.plans import (
    MACHINES,
    NAMES,
    PROGRAM,
    Site,
    events,
    make_site,
    outcome,
    registry_of,
    visible_images,
)
from support.registry import FakeRegistry
from uenvd.errors import DeployRefused, DispatchFailed
from uenvd.oci.attach import META_TYPE, REFRAME_TYPE, attachments
from uenvd.publish.provenance import LOG_TYPE, PROVENANCE_TYPE
from uenvd.publish.sbom import SBOM_TYPE

pytestmark = pytest.mark.usefixtures("node")
FULL = os.environ.get("UENVD_TEST_PLAN") == "full"


@pytest.fixture(scope="module")
def site(node: None, tmp_path_factory: pytest.TempPathFactory) -> Site:
    directory = tmp_path_factory.mktemp("site")
    if not FULL:
        return make_site(directory, names=NAMES[:1], machines=(MACHINES[0], MACHINES[2]))
    reason = needed_packages()
    if reason:
        pytest.skip(f"needs Debian packages to build with: {reason}")
    return make_site(directory, python=True)


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        yield registry


POLICY = """
who: {ci: ["gitlab:hpc/uenv@main"]}
tests: {required: [Runs], minimum: 1}
evidence: [uenv/meta, uenv/sbom, uenv/provenance, uenv/log]
"""
JOB = {"GITLAB_CI": "true", "CI_PROJECT_PATH": "hpc/uenv", "CI_COMMIT_REF_NAME": "main"}
"""What a CI job tells of itself: the policy holds for it wherever its stages run."""


def finals(stdout: str) -> dict[str, str]:
    """Return the last state of each job, and that it came to it in a sensible way."""
    found: dict[str, list[str]] = {}
    for event in events(stdout)[:-1]:
        found.setdefault(event["job"], []).append(event["state"])
    for job, states in found.items():
        assert states.index("running") < states.index("passed") if "running" in states else True, (
            job,
            states,
        )
    return {job: states[-1] for job, states in found.items()}


def test_the_same_everywhere(site: Site, tmp_path: Path) -> None:
    reason = missing()
    if reason:
        pytest.skip(reason)
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    seen = {}
    with running_cluster(nodes=1) as cluster, firecrest_double() as double:
        environs = {"local": {}, "slurm": cluster.environ(), "firecrest": double.variables()}
        for executor, env in environs.items():
            work = tmp_path / executor
            words = ["--executor", executor, "--work", str(work), "--deploy", "v1", "--json"]
            words += ["--policy", str(policy)]
            if executor != "local":
                words += ["--poll=0.3s"]
            if executor == "firecrest":
                words += [f"--remote-dir={tmp_path}/remote", f"--remote-command={shlex.join(PROGRAM)}"]
            with FakeRegistry() as registry:
                refused = site.run(registry.url, *words, env=env)
                assert refused.returncode == DeployRefused.exit_status, refused.stderr
                assert "may not: the policy names gitlab:hpc/uenv@main" in refused.stderr
                assert registry.count("POST", "/blobs/uploads") == 0, "nothing was built for it"
                env = {**env, **JOB}
                done = site.run(registry.url, *words, env=env)
                assert done.returncode == 0, done.stdout + done.stderr
                cells = outcome(done.stdout)
                assert list(cells) == site.cells
                images = visible_images(registry_of(registry.url), site)
                seen[executor] = (cells, finals(done.stdout), images)
                uploads = registry.count("POST", "/blobs/uploads")
                # Again: no job is started, nothing is uploaded.
                again = site.run(registry.url, *words, env=env)
                assert again.returncode == 0, again.stderr
                assert all(event["reused"] for event in events(again.stdout)[:-1])
                assert {one["digest"] for one in outcome(again.stdout).values()} == {
                    one["digest"] for one in cells.values()
                }
                assert registry.count("POST", "/blobs/uploads") == uploads
        assert len(double.jobs) == 3 * len(site.cells)
        assert cluster.jobs() == []
    assert seen["local"] == seen["slurm"] == seen["firecrest"]


def test_a_recipe_alone_gets_what_a_cell_gets(site: Site, registry: FakeRegistry, tmp_path: Path) -> None:
    """The same image, the same attachments, whether a recipe is run or the plan that has it; and the policy holds there, too."""
    system, uarch = site.machines[0]
    left = tmp_path / "left.env"
    words = ["--cell", site.cells[0], "--work", str(tmp_path / "work"), "--json", "--dotenv", str(left)]
    done = site.run(registry.url, *words)
    assert done.returncode == 0, done.stderr
    digest = outcome(done.stdout)[site.cells[0]]["digest"]
    assert f"UENV_DIGEST={digest}" in left.read_text(), "for the next job of a CI system, in JSON mode, too"
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY.replace("minimum: 1", "minimum: 9"))
    with FakeRegistry() as other:
        words = [
            "recipes/tiny/1.0",
            "--system",
            system,
            "--uarch",
            uarch,
            "--pipeline",
            "7",
            "--deploy",
            "v1",
        ]
        done = site.run(other.url, *words, "--policy", str(policy), env=JOB, config=False)
        assert done.returncode == DeployRefused.exit_status, done.stderr
        assert "number of tests: 1 of its own, 9 needed" in done.stderr
        place = f"build/{system}/{uarch}/tiny/1.0"
        first, second = registry_of(registry.url), registry_of(other.url)
        assert second.resolve(place, "7") == digest
        assert second.tags(place.replace("build", "deploy")) == []
        kinds = [
            sorted(one.artifact_type for one in attachments(remote, place, digest))
            for remote in (first, second)
        ]
        assert kinds[0] == kinds[1]
        assert set(kinds[0]) == {META_TYPE, SBOM_TYPE, PROVENANCE_TYPE, LOG_TYPE, REFRAME_TYPE}


def test_one_that_fails_stops_only_itself(site: Site, registry: FakeRegistry, tmp_path: Path) -> None:
    broken = tmp_path / "site"
    shutil.copytree(site.directory, broken, symlinks=True)
    config = json.loads((broken / "config.yaml").read_text())
    entry = config["uenvs"]["tiny"]["1.0"]
    entry["recipes"] = {"zen3": "1.0"}
    config["clusters"]["alpha"]["targets"] = [{"uarch": "zen3"}]
    config["clusters"]["beta"]["targets"] = [
        {"uarch": "zen3", "variables": {"UENV_CIBUILDV_X": "$NOT_SET_ANYWHERE"}}
    ]
    entry["deploy"] = {}
    (broken / "config.yaml").write_text(json.dumps(config))
    other = replace(site, directory=broken, names=("tiny",), machines=(("alpha", "zen3"), ("beta", "zen3")))
    junit = tmp_path / "junit.xml"
    done = other.run(registry.url, "tiny", "--work", str(tmp_path / "work"), "--junit", str(junit))
    assert "build-tiny/1.0-beta/zen3 failed: " in done.stderr, done.stderr
    assert "NOT_SET_ANYWHERE" in done.stderr
    assert "test-tiny/1.0-beta/zen3: skipped" in done.stderr
    assert "test-tiny/1.0-alpha/zen3: passed" in done.stderr
    assert done.returncode == 86
    assert junit.read_text().count("<failure") == 1


def test_firecrest_refuses(site: Site, registry: FakeRegistry, tmp_path: Path) -> None:
    words = [
        "--executor=firecrest",
        "--work",
        str(tmp_path / "work"),
        f"--remote-dir={tmp_path}/remote",
        "--poll=0.2s",
    ]
    with firecrest_double(busy=1000) as double:
        done = site.run(registry.url, *words, env=double.variables())
        assert done.returncode == DispatchFailed.exit_status, done.stderr
        assert "429 too many requests" in done.stderr
        assert len(double.requests) < 50
        done = site.run(
            registry.url, *words, env={**double.variables(), "FIRECREST_CLIENT_SECRET": "wrong-one"}
        )
        assert done.returncode == DispatchFailed.exit_status
        assert "check FIRECREST_CLIENT_ID" in done.stderr
        assert SECRET not in done.stderr
        assert "wrong-one" not in done.stderr
        assert not double.jobs
