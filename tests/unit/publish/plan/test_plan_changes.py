"""What a branch changes, in a real git repository: only these cells are built again."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from support.planning import Site
from uenvd.errors import UsageError
from uenvd.publish.main import main
from uenvd.publish.plan import load_plan
from uenvd.publish.plan.changes import changes_since


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path)
    site.commit("base")
    site.branch()
    return site


def reasons(site: Site, base: str = "main") -> dict[str, str]:
    return changes_since(load_plan(site.config), base).reasons


def test_nothing_changed(site: Site) -> None:
    assert reasons(site) == {}
    site.write("README.md", "hello\n")
    site.commit()
    assert reasons(site) == {}


@pytest.mark.parametrize("state", ["committed", "staged", "untracked"])
def test_a_file_of_a_recipe(site: Site, state: str) -> None:
    site.write("recipes/prgenv-gnu/23.11/mc/extra/new test.py", "x = 1\n")
    if state == "committed":
        site.commit()
    elif state == "staged":
        site.git("add", "--all")
    assert reasons(site) == {"prgenv-gnu/23.11-eiger/zen2": "recipe"}


def test_a_file_of_a_recipe_that_is_removed(site: Site) -> None:
    (site.root / "recipes/prgenv-gnu/23.11/mc/extra/reframe.yaml").unlink()
    site.commit()
    assert reasons(site) == {"prgenv-gnu/23.11-eiger/zen2": "recipe"}


def test_a_recipe_that_is_removed_while_the_configuration_names_it(site: Site) -> None:
    site.git("rm", "-r", "--quiet", "recipes/tools")
    site.commit()
    changes = changes_since(load_plan(site.config), "main")
    assert set(changes.reasons) == {"forge/26.0-clariden/gh200", "forge/26.0-daint/gh200"}
    assert [problem.key for problem in changes.plan.errors] == ["uenvs.forge.26.0.recipes.gh200"]


def test_comments_and_order_do_not_count(site: Site) -> None:
    text = site.config.read_text()
    clusters, uenvs = text.split("uenvs:\n")
    site.config.write_text("uenvs:\n" + uenvs.replace('"2025"', "'2025'") + "# a comment\n" + clusters)
    site.commit()
    assert reasons(site) == {}


@pytest.mark.parametrize(
    ("old", "new", "cells"),
    [
        ("      develop: false\n", "", set()),
        (
            "        clariden: [gh200]\n", "", {"netcdf-tools/2025-clariden/gh200"},
        ),
        (
            "partition: 'long'", "partition: 'short'",
            {"prgenv-gnu/24.11-clariden/gh200", "netcdf-tools/2025-clariden/gh200", "forge/26.0-clariden/gh200"},
        ),
        (
            "zen2: 24.11", "zen2: 23.11/mc", {"prgenv-gnu/24.11-eiger/zen2"},
        ),
        (
            "      tools/forge", "      tools/forge", set(),
        ),
        (
            "no_bwrap: true", "no_bwrap: false",
            {"prgenv-gnu/23.11-eiger/zen2", "prgenv-gnu/24.11-eiger/zen2", "python-mini/26.1-eiger/zen2"},
        ),
    ],
)  # fmt: skip
def test_an_entry_of_the_configuration(site: Site, old: str, new: str, cells: set[str]) -> None:
    if old != new:
        site.replace("config.yaml", old, new)
        site.commit()
    found = reasons(site)
    assert set(found) == cells
    assert set(found.values()) <= {"entry"}


def test_a_version_that_is_new_and_one_that_is_gone(site: Site) -> None:
    site.replace(
        "config.yaml",
        '  python-mini:\n    "26.1":\n      recipes:\n        zen2: "26.1"',
        '  python-mini:\n    "26.2":\n      recipes:\n        zen2: "26.1"',
    )
    site.commit()
    changes = changes_since(load_plan(site.config), "main")
    assert changes.reasons == {"python-mini/26.2-eiger/zen2": "new"}
    assert changes.removed == ("python-mini/26.1-eiger/zen2",)


def test_what_the_base_did_meanwhile_does_not_count(site: Site) -> None:
    site.git("checkout", "--quiet", "main")
    site.write("recipes/tools/forge/README", "x\n")
    site.commit()
    site.git("checkout", "--quiet", "feature")
    assert reasons(site) == {}


def test_a_recipe_that_nobody_uses_and_that_the_branch_brings(site: Site) -> None:
    site.write("recipes/old/1.0/config.yaml", "name: old\n")
    site.commit()
    changes = changes_since(load_plan(site.config), "main")
    assert changes.reasons == {}
    assert len(changes.plan.errors) == 1
    # One that was there before is no business of the branch.
    site.git("checkout", "--quiet", "main")
    site.git("merge", "--quiet", "feature")
    site.git("checkout", "--quiet", "-b", "second")
    assert changes_since(load_plan(site.config), "main").plan.errors == ()


def test_a_configuration_that_the_base_has_not(site: Site) -> None:
    site.git("checkout", "--quiet", "main")
    site.git("mv", "config.yaml", "other.yaml")
    site.commit()
    site.git("checkout", "--quiet", "-B", "feature")
    site.git("mv", "other.yaml", "config.yaml")
    site.commit()
    assert len(reasons(site)) == 10


def test_a_repository_below_another_directory(tmp_path: Path) -> None:
    site = Site(tmp_path)
    (site.root / "hpc").mkdir()
    for name in ("config.yaml", "recipes"):
        (site.root / name).rename(site.root / "hpc" / name)
    site.commit()
    site.branch()
    site.write("hpc/recipes/tools/forge/README", "x\n")
    site.commit()
    link = tmp_path / "link"
    link.symlink_to(site.root)
    for root in (site.root, link):
        found = changes_since(load_plan(root / "hpc" / "config.yaml"), "main").reasons
        assert set(found) == {"forge/26.0-clariden/gh200", "forge/26.0-daint/gh200"}


@pytest.mark.parametrize("base", ["nowhere", "--output=/tmp/x", "main:config.yaml", ""])
def test_a_base_that_is_none(site: Site, base: str) -> None:
    with pytest.raises(UsageError, match="git knows no commit"):
        reasons(site, base)


def test_a_base_with_nothing_in_common(site: Site) -> None:
    site.git("checkout", "--quiet", "--orphan", "alone")
    site.commit()
    with pytest.raises(UsageError, match="no commit in common"):
        reasons(site)


def test_no_repository(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with pytest.raises(UsageError, match="git knows no commit"):
        reasons(site)


def test_nothing_of_the_repository_is_run(site: Site, tmp_path: Path) -> None:
    """A merge request may bring attributes; a shared checkout may bring configuration."""
    trap = tmp_path / "trap"
    script = tmp_path / "evil"
    script.write_text(f"#!/bin/sh\ntouch {trap}\n")
    script.chmod(0o755)
    for key in ("core.fsmonitor", "diff.external", "diff.evil.textconv", "core.pager"):
        site.git("config", key, str(script))
    site.write(".gitattributes", "* diff=evil\n")
    site.write("recipes/tools/forge/README", "x\n")
    assert len(reasons(site)) == 2
    assert not trap.exists()


def test_the_command(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(site.root)
    assert main(["plan", "--changed", "main"]) == 0
    assert "nothing to do" in capsys.readouterr().err
    site.write("recipes/tools/forge/README", "x\n")
    assert main(["plan", "--changed", "main", "--deployed", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [cell["id"] for cell in document["cells"]] == ["forge/26.0-daint/gh200"]
    assert document["reasons"] == {"forge/26.0-daint/gh200": "recipe"}
    assert document["base"] == site.git("rev-parse", "main")
    assert main(["plan", "prgenv-gnu", "--changed", "main"]) == 0
    assert main(["plan", "prgenv-nug"]) == UsageError.exit_status


def test_git_is_asked_in_a_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object, **options: float) -> None:
        raise subprocess.TimeoutExpired("git", options["timeout"])

    plan = load_plan(site.config)
    monkeypatch.setattr(subprocess, "run", slow)
    with pytest.raises(UsageError, match="more than 120 s"):
        changes_since(plan, "main")
