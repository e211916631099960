"""Own images: one rule for where they are and what they are called, for who makes them, who lists them, and the daemon."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uenvd import own
from uenvd.config import Config
from uenvd.ctl.own import as_file, name_of, records
from uenvd.daemon.peer import Identity
from uenvd.daemon.requests import own_image
from uenvd.label import Description, Label, parse_description, parse_namespaced_label


@pytest.mark.parametrize(
    ("environ", "store"),
    [
        ({"HOME": "/home/ada"}, "/home/ada/.local/share/uenv"),
        ({"HOME": "/home/ada/"}, "/home/ada/.local/share/uenv"),
        ({"HOME": "/"}, "/.local/share/uenv"),
        ({"HOME": "/home/ada", "XDG_DATA_HOME": "/scratch/ada"}, "/scratch/ada/uenv"),
        ({"HOME": "/home/ada", "XDG_DATA_HOME": "share"}, "/home/ada/.local/share/uenv"),
        ({"HOME": "/home/ada", "XDG_DATA_HOME": ""}, "/home/ada/.local/share/uenv"),
        ({"HOME": "ada"}, ""),
        ({}, ""),
    ],
)
def test_where_they_are(environ: dict[str, str], store: str) -> None:
    assert own.store_directory(environ) == store
    assert own.images_directory(environ) == (f"{store}/images" if store else "")


@pytest.mark.parametrize("text", ["mine::app/1.0", "mine::app/1.0:v1", "mine::a.b/1-2:x_y"])
def test_all_agree_on_the_file(text: str) -> None:
    """The one who builds, `uenvctl`, and the daemon with the source that is its default."""
    directory = own.SOURCE.replace("%h", "/home/ada")
    label = parse_namespaced_label(text)
    path = own.image_path(directory, label)
    assert path == own_image(directory, label, Identity(1000, 1000, ()))
    assert path is not None and own.label_of(directory, path) == label
    assert directory == own.images_directory({"HOME": "/home/ada"})
    assert Config(system="s", registry=None).sources == {own.NAMESPACE: own.SOURCE}  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["app/1.0", "deploy::app/1.0", "mine::", "mine::app/1.0@sha256:" + 64 * "a"])
def test_what_is_no_own_image(text: str) -> None:
    assert own.image_path("/images", parse_namespaced_label(text)) is None
    assert own.image_path("", Label("app", "1", namespace=own.NAMESPACE)) is None


@given(st.text(alphabet="ab./-", max_size=20))
def test_no_file_elsewhere_has_a_label(name: str) -> None:
    label = own.label_of("/images", f"/images/{name}.squashfs")
    if label is not None:
        assert own.image_path("/images", label) == f"/images/{name}.squashfs"
        assert ".." not in name.split("/")
    assert own.label_of("/images", f"/other/{name}.squashfs") is None


def image(directory: Path, name: str, facts: object = None) -> Path:
    path = directory / "uenv/images" / f"{name}.squashfs"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"hsqs")
    if facts is not None:
        path.with_name(path.name.replace(".squashfs", ".json")).write_text(
            facts if isinstance(facts, str) else json.dumps(facts)
        )
    return path


def test_they_are_listed(tmp_path: Path) -> None:
    environ = {"XDG_DATA_HOME": str(tmp_path)}
    assert records("", environ) == []
    digest = "sha256:" + 64 * "a"
    image(
        tmp_path,
        "app/1.0",
        {"digest": digest, "system": "local", "uarch": "zen3", "date": "2026-11-01T00:00:00Z"},
    )
    image(tmp_path, "app/1.0/v1", "[" * 100_000)
    image(tmp_path, "tool/2", ["no facts"])
    image(tmp_path, "too/deep/for/us")
    image(tmp_path, ".app/hidden")
    image(tmp_path, "flat")

    def listed(text: str) -> list[str]:
        return [f"{one['name']}/{one['version']}:{one['tag']}" for one in records(text, environ)]

    everything = ["app/1.0:None", "app/1.0:v1", "tool/2:None"]
    assert listed("") == listed("mine::") == listed("@*") == everything
    assert listed("ap") == listed("mine::app/1.0") == everything[:2]
    assert listed(":v1") == listed("mine::app/1.0:v1") == ["app/1.0:v1"]
    assert listed("deploy::app") == listed("app/3") == []
    assert listed("%gh200") == everything[1:], "what is not known of a file keeps it out of no list"
    first = records("mine::app/1.0", environ)[0]
    assert (first["digest"], first["date"], first["size_bytes"]) == (digest, "2026-11-01T00:00:00Z", 4)
    assert records("tool", environ)[0]["digest"] is None


def test_a_label_is_its_file_where_there_is_one(tmp_path: Path) -> None:
    environ = {"XDG_DATA_HOME": str(tmp_path)}
    path = image(tmp_path, "app/1.0")
    asked = parse_description("mine::app/1.0:/mnt")
    assert as_file(asked, environ) == Description(None, str(path), "/mnt")
    assert name_of(str(path), environ) == "mine::app/1.0"
    assert name_of("/else/where.squashfs", environ) == "/else/where.squashfs"
    for text in ("mine::app/2.0", "app/1.0", "./x.squashfs", "deploy::app/1.0"):
        other = parse_description(text)
        assert as_file(other, environ) is other
