"""Releases by policy: each reason to refuse one, the way back, and that a copy elsewhere has all that speaks for the image."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from support.publishing import simple_image
from support.registry import RealRegistry, docker_registry
from support.reports import junit, report
from uenvd.oci.attach import REFRAME_TYPE, Content, attach, attachments, json_content
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import Remote, open_remote
from uenvd.oci.signatures import SIGNATURE_TYPE, make_keys, read_keys, verify
from uenvd.publish.history import releases_of
from uenvd.publish.main import main
from uenvd.publish.provenance import LOG_TYPE, PROVENANCE_TYPE
from uenvd.publish.reframe.report import TESTED
from uenvd.publish.sbom import SBOM_TYPE

REFUSED = 110
BUILD, DEPLOY = "build/demo/zen3/app/1.0", "deploy/demo/zen3/app/1.0"
PASS = report([("UenvSmoke %view=default", "pass"), ("Says", "pass"), ("Stream", "pass")])


def measuring(triad: float, *, other: bool = True) -> bytes:
    """Return a passing report with figures."""
    document = json.loads(PASS)
    values: dict[str, Any] = {"demo:local:triad": [triad, 0, None, None, "GB/s", "pass"]}
    if other:
        values["demo:local:copy"] = [50, 0, None, None, "GB/s", "pass"]
    document["runs"][0]["testcases"][2]["perfvalues"] = values
    return json.dumps(document).encode()


class Site:
    """A registry, the tool, and images in it."""

    def __init__(self, address: str, directory: Path, images: list[Path]) -> None:
        self.address = address
        self.directory = directory
        self.images = images
        self.policy = directory / "policy.yaml"
        self.policy.write_text("{}\n")

    @property
    def remote(self) -> Remote:
        return open_remote(parse_registry(self.address))

    def run(self, *words: object, address: str | None = None) -> subprocess.CompletedProcess[str]:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = main([*map(str, words), "--registry", address or self.address])
        return subprocess.CompletedProcess(list(words), status, out.getvalue(), err.getvalue())

    def good(self, *words: object) -> str:
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def push(self, number: int, tested: bytes | None = PASS, **notes: str) -> str:
        """Push image ``number`` to build, with a report; return its digest."""
        digest = self.good("push", self.images[number], f"build::app/1.0:{number}")
        if tested is not None:
            self.report(digest, tested, **notes)
        return digest

    def report(
        self, digest: str, data: bytes, created: str | None = None, title: str = "report.json", **notes: str
    ) -> None:
        attach(self.remote, BUILD, digest, REFRAME_TYPE, [json_content(title, data)], notes, created=created)

    def promote(self, number: int, *words: object, tag: str = "v1") -> subprocess.CompletedProcess[str]:
        return self.run("promote", f"app/1.0:{number}", "--policy", self.policy, "--tag", tag, *words)

    def refused(self, number: int, *words: object) -> str:
        """Make sure that it is refused and that nothing came of it; return what was said."""
        done = self.promote(number, *words)
        assert (done.returncode, done.stdout) == (REFUSED, ""), done.stderr
        assert self.remote.tags(DEPLOY) == []
        return done.stderr


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("images")
    return [simple_image(directory / f"{word}.squashfs", "app", word) for word in ("one", "two", "three")]


@pytest.fixture
def site(tmp_path: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("UENVD_SYSTEM", "demo")
    monkeypatch.setenv("UENVD_UARCH", "zen3")
    for name in ("GITLAB_CI", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    return Site(f"oci-layout:{tmp_path}/layout", tmp_path, images)


@pytest.fixture
def real_site(site: Site, real: RealRegistry, tmp_path: Path) -> Site:
    return Site(f"{real.url}/{tmp_path.name.replace('_', '-')}", tmp_path, site.images)


OTHER = "sha256:" + 64 * "e"


@pytest.mark.parametrize(
    ("data", "notes", "reason"),
    [
        (None, {}, "no test report is attached"),
        (
            report([("Says", "fail"), ("b", "pass")]),
            {},
            "Says @generic:default+builtin: failed in sanity: wrong answer",
        ),
        (report([("Says", "pass"), ("Child", "fail_deps")]), {}, "Child @generic:default+builtin: fail_deps"),
        (PASS, {TESTED: OTHER}, f"is of a test of another image, {OTHER}"),
        (report(), {}, "no test was run"),
        (report([("Says", "skip")]), {}, "no test was run"),
    ],
)
def test_reports_that_do_not_speak_for_the_image(
    site: Site, data: bytes | None, notes: dict[str, str], reason: str
) -> None:
    site.push(0, data, **notes)
    said = site.refused(0)
    assert reason in said
    assert "REFUSED  tests" in said
    assert reason in site.refused(0, "--dry-run")


def test_a_report_that_belongs_to_another_image_is_none(site: Site) -> None:
    """Listed for this image, it says another subject."""
    other = site.push(1)
    digest = site.push(0, None)
    (stolen,) = attachments(site.remote, BUILD, other, REFRAME_TYPE)
    index = Path(site.address.removeprefix("oci-layout:")) / "index.json"
    document = json.loads(index.read_text())
    for entry in document["manifests"]:
        for key, value in list(entry.get("annotations", {}).items()):
            if stolen.digest == entry["digest"]:
                entry["annotations"][key] = value.replace(
                    other.removeprefix("sha256:"), digest.removeprefix("sha256:")
                )
    index.write_text(json.dumps(document))
    said = site.refused(0)
    assert "belong to other images" in said or "no test report" in said


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (
            "who: {users: [nobody-else], ci: ['gitlab:hpc/*']}",
            "may not: the policy names nobody-else, gitlab:hpc/*",
        ),
        ("who: {groups: [no-such-group]}", "may not: the policy names no-such-group"),
        ("tests: {required: ['Hello*', 'Says']}", "required test: Hello* was not run"),
        ("tests: {minimum: 3}", "number of tests: 2 of its own, 3 needed"),
        ("min_age: 1d", "first tested 0 min ago, 24.0 h needed"),
        ("evidence: [uenv/meta, uenv/sbom]", "uenv/sbom is not attached"),
        ("signature: {keys: %s}", "is not signed"),
    ],
)
def test_what_a_policy_demands(site: Site, policy: str, reason: str) -> None:
    keys = site.directory / "keys"
    keys.mkdir()
    make_keys(site.directory / "release", keys / "release.pub")
    site.policy.write_text(policy.replace("%s", str(keys)))
    site.push(0)
    assert reason in site.refused(0)


def test_every_reason_is_told_at_once(site: Site) -> None:
    site.policy.write_text(
        "{who: {users: [nobody]}, min_age: 1h, evidence: [uenv/sbom], tests: {waivers: no, retries: no}}"
    )
    digest = site.push(0, report([("a", "fail")], [("a", "pass")]))
    said = site.refused(0)
    for name in ("who", "age", "evidence", "retries"):
        assert f"REFUSED  {name}" in said
    assert "a passed only at a later attempt" in said
    site.report(digest, report())
    assert "the policy allows no waivers" in site.refused(0, "--waive-tests", "ticket 7")


def test_junit_says_too_little_for_some_policies(site: Site) -> None:
    digest = site.push(0, None)
    attach(
        site.remote,
        BUILD,
        digest,
        REFRAME_TYPE,
        [Content("report.xml", junit(("a", "pass")), "application/xml")],
    )
    site.policy.write_text("tests: {minimum: 1}")
    assert "no report of ReFrame in JSON" in site.refused(0)
    site.policy.write_text("{}")
    assert site.promote(0).returncode == 0


def test_the_policy_holds_however_an_image_is_released(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """``deploy`` with the policy, named by an option or by the site's variable, is as strict as ``promote``."""
    site.policy.write_text("{who: {users: [nobody-else]}, tests: {minimum: 3}, min_age: 1d}")
    digest = site.push(0)

    def refused(*words: object) -> None:
        done = site.run(*words)
        assert (done.returncode, done.stdout) == (REFUSED, ""), done.stderr
        for name in ("who", "number of tests", "age"):
            assert f"REFUSED  {name}: " in done.stderr
        assert site.remote.tags(DEPLOY) == []

    refused("deploy", "app/1.0:0", "--tag", "v1", "--policy", site.policy)
    refused("deploy", digest, "--tag", "v1", "--policy", site.policy)
    monkeypatch.setenv("UENVD_POLICY", str(site.policy))
    refused("deploy", "app/1.0:0", "--tag", "v1")
    refused("promote", "app/1.0:0", "--tag", "v1")
    monkeypatch.setenv("UENVD_POLICY", str(site.directory / "gone.yaml"))
    done = site.run("deploy", "app/1.0:0", "--tag", "v1")
    assert (done.returncode, "gone.yaml cannot be read" in done.stderr) == (66, True), done.stderr
    monkeypatch.delenv("UENVD_POLICY")
    done = site.run("promote", "app/1.0:0", "--tag", "v1")
    assert (done.returncode, "no policy was named" in done.stderr) == (66, True), done.stderr
    make_keys(site.directory / "release", site.directory / "release.pub")
    assert site.good("deploy", "app/1.0:0", "--tag", "v1", "--sign", site.directory / "release") == digest
    assert len(attachments(site.remote, DEPLOY, digest, SIGNATURE_TYPE)) == 1


