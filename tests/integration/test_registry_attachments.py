"""Attachments that others overwrite, that a clean-up would delete, or that a registry lists in its own way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from support.publishing import Publisher, simple_image
from support.registry import FakeRegistry, RealRegistry, docker_registry
from uenvd.errors import DigestMismatch, ManifestError, NotFound, UsageError
from uenvd.oci.attach import (
    Content,
    attach,
    attached_meta,
    attachments,
    directory_content,
    json_content,
    link,
)
from uenvd.oci.copy import copy
from uenvd.oci.manifest import (
    EMPTY_BLOB,
    EMPTY_TYPE,
    INDEX_TYPE,
    Descriptor,
    build_artifact,
    build_index,
    digest_of,
)
from uenvd.oci.reference import attachment_tag, fallback_tag, parse_registry
from uenvd.oci.remote import Remote, open_remote

BUILD = "build/demo/zen3/app/1.0"
DEPLOY = "deploy/demo/zen3/app/1.0"
WRITERS = 12
THREADS = 5
KINDS = ("real", "layout", "fake", "fake without API")

_ATTACHER = """
import sys
from uenvd.oci.attach import attach, json_content
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import open_remote
address, repository, digest, number = sys.argv[1:]
sys.stdin.readline()
attach(open_remote(parse_registry(address)), repository, digest, "uenv/reframe", [json_content("r.json", number.encode())])
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simple_image(tmp_path_factory.mktemp("image") / "app.squashfs", "app", "one")


@pytest.fixture(params=KINDS)
def address(request: pytest.FixtureRequest, tmp_path: Path, real: RealRegistry) -> Iterator[str]:
    match request.param:
        case "real":
            yield f"{real.url}/{tmp_path.name.replace('_', '-')}"
        case "layout":
            yield f"oci-layout:{tmp_path}/layout"
        case kind:
            with FakeRegistry(referrers_api=kind == "fake") as fake:
                yield fake.url


def pushed(address: str, image: Path) -> tuple[Remote, str]:
    publisher = Publisher(address, namespace="build")
    return publisher.remote, publisher.push(image, "app/1.0", "7")


def test_twelve_programs_attach_at_once(address: str, image: Path) -> None:
    remote, digest = pushed(address, image)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _ATTACHER, address, BUILD, digest, str(number)], stdin=subprocess.PIPE
        )
        for number in range(WRITERS)
    ]
    try:
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write(b"go\n")
            writer.stdin.flush()
        assert [writer.wait(60) for writer in writers] == [0] * WRITERS
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    found = attachments(remote, BUILD, digest, "uenv/reframe")
    assert len(found) == WRITERS
    if not _has_api(address):
        # Stock clients know the index only, not the tags.
        raw, media_type = remote.manifest_bytes(BUILD, fallback_tag(digest))
        assert media_type == INDEX_TYPE
        assert {entry["digest"] for entry in json.loads(raw)["manifests"]} == {one.digest for one in found}


def _has_api(address: str) -> bool:
    if address.startswith("oci-layout"):
        return False

    answer = requests.get(f"{address}/v2/{BUILD}/referrers/sha256:{'0' * 64}", timeout=5)
    return answer.status_code == 200


def test_threads_of_one_program_attach_at_once(address: str, image: Path) -> None:
    remote, digest = pushed(address, image)

    def one(number: int) -> str:
        return attach(remote, BUILD, digest, "uenv/reframe", [json_content("r.json", b"%d" % number)])

    with ThreadPoolExecutor(THREADS) as pool:
        made = set(pool.map(one, range(THREADS)))
    assert {entry.digest for entry in remote.referrers(BUILD, digest, None)} == made
    assert len(made) == THREADS
    assert remote.referrers(BUILD, digest, "uenv/meta") == []


def test_what_is_attached_already_is_not_attached_again(address: str, image: Path, tmp_path: Path) -> None:
    remote, digest = pushed(address, image)
    meta = tmp_path / "meta"
    meta.mkdir()
    (meta / "env.json").write_text('{"name": "app", "mount": "/user-tools", "views": {}}')
    first = attach(remote, BUILD, digest, "uenv/meta", [directory_content(meta)])
    assert attach(remote, BUILD, digest, "uenv/meta", [directory_content(meta)]) == first
    found = attached_meta(remote, BUILD, digest)
    assert found is not None and found.mount == "/user-tools"
    second = attach(remote, BUILD, digest, "uenv/meta", [directory_content(meta)], {"why": "a note"})
    assert [one.digest for one in attachments(remote, BUILD, digest)] == [second, first]
    assert remote.tags(BUILD) == ["7"], "tags of attachments are no tags of images"
    assert attachment_tag(digest, first) in remote.every_tag(BUILD)


def test_a_list_that_others_overwrote_is_mended(address: str, image: Path) -> None:
    remote, digest = pushed(address, image)
    first = attach(remote, BUILD, digest, "a/b", [Content("x", b"1")])
    remote.push_manifest(BUILD, fallback_tag(digest), build_index([]), INDEX_TYPE)
    assert [one.digest for one in attachments(remote, BUILD, digest)] == [first]
    second = attach(remote, BUILD, digest, "a/b", [Content("x", b"2")])
    assert {one.digest for one in attachments(remote, BUILD, digest)} == {first, second}


