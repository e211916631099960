"""Own images: one rule for where they are and what they are called, for who makes them, who lists them, and the daemon."""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uenvd import own
from uenvd.config import Config
from uenvd.ctl.own import as_file, name_of, records
from uenvd.daemon.ownfiles import directory_of
from uenvd.daemon.peer import Identity
from uenvd.errors import AmbiguousLabel, LabelError, UenvError, UnknownLabel
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
    assert path is not None and own.label_of(directory, path) == label
    assert directory == own.images_directory({"HOME": "/home/ada"})
    entry = pwd.getpwuid(os.getuid())
    assert directory_of(own.SOURCE, Identity(entry.pw_uid, entry.pw_gid, ())) == own.images_directory(
        {"HOME": entry.pw_dir}
    )
    assert Config(system="s", registry=None).sources == {own.NAMESPACE: own.SOURCE}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["app/1.0", "deploy::app/1.0", "mine::", "mine::app:v1", "mine::app/1.0@sha256:" + 64 * "a"]
)
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


def meant(text: str, environ: dict[str, str]) -> str:
    """Return what `uenvctl` takes a label for, without what all of them have in common; or the refusal's code."""
    try:
        found = as_file(parse_description(text), environ)
    except UenvError as error:
        return error.code
    return str(found.path).removeprefix(f"{environ['XDG_DATA_HOME']}/uenv/images/")


def test_a_label_is_its_file(tmp_path: Path) -> None:
    environ = {"XDG_DATA_HOME": str(tmp_path)}
    path = image(tmp_path, "app/1.0")
    asked = parse_description("mine::app/1.0:/mnt")
    assert as_file(asked, environ) == Description(None, str(path), "/mnt")
    assert name_of(str(path), environ) == "mine::app/1.0"
    assert name_of("/else/where.squashfs", environ) == "/else/where.squashfs"
    for text in ("app/1.0", "./x.squashfs", "deploy::app/1.0"):
        other = parse_description(text)
        assert as_file(other, environ) is other


def test_a_label_that_leaves_something_out_means_what_there_is(tmp_path: Path) -> None:
    environ = {"XDG_DATA_HOME": str(tmp_path)}
    latest = image(tmp_path, "app/1.0")
    os.link(latest, image(tmp_path, "app/1.0/v2").with_name("v3.squashfs"))
    image(tmp_path, "tool/2/a")
    image(tmp_path, "two/1/a")
    image(tmp_path, "two/1/b")
    image(tmp_path, "two/2")
    os.link(image(tmp_path, "same/1/a"), tmp_path / "uenv/images/same/1/b.squashfs")
    image(tmp_path, "flat")
    assert meant("mine::app", environ) == "app/1.0.squashfs", "the version's own, whatever tags there are"
    assert meant("mine::app:v2", environ) == "app/1.0/v2.squashfs"
    assert meant("mine::tool", environ) == meant("mine::tool/2", environ) == "tool/2/a.squashfs"
    assert meant("mine::two/1", environ) == meant("mine::two", environ) == AmbiguousLabel.code
    assert meant("mine::two:b", environ) == "two/1/b.squashfs"
    assert meant("mine::same", environ) == "same/1/a.squashfs", "two names of one image"
    assert meant("mine::flat", environ) == "flat.squashfs"
    with pytest.raises(AmbiguousLabel) as caught:
        as_file(parse_description("mine::two"), environ)
    assert caught.value.message.endswith("\n  mine::two/1:a\n  mine::two/1:b\n  mine::two/2")
    for text in ("mine::app/1.0@daint", "mine::app%zen3", "mine::app/1.0@sha256:" + 64 * "a"):
        assert meant(text, environ) == LabelError.code, "no file name says that"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("mine::app/3", "there is: mine::app/1.0, mine::app/1.0:v1; list them: uenvctl image ls mine::;"),
        ("mine::app/1.0:v9", "there is: mine::app/1.0, mine::app/1.0:v1;"),
        ("mine::appp/1", "did you mean mine::app?; list them:"),
        ("mine::flatt", "did you mean mine::flat?"),
        ("mine::none/1", "list them: uenvctl image ls mine::; build it: uenvd-publish build RECIPE none/1"),
        ("mine::none", "build RECIPE none/VERSION"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(text: str, hint: str, tmp_path: Path) -> None:
    environ = {"XDG_DATA_HOME": str(tmp_path)}
    image(tmp_path, "app/1.0", {"digest": "x"})
    image(tmp_path, "app/1.0/v1")
    image(tmp_path, "flat")
    (tmp_path / "uenv/images/app/odd name.squashfs").touch()
    (tmp_path / "uenv/images/app/gone.squashfs").symlink_to("nowhere")
    with pytest.raises(UnknownLabel) as caught:
        as_file(parse_description(text), environ)
    said = f"there is no own image {text.removeprefix('mine::')} in {tmp_path}/uenv/images"
    assert caught.value.message == said
    assert hint in caught.value.hint and "odd" not in caught.value.hint
    with pytest.raises(UnknownLabel, match="HOME"):
        as_file(parse_description(text), {})