def test_who_may(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.policy.write_text("who: {users: [nobody-else], ci: ['gitlab:hpc/uenv@main']}")
    site.push(0)
    for name, value in (
        ("GITLAB_CI", "true"),
        ("CI_PROJECT_PATH", "hpc/uenv"),
        ("CI_COMMIT_REF_NAME", "topic"),
    ):
        monkeypatch.setenv(name, value)
    assert "gitlab:hpc/uenv@topic may not" in site.refused(0)
    monkeypatch.setenv("CI_COMMIT_REF_NAME", "main")
    done = site.promote(0, "--dry-run")
    assert (done.returncode, "who: gitlab:hpc/uenv@main may" in done.stderr) == (0, True)
    assert site.remote.tags(DEPLOY) == []


def test_old_enough_signed_and_with_evidence(real_site: Site) -> None:
    """The whole way on a real registry: evidence, dry run, signature, release, copy to another registry with everything."""
    site = real_site
    keys = site.directory / "keys"
    keys.mkdir()
    make_keys(site.directory / "release", keys / "release.pub")
    site.policy.write_text(
        f"{{min_age: 1h, evidence: [uenv/sbom, uenv/provenance, uenv/log], signature: {{keys: {keys}}}, tests: {{required: [Says], minimum: 2}}}}"
    )
    digest = site.push(0, None)
    site.report(digest, PASS, created="2026-01-01T00:00:00Z")
    log = site.directory / "build.log"
    log.write_text("built\n")
    words = ("evidence", "build::app/1.0:0", "--image", site.images[0], "--log", log)
    first = site.good(*words)
    assert [line.split()[0] for line in first.splitlines()] == [SBOM_TYPE, PROVENANCE_TYPE, LOG_TYPE]
    assert site.good(*words) == first, "attaching again attaches nothing new"
    assert "is not signed" in site.refused(0)
    (site.directory / "other").mkdir()
    make_keys(site.directory / "mallory", site.directory / "other/mallory.pub")
    assert site.promote(0, "--sign", site.directory / "mallory").returncode == 66
    site.good("sign", "build::app/1.0:0", "--key", site.directory / "mallory")
    assert "an unknown key" in site.refused(0)
    done = site.promote(0, "--sign", site.directory / "release", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["digest"], result["released"], {check["passed"] for check in result["checks"]}) == (
        digest,
        True,
        {True},
    )
    assert site.good("verify", "app/1.0:v1", "--keys", keys) == "release"
    # Elsewhere: the same digest, all that speaks for it, and the signature still good.
    elsewhere = f"oci-layout:{site.directory}/elsewhere"
    site.good("copy", "-r", "app/1.0:v1", "app/1.0:v1", "--to-registry", elsewhere)
    there = open_remote(parse_registry(elsewhere))
    assert there.resolve(DEPLOY, "v1") == digest
    here = {one.digest for one in attachments(site.remote, DEPLOY, digest)}
    assert {one.digest for one in attachments(there, DEPLOY, digest)} == here
    assert verify(there, DEPLOY, digest, read_keys(keys)).name == "release"
    assert len(attachments(there, DEPLOY, digest, SIGNATURE_TYPE)) == 2
    assert site.promote(0).returncode == 0, "promoting again changes nothing"
    # And back.
    site.policy.write_text("{}")
    site.push(1)
    assert site.promote(1, tag="v2").returncode == 0
    assert site.good("rollback", "app/1.0") == digest == site.remote.resolve(DEPLOY, "latest")


def test_rollback_restores_the_former_digest(site: Site) -> None:
    digests = [site.push(number) for number in range(3)]
    for number in range(2):
        site.good("deploy", f"app/1.0:{number}", "--tag", f"v{number}")
    site.good("promote", "app/1.0:2", "--policy", site.policy, "--tag", "v2")

    def latest() -> str:
        return site.remote.resolve(DEPLOY, "latest")

    assert latest() == digests[2]
    assert site.good("rollback", "app/1.0") == digests[1] == latest()
    listed = json.loads(site.good("list", "app", "--json"))["images"]
    assert [image["digest"] for image in listed if "latest" in image["tags"]] == [digests[1]]
    # Once more goes back one more, not forth; then there is nothing before.
    assert site.good("rollback", "app/1.0@demo%zen3") == digests[0] == latest()
    done = site.run("rollback", "app/1.0")
    assert (done.returncode, "no release before" in done.stderr, latest()) == (REFUSED, True, digests[0])
    assert site.good("rollback", "app/1.0", "--to", "v2") == digests[2] == latest()
    done = site.run("rollback", "app/1.0", "--to", "v2")
    assert (done.returncode, "already" in done.stderr) == (REFUSED, True)
    done = site.run("rollback", "app/1.0", "--to", "v7")
    assert (done.returncode, "not there any more" in done.stderr) == (REFUSED, True)
    assert site.remote.tags(DEPLOY) == ["latest", "v0", "v1", "v2"], "releases keep their tags"
    notes = releases_of(site.remote, DEPLOY, digests[2])
    assert [(note.action, note.tag, note.previous) for note in notes] == [
        ("rollback", "v2", digests[0]),
        ("promote", "v2", digests[1]),
    ]


def test_rollback_of_what_nobody_released(site: Site) -> None:
    done = site.run("rollback", "app/1.0")
    assert (done.returncode, "nothing was released there" in done.stderr) == (68, True)
    done = site.run("rollback", "app")
    assert (done.returncode, "must say name, version" in done.stderr) == (66, True)


def test_performance_against_the_release_before(site: Site) -> None:
    site.policy.write_text("performance: {worse: 5%, figures: {'Stream:triad': 20%}, lost: no}")
    site.push(0, measuring(100))
    done = site.promote(0)
    assert (done.returncode, "nothing to compare with" in done.stderr) == (0, True), done.stderr
    digest = site.push(1, measuring(70))
    done = site.promote(1, tag="v2")
    assert done.returncode == REFUSED
    assert "2 figures compared with app/1.0:latest: 1 worse" in done.stderr
    assert "worse: Stream @demo:local: triad 100 -> 70 GB/s (-30.0 %)" in done.stderr
    site.report(digest, measuring(95, other=False), created="2030-01-01T00:00:00Z")
    done = site.promote(1, tag="v2")
    assert (done.returncode, "lost: Stream @demo:local+builtin: copy = 50 GB/s" in done.stderr) == (
        REFUSED,
        True,
    )
    site.report(digest, measuring(85), created="2030-01-02T00:00:00Z")
    done = site.promote(1, tag="v2")
    assert (done.returncode, "none is worse" in done.stderr) == (0, True), done.stderr
    shown = site.good("show", "app/1.0:v2")
    assert "performance  2 figures compared with app/1.0@sha256:" in shown, "with what it replaced"
    # A new version is compared with the newest other one.
    digest = site.good("push", site.images[2], "build::app/2.0:1")
    attach(
        site.remote, "build/demo/zen3/app/2.0", digest, REFRAME_TYPE, [json_content("r.json", measuring(10))]
    )
    done = site.run("promote", "app/2.0:1", "--policy", site.policy, "--tag", "v1")
    assert (done.returncode, "compared with app/1.0:latest" in done.stderr) == (REFUSED, True), done.stderr
