"""The registry as the node sees it: fresh for a while, remembered when it is down, never waited for beyond the deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from uenvd.cache.store import Store
from uenvd.config import AccessRule, Config, RegistryConfig
from uenvd.daemon.access import Permit
from uenvd.daemon.catalogue import Catalogue
from uenvd.daemon.peer import Identity
from uenvd.daemon.question import Image
from uenvd.daemon.resolution import listed
from uenvd.errors import (
    AccessDenied,
    AmbiguousLabel,
    LabelError,
    ManifestError,
    NotFound,
    RegistryDenied,
    RegistryError,
    RegistryUnreachable,
    UnknownLabel,
)
from uenvd.label import parse_namespaced_label
from uenvd.oci.index import Entry, SystemIndex
from uenvd.oci.manifest import (
    CONFIG_TYPE,
    SQUASHFS_TYPE,
    Descriptor,
    ImageConfig,
    Manifest,
    build_manifest,
    digest_of,
    parse_manifest,
)
from uenvd.views import ImageMeta

APP = "deploy/demo/zen3/app/1.0"


class FakeRegistry:
    """A `Remote` in memory that counts what it is asked, and can be down or mute."""

    address: Any = "fake.example/uenv"

    def __init__(self) -> None:
        self.images: dict[str, dict[str, str]] = {}
        self.manifests: dict[str, Manifest] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked = 0
        self.down = False
        self.mute: threading.Event | None = None
        self.budgets_s: list[float] = []

    def add(self, repository: str, tag: str, word: str, *, config: bytes | None = None) -> str:
        meta = ImageMeta(word, "", "/user-environment", None, ())
        data = ImageConfig(meta, "x86_64").encode() if config is None else config
        self.blobs[digest_of(data)] = data
        layer = Descriptor(SQUASHFS_TYPE, digest_of(word.encode()), len(word))
        raw = build_manifest(layer, Descriptor(CONFIG_TYPE, digest_of(data), len(data)), {})
        manifest = parse_manifest(raw, None)
        self.manifests[manifest.digest] = manifest
        self.images.setdefault(repository, {})[tag] = manifest.digest
        return manifest.digest

    @contextmanager
    def deadline(
        self, seconds: float | None, _cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        assert seconds is not None
        self.budgets_s.append(seconds)
        yield

    def _answer(self) -> None:
        self.asked += 1
        if self.mute is not None:
            self.mute.wait(10)
        if self.down:
            raise RegistryUnreachable("the registry does not answer: connection refused")

    def tags(self, repository: str) -> list[str]:
        self._answer()
        return sorted(self.images.get(repository, {}))

    def repositories(self, prefix: str) -> list[str]:
        self._answer()
        return sorted(path for path in self.images if path.startswith(prefix))

    def manifest(self, repository: str, reference: str) -> Manifest:
        self._answer()
        tags = self.images.get(repository, {})
        digest = tags.get(reference, reference)
        if digest not in tags.values():
            raise NotFound(f"{repository} has no {reference}")
        return self.manifests[digest]

    def small_blob(self, _repository: str, descriptor: Descriptor, _limit_bytes: int) -> bytes:
        return self.blobs[descriptor.digest]


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "cache")
    store.prepare()
    return store


def make(registry: FakeRegistry, store: Store, **fields: Any) -> Catalogue:
    config = Config(system="demo", registry=RegistryConfig("fake"), **fields)
    return Catalogue(config, registry, store)  # type: ignore[arg-type]


async def resolve(
    catalogue: Catalogue, label: str, *, refresh: bool = False, permit: Permit | None = None
) -> tuple[Image, list[str]]:
    question = catalogue.question(refresh=refresh)
    question.permit = permit
    return await catalogue.resolve(parse_namespaced_label(label), question), question.notes


async def test_an_answer_is_fresh_for_the_ttl_then_asked_again(
    registry: FakeRegistry, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = registry.add(APP, "v1", "one")
    catalogue = make(registry, store)
    assert (await resolve(catalogue, "app/1.0:v1"))[0].found.digest == first
    asked = registry.asked
    second = registry.add(APP, "v1", "two")
    assert (await resolve(catalogue, "app/1.0:v1"))[0].found.digest == first
    assert registry.asked == asked
    assert (await resolve(catalogue, "app/1.0:v1", refresh=True))[0].found.digest == second
    third = registry.add(APP, "v1", "three")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert (await resolve(catalogue, "app/1.0:v1"))[0].found.digest == third


async def test_latest_the_only_digest_or_a_table(registry: FakeRegistry, store: Store) -> None:
    one = registry.add(APP, "v1", "one")
    catalogue = make(registry, store)
    assert (await resolve(catalogue, "app"))[0].found.digest == one
    registry.add(APP, "v2", "two")
    with pytest.raises(AmbiguousLabel):
        await resolve(catalogue, "app", refresh=True)
    registry.images[APP]["latest"] = one
    assert (await resolve(catalogue, "app", refresh=True))[0].found.digest == one


async def test_a_digest_pins(registry: FakeRegistry, store: Store) -> None:
    one = registry.add(APP, "v1", "one")
    registry.add(APP, "latest", "two")
    catalogue = make(registry, store)
    image, _notes = await resolve(catalogue, f"app/1.0@{one}")
    assert (image.found.digest, image.config and image.config.meta and image.config.meta.name) == (one, "one")
    with pytest.raises(UnknownLabel):
        await resolve(catalogue, "app/1.0@sha256:" + "0" * 64)


async def test_a_remembered_meaning_goes_when_any_answer_changes(
    registry: FakeRegistry, store: Store
) -> None:
    first = registry.add(APP, "v1", "one")
    catalogue = make(registry, store)
    assert (await resolve(catalogue, "app/1.0"))[0] is (await resolve(catalogue, "app/1.0"))[0]
    second = registry.add(APP, "v1", "two")
    assert (await resolve(catalogue, "app/1.0"))[0].found.digest == first
    # Another user insists on what is there now; from then on it is what everybody gets.
    assert (await resolve(catalogue, "app/1.0:v1", refresh=True))[0].found.digest == second
    assert (await resolve(catalogue, "app/1.0"))[0].found.digest == second


async def test_what_a_digest_means_is_remembered_but_not_for_whom(
    registry: FakeRegistry, store: Store
) -> None:
    one = registry.add(APP, "v1", "one")
    catalogue = make(registry, store)
    label = f"app/1.0@{one}"
    first, _notes = await resolve(catalogue, label)
    asked = registry.asked
    again, _notes = await resolve(catalogue, label)
    assert again is first
    assert registry.asked == asked
    rule = AccessRule(parse_namespaced_label("deploy::app"), ("some-group",))
    with pytest.raises(AccessDenied):
        await resolve(catalogue, label, permit=Permit(Identity(1000, 1000, ()), [rule], {}))
    assert (await resolve(catalogue, label, refresh=True))[0] == first


async def test_a_digest_alone_is_known_where_the_image_was_used(registry: FakeRegistry, store: Store) -> None:
    """What a session knows of itself is what it has mounted."""
    one = registry.add(APP, "v1", "one")
    catalogue = make(registry, store)
    with pytest.raises(UnknownLabel, match="this node knows no image sha256:"):
        await resolve(catalogue, f"@{one}")
    await resolve(catalogue, "app/1.0:v1")
    registry.add(APP, "v1", "two")
    image, _notes = await resolve(catalogue, f"@{one}")
    assert (image.found.digest, str(image.found.label)) == (one, "deploy::app/1.0:v1@demo%zen3")
    with pytest.raises(AccessDenied):
        await resolve(make(registry, store, namespaces=("build",)), f"@{one}")


async def test_the_registry_down_means_the_last_known_digest_and_one_note(
    registry: FakeRegistry, store: Store
) -> None:
    digest = registry.add(APP, "latest", "one")
    await resolve(make(registry, store), "app/1.0")
    registry.down = True
    after_restart = make(registry, store, resolve_ttl_s=0.0)
    image, notes = await resolve(after_restart, "app/1.0")
    assert image.found.digest == digest
    assert len(notes) == 1
    assert "connection refused" in notes[0]


async def test_the_registry_down_and_nothing_known_says_so(registry: FakeRegistry, store: Store) -> None:
    registry.down = True
    with pytest.raises(RegistryUnreachable):
        await resolve(make(registry, store), "app/1.0")


async def test_a_mute_registry_costs_one_deadline_not_one_for_each_question(
    registry: FakeRegistry, store: Store
) -> None:
    digest = registry.add(APP, "latest", "one")
    await resolve(make(registry, store), "app/1.0")
    registry.mute = threading.Event()
    try:
        catalogue = make(registry, store, resolve_ttl_s=0.0, resolve_deadline_s=0.2)
        begin = trio.current_time()
        image, notes = await resolve(catalogue, "app/1.0")
        assert image.found.digest == digest
        assert len(notes) == 1
        assert trio.current_time() - begin < 1.0
        asked = registry.asked
        await resolve(catalogue, "app/1.0")
        assert registry.asked == asked  # left alone for a moment
        assert max(registry.budgets_s[-1:]) <= 0.2
    finally:
        registry.mute.set()


async def test_an_answer_after_a_failure_is_used_again(
    registry: FakeRegistry, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uenvd.daemon.asking._QUIET_S", 0.0)
    registry.add(APP, "latest", "one")
    catalogue = make(registry, store, resolve_ttl_s=0.0)
    await resolve(catalogue, "app/1.0")
    registry.down = True
    assert (await resolve(catalogue, "app/1.0"))[1]
    registry.down = False
    two = registry.add(APP, "latest", "two")
    image, notes = await resolve(catalogue, "app/1.0")
    assert (image.found.digest, notes) == (two, [])


async def test_configured_microarchitectures_need_no_catalogue(registry: FakeRegistry, store: Store) -> None:
    registry.add(APP, "v1", "one")

    def no_catalogue(_prefix: str) -> list[str]:
        raise AssertionError("a hosted registry has no catalogue")

    registry.repositories = no_catalogue  # type: ignore[method-assign]
    catalogue = make(registry, store, uarchs=("zen2", "zen3"))
    assert (await resolve(catalogue, "app/1.0"))[0].found.repository.path == APP


async def test_closed_namespaces_and_nameless_labels_are_refused(
    registry: FakeRegistry, store: Store
) -> None:
    catalogue = make(registry, store)
    with pytest.raises(AccessDenied, match="build"):
        await resolve(catalogue, "build::app/1.0")
    with pytest.raises(LabelError):
        await resolve(catalogue, ":v1")
    registry.add("build/demo/zen3/app/1.0", "7", "early")
    opened = make(registry, store, namespaces=("deploy", "build"))
    assert (await resolve(opened, "build::app/1.0:7"))[0].found.tag == "7"


async def test_made_up_names_leave_nothing_on_disk(registry: FakeRegistry, store: Store) -> None:
    catalogue = make(registry, store, uarchs=("zen3",))
    before = sorted(path for path in store.root.rglob("*") if path.is_file())
    for number in range(20):
        with pytest.raises(UnknownLabel):
            await resolve(catalogue, f"made-up-{number}/1")
    assert sorted(path for path in store.root.rglob("*") if path.is_file()) == before


async def test_unusable_metadata_is_as_none_but_no_squashfs_is_an_error(
    registry: FakeRegistry, store: Store
) -> None:
    registry.add(APP, "v1", "one", config=b'{"schema": 1, "meta": []}')
    image, _notes = await resolve(make(registry, store), "app/1.0")
    assert image.config is None
    raw = build_manifest(
        Descriptor("text/plain", "sha256:" + "1" * 64, 5),
        Descriptor("text/plain", "sha256:" + "2" * 64, 5),
        {},
        "text/plain",
    )
    manifest = parse_manifest(raw, None)
    registry.manifests[manifest.digest] = manifest
    registry.images["deploy/demo/zen3/text/1"] = {"v1": manifest.digest}
    with pytest.raises(ManifestError):
        await resolve(make(registry, store), "text/1", refresh=True)


@pytest.mark.parametrize("denied", [RegistryDenied("no"), RegistryError("HTTP 500")])
async def test_a_registry_that_denies_the_index_is_asked_for_its_list(
    registry: FakeRegistry, store: Store, monkeypatch: pytest.MonkeyPatch, denied: RegistryError
) -> None:
    """Hosted registries deny what is not there."""
    digest = registry.add(APP, "v1", "one")
    manifest = registry.manifest

    def deny(repository: str, reference: str) -> Manifest:
        if repository.endswith("/index"):
            raise denied
        return manifest(repository, reference)

    monkeypatch.setattr(registry, "manifest", deny)
    catalogue = make(registry, store)
    assert (await resolve(catalogue, "app"))[0].found.digest == digest
    found = await catalogue.listing(parse_namespaced_label("app"), catalogue.question())
    assert [(one.found.digest, one.size_bytes) for one in found] == [(digest, 3)]


async def test_the_list_of_an_index_is_filtered_like_any(registry: FakeRegistry, store: Store) -> None:
    entries = [
        Entry(
            f"deploy/demo/{uarch}/{name}/1.0",
            "sha256:" + str(number) * 64,
            ("latest", "v1"),
            "sha256:" + "9" * 64,
            number,
        )
        for number, (name, uarch) in enumerate(
            [("app", "zen3"), ("app", "a100"), ("apple", "zen3"), ("other", "zen3")]
        )
    ]
    index = SystemIndex("deploy", "demo", {(entry.repository, entry.digest): entry for entry in entries})

    def texts(label: str) -> list[str]:
        return [
            str(one.found.label._replace(namespace=None))
            for one in listed(parse_namespaced_label(label), index)
        ]

    assert texts("app:v1%zen3") == ["app/1.0:v1@demo%zen3", "apple/1.0:v1@demo%zen3"]
    assert len(texts("app")) == 6 and len(texts("@demo")) == 8
    assert texts("other@" + "sha256:" + "3" * 64) == ["other/1.0:latest@demo%zen3", "other/1.0:v1@demo%zen3"]
    assert texts("other/2") == []
