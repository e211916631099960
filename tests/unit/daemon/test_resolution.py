"""What a label means, given tags: latest, the only digest, the table; hints for what is not there."""

from __future__ import annotations

import pytest

from uenvd.daemon.resolution import Found, Repository, choose, image_tags, matching, table, tags_to_ask
from uenvd.errors import AmbiguousLabel, UnknownLabel
from uenvd.label import parse_namespaced_label

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64
PATHS = [
    "deploy/alps/zen3/app/42.0",
    "deploy/alps/gh200/app/42.0",
    "deploy/alps/zen3/app/43.0",
    "deploy/alps/zen3/tool/1",
    "deploy/daint/zen3/app/42.0",
    "not/ours",
]


def paths(label: str, *, name_prefix: bool = False) -> list[str]:
    return [repo.path for repo in matching(parse_namespaced_label(label), PATHS, name_prefix=name_prefix)]


def found(path: str, tag: str | None, digest: str) -> Found:
    repository = Repository.parse(path)
    assert repository is not None
    return Found(repository, tag, digest)


def test_a_label_means_the_repositories_that_it_does_not_exclude() -> None:
    assert paths("deploy::app/42.0@alps%zen3") == ["deploy/alps/zen3/app/42.0"]
    assert paths("deploy::app/42.0@alps") == ["deploy/alps/gh200/app/42.0", "deploy/alps/zen3/app/42.0"]
    assert len(paths("deploy::app@*")) == 4
    assert paths("deploy::ap") == []
    assert len(paths("deploy::ap", name_prefix=True)) == 4


def test_tags_that_carry_attachments_are_no_images() -> None:
    assert image_tags(["v1", "sha256-" + "0" * 64, "latest"]) == ["latest", "v1"]


def test_latest_decides_when_no_tag_is_named() -> None:
    assert tags_to_ask(parse_namespaced_label("app"), ["latest", "v1", "v2"]) == ["latest"]
    assert tags_to_ask(parse_namespaced_label("app"), ["v1", "v2"]) == ["v1", "v2"]
    assert tags_to_ask(parse_namespaced_label("app:v1"), ["latest", "v1"]) == ["v1"]
    assert tags_to_ask(parse_namespaced_label("app:v9"), ["latest", "v1"]) == []


def test_several_tags_of_one_digest_are_one_image() -> None:
    label = parse_namespaced_label("app/42.0")
    chosen = choose(label, [found(PATHS[0], "latest", A), found(PATHS[0], "v1", A)], {})
    assert (chosen.digest, chosen.tag) == (A, "v1")


def test_several_digests_are_a_table() -> None:
    candidates = [found(PATHS[0], "v1", A), found(PATHS[1], "v1", B)]
    with pytest.raises(AmbiguousLabel) as caught:
        choose(parse_namespaced_label("app/42.0"), candidates, {})
    assert "app/42.0:v1" in caught.value.message
    assert "%gh200" in caught.value.message
    assert "%zen3" in caught.value.message
    assert len(table(candidates).splitlines()) == 3


def test_an_unknown_label_hints_at_what_there_is() -> None:
    known = {"deploy/alps/zen3/app/42.0": ["v1", "v2"], "deploy/alps/zen3/tool/1": ["v1"]}
    with pytest.raises(UnknownLabel) as caught:
        choose(parse_namespaced_label("app/41.0"), [], known)
    assert "app/42.0:v1, app/42.0:v2" in caught.value.hint
    with pytest.raises(UnknownLabel) as caught:
        choose(parse_namespaced_label("tol"), [], known)
    assert "did you mean tool" in caught.value.hint
    with pytest.raises(UnknownLabel) as caught:
        choose(parse_namespaced_label("zzz"), [], {})
    assert "image find" in caught.value.hint
