"""Stackinator itself is asked about recipes of its generation: the real 4.0 for format 1, stand-ins for the later ones."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from support.planning import SITE, Site
from uenvd.errors import RecipeError, UsageError
from uenvd.publish.main import main
from uenvd.publish.plan import stackconfig
from uenvd.publish.plan.stackconfig import StackConfig, ask_stack_config, find_stack_config, format_of
from uenvd.publish.recipe import Recipe, load_recipe

REAL = Path(sys.executable).parent / "stack-config"
RECIPES = SITE / "recipes"


def recipe(path: str) -> Recipe:
    return load_recipe(RECIPES / path)


@pytest.fixture(scope="module")
def real() -> StackConfig:
    tool = find_stack_config(str(REAL))
    assert tool is not None, "Stackinator belongs to the extra dev"
    return tool


def stand_in(directory: Path, version: str, body: str = "exit 0") -> Path:
    path = directory / "stack-config"
    path.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo "stackinator version {version}"; exit; fi\n{body}\n'
    )
    path.chmod(0o755)
    return path


def test_which_one_it_is(real: StackConfig, tmp_path: Path) -> None:
    assert (real.version, real.major, real.format) == ("4.0", 4, 1)
    for version, number in (("5.1.2", 1), ("6.0", 2), ("7.0.1", 3), ("7.0.0-dev", 0), ("99", 0)):
        tool = find_stack_config(str(stand_in(tmp_path, version)))
        assert tool is not None
        assert (tool.version, tool.format) == (version, number)
    assert find_stack_config(str(tmp_path / "none")) is None
    assert find_stack_config("/bin/false") is None


def test_which_recipes_it_takes() -> None:
    recipes = [
        recipe(path)
        for path in (
            "prgenv-gnu/23.11/mc",
            "prgenv-gnu/24.11",
            "netcdf-tools/2025",
            "tools/forge",
            "python-mini/26.1",
        )
    ]
    assert [format_of(one) for one in recipes] == [1, 1, 2, 3, 0]
    takes = {
        version: [StackConfig("x", version).takes(one) for one in recipes]
        for version in ("4.0", "5.0", "6.1", "7.0")
    }
    assert takes == {
        "4.0": [True, False, False, False, False],
        "5.0": [True, True, False, False, False],
        "6.1": [False, False, True, False, False],
        "7.0": [False, False, False, True, False],
    }


@pytest.mark.parametrize("path", ["prgenv-gnu/23.11/a100", "prgenv-gnu/23.11/mc"])
def test_the_real_one_takes_good_recipes(real: StackConfig, path: str) -> None:
    before = set(stackconfig.SCRATCH.iterdir())
    assert ask_stack_config(real, recipe(path)) is None
    assert not [
        entry
        for entry in set(stackconfig.SCRATCH.iterdir()) - before
        if entry.name.startswith("uenv-stack-config-")
    ]


def test_the_real_one_finds_what_no_schema_says(real: StackConfig, tmp_path: Path) -> None:
    """MPI libraries that Stackinator does not know are refused by its code, not by a schema."""
    site = Site(tmp_path)
    site.replace(
        "recipes/prgenv-gnu/23.11/mc/environments.yaml", "spec: cray-mpich@8.1.27", "spec: openmpi@5"
    )
    problem = ask_stack_config(real, load_recipe(site.root / "recipes/prgenv-gnu/23.11/mc"), about=("x",))
    assert problem is not None
    assert problem.severity == "error"
    assert problem.about == ("x",)
    assert problem.text.startswith("stack-config 4.0: ")
    assert "openmpi" in problem.text
    assert "/var/tmp" not in problem.text


def test_the_clusters_own_configuration_is_used(real: StackConfig, tmp_path: Path) -> None:
    (tmp_path / "mirrors.yaml").write_text("{}\n")
    problem = ask_stack_config(real, recipe("prgenv-gnu/23.11/mc"), system=tmp_path)
    assert problem is not None
    assert "mirrors.yaml" in problem.text


def test_one_that_hangs_or_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stackconfig, "TIMEOUT_S", 0.3)
    tool = StackConfig(str(stand_in(tmp_path, "4.0", "exec sleep 60")), "4.0")
    problem = ask_stack_config(tool, recipe("prgenv-gnu/23.11/mc"))
    assert problem is not None
    assert "did not finish" in problem.text
    problem = ask_stack_config(StackConfig(str(tmp_path), "4.0"), recipe("prgenv-gnu/23.11/mc"))
    assert problem is not None
    assert "cannot be run" in problem.text


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Site(tmp_path)
    monkeypatch.chdir(site.root)
    log = tmp_path / "log"
    monkeypatch.setenv("LOG", str(log))
    script = 'while [ "$1" != --recipe ]; do shift; done; echo "$2" >> "$LOG"; echo too new; exit 1'
    (tmp_path / "good").mkdir()
    good = str(stand_in(tmp_path / "good", "4.0"))
    assert main(["validate", "--stack-config", good]) == 0
    assert "stack-config 4.0 was asked about 2 recipes" in capsys.readouterr().err
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    stand_in(tmp_path, "6.0", script)
    assert main(["validate"]) == RecipeError.exit_status
    assert "recipes/netcdf-tools/2025: error: stack-config 6.0: too new" in capsys.readouterr().err
    # Once, although two cells are made of it.
    assert log.read_text().splitlines() == [str(site.root / "recipes/netcdf-tools/2025")]
    assert main(["validate", "--no-stack-config"]) == 0
    assert main(["validate", "--stack-config", "/bin/false"]) == UsageError.exit_status
    assert (
        main(["validate", "--stack-config", good, "--cluster-config", str(tmp_path)])
        == UsageError.exit_status
    )


def test_the_command_with_the_real_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Site(tmp_path)
    monkeypatch.chdir(site.root)
    directory = "recipes/prgenv-gnu/23.11/mc"
    site.replace(f"{directory}/environments.yaml", "spec: cray-mpich@8.1.27", "spec: openmpi@5")
    assert main(["validate", "--stack-config", str(REAL), directory]) == RecipeError.exit_status
    assert f"{directory}: error: stack-config 4.0: " in capsys.readouterr().err
