"""How much memory a build may take, where it is limited: a job, a container."""

from __future__ import annotations

from pathlib import Path

from uenvd.publish.build.builder import _cgroup_memory


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
    assert _cgroup_memory(root, own) == 3 << 30
    group(root, "job/step", str(2 << 30), 3 << 30)
    assert _cgroup_memory(root, own) == 0


def test_no_limit_where_there_are_no_such_groups(tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert _cgroup_memory(tmp_path, own) > 1 << 50
    own.write_text("3:memory:/old\n0::/\n")
    assert _cgroup_memory(tmp_path / "cgroup", own) > 1 << 50
