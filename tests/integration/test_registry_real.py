"""Against Debian's docker-registry and image layouts: everything that a remote does, and skopeo on the other side."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.registry import PASSWORD, USER, RealRegistry, docker_registry, oras_manifest
from uenvd.cache.pull import pull_blob
from uenvd.cache.store import Store
from uenvd.errors import (
    DigestMismatch,
    ManifestError,
    NotFound,
    RegistryDenied,
    RegistryError,
    RegistryUnreachable,
)
from uenvd.oci.credentials import Credential
from uenvd.oci.manifest import (
    CONFIG_TYPE,
    EMPTY_TYPE,
    INDEX_TYPE,
    LAYER_TITLE,
    SQUASHFS_TYPE,
    TITLE,
    Descriptor,
    ImageConfig,
    build_manifest,
    digest_of,
    parse_config,
    squashfs_layer,
)
from uenvd.oci.reference import fallback_tag, parse_registry
from uenvd.oci.remote import Remote, never, no_progress, open_remote

REPOSITORY = "deploy/demo/zen3/app/1.0"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture(params=["http", "prefix", "layout"])
def remote(request: pytest.FixtureRequest, tmp_path: Path, real: RealRegistry) -> Iterator[Remote]:
    """A registry for one test: a prefix keeps the tests apart."""
    where = {
        "http": f"{real.url}/t{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:8]}",
        "prefix": f"{real.url}/p{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:8]}/a/b",
        "layout": f"oci-layout:{tmp_path}/layout",
    }[request.param]
    opened = open_remote(parse_registry(where))
    yield opened
    opened.close()


def push(remote: Remote, directory: Path, data: bytes, *tags: str) -> tuple[str, Descriptor]:
    path = directory / "image"
    path.write_bytes(data)
    layer = Descriptor(SQUASHFS_TYPE, digest_of(data), len(data), {TITLE: LAYER_TITLE})
    remote.push_blob(REPOSITORY, path, layer)
    config = remote.push_bytes(REPOSITORY, ImageConfig(None, "x86_64").encode(), CONFIG_TYPE)
    raw = build_manifest(layer, config, {})
    for tag in tags:
        remote.push_manifest(REPOSITORY, tag, raw)
    return digest_of(raw), layer


def pull(remote: Remote, layer: Descriptor, directory: Path) -> bytes:
    store = Store(directory)
    store.prepare()
    pull_blob(remote, REPOSITORY, layer, store, progress=no_progress, cancelled=never)
    with os.fdopen(store.open(layer.digest), "rb") as file:
        return file.read()


def test_what_is_pushed_comes_back(remote: Remote, tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    digest, layer = push(remote, tmp_path, data, "v1", "latest")
    assert remote.tags(REPOSITORY) == ["latest", "v1"]
    assert remote.repositories("") == remote.repositories("deploy/demo/") == [REPOSITORY]
    assert remote.repositories("build/") == []
    manifest = remote.manifest(REPOSITORY, "latest")
    assert (
        manifest.digest
        == digest
        == remote.manifest(REPOSITORY, digest).digest
        == remote.resolve(REPOSITORY, "v1")
    )
    assert squashfs_layer(manifest) == layer
    config = parse_config(remote.small_blob(REPOSITORY, manifest.config, 1 << 20))
    assert config == ImageConfig(None, "x86_64")
    assert pull(remote, layer, tmp_path / "cache") == data
    assert b"".join(remote.stream_blob(REPOSITORY, layer, 2_999_999, never)) == data[2_999_999:]
    assert list(remote.stream_blob(REPOSITORY, layer, len(data), never)) == []


def test_a_blob_that_is_there_is_not_sent_again(remote: Remote, tmp_path: Path) -> None:
    _, layer = push(remote, tmp_path, b"once", "v1")
    (tmp_path / "image").write_bytes(b"2222")
    remote.push_blob(REPOSITORY, tmp_path / "image", layer)


def test_a_file_that_changed_is_refused(remote: Remote, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"other")
    with pytest.raises(DigestMismatch):
        remote.push_blob(REPOSITORY, tmp_path / "image", Descriptor(SQUASHFS_TYPE, digest_of(b"bytes"), 5))


def test_empty_blobs(remote: Remote, tmp_path: Path) -> None:
    _, layer = push(remote, tmp_path, b"", "v1")
    assert pull(remote, layer, tmp_path / "cache") == b""


def test_what_is_not_there(remote: Remote, tmp_path: Path) -> None:
    push(remote, tmp_path, b"x", "v1")
    nothing = digest_of(b"nothing")
    assert remote.tags("deploy/no/such/repository/1") == []
    for call in (
        lambda: remote.manifest(REPOSITORY, "v2"),
        lambda: remote.manifest(REPOSITORY, nothing),
        lambda: remote.manifest("no/such", "v1"),
        lambda: remote.small_blob(REPOSITORY, Descriptor("x", nothing, 7), 100),
        lambda: list(remote.stream_blob(REPOSITORY, Descriptor("x", nothing, 7), 0, never)),
        lambda: remote.resolve("no/such", "v1"),
    ):
        with pytest.raises(NotFound):
            call()
    with pytest.raises(RegistryError):
        remote.manifest("../etc", "passwd")
    with pytest.raises(RegistryError):
        remote.push_manifest(
            REPOSITORY, "v3", build_manifest(Descriptor("x", nothing, 7), Descriptor("x", nothing, 7), {})
        )


def test_an_index_is_no_image(remote: Remote, tmp_path: Path) -> None:
    push(remote, tmp_path, b"x", "v1")
    raw = json.dumps({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": []}).encode()
    assert remote.push_manifest(REPOSITORY, "many", raw, INDEX_TYPE) == remote.resolve(REPOSITORY, "many")
    with pytest.raises(ManifestError, match="index"):
        remote.manifest(REPOSITORY, "many")


def test_tags_move_and_digests_stay(remote: Remote, tmp_path: Path) -> None:
    first, _ = push(remote, tmp_path, b"first", "v1", "latest")
    second, _ = push(remote, tmp_path, b"second", "v2", "latest")
    assert remote.resolve(REPOSITORY, "latest") == second != first
    assert remote.manifest(REPOSITORY, first).digest == remote.resolve(REPOSITORY, "v1") == first
    assert remote.tags(REPOSITORY) == ["latest", "v1", "v2"]


def test_the_shape_of_oras_push(remote: Remote, tmp_path: Path) -> None:
    data = os.urandom(10_000)
    (tmp_path / "image").write_bytes(data)
    remote.push_blob(REPOSITORY, tmp_path / "image", Descriptor("x", digest_of(data), len(data)))
    remote.push_bytes(REPOSITORY, b"{}", EMPTY_TYPE)
    raw = oras_manifest(digest_of(data), len(data))
    remote.push_manifest(REPOSITORY, "v1", raw)
    manifest = remote.manifest(REPOSITORY, "v1")
    assert manifest.raw == raw
    assert parse_config(remote.small_blob(REPOSITORY, manifest.config, 1 << 20)) is None
    assert pull(remote, squashfs_layer(manifest), tmp_path / "cache") == data


def test_referrers_by_the_tag_schema(remote: Remote, tmp_path: Path) -> None:
    digest, layer = push(remote, tmp_path, b"subject", "v1")
    assert remote.referrers(REPOSITORY, digest, None) == []
    subject = remote.manifest(REPOSITORY, digest).descriptor
    body = json.loads(build_manifest(layer, remote.manifest(REPOSITORY, digest).config, {}, "uenv/reframe"))
    raw = json.dumps(body | {"subject": subject.to_json()}).encode()
    entry = Descriptor(
        "application/vnd.oci.image.manifest.v1+json", remote.push_manifest(REPOSITORY, None, raw), len(raw)
    )
    index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [entry.to_json(), entry.to_json()]}
    remote.push_manifest(REPOSITORY, fallback_tag(digest), json.dumps(index).encode(), INDEX_TYPE)
    assert [found.digest for found in remote.referrers(REPOSITORY, digest, None)] == [entry.digest]
    assert [found.artifact_type for found in remote.referrers(REPOSITORY, digest, "uenv/reframe")] == [
        "uenv/reframe"
    ]
    assert remote.referrers(REPOSITORY, digest, "uenv/meta") == []
    assert remote.tags(REPOSITORY) == ["v1"], "the fallback tag is no image"


def test_a_fallback_tag_that_leads_to_the_subject_itself_is_no_list(remote: Remote, tmp_path: Path) -> None:
    digest, _ = push(remote, tmp_path, b"subject", "v1")
    remote.push_manifest(REPOSITORY, fallback_tag(digest), remote.manifest(REPOSITORY, digest).raw)
    assert remote.referrers(REPOSITORY, digest, None) == []


def skopeo_name(remote: Remote, tag: str) -> str:
    address = remote.address
    if address.kind == "layout":
        return f"oci:{address.path}:{REPOSITORY}:{tag}"
    return f"docker://{address.host}/{address.prefix}/{REPOSITORY}:{tag}"


def skopeo(*words: str) -> bytes:
    done = subprocess.run(["skopeo", *words], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.mark.parametrize("stock", [True, False])
def test_skopeo_copies_what_we_push_and_we_pull_what_it_copied(
    remote: Remote, tmp_path: Path, real: RealRegistry, stock: bool
) -> None:
    data = os.urandom(100_000)
    digest, _ = push(remote, tmp_path, data, "v1")
    if stock:
        remote.push_bytes(REPOSITORY, b"{}", EMPTY_TYPE)
        digest = remote.push_manifest(REPOSITORY, "v1", oras_manifest(digest_of(data), len(data)))
    insecure = ["--src-tls-verify=false", "--dest-tls-verify=false"]
    inspected = skopeo("inspect", "--raw", "--tls-verify=false", skopeo_name(remote, "v1"))
    assert digest_of(inspected) == digest
    skopeo("copy", "-q", *insecure, skopeo_name(remote, "v1"), f"dir:{tmp_path}/dir")
    skopeo("copy", "-q", *insecure, f"dir:{tmp_path}/dir", skopeo_name(remote, "v2"))
    copied = remote.manifest(REPOSITORY, "v2")
    assert copied.digest == digest
    assert remote.tags(REPOSITORY) == ["v1", "v2"]
    other = open_remote(parse_registry(f"oci-layout:{tmp_path}/other"))
    skopeo("copy", "-q", *insecure, skopeo_name(remote, "v2"), skopeo_name(other, "v3"))
    found = other.manifest(REPOSITORY, "v3")
    assert found.digest == digest
    assert pull(other, squashfs_layer(found), tmp_path / "cache") == data


def test_skopeo_reads_the_cache(remote: Remote, tmp_path: Path) -> None:
    data = os.urandom(1000)
    _digest, layer = push(remote, tmp_path, data, "v1")
    store = Store(tmp_path / "cache")
    store.prepare()
    manifest = remote.manifest(REPOSITORY, "v1")
    config = remote.small_blob(REPOSITORY, manifest.config, 1 << 20)
    store.put_manifest(REPOSITORY, manifest, layer, config, tag="v1")
    pull_blob(remote, REPOSITORY, layer, store, progress=no_progress, cancelled=never)
    store.put_manifest(REPOSITORY, manifest, layer, config, tag="v1")
    skopeo("copy", "-q", f"oci:{tmp_path}/cache:{REPOSITORY}:v1", f"dir:{tmp_path}/dir")
    assert (tmp_path / "dir" / digest_of(data).removeprefix("sha256:")).read_bytes() == data


# --- authentication -------------------------------------------------------------------------------------------------------------


def test_basic_authentication(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with docker_registry(tmp_path / "registry", htpasswd=True) as registry:
        address = parse_registry(registry.url)
        right = open_remote(address, credential=Credential(USER, PASSWORD))
        digest, layer = push(right, tmp_path, os.urandom(2_000_000), "v1")
        assert right.resolve(REPOSITORY, "v1") == digest
        wrong = open_remote(address, credential=Credential(USER, "not-the-password"))
        anonymous = open_remote(address)
        for remote in (wrong, anonymous):
            for call in (lambda r=remote: r.tags(REPOSITORY), lambda r=remote: r.manifest(REPOSITORY, "v1"),
                         lambda r=remote: r.push_bytes(REPOSITORY, b"x", "x"), lambda r=remote: r.repositories(""),
                         lambda r=remote: next(iter(r.stream_blob(REPOSITORY, layer, 0, never)))):  # fmt: skip
                with pytest.raises(RegistryDenied) as caught:
                    call()
                assert "not-the-password" not in str(caught.value) and PASSWORD not in str(caught.value)
        config = tmp_path / "home/.docker/config.json"
        config.parent.mkdir(parents=True)
        config.write_text(json.dumps({"auths": {address.host: {"username": USER, "password": PASSWORD}}}))
        assert open_remote(address).tags(REPOSITORY) == ["v1"]
        for remote in (right, wrong, anonymous):
            remote.close()


def test_a_password_in_netrc_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with docker_registry(tmp_path / "registry", htpasswd=True) as registry, pytest.raises(RegistryDenied):
        open_remote(parse_registry(registry.url)).tags(REPOSITORY)


# --- layouts --------------------------------------------------------------------------------------------------------------------


PUSH_MANY = """
import sys
from uenvd.oci.manifest import CONFIG_TYPE, build_manifest
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import open_remote
path, repository, worker = sys.argv[1:]
remote = open_remote(parse_registry(path))
config = remote.push_bytes(repository, f"config {worker}".encode(), CONFIG_TYPE)
for number in range(10):
    raw = build_manifest(config, config, {"number": str(number)})
    remote.push_manifest(repository, f"w{worker}-{number}", raw)
    remote.push_manifest(repository, "shared", raw)
