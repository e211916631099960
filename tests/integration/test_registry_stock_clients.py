"""Stock ``oras`` and ``skopeo`` read what we write, and the reverse: as in a pipeline that knows nothing of uenvd."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.orascli import oras_command
from support.publishing import Publisher, env_json, simple_image
from support.registry import FakeRegistry, docker_registry
from support.reports import junit, report
from uenvd.oci.attach import (
    META_TYPE,
    REFRAME_TYPE,
    attach,
    attached_meta,
    attachments,
    directory_content,
    json_content,
)
from uenvd.oci.copy import copy
from uenvd.oci.index import read_index
from uenvd.oci.manifest import squashfs_layer
from uenvd.oci.reference import attachment_tag, parse_registry
from uenvd.oci.remote import open_remote
from uenvd.publish.deploy import deploy_image
from uenvd.publish.history import RELEASE_TYPE
from uenvd.publish.push import Target
from uenvd.publish.releases import reindex

BUILD = "build/demo/zen3/app/1.0"
DEPLOY = "deploy/demo/zen3/app/1.0"
META = env_json("app", views={"default": {"scalar": {"A": "1"}}})


@pytest.fixture(scope="module")
def oras() -> Path:
    program, why = oras_command()
    if program is None:
        pytest.skip(why)
    return program


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simple_image(tmp_path_factory.mktemp("image") / "store.squashfs", "app", "one")


@pytest.fixture(params=["docker-registry", "referrers API"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "docker-registry":
        with docker_registry(tmp_path / "registry") as registry:
            yield registry.url
    else:
        with FakeRegistry() as fake:
            yield fake.url


def run(program: object, *words: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(program), *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def meta_directory(parent: Path) -> Path:
    meta = parent / "meta"
    (meta / "recipe").mkdir(parents=True)
    (meta / "env.json").write_bytes(META)
    (meta / "recipe/config.yaml").write_text("name: app\n")
    return meta


def test_oras_discovers_pulls_and_copies_what_we_publish(
    oras: Path, url: str, image: Path, tmp_path: Path
) -> None:
    host = url.removeprefix("http://")
    publisher = Publisher(url, namespace="build")
    digest = publisher.push(image, "app/1.0", "7")
    meta = attach(publisher.remote, BUILD, digest, META_TYPE, [directory_content(meta_directory(tmp_path))])
    passing = attach(
        publisher.remote, BUILD, digest, REFRAME_TYPE, [json_content("report.json", report([("a", "pass")]))]
    )

    words = ("--plain-http", "--format", "json")
    found = json.loads(run(oras, "discover", *words, f"{host}/{BUILD}:7", cwd=tmp_path))["manifests"]
    assert {(one["artifactType"], one["digest"]) for one in found} == {
        (META_TYPE, meta),
        (REFRAME_TYPE, passing),
    }
    only = json.loads(
        run(oras, "discover", *words, "--artifact-type", META_TYPE, f"{host}/{BUILD}@{digest}", cwd=tmp_path)
    )
    assert [one["digest"] for one in only["manifests"]] == [meta]

    out = tmp_path / "out"
    run(oras, "pull", "--plain-http", "-o", out, f"{host}/{BUILD}:7", cwd=tmp_path)
    assert (out / "store.squashfs").read_bytes() == image.read_bytes()
    run(oras, "pull", "--plain-http", "-o", out, f"{host}/{BUILD}@{meta}", cwd=tmp_path)
    assert (out / "meta/env.json").read_bytes() == META, "a directory is unpacked"

    run(
        oras,
        "cp",
        "-r",
        "--from-plain-http",
        "--to-plain-http",
        f"{host}/{BUILD}:7",
        f"{host}/{DEPLOY}:v1",
        cwd=tmp_path,
    )
    assert publisher.remote.resolve(DEPLOY, "v1") == digest
    assert {one.digest for one in attachments(publisher.remote, DEPLOY, digest)} == {meta, passing}


def test_we_discover_and_deploy_what_oras_publishes(
    oras: Path, url: str, image: Path, tmp_path: Path
) -> None:
    host = url.removeprefix("http://")
    (tmp_path / "store.squashfs").write_bytes(image.read_bytes())
    meta_directory(tmp_path)
    (tmp_path / "report.xml").write_bytes(junit(("a", "pass"), ("b", "pass")))
    reference = f"{host}/{BUILD}:4711"
    kind = "--artifact-type"
    run(
        oras,
        "push",
        "--plain-http",
        kind,
        "application/x-squashfs",
        reference,
        "store.squashfs",
        cwd=tmp_path,
    )
    run(oras, "attach", "--plain-http", kind, "uenv/meta", reference, "./meta", cwd=tmp_path)
    run(oras, "attach", "--plain-http", kind, "uenv/reframe", reference, "report.xml", cwd=tmp_path)

    remote = open_remote(parse_registry(url))
    digest = remote.resolve(BUILD, "4711")
    assert squashfs_layer(remote.manifest(BUILD, digest)).size_bytes == image.stat().st_size
    meta = attached_meta(remote, BUILD, digest)
    assert meta is not None and [view.name for view in meta.views] == ["default"]
    done = deploy_image(remote, Target(BUILD, "4711"), "v1")
    assert (done.digest, done.verdict, done.attachments) == (digest, "passed", 2)
    assert {one.artifact_type for one in attachments(remote, DEPLOY, digest)} == {
        META_TYPE,
        REFRAME_TYPE,
        RELEASE_TYPE,
    }
    (entry,) = read_index(remote, "deploy", "demo").entries.values()
    assert entry.views == (("default", "the view default"),) and entry.remark == "2 of 2 tests passed"

    other = "deploy/demo/zen3/other/2.0"
    run(
        oras,
        "cp",
        "-r",
        "--from-plain-http",
        "--to-plain-http",
        reference,
        f"{host}/{other}:v1",
        cwd=tmp_path,
    )
    index = reindex(remote, "deploy", "demo", print)
    assert index.repositories() == [DEPLOY, other]
    assert {entry.verdict for entry in index.entries.values()} == {"passed"}
    for repository in index.repositories():
        for one in attachments(remote, repository, digest):
            assert attachment_tag(digest, one.digest) in remote.every_tag(repository), "safe from a clean-up"
    seen = json.loads(
        run(oras, "discover", "--plain-http", "--format", "json", f"{host}/{DEPLOY}:v1", cwd=tmp_path)
    )
    assert len(seen["manifests"]) == 3


def test_oras_and_we_attach_at_the_same_time(oras: Path, image: Path, tmp_path: Path) -> None:
    """The stock client overwrites the list without looking again; ours puts back what it lost of ours."""
    with docker_registry(tmp_path / "registry") as registry:
        host = registry.url.removeprefix("http://")
        publisher = Publisher(registry.url, namespace="build")
        digest = publisher.push(image, "app/1.0", "7")
        (tmp_path / "note").write_text("x")
        words = [oras, "attach", "--plain-http", "--artifact-type", "a/b", f"{host}/{BUILD}@{digest}", "note"]

        def stock() -> None:
            # Whether it succeeds is its own affair: it deletes the list that it replaces.
            for _ in range(3):
                subprocess.run(words, cwd=tmp_path, capture_output=True, timeout=30, check=False)

        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(stock)
            mine = {
                attach(publisher.remote, BUILD, digest, "uenv/x", [json_content("n", b"%d" % number)])
                for number in range(3)
            }
            ended.result()
        assert mine <= {entry.digest for entry in publisher.remote.referrers(BUILD, digest, None)}


def test_skopeo_copies_what_we_publish(url: str, image: Path, tmp_path: Path) -> None:
    host = url.removeprefix("http://")
    publisher = Publisher(url, namespace="build")
    digest = publisher.push(image, "app/1.0", "7")
    meta = attach(publisher.remote, BUILD, digest, META_TYPE, [directory_content(meta_directory(tmp_path))])
    for reference in (digest, meta):
        out = tmp_path / reference[7:20]
        run(
            "skopeo",
            "copy",
            "-q",
            "--src-tls-verify=false",
            f"docker://{host}/{BUILD}@{reference}",
            f"dir:{out}",
            cwd=tmp_path,
        )
        manifest = json.loads((out / "manifest.json").read_bytes())
        layer = out / manifest["layers"][0]["digest"].removeprefix("sha256:")
        if reference == digest:
            assert layer.read_bytes() == image.read_bytes()
        else:
            with tarfile.open(layer) as archive:
                assert "meta/env.json" in archive.getnames()
    raw = run(
        "skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{host}/{BUILD}@{meta}", cwd=tmp_path
    )
    assert json.loads(raw)["subject"]["digest"] == digest
    listed = json.loads(
        run("skopeo", "list-tags", "--tls-verify=false", f"docker://{host}/{BUILD}", cwd=tmp_path)
    )
    assert "7" in listed["Tags"]
    done = copy(
        publisher.remote,
        BUILD,
        "7",
        open_remote(parse_registry(f"oci-layout:{tmp_path}/layout")),
        DEPLOY,
        "v1",
    )
    out = tmp_path / "from-layout"
    run("skopeo", "copy", "-q", f"oci:{tmp_path}/layout:{DEPLOY}:v1", f"dir:{out}", cwd=tmp_path)
    assert done.digest == digest and (out / "manifest.json").exists()
