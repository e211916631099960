import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.registry import oras_manifest
from uenvd.errors import DigestMismatch, ManifestError
from uenvd.oci.manifest import (
    CONFIG_TYPE,
    EMPTY_BLOB,
    EMPTY_DIGEST,
    LAYER_TITLE,
    MAX_MANIFEST_BYTES,
    SQUASHFS_TYPE,
    TITLE,
    Descriptor,
    ImageConfig,
    build_manifest,
    digest_of,
    parse_config,
    parse_index,
    parse_manifest,
    squashfs_layer,
)
from uenvd.views import ImageMeta, View

D1 = "sha256:" + "1" * 64
D2 = "sha256:" + "2" * 64
LAYER = Descriptor(SQUASHFS_TYPE, D1, 4096, {TITLE: LAYER_TITLE})


def stock(**changes: Any) -> bytes:
    body = json.loads(oras_manifest(D1, 4096))
    return json.dumps(
        {key: value for key, value in {**body, **changes}.items() if value is not None}
    ).encode()


def layer(
    media_type: str = "application/vnd.oci.image.layer.v1.tar", title: str | None = None, digest: str = D1
) -> Any:
    annotations = {"annotations": {TITLE: title}} if title else {}
    return {"mediaType": media_type, "digest": digest, "size": 1} | annotations


def test_the_manifest_of_oras_push() -> None:
    raw = oras_manifest(D1, 4096)
    manifest = parse_manifest(raw, digest_of(raw))
    assert manifest.artifact_type == SQUASHFS_TYPE
    assert manifest.raw == raw
    assert manifest.config.digest == EMPTY_DIGEST
    assert squashfs_layer(manifest).digest == D1
    assert squashfs_layer(manifest).size_bytes == 4096


def test_our_manifest_comes_back_and_is_reproducible() -> None:
    config = Descriptor(CONFIG_TYPE, D2, 10)
    raw = build_manifest(LAYER, config, {"b": "2", "a": "1"}, created="2026-01-01T00:00:00Z")
    assert raw == build_manifest(LAYER, config, {"a": "1", "b": "2"}, created="2026-01-01T00:00:00Z")
    manifest = parse_manifest(raw, None)
    assert (manifest.config, squashfs_layer(manifest)) == (config, LAYER)
    assert manifest.annotations == {
        "a": "1",
        "b": "2",
        "org.opencontainers.image.created": "2026-01-01T00:00:00Z",
    }
    assert manifest.descriptor == Descriptor(
        manifest.media_type, digest_of(raw), len(raw), artifact_type=SQUASHFS_TYPE
    )


def test_bytes_with_another_digest_are_refused() -> None:
    with pytest.raises(DigestMismatch):
        parse_manifest(stock(), D1)


def test_an_index_is_named_as_such() -> None:
    for raw in (
        b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}',
        b'{"schemaVersion":2,"manifests":[]}',
    ):
        with pytest.raises(ManifestError, match="index"):
            parse_manifest(raw, None)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"1" * 10_000,
        stock(schemaVersion=1),
        stock(mediaType="text/html"),
        stock(mediaType=5),
        stock(layers={}),
        stock(layers=[layer()] * 1001),
        stock(layers=[None]),
        stock(config=None),
        stock(config=[]),
        stock(config={"mediaType": "x", "digest": "sha512:" + "1" * 128, "size": 1}),
        stock(config={"mediaType": "x", "digest": D1.upper(), "size": 1}),
        stock(config={"mediaType": "x", "digest": D1, "size": -1}),
        stock(config={"mediaType": "x", "digest": D1, "size": True}),
        stock(config={"mediaType": "x", "digest": D1, "size": 1.5}),
        stock(config={"mediaType": "x", "digest": D1, "size": 1 << 63}),
        stock(annotations={"a": 1}),
        stock(annotations=[]),
        stock(subject="x"),
        stock(artifactType=["x"]),
        b'{"a":"' + b"x" * MAX_MANIFEST_BYTES + b'"}',
    ],
)
def test_hostile_manifests_are_errors(raw: bytes) -> None:
    with pytest.raises(ManifestError):
        parse_manifest(raw, None)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "schemaVersion",
                        "config",
                        "layers",
                        "digest",
                        "size",
                        "mediaType",
                        "annotations",
                        "subject",
                        "manifests",
                        "schema",
                        "meta",
                        "image",
                    ]
                ),
                inner,
            )
        ),
    )
)
def test_any_json_is_a_value_or_an_error(value: Any) -> None:
    raw = json.dumps(value).encode()
    for parse in (lambda: parse_manifest(raw, None), lambda: parse_index(raw), lambda: parse_config(raw)):
        with contextlib.suppress(ManifestError):
            parse()


@pytest.mark.parametrize(
    ("changes", "digest"),
    [
        ({}, D1),
        ({"artifactType": None, "layers": [layer(SQUASHFS_TYPE)]}, D1),
        ({"artifactType": None, "layers": [layer(title="other.squashfs")]}, D1),
        ({"layers": [layer("text/plain", "notes"), layer(SQUASHFS_TYPE, digest=D2)]}, D2),
        ({"artifactType": None, "config": {"mediaType": SQUASHFS_TYPE, "digest": D2, "size": 0}}, D1),
        ({"layers": [layer("application/octet-stream", "any name")]}, D1),
    ],
)
def test_the_squashfs_layer_is_found(changes: dict[str, Any], digest: str) -> None:
    assert squashfs_layer(parse_manifest(stock(**changes), None)).digest == digest


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": []},
        {"artifactType": None},
        {"layers": [layer(SQUASHFS_TYPE), layer(SQUASHFS_TYPE)]},
        {"artifactType": "application/x-other", "layers": [layer(title="data.tar")]},
        {"layers": [layer("application/vnd.oci.image.layer.v1.tar+gzip", "store.squashfs")]},
    ],
)
def test_what_is_no_uenv_is_refused_with_a_hint(changes: dict[str, Any]) -> None:
    if changes == {"artifactType": None}:
        changes = {"artifactType": None, "layers": [layer(title="meta")]}
    with pytest.raises(ManifestError) as caught:
        squashfs_layer(parse_manifest(stock(**changes), None))
    assert "uenvd-publish" in caught.value.hint


def test_config_blobs_come_back() -> None:
    meta = ImageMeta(
        "app",
        "what it is",
        "/user-environment",
        "default",
        (View("default", "d", (("set", "A", "b"),), True),),
    )
    config = ImageConfig(meta, "aarch64", "2026-01-01T00:00:00Z", D1, 4096)
    assert parse_config(config.encode()) == config
    assert parse_config(ImageConfig(None, None).encode()) == ImageConfig(None, None)


def test_config_blobs_of_others_say_nothing() -> None:
    assert parse_config(EMPTY_BLOB) is None
    assert parse_config(b'{"architecture":"amd64","os":"linux","rootfs":{}}') is None


@pytest.mark.parametrize(
    "raw",
    [
        b'{"schema":2}',
        b'{"schema":1,"meta":5}',
        b'{"schema":1,"meta":{"name":[]}}',
        b'{"schema":1,"image":"x"}',
        b'{"schema":1,"architecture":5}',
        b'{"schema":1,"x":"' + b"x" * (1 << 20) + b'"}',
        b"no json",
    ],
)
def test_broken_config_blobs_are_errors(raw: bytes) -> None:
    with pytest.raises(ManifestError):
        parse_config(raw)
