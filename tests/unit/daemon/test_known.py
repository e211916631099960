"""What is known of an image beside its bytes: from the index, from attachments, from neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.publishing import Publisher, env_json, make_squashfs
from uenvd.cache.store import Store
from uenvd.config import Config, RegistryConfig
from uenvd.daemon import known
from uenvd.daemon.catalogue import Catalogue
from uenvd.daemon.question import Image
from uenvd.errors import RegistryUnreachable
from uenvd.label import parse_label
from uenvd.oci.attach import (
    META_TYPE,
    REFRAME_TYPE,
    VERDICT,
    Content,
    attach,
    directory_content,
    json_content,
)
from uenvd.oci.index import Entry, update_index
from uenvd.oci.reference import repository_of

REPOSITORY = repository_of("deploy", "demo", "zen3", "app", "1")


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(f"oci-layout:{tmp_path / 'layout'}")


@pytest.fixture
def digest(tmp_path: Path, publisher: Publisher) -> str:
    return publisher.push(
        make_squashfs(tmp_path / "a.squashfs", {"a": "a"}, meta=env_json("app")), "app/1", "v1"
    )


@pytest.fixture
def catalogue(tmp_path: Path, publisher: Publisher) -> Catalogue:
    config = Config(system="demo", registry=RegistryConfig("-"), resolve_ttl_s=0.0)
    store = Store(tmp_path / "cache")
    store.prepare()
    return Catalogue(config, publisher.remote, store)


async def image(catalogue: Catalogue) -> Image:
    return await catalogue.resolve(parse_label("app/1:v1"), catalogue.question())


async def evidence(catalogue: Catalogue) -> dict[str, Any]:
    return await known.evidence(catalogue, await image(catalogue), catalogue.question())


async def test_nothing_is_known(catalogue: Catalogue, digest: str) -> None:
    assert await evidence(catalogue) == {
        "tests": {"verdict": "untested", "remark": None},
        "deprecated": None,
        "tags": None,
    }
    assert await known.recipe(catalogue, await image(catalogue), catalogue.question()) is None


async def test_the_newest_report_counts(catalogue: Catalogue, publisher: Publisher, digest: str) -> None:
    for day, verdict in enumerate(("pass", "fail", "nonsense", "waived"), start=1):
        notes = {VERDICT: verdict}
        when = f"2026-11-0{day}T00:00:00Z"
        content = [json_content("report.json", str(day).encode())]
        attach(publisher.remote, REPOSITORY, digest, REFRAME_TYPE, content, notes, created=when)
        expected = {"pass": "passed", "fail": "failed", "waived": "waived"}.get(verdict, "untested")
        assert (await evidence(catalogue))["tests"]["verdict"] == expected


async def test_the_index_goes_first(catalogue: Catalogue, publisher: Publisher, digest: str) -> None:
    layer = publisher.remote.manifest(REPOSITORY, digest).layers[0].digest
    entry = Entry(REPOSITORY, digest, ("v1",), layer, 5, verdict="waived", remark="why", deprecated="old")
    update_index(publisher.remote, "deploy", "demo", lambda index: index.with_repository(REPOSITORY, [entry]))
    assert await evidence(catalogue) == {
        "tests": {"verdict": "waived", "remark": "why"},
        "deprecated": "old",
        "tags": ["v1"],
    }


async def test_what_the_registry_does_not_say_is_not_known(
    catalogue: Catalogue, publisher: Publisher, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = await image(catalogue)

    def away(*_arguments: object) -> None:
        raise RegistryUnreachable("away")

    monkeypatch.setattr(publisher.remote, "referrers", away)
    assert (await known.evidence(catalogue, found, catalogue.question()))["tests"] is None
    with pytest.raises(RegistryUnreachable):
        await known.recipe(catalogue, found, catalogue.question())


async def test_the_recipe_is_read_and_remembered(
    catalogue: Catalogue, publisher: Publisher, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "meta" / "recipe"
    (recipe / "extra").mkdir(parents=True)
    (recipe / "environments.yaml").write_text("e: {specs: [a]}\n")
    (recipe / "extra" / "a.txt").write_text("x")
    (recipe / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "meta" / "env.json").write_text("{}")
    junk = Content("meta.tar", b"no archive", "application/x", {})
    attach(publisher.remote, REPOSITORY, digest, META_TYPE, [junk], created="2026-12-01T00:00:00Z")
    attach(publisher.remote, REPOSITORY, digest, META_TYPE, [directory_content(tmp_path / "meta", "meta")])
    expected = {"environments.yaml": "e: {specs: [a]}\n", "extra/a.txt": "x"}
    assert await known.recipe(catalogue, await image(catalogue), catalogue.question()) == expected

    found = await image(catalogue)
    monkeypatch.setattr(publisher.remote, "referrers", lambda *_: pytest.fail("asked again"))
    question = catalogue.question()
    question.remembered_only = True
    assert await known.recipe(catalogue, found, question) == expected


async def test_what_was_never_asked_is_not_asked_at_a_tab(catalogue: Catalogue, digest: str) -> None:
    question = catalogue.question()
    question.remembered_only = True
    with pytest.raises(RegistryUnreachable):
        await catalogue.listing(parse_label(""), question)
    await catalogue.listing(parse_label(""), catalogue.question())
    (found,) = await catalogue.listing(parse_label(""), question)
    assert found.found.digest == digest
    assert question.oldest_s is not None and 0 <= question.oldest_s < 60
