"""The defects of real configurations: each is found, with file, line and key, and decides over the exit status."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from support.planning import Site
from uenvd.errors import RecipeError
from uenvd.publish.main import main
from uenvd.publish.plan import load_plan

CONFIG = "config.yaml"
GNU = "recipes/prgenv-gnu/23.11"


class Defect(NamedTuple):
    """A text of the site that is replaced, and the problem that comes of it; ``line`` is relative to that of the old text."""

    file: str
    old: str
    new: str
    key: str
    text: str
    at: str | None = None
    line: int = 0
    severity: str = "error"


DEFECTS = {
    "deployed where there is no recipe": Defect(
        CONFIG, "clariden: [a100]\n        eiger", "clariden: [gh200]\n        eiger",
        "uenvs.prgenv-gnu.23.11.deploy.clariden", "no recipe for gh200",
    ),
    "deployed where there is no such node": Defect(
        CONFIG, "eiger: [zen2]\n    \"24.11\"", "eiger: [a100]\n    \"24.11\"",
        "uenvs.prgenv-gnu.23.11.deploy.eiger", "the cluster has no a100",
    ),
    "deployed to a cluster that is not there": Defect(
        CONFIG, "deploy: {daint: [gh200]}", "deploy: {dom: [gh200]}", "uenvs.forge.26.0.deploy.dom", "no such cluster",
    ),
    "mount against store": Defect(
        CONFIG, "      mount: /user-tools\n", "      mount: /user-environment\n",
        "uenvs.netcdf-tools.2025.mount", "the recipe's store is /user-tools",
    ),
    "mount against store by default": Defect(
        CONFIG, '      mount: "/user-tools"\n  python', "  python", "uenvs.forge.26.0.mount", "recipe's store is /user-tools", line=-4,
    ),
    "no directory of that name": Defect(
        CONFIG, "zen2: 23.11/mc", "zen2: 23.11/cpu", "uenvs.prgenv-gnu.23.11.recipes.zen2", "there is no recipe '23.11/cpu'",
    ),
    "a path that leaves the recipes": Defect(
        CONFIG, "gh200: tools/forge", "gh200: ../forge", "uenvs.forge.26.0.recipes.gh200", "no directory below",
    ),
    "a misspelt key": Defect(
        CONFIG, "develop: false", "develope: false", "uenvs.prgenv-gnu.24.11.develope", "no key that uenvd knows",
    ),
    "a runner of a typing error": Defect(CONFIG, "runner: f7t", "runner: fjt", "clusters.clariden.runner", "'fjt' is no runner"),
    "a target without uarch": Defect(
        CONFIG, "- uarch: 'zen2'\n      partition", "- partition", "clusters.eiger.targets.0.uarch", "is missing",
    ),
    "a uarch twice": Defect(CONFIG, "- uarch: 'a100'", "- uarch: 'gh200'", "clusters.clariden.targets", "is there twice", line=5),
    "a mount point that is no path": Defect(
        CONFIG, 'mount: "/user-tools"', "mount: user-tools", "uenvs.forge.26.0.mount", "no absolute path",
    ),
    "no recipes": Defect(
        CONFIG, '      recipes: {gh200: "2025"}\n', "", "uenvs.netcdf-tools.2025.recipes", "is missing", line=-1,
    ),
    "a key twice": Defect(CONFIG, "        zen2: 23.11/mc", "        a100: 23.11/mc", "uenvs.prgenv-gnu.23.11.recipes.a100", "given twice"),
    "a name of a cluster": Defect(CONFIG, "  daint:\n    targets", "  Daint:\n    targets", "clusters.Daint", "no name of a cluster"),
    "variables that are no texts": Defect(
        CONFIG, "SLURM_CONSTRAINT: 'gh'", "SLURM_CONSTRAINT: [gh]", "clusters.daint.targets.0.variables", "must be a text",
    ),
    "no YAML": Defect(CONFIG, "uenvs:\n", "uenvs: [\n", "", "not valid YAML", line=2),
    "a view that does not exist": Defect(
        f"{GNU}/mc/extra/reframe.yaml", "views: [develop]", "views: [devel]", "develop.views", "no view 'devel'",
    ),
    "a number as a version": Defect(
        "recipes/netcdf-tools/2025/compilers.yaml", '"13"', "13.10", "gcc.version", "put it in quotes",
    ),
    "two formats mixed": Defect(
        f"{GNU}/a100/config.yaml", "name: prgenv-gnu", "version: 2\nname: prgenv-gnu", "bootstrap", "recipe format 1",
        at=f"{GNU}/a100/compilers.yaml",
    ),
    "an unknown compiler": Defect(
        f"{GNU}/mc/environments.yaml", "spec: gcc@12.3", "spec: gcc@13.1", "gcc-env.compiler", "not in compilers.yaml", line=-1,
    ),
    "a view twice": Defect(f"{GNU}/a100/environments.yaml", "    nvfort:", "    default:", "nvhpc-env.views.default", "of this name already"),
    "modules.yaml that is no YAML": Defect("recipes/netcdf-tools/2025/modules.yaml", "{include: [nco]}", "{include: [nco}", "", "not valid YAML"),
    "deployed nowhere": Defect(
        CONFIG, "      deploy: {daint: [gh200]}\n", "", "uenvs.forge.26.0.deploy", "is deployed nowhere", line=-3, severity="warning",
    ),
    "a uarch that nobody has": Defect(
        CONFIG, "        zen2: 23.11/mc", "        zen2: 23.11/mc\n        mi300: 23.11/mc", "uenvs.prgenv-gnu.23.11.recipes.mi300",
        "no cluster has this", line=1, severity="warning",
    ),
    "another name in the recipe": Defect(
        "recipes/tools/forge/config.yaml", "name: forge", "name: linaro-forge", "name", "lists the recipe under 'forge'", severity="warning",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_each_defect_is_found(name: str, tmp_path: Path) -> None:
    defect, site = DEFECTS[name], Site(tmp_path)
    line = site.replace(defect.file, defect.old, defect.new) + defect.line
    if defect.at is not None:
        line = 1
    problems = load_plan(site.config).problems
    where = str(site.root / (defect.at or defect.file))
    found = [
        problem
        for problem in problems
        if (problem.file, problem.line, problem.key) == (where, line, defect.key)
        and defect.text in problem.text
    ]
    assert found, "\n".join(map(str, problems))
    assert found[0].severity == defect.severity
    if defect.severity == "warning":
        assert [problem for problem in problems if problem.severity == "error"] == []


@pytest.mark.parametrize(
    ("spoil", "file", "text"),
    [
        (
            lambda site: site.write("recipes/old/1.0/config.yaml", "name: old\n"),
            "recipes/old/1.0/config.yaml",
            "no version of the",
        ),
        (
            lambda site: (site.root / GNU / "mc/extra/reframe.yaml").unlink(),
            f"{GNU}/mc/extra/reframe.yaml",
            "no tests of its own",
        ),
        (
            lambda site: (site.root / GNU / "mc/compilers.yaml").unlink(),
            f"{GNU}/mc/compilers.yaml",
            "no such file",
        ),
        (lambda site: site.write(f"{GNU}/mc/mirrors.yaml", "{}\n"), f"{GNU}/mc/mirrors.yaml", "own mirrors"),
        (
            lambda site: (site.root / GNU / "mc/config.yaml").write_bytes(b"\xff"),
            f"{GNU}/mc/config.yaml",
            "cannot be read",
        ),
    ],
    ids=["unused", "untested", "no compilers", "mirrors", "not utf-8"],
)
def test_files_that_are_missing_or_too_many(
    spoil: Callable[[Site], object], file: str, text: str, tmp_path: Path
) -> None:
    site = Site(tmp_path)
    spoil(site)
    problems = load_plan(site.config).problems
    assert any(file in str(problem) and text in str(problem) for problem in problems), problems


def test_all_defects_at_once_are_all_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference's validator reported only its last check, and ended with 0."""
    site = Site(tmp_path)
    monkeypatch.chdir(site.root)
    names = [
        "deployed where there is no recipe", "mount against store", "a misspelt key", "a view that does not exist", "a number as a version",
        "another name in the recipe",
    ]  # fmt: skip
    for name in names:
        site.replace(*DEFECTS[name][:3])
    assert main(["validate", "--no-stack-config", "--config", "config.yaml"]) == RecipeError.exit_status
    told = capsys.readouterr().err
    for name in names:
        assert DEFECTS[name].text in told
    assert "5 errors and 1 warning" in told
    assert f"{GNU}/mc/extra/reframe.yaml:7: error: develop.views: there is no view 'devel'" in told