"""


def test_processes_push_into_one_layout_at_once(tmp_path: Path) -> None:
    path = f"oci-layout:{tmp_path}/layout"
    workers = [
        subprocess.Popen([sys.executable, "-c", PUSH_MANY, path, REPOSITORY, str(number)])
        for number in range(4)
    ]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0, 0]
    tags = open_remote(parse_registry(path)).tags(REPOSITORY)
    assert tags == sorted([f"w{worker}-{number}" for worker in range(4) for number in range(10)] + ["shared"])


def test_a_layout_that_is_not_there_is_unreachable(tmp_path: Path) -> None:
    remote = open_remote(parse_registry(f"oci-layout:{tmp_path}/none"))
    with pytest.raises(RegistryUnreachable) as caught:
        remote.tags(REPOSITORY)
    assert "none" in str(caught.value) and "push" in caught.value.hint
    (tmp_path / "file").touch()
    with pytest.raises(RegistryUnreachable):
        open_remote(parse_registry(f"oci-layout:{tmp_path}/file")).tags(REPOSITORY)


def test_entries_of_other_tools_stay_in_a_layout(tmp_path: Path) -> None:
    remote = open_remote(parse_registry(f"oci-layout:{tmp_path}/layout"))
    push(remote, tmp_path, b"x", "v1")
    index = tmp_path / "layout/index.json"
    body = json.loads(index.read_bytes())
    foreign = {"mediaType": "x/y", "digest": "sha512:00", "size": 1, "annotations": {"k": "v"}}
    body["manifests"].append(foreign)
    index.write_text(json.dumps(body))
    push(remote, tmp_path, b"y", "v1")
    assert foreign in json.loads(index.read_bytes())["manifests"]
    assert remote.tags(REPOSITORY) == ["v1"]


def test_damage_in_a_layout_is_noticed(tmp_path: Path) -> None:
    remote = open_remote(parse_registry(f"oci-layout:{tmp_path}/layout"))
    digest, layer = push(remote, tmp_path, b"12345678", "v1")
    blobs = tmp_path / "layout/blobs/sha256"
    (blobs / layer.digest.removeprefix("sha256:")).write_bytes(b"1234x678")
    with pytest.raises(DigestMismatch):
        pull(remote, layer, tmp_path / "cache")
    (blobs / layer.digest.removeprefix("sha256:")).write_bytes(b"1234")
    with pytest.raises(DigestMismatch):
        pull(remote, layer, tmp_path / "cache")
    (blobs / digest.removeprefix("sha256:")).write_bytes(b"{}")
    with pytest.raises(DigestMismatch):
        remote.manifest(REPOSITORY, "v1")
    for damage in ("", "[]", '{"manifests":5}'):
        (tmp_path / "layout/index.json").write_text(damage)
        with pytest.raises(ManifestError):
            remote.tags(REPOSITORY)
