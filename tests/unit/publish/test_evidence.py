"""Bill of materials and provenance: what is found in an image, and that the documents are what their standards say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from support.publishing import Publisher, make_squashfs
from uenvd.errors import UsageError
from uenvd.oci.attach import attachments
from uenvd.publish.provenance import (
    LOG_TYPE,
    PREDICATE_TYPE,
    PROVENANCE_TYPE,
    STATEMENT_TYPE,
    Input,
    attach_evidence,
    ci_identity,
    clean_log,
    image_inputs,
    locked_inputs,
    statement,
)
from uenvd.publish.sbom import SBOM_TYPE, Component, components, document

HEX = 64 * "a"
DIGEST = "sha256:" + HEX
SITE = "env/default/lib/python3.11/site-packages"
FILES: dict[str, bytes | str] = {
    f"{SITE}/numpy-2.1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: NumPy\nVersion: 2.1.0\nLicense-Expression: BSD-3-Clause\n\ntext",
    f"{SITE}/Odd_Name-1.dist-info/METADATA": "Name: Odd_Name\nVersion: 1\nLicense: a\n  long\n  text\n",
    f"{SITE}/broken-1.dist-info/METADATA": b"\xff\xfe",
    "linux-x/hdf5-1.14-abc/.spack/spec.json": json.dumps({"spec": {"nodes": [{"name": "hdf5", "version": "1.14", "hash": "abc"}]}}),
    "linux-x/bad/.spack/spec.json": "{",
    "conda-meta/zlib-1.3-h1.json": json.dumps({"name": "zlib", "version": "1.3", "build": "h1", "license": "Zlib", "sha256": HEX}),
    "meta/recipe/interpreter.lock": f"# packages\nlibc6=2.36-9+deb12u7 amd64 sha256:{HEX}\n",
    "meta/recipe/requirements.lock": f"numpy==2.1.0 \\\n    --hash=sha256:{HEX} \\\n    --hash=sha256:{64 * 'b'}\n",
    "bin/tool": "#!/bin/sh\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_squashfs(tmp_path_factory.mktemp("image") / "store.squashfs", FILES)


def bill(image: Path) -> dict[str, Any]:
    raw = document(
        components(image), name="app", version="1.0", layer_digest=DIGEST, created="2026-11-01T00:00:00Z"
    )
    return dict(json.loads(raw))


def test_packages_of_all_kinds_are_found(image: Path) -> None:
    assert components(image) == [
        Component("conda", "zlib", "1.3", (("build", "h1"),)),
        Component("deb", "libc6", "2.36-9+deb12u7", (("arch", "amd64"),)),
        Component("generic", "hdf5", "1.14", (("spack-hash", "abc"),)),
        Component("pypi", "numpy", "2.1.0"),
        Component("pypi", "odd-name", "1"),
    ]


def test_the_bill_is_cyclonedx_and_always_the_same(image: Path) -> None:
    found = bill(image)
    assert found == bill(image)
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    assert found["metadata"]["timestamp"] == "2026-11-01T00:00:00+00:00"
    assert found["metadata"]["component"]["hashes"] == [{"alg": "SHA-256", "content": HEX}]
    urls = [one["purl"] for one in found["components"]]
    assert "pkg:pypi/numpy@2.1.0" in urls
    assert "pkg:deb/debian/libc6@2.36-9%2Bdeb12u7?arch=amd64" in urls
    numpy = next(one for one in found["components"] if one["name"] == "numpy")
    assert numpy["licenses"] == [{"license": {"name": "BSD-3-Clause"}}]
    assert all(len(one.get("hashes", [])) <= 1 for one in found["components"])


def test_the_bill_is_valid_against_the_published_schema(image: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill(image))) is None


def test_inputs_come_from_the_recipe_in_the_image(image: Path) -> None:
    assert image_inputs(image) == [
        Input("pkg:deb/debian/libc6@2.36-9+deb12u7?arch=amd64", HEX),
        Input("pkg:pypi/numpy@2.1.0", HEX),
        Input("pkg:pypi/numpy@2.1.0", 64 * "b"),
    ]
    assert locked_inputs("nothing here\n") == []


def test_the_statement_is_in_totos(image: Path) -> None:
    circumstances = {
        "builder": "uenvd 1", "recipe": {"fingerprint": "sha256:" + 64 * "c"}, "mount": "/user-environment", "machine": "x86_64",
        "time": "2026-11-01T00:00:00+00:00", "seconds": 90.0, "host": "secret-host", "user": "secret-user",
    }  # fmt: skip
    environ = {
        "GITLAB_CI": "true", "CI_PROJECT_PATH": "hpc/uenv", "CI_COMMIT_REF_NAME": "main", "CI_COMMIT_SHA": 40 * "d",
        "CI_PROJECT_URL": "https://git.example.org/hpc/uenv", "CI_JOB_URL": "https://git.example.org/hpc/uenv/-/jobs/1",
    }  # fmt: skip
    raw = statement(
        label="demo/zen3/app/1.0", digest=DIGEST, layer_digest="sha256:" + 64 * "b", circumstances=circumstances,
        inputs=image_inputs(image), environ=environ,
    )  # fmt: skip
    assert b"secret" not in raw
    body = json.loads(raw)
    assert (body["_type"], body["predicateType"]) == (STATEMENT_TYPE, PREDICATE_TYPE)
    assert body["subject"][0] == {"name": "demo/zen3/app/1.0", "digest": {"sha256": HEX}}
    definition, details = body["predicate"]["buildDefinition"], body["predicate"]["runDetails"]
    assert definition["externalParameters"]["ci"] == "gitlab:hpc/uenv@main"
    recipe, source, *rest = definition["resolvedDependencies"]
    assert recipe["digest"] == {"sha256": 64 * "c"}
    assert source == {
        "name": "source",
        "uri": "git+https://git.example.org/hpc/uenv",
        "digest": {"gitCommit": 40 * "d"},
    }
    assert len(rest) == 3
    assert details["builder"] == {"id": "uenvd 1"}
    assert details["metadata"] == {
        "invocationId": environ["CI_JOB_URL"], "startedOn": "2026-11-01T00:00:00Z", "finishedOn": "2026-11-01T00:01:30Z",
    }  # fmt: skip


def test_little_is_known_of_a_build_by_others() -> None:
    odd: dict[str, Any] = {"recipe": 3, "time": "never", "seconds": "x"}
    body = json.loads(
        statement(label="a", digest=DIGEST, layer_digest=DIGEST, circumstances=odd, inputs=[], environ={})
    )
    assert body["predicate"]["runDetails"] == {"builder": {"id": "unknown"}, "metadata": {}}
    assert ci_identity({}) is None
    github = {"GITHUB_ACTIONS": "true", "GITHUB_REPOSITORY": "hpc/uenv", "GITHUB_REF": "refs/heads/main"}
    assert ci_identity(github) == "github:hpc/uenv@refs/heads/main"


def test_logs_hold_no_secrets() -> None:
    host = os.uname().nodename
    shown = "host" if len(host) >= 3 else host  # shorter ones are in other words, too
    environ = {
        "HOME": "/home/alice",
        "USER": "alice",
        "CI_JOB_TOKEN": "glcbt-123456",
        "SHORT_TOKEN": "abc",
        "KEY_FILE": "/x",
    }
    log = f"alice on {host} at /home/alice/x with glcbt-123456, malice, abc\n".encode()
    assert clean_log(log, environ) == f"USER on {shown} at HOME/x with [secret], malice, abc\n".encode()


def test_all_is_attached_once(image: Path, tmp_path: Path) -> None:
    publisher = Publisher(f"oci-layout:{tmp_path}/layout", namespace="build")
    digest = publisher.push(image, "app/1.0", "1")
    repository = "build/demo/zen3/app/1.0"
    log = tmp_path / "build.log"
    log.write_text("done\n")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/configure.json").write_text('{"builder": "b"}')
    first = attach_evidence(
        publisher.remote, repository, digest, image=image, meta_dir=tmp_path / "meta", log=log, environ={}
    )
    assert set(first) == {SBOM_TYPE, PROVENANCE_TYPE, LOG_TYPE}
    assert (
        attach_evidence(
            publisher.remote, repository, digest, image=image, meta_dir=tmp_path / "meta", log=log, environ={}
        )
        == first
    )
    assert len(attachments(publisher.remote, repository, digest)) == 3
    with pytest.raises(UsageError, match="another size"):
        attach_evidence(publisher.remote, repository, digest, image=log, environ={})
    with pytest.raises(UsageError, match="cannot be read"):
        attach_evidence(publisher.remote, repository, digest, image=image, log=tmp_path / "none", environ={})


def test_source_files_are_inputs() -> None:
    lock = (
        f"# comment\nzlib_1.orig.tar.bz2 sha256:{64 * 'a'} debian:zlib=1:1.2-1 https://example.org/zlib\n"
        f"lib.tar.gz   sha256:{64 * 'b'} https://example.org/lib.tar.gz\n"
    )
    assert [(one.uri, one.sha256[0]) for one in locked_inputs(lock)] == [
        ("pkg:deb/debian/zlib@1:1.2-1?arch=source#zlib_1.orig.tar.bz2", "a"),
        ("https://example.org/lib.tar.gz", "b"),
    ]