def test_foreign_entries_in_the_list_are_no_attachments(address: str, image: Path) -> None:
    remote, digest = pushed(address, image)
    other = "sha256:" + "1" * 64
    raw = build_artifact("a/b", [], {}, subject=Descriptor("x/y", other, 3))
    remote.push_bytes(BUILD, EMPTY_BLOB, EMPTY_TYPE)
    remote.push_manifest(BUILD, "other", raw)
    entry = Descriptor(
        "application/vnd.oci.image.manifest.v1+json", digest_of(raw), len(raw), artifact_type="a/b"
    )
    remote.push_manifest(BUILD, fallback_tag(digest), build_index([entry]), INDEX_TYPE)
    assert attachments(remote, BUILD, digest) == []
    with pytest.raises(UsageError):
        attach(remote, BUILD, "v1", "a/b", [])
    with pytest.raises(NotFound):
        attach(remote, BUILD, other, "a/b", [])


def test_a_copy_has_everything_and_moves_nothing_it_need_not(address: str, image: Path) -> None:
    remote, digest = pushed(address, image)
    report = attach(remote, BUILD, digest, "uenv/reframe", [json_content("r.json", b"{}")])
    signature = attach(remote, BUILD, report, "a/signature", [Content("s", b"of the report")])
    done = copy(remote, BUILD, "7", remote, DEPLOY, "v1")
    assert (done.digest, done.attachments) == (digest, [report, signature])
    assert done.streamed_bytes == 0, "blobs of one registry are mounted"
    assert remote.resolve(DEPLOY, "v1") == digest
    assert [one.digest for one in attachments(remote, DEPLOY, digest)] == [report]
    assert [one.digest for one in attachments(remote, DEPLOY, report)] == [signature]


def test_a_copy_between_registries_streams_and_verifies(
    real: RealRegistry, image: Path, tmp_path: Path
) -> None:
    remote, digest = pushed(f"{real.url}/streamed", image)
    attach(remote, BUILD, digest, "uenv/reframe", [json_content("r.json", b"{}")])
    layout = open_remote(parse_registry(f"oci-layout:{tmp_path}/there"))
    done = copy(remote, BUILD, "7", layout, DEPLOY, "v1")
    assert done.streamed_bytes > image.stat().st_size and done.mounted_bytes == 0
    back = copy(layout, DEPLOY, "v1", open_remote(parse_registry(f"{real.url}/back")), DEPLOY, "v1")
    assert back.digest == digest and len(back.attachments) == 1
    with FakeRegistry() as fake:
        copy(layout, DEPLOY, "v1", open_remote(parse_registry(fake.url)), DEPLOY, "v1")
        fake.spoil(f"/blobs/{remote.manifest(BUILD, '7').layers[0].digest}", corrupt=True)
        other = open_remote(parse_registry(f"oci-layout:{tmp_path}/other"))
        with pytest.raises(DigestMismatch):
            copy(open_remote(parse_registry(fake.url)), DEPLOY, "v1", other, DEPLOY, "v1")
        with pytest.raises(NotFound):
            other.resolve(DEPLOY, "v1")


@pytest.mark.parametrize("status", [202, 401, 404, 405])
def test_any_other_answer_than_created_means_not_mounted(image: Path, status: int, tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        remote, digest = pushed(fake.url, image)
        layer = remote.manifest(BUILD, digest).layers[0]
        fake.spoil(f"{DEPLOY}/blobs/sha256", method="HEAD", status=404)
        fake.spoil("mount=", method="POST", status=status, headers={"Location": "/v2/elsewhere"})
        assert not remote.mount_blob(DEPLOY, layer, BUILD)
        uploads = fake.count("PUT", f"{DEPLOY}/blobs/uploads")
        assert copy(remote, BUILD, "7", remote, DEPLOY, "v1").streamed_bytes > layer.size_bytes
        assert fake.count("PUT", f"{DEPLOY}/blobs/uploads") > uploads


def test_a_clean_up_of_untagged_manifests_deletes_nothing_that_a_job_needs(
    image: Path, tmp_path: Path
) -> None:
    """``docker-registry garbage-collect --delete-untagged`` after `latest` has moved on."""
    later = simple_image(tmp_path / "later.squashfs", "app", "two")
    directory = tmp_path / "registry"
    with docker_registry(directory) as registry:
        publisher = Publisher(registry.url)
        queued = publisher.push(image, "app/1.0", "v1", "latest")
        report = attach(publisher.remote, DEPLOY, queued, "uenv/reframe", [json_content("r.json", b"{}")])
        attach(publisher.remote, DEPLOY, queued, "uenv/meta", [Content("m", b"1")])
        doomed = build_artifact("a/b", [], {"no": "tag"})
        publisher.remote.push_manifest(DEPLOY, None, doomed)
        publisher.push(later, "app/1.0", "v2", "latest")
    config = directory / "config.yml"
    subprocess.run(
        ["docker-registry", "garbage-collect", "--delete-untagged", config],
        check=True,
        capture_output=True,
        timeout=60,
    )
    with docker_registry(directory) as registry:
        remote = open_remote(parse_registry(registry.url))
        with pytest.raises(NotFound):
            remote.manifest(DEPLOY, digest_of(doomed))
        manifest = remote.manifest(DEPLOY, queued)
        data = b"".join(remote.stream_blob(DEPLOY, manifest.layers[0], 0, lambda: False))
        assert digest_of(data) == manifest.layers[0].digest
        found = attachments(remote, DEPLOY, queued)
        assert len(found) == 2 and report in {one.digest for one in found}
        for one in found:
            remote.small_blob(DEPLOY, one.layers[0], 1000)


def test_a_manifest_of_another_subject_is_not_linked(image: Path, tmp_path: Path) -> None:
    remote, digest = pushed(f"oci-layout:{tmp_path}/layout", image)
    raw = build_artifact("a/b", [], {})
    with pytest.raises(ManifestError, match="does not belong"):
        link(remote, BUILD, digest, [raw])