def test_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Site(tmp_path)
    monkeypatch.chdir(site.root)
    assert main(["validate", "--no-stack-config", "--strict"]) == 0
    site.replace(*DEFECTS["deployed nowhere"][:3])
    assert main(["validate", "--no-stack-config"]) == 0
    assert "warning: uenvs.forge.26.0.deploy" in capsys.readouterr().err
    assert main(["validate", "--no-stack-config", "--strict"]) == RecipeError.exit_status
    capsys.readouterr()
    assert main(["validate", "--no-stack-config", "--json", "--config", "config.yaml"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["cells"]) == 10
    assert [problem["severity"] for problem in document["problems"]] == ["warning"]


def test_plan_of_good_cells_is_not_stopped_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Site(tmp_path)
    monkeypatch.chdir(site.root)
    site.replace(*DEFECTS["a view that does not exist"][:3])
    assert main(["plan", "forge"]) == 0
    assert "forge/26.0-daint/gh200" in capsys.readouterr().out
    assert main(["plan"]) == RecipeError.exit_status
    assert main(["plan", "--write", "gitlab", str(tmp_path / "out.yml")]) == RecipeError.exit_status
    assert not (tmp_path / "out.yml").exists()


def test_an_entry_that_cannot_be_read_is_told_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Site(tmp_path)
    monkeypatch.chdir(site.root)
    site.replace(*DEFECTS["no recipes"][:3])
    assert main(["plan", "forge"]) == 0
    capsys.readouterr()
    assert main(["plan", "netcdf-tools"]) != 0
    assert "uenvs.netcdf-tools.2025.recipes: is missing" in capsys.readouterr().err
