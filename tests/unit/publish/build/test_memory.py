"""Whether there is room for a build: what is free, where it is limited (a job, a container), and the refusal with its figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from uenvd.errors import ResourceMissing, StorageFull, UsageError
from uenvd.publish.build.kinds import Needs, Site
from uenvd.publish.build.memory import cgroup_bytes, check_room

GIB = 1 << 30


def group(root: Path, name: str, limit: str, current: int) -> None:
    directory = root / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text(f"{current}\n")


def test_the_tightest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    group(root, "job", str(4 << 30), 1 << 30)
    group(root, "job/step", "max", 1 << 20)
    own.write_text("0::/job/step\n")
    assert cgroup_bytes(root, own) == 3 << 30
    group(root, "job/step", str(2 << 30), 3 << 30)
    assert cgroup_bytes(root, own) == 0


def test_no_limit_where_there_are_no_such_groups(tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert cgroup_bytes(tmp_path, own) > 1 << 50
    own.write_text("3:memory:/old\n0::/\n")
    assert cgroup_bytes(tmp_path / "cgroup", own) > 1 << 50


def test_too_little_memory_is_refused_with_figures(tmp_path: Path) -> None:
    needs = Needs(3 * GIB, 0, "wheels of 2.5 GiB")
    assert check_room(needs, tmp_path, available=4 * GIB) == int(3.2 * GIB)
    with pytest.raises(ResourceMissing) as caught:
        check_room(needs, tmp_path, available=3 * GIB)
    assert "needs 3.0 GiB (estimated: wheels of 2.5 GiB)" in caught.value.message
    assert "of the 3.0 GiB that are free 2.4 GiB may be taken" in caught.value.message
    assert "UENVD_BUILD_MEMORY" in caught.value.hint


def test_the_sites_word_goes_before_the_estimate(tmp_path: Path) -> None:
    needs = Needs(1 << 50, 0, "too much")
    assert check_room(needs, tmp_path, stated_bytes=GIB, available=2 * GIB)
    with pytest.raises(ResourceMissing, match="as UENVD_BUILD_MEMORY says"):
        check_room(Needs(0, 0, ""), tmp_path, stated_bytes=GIB, available=GIB)
    assert Site.of({"UENVD_BUILD_MEMORY": "2G"}).memory_bytes == 2 * GIB
    with pytest.raises(UsageError, match="UENVD_BUILD_MEMORY: 'much' is no size"):
        Site.of({"UENVD_BUILD_MEMORY": "much"})


def test_a_small_estimate_does_not_mean_no_memory(tmp_path: Path) -> None:
    with pytest.raises(ResourceMissing, match="needs 512 MiB"):
        check_room(Needs(1, 0, "nothing"), tmp_path, available=GIB // 2)


def test_no_room_for_the_image(tmp_path: Path) -> None:
    with pytest.raises(StorageFull, match=r"the image will have about 1048576\.0 GiB"):
        check_room(Needs(0, 1 << 50, ""), tmp_path, available=4 * GIB)
