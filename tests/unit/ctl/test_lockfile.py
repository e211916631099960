"""uenv.lock: found, read, damaged; what it pins."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uenvd.ctl import lockfile
from uenvd.ctl.lockfile import Locked, LockFile
from uenvd.errors import LockError

A, B = ("sha256:" + digit * 64 for digit in "ab")


def locked(asked: str, label: str, digest: str) -> Locked:
    return Locked(asked, label, digest, 5, "registry.example", "2026-01-02T03:04:05Z", None)


LOCK = LockFile(
    "uenv.lock",
    (
        locked("app/1", "deploy::app/1:v1@demo%zen3", A),
        locked("tool", "deploy::tool/2:v3@demo%zen3", B),
        locked("tool/2:v3", "deploy::tool/2:v3@demo%zen3", B),
    ),
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    lock = LOCK._replace(path=str(tmp_path / "uenv.lock"))
    lockfile.write(lock)
    first = Path(lock.path).read_bytes()
    assert lockfile.read(lock.path) == lock
    lockfile.write(lockfile.read(lock.path))
    assert Path(lock.path).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["uenv.lock"]


def test_the_nearest_file_above_is_found(tmp_path: Path) -> None:
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    (tmp_path / "uenv.lock").touch()
    assert lockfile.find(str(below)) == str(tmp_path / "uenv.lock")
    (below / "uenv.lock").mkdir()
    assert lockfile.find(str(below)) == str(tmp_path / "uenv.lock"), "a directory is none"
    (tmp_path / "a" / "uenv.lock").touch()
    assert lockfile.find(str(below)) == str(tmp_path / "a" / "uenv.lock")


@pytest.mark.parametrize(
    ("text", "pinned"),
    [
        ("app/1", f"deploy::app/1:v1@demo%zen3@{A}"),
        ("app", f"deploy::app/1:v1@demo%zen3@{A}"),
        ("app:v1@demo", f"deploy::app/1:v1@demo%zen3@{A}"),
        ("tool", f"deploy::tool/2:v3@demo%zen3@{B}"),
        ("app/1:/mnt,./x.squashfs", f"deploy::app/1:v1@demo%zen3@{A}:/mnt,./x.squashfs"),
        (f"other/1@{B}", f"other/1@{B}"),
    ],
)
def test_what_is_pinned(text: str, pinned: str) -> None:
    assert lockfile.pin(text, LOCK) == pinned


def test_what_is_not_pinned_is_an_error() -> None:
    for text in ("app/2", "app/1:v2", "build::app/1", "ap"):
        with pytest.raises(LockError, match=r"is not in uenv\.lock, which has: app/1, tool"):
            lockfile.pin(text, LOCK)
    two = LockFile("l", (locked("x/1", "x/1:v1", A), locked("x/2", "x/2:v1", B)))
    with pytest.raises(LockError, match="can mean several"):
        lockfile.pin("x", two)
    with pytest.raises(LockError, match="nothing"):
        lockfile.pin("x", LockFile("l", ()))


GOOD: dict[str, Any] = {"asked": "a", "label": "a/1:v1", "digest": A}


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"images": []},
        {"version": 2, "images": []},
        {"version": 1, "images": {}},
        {"version": 1, "images": [3]},
        {"version": 1, "images": [{**GOOD, "digest": "sha256:zz"}]},
        {"version": 1, "images": [{**GOOD, "digest": A + f"@{B}"}]},
        {"version": 1, "images": [{**GOOD, "digest": 7}]},
        {"version": 1, "images": [{**GOOD, "label": "a//"}]},
        {"version": 1, "images": [{**GOOD, "label": f"a@{B}"}]},
        {"version": 1, "images": [{**GOOD, "label": ":v1"}]},
        {"version": 1, "images": [{"asked": "a"}]},
    ],
)
def test_damage_is_told(document: Any, tmp_path: Path) -> None:
    path = tmp_path / "uenv.lock"
    path.write_text(json.dumps(document))
    with pytest.raises(LockError, match="is damaged"):
        lockfile.read(str(path))


@given(st.binary(max_size=200))
def test_any_bytes_are_an_error_or_a_file(data: bytes) -> None:
    path = Path(f"/proc/self/fd/{_memory(data)}")
    try:
        lockfile.read(str(path))
    except LockError as error:
        assert "damaged" in error.message
    finally:
        os.close(int(path.name))


def _memory(data: bytes) -> int:
    descriptor = os.memfd_create("lock")
    os.write(descriptor, data)
    return descriptor


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(LockError, match="there is no"):
        lockfile.read(str(tmp_path / "none"))
    with pytest.raises(LockError, match="cannot be read"):
        lockfile.read(str(tmp_path))
    with pytest.raises(LockError, match="cannot be written"):
        lockfile.write(LockFile(str(tmp_path / "none" / "uenv.lock"), ()))
    (tmp_path / "big").write_bytes(b" " * (lockfile.MAX_BYTES + 1))
    with pytest.raises(LockError, match="damaged"):
        lockfile.read(str(tmp_path / "big"))


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "uenv.lock"
    path.mkdir()
    with pytest.raises(LockError, match="cannot be written"):
        lockfile.write(LockFile(str(path), ()))
    assert stat.S_ISDIR(path.stat().st_mode)
    assert [entry.name for entry in tmp_path.iterdir()] == ["uenv.lock"]


def test_images_keep_their_places() -> None:
    new = locked("tool", "deploy::tool/3:v1@demo%zen3", A)
    more = locked("z", "z/1:v1", A)
    assert [one.asked for one in lockfile.merged(LOCK.images, [more, new])] == [
        "app/1",
        "tool",
        "tool/2:v3",
        "z",
    ]
    assert lockfile.merged(LOCK.images, [new])[1] == new
