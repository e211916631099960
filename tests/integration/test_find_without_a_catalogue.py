"""A registry that does not list its repositories, or is down: the index of the system is what users find images by."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.daemon import Daemon, running_daemon
from support.publishing import Publisher, env_json, simple_image
from support.registry import FakeRegistry
from uenvd.oci.attach import META_TYPE, attach, directory_content
from uenvd.oci.index import Entry, SystemIndex, update_index
from uenvd.oci.reference import repository_of

pytestmark = pytest.mark.usefixtures("node")

ENVIRONMENTS = 150
COLD_S = 1.0
CACHED_S = 0.1
SLACK = 3
APP = "deploy/demo/zen3/app/1.0"


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        registry.spoil("/v2/_catalog", status=401)
        yield registry


def index_of(publisher: Publisher, count: int, *more: Entry) -> None:
    entries = list(more)
    for number in range(count):
        repository = repository_of("deploy", "demo", "zen3", f"env{number:03d}", "24.11")
        views = tuple((f"view{view}", "what it is for, in some words") for view in range(4))
        entries.append(
            Entry(
                repository,
                f"sha256:{number:064x}",
                ("latest", "v1"),
                f"sha256:{number + (1 << 64):064x}",
                3 << 30,
                "2026-11-01T00:00:00Z",
                views=views,
                verdict="passed",
            )
        )
    keyed = {(entry.repository, entry.digest): entry for entry in entries}
    update_index(publisher.remote, "deploy", "demo", lambda _there: SystemIndex("deploy", "demo", keyed))


def timed_find(daemon: Daemon, label: str = "", **fields: Any) -> tuple[float, dict[str, Any]]:
    begin = time.monotonic()
    answer = daemon.ask("find", uenv=label, **fields)
    return time.monotonic() - begin, answer


def entry_of(image: Path, digest: str, *tags: str, deprecated: str | None = None) -> Entry:
    return Entry(APP, digest, tags, "sha256:" + "0" * 64, image.stat().st_size, deprecated=deprecated)


def test_find_is_quick_cold_cached_and_offline(public_dir: Path, fake: FakeRegistry) -> None:
    publisher = Publisher(fake.url)
    index_of(publisher, ENVIRONMENTS)
    with running_daemon(public_dir / "uenvd", fake.url) as daemon:
        before = len(fake.seen)
        cold_s, answer = timed_find(daemon)
        assert answer["ok"] and len(answer["records"]) == 2 * ENVIRONMENTS
        assert len(fake.seen) == before + 2, "a manifest and a blob, however many images there are"
        cached_s, again = timed_find(daemon, "env0")
        assert len(again["records"]) == 2 * 100
        assert len(fake.seen) == before + 2
        fake.spoil(".*", status=503)
        offline_s, offline = timed_find(daemon)
        daemon.stop()
        daemon.start()
        restarted_s, restarted = timed_find(daemon)
        assert offline["records"] == restarted["records"] == answer["records"]
        _stale_s, stale = timed_find(daemon, refresh=True)
        assert stale["records"] == answer["records"] and "using what it said" in stale["notes"][0]
    print(
        f"find: cold {cold_s:.3f}, cached {cached_s:.3f}, offline {offline_s:.3f}, restarted {restarted_s:.3f} s"
    )
    assert cold_s < COLD_S * SLACK
    assert max(cached_s, offline_s) < CACHED_S * SLACK
    assert restarted_s < COLD_S * SLACK


def test_a_label_without_microarchitecture_or_version_resolves(public_dir: Path, fake: FakeRegistry) -> None:
    publisher = Publisher(fake.url)
    image = simple_image(public_dir / "app.squashfs", "app", "one")
    digest = publisher.push(image, "app/1.0", "v1", "latest")
    index_of(publisher, 3, entry_of(image, digest, "latest", "v1", deprecated="wrong BLAS"))
    with running_daemon(public_dir / "uenvd", fake.url) as daemon:
        answer = daemon.ask("resolve", uenv="app")
        assert answer["ok"] and digest in answer["resolved"]
        assert any("deprecated: wrong BLAS" in note for note in answer["notes"])
        found = daemon.ask("find", uenv="app")
        assert {record["deprecated"] for record in found["records"]} == {"wrong BLAS"}
        assert any("wrong BLAS" in note for note in found["notes"])
        hint = daemon.ask("resolve", uenv="env00")["error"]["hint"]
        assert "env000" in hint, "completion knows the names, too"


def test_a_stale_index_never_wins_over_a_tag(public_dir: Path, fake: FakeRegistry) -> None:
    publisher = Publisher(fake.url)
    image = simple_image(public_dir / "app.squashfs", "app", "one")
    old = publisher.push(image, "app/1.0", "v1", "latest")
    index_of(publisher, 0, entry_of(image, old, "latest", "v1"))
    new = publisher.push(simple_image(public_dir / "new.squashfs", "app", "two"), "app/1.0", "v2", "latest")
    with running_daemon(public_dir / "uenvd", fake.url) as daemon:
        assert daemon.ask("find", uenv="app")["records"][0]["digest"] == old
        assert new in daemon.ask("resolve", uenv="app")["resolved"]
        assert new in daemon.ask("resolve", uenv="app/1.0:v2%zen3")["resolved"]


def test_what_the_index_does_not_name_is_looked_for_in_the_catalogue(public_dir: Path) -> None:
    with FakeRegistry() as fake:
        publisher = Publisher(fake.url)
        image = simple_image(public_dir / "app.squashfs", "app", "one")
        digest = publisher.push(image, "app/1.0", "v1")
        index_of(publisher, 2)
        with running_daemon(public_dir / "uenvd", fake.url) as daemon:
            assert digest in daemon.ask("resolve", uenv="app")["resolved"]
        fake.put_manifest("deploy/demo/index", "latest", b'{"no": "manifest"}', "application/json")
        with running_daemon(public_dir / "second", fake.url) as daemon:
            (record,) = daemon.ask("find")["records"]
            assert record["digest"] == digest, "a damaged index is as none"


def test_views_of_a_stock_image_are_known_before_it_is_pulled(public_dir: Path, fake: FakeRegistry) -> None:
    publisher = Publisher(fake.url)
    image = simple_image(public_dir / "app.squashfs", "app", "one", mount="/user-tools")
    digest = publisher.push(image, "app/1.0", "v1", stock=True)
    meta = public_dir / "meta"
    meta.mkdir()
    views = json.loads(env_json("app", mount="/user-tools", views={"default": {"scalar": {"A": "1"}}}))
    (meta / "env.json").write_text(json.dumps(views))
    attach(publisher.remote, APP, digest, META_TYPE, [directory_content(meta)])
    with running_daemon(public_dir / "uenvd", fake.url, extra="resolve: {ttl: 0s}\n") as daemon:
        image_record = daemon.ask("resolve", uenv="app/1.0:v1%zen3", view="default")["images"][0]
        assert image_record["mount"] == "/user-tools" and image_record["views"] == ["default"]
        refused = daemon.ask("resolve", uenv="app/1.0:v1%zen3", view="absent")["error"]
        assert refused["code"] == "unknown-view"
        assert fake.count("GET", f"/blobs/{publisher.remote.manifest(APP, 'v1').layers[0].digest}") == 0
        fake.spoil(".*", status=503)
        again = daemon.ask("resolve", uenv="app/1.0:v1%zen3", view="default")
        assert again["ok"] and again["images"][0]["mount"] == "/user-tools", "remembered"
