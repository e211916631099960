"""The index of a system: equal values, equal bytes; whatever is malformed is refused; changes stay."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from uenvd.errors import ManifestError, NotFound, RegistryError
from uenvd.oci import index as indexes
from uenvd.oci.index import Entry, SystemIndex, decode_index, index_repository, read_index, update_index
from uenvd.oci.reference import is_repository, parse_registry, split_repository
from uenvd.oci.remote import Remote, open_remote

DIGEST = "sha256:" + "1" * 64
ENTRY = Entry(
    "deploy/demo/zen3/app/1.0",
    DIGEST,
    ("latest", "v1"),
    "sha256:" + "2" * 64,
    12345,
    "2026-11-01T00:00:00Z",
    "/user-environment",
    "default",
    (("default", "all"), ("develop", "")),
    "passed",
    "2 of 2 tests passed",
    None,
)


def index_of(*entries: Entry) -> SystemIndex:
    return SystemIndex("deploy", "demo", {(entry.repository, entry.digest): entry for entry in entries})


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    remote = open_remote(parse_registry(f"oci-layout:{tmp_path}/layout"))
    remote.push_bytes("deploy/demo/zen3/app/1.0", b"an image was pushed before", "text/plain")
    return remote


def test_its_repository_is_a_valid_name_and_no_image() -> None:
    assert is_repository(index_repository("deploy", "demo"))
    assert split_repository(index_repository("deploy", "demo")) is None


def test_there_and_back() -> None:
    bare = Entry("deploy/demo/a100/b/2", DIGEST, ("v1",), DIGEST, 0, deprecated="old")
    index = index_of(ENTRY, bare)
    assert decode_index(index.encode(), "deploy", "demo") == index
    assert index.encode() == index_of(bare, ENTRY).encode()
    assert index.repositories() == ["deploy/demo/a100/b/2", "deploy/demo/zen3/app/1.0"]
    assert index.of_repository(ENTRY.repository) == [ENTRY]
    moved = replace(ENTRY, tags=("v1",))
    assert index.with_repository(ENTRY.repository, [moved]).of_repository(ENTRY.repository) == [moved]
    assert index.with_repository(ENTRY.repository, []).repositories() == ["deploy/demo/a100/b/2"]


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "sha256:1"},
        {"layer": None},
        {"size": -1},
        {"size": "1"},
        {"tags": ["a b"]},
        {"tags": 3},
        {"name": "A B"},
        {"name": "../x"},
        {"verdict": "great"},
        {"views": [["a"]]},
        {"views": 1},
        {"mount": 3},
        {"remark": "x" * 5000},
        {"verdict": []},
    ],
)
def test_malformed_entries(change: dict[str, Any]) -> None:
    body = json.loads(index_of(ENTRY).encode())
    body["images"][0] |= change
    with pytest.raises(ManifestError):
        decode_index(json.dumps(body).encode(), "deploy", "demo")


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"{}", b'{"schema": 2}', b'{"schema":1,"namespace":"deploy","system":"x","images":[]}'],
)
def test_what_is_no_index_of_this_system(raw: bytes) -> None:
    with pytest.raises(ManifestError):
        decode_index(raw, "deploy", "demo")


def test_updates(remote: Remote) -> None:
    with pytest.raises(NotFound):
        read_index(remote, "deploy", "demo")
    update_index(remote, "deploy", "demo", lambda there: there.with_repository(ENTRY.repository, [ENTRY]))
    assert read_index(remote, "deploy", "demo") == index_of(ENTRY)
    before = remote.resolve(index_repository("deploy", "demo"), "latest")
    update_index(remote, "deploy", "demo", lambda there: there)
    assert remote.resolve(index_repository("deploy", "demo"), "latest") == before, "nothing to write"


@pytest.fixture
def unlocked(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """A place without locks, as registries are."""

    @contextmanager
    def updating(_name: str) -> Any:
        yield False

    monkeypatch.setattr(remote, "updating", updating)
    return remote


def test_what_another_writes_between_reading_and_writing_stays(
    unlocked: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He has waited for whoever read before him, but not for ever."""
    monkeypatch.setattr("uenvd.oci.optimistic.time.sleep", lambda _seconds: None)
    other = replace(ENTRY, repository="deploy/demo/zen3/other/1")
    rivals = [index_of(other)]

    def change(there: SystemIndex) -> SystemIndex:
        if rivals:
            indexes._write(unlocked, index_repository("deploy", "demo"), rivals.pop())
        return there.with_repository(ENTRY.repository, [ENTRY])

    update_index(unlocked, "deploy", "demo", change)
    assert read_index(unlocked, "deploy", "demo") == index_of(ENTRY, other)


def test_an_update_that_others_overwrite_is_made_again(
    unlocked: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registry has no locks: as many rivals as there are, the change is there in the end, or an error."""
    remote = unlocked
    rivals = [index_of(), index_of(), None]

    def sleep(_seconds: float) -> None:
        rival = rivals.pop(0) if rivals else None
        if rival is not None:
            indexes._write(remote, index_repository("deploy", "demo"), rival)

    monkeypatch.setattr("uenvd.oci.optimistic.time.sleep", sleep)
    update_index(remote, "deploy", "demo", lambda there: there.with_repository(ENTRY.repository, [ENTRY]))
    assert read_index(remote, "deploy", "demo") == index_of(ENTRY)
    rivals += [index_of() for _ in range(50)]
    with pytest.raises(RegistryError, match="again and again"):
        update_index(remote, "deploy", "demo", lambda there: there.with_repository(ENTRY.repository, [ENTRY]))
