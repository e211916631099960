"""Releases: every reason to refuse one, what it leaves in the registry, and readers of it. `uenvd-publish` as a program."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from support.publishing import simple_image
from support.registry import PASSWORD, USER, FakeRegistry, RealRegistry, docker_registry
from support.reports import junit, report
from uenvd.oci.attach import VERDICT
from uenvd.oci.index import index_repository, read_index
from uenvd.oci.manifest import EMPTY_BLOB, EMPTY_TYPE, build_artifact
from uenvd.oci.reference import parse_registry, repository_of
from uenvd.oci.remote import Remote, open_remote
from uenvd.publish.main import main
from uenvd.publish.reframe.report import TESTED

Publish = Callable[..., subprocess.CompletedProcess[str]]
REFUSED = 110
PASS = report([("a", "pass"), ("b", "pass")])


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("images")
    return [simple_image(directory / f"{word}.squashfs", "app", word) for word in ("one", "two")]


@pytest.fixture(params=["http", "layout"])
def address(request: pytest.FixtureRequest, tmp_path: Path, real: RealRegistry) -> str:
    return (
        f"oci-layout:{tmp_path}/layout"
        if request.param == "layout"
        else f"{real.url}/{tmp_path.name.replace('_', '-')}"
    )


@pytest.fixture
def layout(tmp_path: Path) -> str:
    return f"oci-layout:{tmp_path}/layout"


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Run a command in this process: starting a program a hundred times would take a minute."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("UENVD_SYSTEM", "demo")
    monkeypatch.setenv("UENVD_UARCH", "zen3")

    def run(address: str, *words: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setenv("UENVD_REGISTRY", address)
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = main([str(word) for word in words])
        return subprocess.CompletedProcess(list(words), status, out.getvalue(), err.getvalue())

    return run


def program(address: str, directory: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a command as a program, which knows nothing of this process."""
    return subprocess.run(
        [sys.executable, "-m", "uenvd.publish.main", *map(str, words), "--registry", address],
        capture_output=True,
        text=True,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "UENVD_SYSTEM": "demo",
            "UENVD_UARCH": "zen3",
        },
        timeout=60,
        check=False,
    )


def attached(
    publish: Publish, address: str, directory: Path, label: str, name: str, data: bytes, *more: str
) -> str:
    (directory / name).write_bytes(data)
    done = publish(address, "attach", label, directory / name, "--type", "uenv/reframe", *more)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def remote_of(address: str) -> Remote:
    return open_remote(parse_registry(address))


def test_a_tested_image_is_released_and_latest_follows(
    publish: Publish, address: str, images: list[Path], tmp_path: Path
) -> None:
    meta = tmp_path / "meta"
    meta.mkdir()
    (meta / "log.txt").write_text("built")
    digests = []
    for number, image in enumerate(images, start=1):
        label = f"build::app/1.0:{number}"
        done = publish(address, "push", image, label)
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout.strip())
        assert publish(address, "attach", label, meta, "--type", "uenv/meta").returncode == 0
        attached(publish, address, tmp_path, label, "report.json", PASS)
        done = publish(address, "deploy", f"app/1.0:{number}", "--tag", f"v{number}")
        assert (done.returncode, done.stdout.strip()) == (0, digests[-1]), done.stderr
        assert "2 of 2 tests passed" in done.stderr
    assert digests[0] in done.stderr, "it says how to go back"
    remote = remote_of(address)
    repository = "deploy/demo/zen3/app/1.0"
    assert remote.tags(repository) == ["latest", "v1", "v2"]
    assert [remote.resolve(repository, tag) for tag in ("v1", "v2", "latest")] == [*digests, digests[1]]
    for digest in digests:
        kinds = {entry.artifact_type for entry in remote.referrers(repository, digest, None)}
        assert kinds == {"uenv/meta", "uenv/reframe", "uenv/release"}

    again = publish(address, "deploy", f"app/1.0@{digests[1]}", "--tag", "v2", "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["digest"] == digests[1], again.stderr
    taken = publish(address, "deploy", "app/1.0:1", "--tag", "v2")
    assert taken.returncode == REFUSED and "never change" in taken.stderr and digests[1] in taken.stderr
    by_digest = publish(address, "deploy", digests[0], "--tag", "v1-again", "--no-latest")
    assert by_digest.returncode == 0, by_digest.stderr
    assert remote.resolve(repository, "latest") == digests[1]

    listed = json.loads(publish(address, "list", "--json").stdout)["images"]
    assert {(one["digest"], *one["tags"]) for one in listed} == {
        (digests[0], "v1", "v1-again"),
        (digests[1], "latest", "v2"),
    }
    assert {one["verdict"] for one in listed} == {"passed"}
    assert listed[0]["views"][0][0] == "default"
    table = publish(address, "list", "app").stdout.splitlines()
    assert table[0].split()[:2] == ["uenv", "uarch"] and len(table) == 3
    shown = publish(address, "show", "app/1.0:v2")
    assert "passed: 2 of 2 tests passed" in shown.stdout and "uenv/meta" in shown.stdout
    shown = publish(address, "show", f"app/1.0@{digests[0]}", "--json")
    assert json.loads(shown.stdout)["tags"] == ["v1", "v1-again"]


@pytest.mark.parametrize(
    ("name", "data", "more", "says"),
    [
        (
            "r.json",
            report([("a", "pass"), ("b", "fail")]),
            (),
            "b @generic:default+builtin: failed in sanity",
        ),
        ("r.json", report([("a", "pass"), ("b", "fail_deps")]), (), "fail_deps"),
        ("r.json", report([("a", "pass")], num_cases=3), (), "cannot be believed"),
        ("r.json", report(), (), "no test was run"),
        ("r.json", report([("a", "skip")]), (), "no test was run"),
        ("r.json", b"{}", (), "cannot be believed"),
        ("r.json", b"no json", (), "cannot be believed"),
        ("r.json", PASS, ("--annotation", f"{TESTED}=sha256:{'0' * 64}"), "another image"),
        ("r.json", PASS, ("--annotation", f"{VERDICT}=fail"), "marked as failed"),
        ("r.txt", PASS, (), "0 files that could be a report"),
        ("r.xml", junit(("a", "pass"), ("b", "fail")), (), "tests failed"),
        ("r.xml", junit(), (), "no test"),
        ("r.xml", junit(("a", "pass"), tests=5), (), "counts 5 tests"),
        ("r.xml", b'<!DOCTYPE x [<!ENTITY a "b">]><testsuites/>', (), "document type"),
    ],
)
def test_a_report_that_does_not_pass_refuses(
    publish: Publish,
    layout: str,
    images: list[Path],
    tmp_path: Path,
    name: str,
    data: bytes,
    more: tuple[str, ...],
    says: str,
) -> None:
    label = "build::app/1.0:1"
    assert publish(layout, "push", images[0], label).returncode == 0
    attached(publish, layout, tmp_path, label, name, data, *more)
    done = publish(layout, "deploy", "app/1.0:1", "--tag", "v1")
    assert (done.returncode, done.stdout) == (REFUSED, "")
    assert says in done.stderr and "hint:" in done.stderr
    assert remote_of(layout).tags("deploy/demo/zen3/app/1.0") == []


def test_other_reasons_to_refuse(publish: Publish, layout: str, images: list[Path], tmp_path: Path) -> None:
    label = "build::app/1.0:1"
    first = publish(layout, "push", images[0], label).stdout.strip()

    def refused(*words: str, status: int = REFUSED) -> str:
        done = publish(layout, "deploy", *words)
        assert (done.returncode, done.stdout) == (status, ""), done.stderr
        return done.stderr

    assert f"no test report is attached to {first}" in refused("app/1.0:1", "--tag", "v1")
    assert "needs a reason" in refused("app/1.0:1", "--tag", "v1", "--waive-tests", " ", status=66)
    assert "no such image" in refused("app/1.0:9", "--tag", "v1", status=68)
    assert "has a tag on" in refused("sha256:" + "1" * 64, "--tag", "v1", status=68)
    assert "in 'build' already" in refused("app/1.0:1", "--tag", "v1", "--to", "build", status=66)
    assert "tag that moves" in refused("app/1.0:1", "--tag", "latest", status=66)
    assert "no valid tag" in refused("app/1.0:1", "--tag", "a b", status=66)

    # A report of another image of the same repository is no report of this one.
    second = publish(layout, "push", images[1], "build::app/1.0:2").stdout.strip()
    attached(publish, layout, tmp_path, "build::app/1.0:2", "r.json", PASS)
    assert "no test report" in refused("app/1.0:1", "--tag", "v1")

    # The newest report counts, in both directions; what failed cannot be waived.
    attached(publish, layout, tmp_path, label, "r.json", PASS)
    attached(publish, layout, tmp_path, label, "f.json", report([("a", "fail")]))
    assert "cannot be waived" in refused("app/1.0:1", "--tag", "v1", "--waive-tests", "I know better")
    attached(publish, layout, tmp_path, label, "g.json", report([("a", "fail")], [("a", "pass")]))
    done = publish(layout, "deploy", "app/1.0:1", "--tag", "v1")
    assert done.returncode == 0 and "only at attempt 2" in done.stderr

    waived = publish(layout, "deploy", "app/1.0:2", "--tag", "v2")
    assert waived.returncode == 0
    pushed = publish(layout, "push", images[1], "build::other/1:5")
    assert pushed.stdout.strip() == second
    waived = publish(layout, "deploy", "other/1:5", "--tag", "v1", "--waive-tests", "bob, ticket 12")
    entry = next(one for one in json.loads(publish(layout, "list", "other", "--json").stdout)["images"])
    assert waived.returncode == 0
    assert (entry["verdict"], entry["remark"]) == ("waived", "bob, ticket 12")


def test_build_tags_are_never_overwritten(publish: Publish, layout: str, images: list[Path]) -> None:
    first = publish(layout, "push", images[0], "build::app/1.0:1").stdout
    for more in ((), ("--force",)):
        done = publish(layout, "push", images[1], "build::app/1.0:1", *more)
        assert done.returncode == 66 and first.strip() in done.stderr and "one pipeline" in done.stderr
    assert publish(layout, "push", images[0], "build::app/1.0:1").stdout == first


def test_the_index_is_kept_by_all_commands_and_can_be_made_anew(
    publish: Publish, address: str, images: list[Path], tmp_path: Path
) -> None:
    assert publish(address, "push", images[0], "app/1.0:v1").returncode == 0
    remote = remote_of(address)
    listed = publish(address, "list")
    assert "app/1.0:v1" in listed.stdout and "untested" in listed.stdout, (
        "without an index the registry is read"
    )
    done = publish(address, "reindex")
    assert done.returncode == 0 and "1 images" in done.stderr, done.stderr
    assert publish(address, "push", images[1], "app/1.0:v2", "--also-tag", "latest").returncode == 0
    index = read_index(remote, "deploy", "demo")
    assert sorted(entry.tags for entry in index.entries.values()) == [("latest", "v2"), ("v1",)]
    assert publish(address, "tag", "app/1.0:v1", "latest").returncode == 0
    assert publish(address, "deprecate", "app/1.0:v2", "wrong BLAS").returncode == 0
    index = read_index(remote, "deploy", "demo")
    assert {entry.tags: entry.deprecated for entry in index.entries.values()} == {
        ("latest", "v1"): None,
        ("v2",): "wrong BLAS",
    }
    remote.push_bytes(index_repository("deploy", "demo"), EMPTY_BLOB, EMPTY_TYPE)
    remote.push_manifest(index_repository("deploy", "demo"), "latest", build_artifact("no/index", [], {}))
    broken = publish(address, "list")
    assert broken.returncode == 0 and "no index" in broken.stderr and "deprecated" in broken.stdout
    assert publish(address, "reindex").returncode == 0
    assert read_index(remote, "deploy", "demo") == index
    assert publish(address, "deprecate", "app/1.0:v2", "--undo").returncode == 0
    assert all(entry.deprecated is None for entry in read_index(remote, "deploy", "demo").entries.values())


def test_releases_at_the_same_time_are_all_in_the_index(
    publish: Publish, real: RealRegistry, images: list[Path], tmp_path: Path
) -> None:
    address = f"{real.url}/many"
    names = [f"app{number}" for number in range(4)]
    assert publish(address, "push", images[0], "app/1.0:v1").returncode == 0
    assert publish(address, "reindex").returncode == 0
    for name in names:
        assert publish(address, "push", images[0], f"build::{name}/1:1").returncode == 0
    (tmp_path / "r.json").write_bytes(PASS)
    for name in names:
        assert (
            publish(
                address, "attach", f"build::{name}/1:1", tmp_path / "r.json", "--type", "uenv/reframe"
            ).returncode
            == 0
        )
    with ThreadPoolExecutor(len(names)) as pool:
        done = list(
            pool.map(lambda name: program(address, tmp_path, "deploy", f"{name}/1:1", "--tag", "v1"), names)
        )
    assert [one.returncode for one in done] == [0] * len(names), done
    found = read_index(remote_of(address), "deploy", "demo").repositories()
    assert found == sorted(
        repository_of("deploy", "demo", "zen3", name, "1.0" if name == "app" else "1")
        for name in ["app", *names]
    )


def test_a_registry_without_a_list_of_repositories(
    publish: Publish, images: list[Path], tmp_path: Path
) -> None:
    """As hosted ones: the index is what makes `list` work there."""
    with FakeRegistry() as fake:
        fake.spoil("/v2/_catalog", status=401)
        assert publish(fake.url, "push", images[0], "build::app/1.0:1").returncode == 0
        attached(publish, fake.url, tmp_path, "build::app/1.0:1", "r.json", PASS)
        refused = publish(fake.url, "list")
        assert refused.returncode == 72 and "does not list" in refused.stderr
        done = publish(fake.url, "deploy", "app/1.0:1", "--tag", "v1")
        assert done.returncode == 0 and "only repositories that are known" in done.stderr, done.stderr
        assert "app/1.0:v1,latest" in publish(fake.url, "list").stdout
        assert publish(fake.url, "reindex").returncode == 0
        assert "app/1.0:v1,latest" in publish(fake.url, "list").stdout


def test_attachments_are_listed_and_fetched(
    publish: Publish, layout: str, images: list[Path], tmp_path: Path
) -> None:
    assert publish(layout, "push", images[0], "build::app/1.0:1").returncode == 0
    nothing = publish(layout, "discover", "build::app/1.0:1")
    assert nothing.returncode == 0 and not nothing.stdout
    digest = attached(publish, layout, tmp_path, "build::app/1.0:1", "r.json", PASS)
    found = json.loads(
        publish(layout, "discover", "build::app/1.0:1", "--json", "--out", tmp_path / "out").stdout
    )
    assert [one["digest"] for one in found["attachments"]] == [digest]
    assert (tmp_path / "out/r.json").read_bytes() == PASS
    assert digest in publish(layout, "discover", "build::app/1.0:1", "--type", "uenv/reframe").stdout
    copied = publish(layout, "copy", "-r", "build::app/1.0:1", "test::app/1.0:x")
    assert copied.returncode == 0 and "1 attachments" in copied.stderr
    missing = publish(layout, "copy", "-r", "build::app/1.0:77", "test::app/1.0:y")
    assert missing.returncode == 68
    for words in (
        ("attach", "build::app/1.0:1", tmp_path / "absent", "--type", "a/b"),
        ("deprecate", "app/1.0:v1"),
        ("bogus",),
    ):
        assert publish(layout, *words).returncode == 66


def test_a_registry_that_gives_a_token_for_each_repository(images: list[Path], tmp_path: Path) -> None:
    """Reading build/ and writing deploy/ need different tokens; anonymous users may do neither."""
    token = tmp_path / "token"
    token.write_text(PASSWORD)
    token.chmod(0o600)
    (tmp_path / "r.json").write_bytes(PASS)
    with FakeRegistry(auth="bearer") as fake:
        who = ("--username", USER, "--token-file", token)
        label = "app/1.0:1@demo%zen3"
        assert program(fake.url, tmp_path, "push", images[0], f"build::{label}", *who).returncode == 0
        assert (
            program(
                fake.url,
                tmp_path,
                "attach",
                f"build::{label}",
                tmp_path / "r.json",
                "--type",
                "uenv/reframe",
                *who,
            ).returncode
            == 0
        )
        refused = program(fake.url, tmp_path, "deploy", label, "--tag", "v1")
        assert refused.returncode == 72 and PASSWORD not in refused.stderr
        done = program(fake.url, tmp_path, "deploy", label, "--tag", "v1", *who)
        assert done.returncode == 0, done.stderr
        assert "app/1.0:v1,latest" in program(fake.url, tmp_path, "list", "--system", "demo", *who).stdout
