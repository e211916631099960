"""The plan of a site: cells, their names, and how they are chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.planning import SITE, Site
from uenvd.errors import UsageError
from uenvd.publish.plan import Cell, Plan, load_plan


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan(SITE / "config.yaml")


def test_the_site_is_planned_without_any_problem(plan: Plan) -> None:
    assert plan.problems == ()
    assert [cell.id for cell in plan.cells] == [
        "prgenv-gnu/23.11-clariden/a100",
        "prgenv-gnu/23.11-eiger/zen2",
        "prgenv-gnu/24.11-clariden/gh200",
        "prgenv-gnu/24.11-eiger/zen2",
        "prgenv-gnu/24.11-daint/gh200",
        "netcdf-tools/2025-clariden/gh200",
        "netcdf-tools/2025-daint/gh200",
        "forge/26.0-clariden/gh200",
        "forge/26.0-daint/gh200",
        "python-mini/26.1-eiger/zen2",
    ]
    assert [cell.id for cell in plan.cells if not cell.deploy] == [
        "prgenv-gnu/24.11-clariden/gh200",
        "prgenv-gnu/24.11-eiger/zen2",
        "forge/26.0-clariden/gh200",
    ]


def test_names_are_those_of_the_slides(plan: Plan) -> None:
    cell = plan.cell("prgenv-gnu/23.11-clariden/a100")
    assert cell.job_name("build") == "build-prgenv-gnu/23.11-clariden/a100"
    assert cell.job_name("test") == "test-prgenv-gnu/23.11-clariden/a100"
    assert cell.label == "prgenv-gnu/23.11@clariden%a100"
    assert plan.cell("prgenv-gnu/23.11-eiger/zen2").context("cscs") == "cscs/eiger-zen2-prgenv-gnu:23.11"


def test_a_cell_has_all_that_its_target_says(plan: Plan) -> None:
    cell = plan.cell("forge/26.0-clariden/gh200")
    assert cell.recipe == SITE / "recipes" / "tools" / "forge"
    assert cell.mount == "/user-tools"
    assert cell.partition == "long"
    assert cell.variables == {
        "F7T_CLIENT_ID": "$F7T_ML_CLIENT_ID",
        "F7T_CLIENT_SECRET": "$F7T_ML_CLIENT_SECRET",
    }
    assert cell.runner.firecrest
    assert not cell.no_bwrap
    eiger = plan.cell("prgenv-gnu/23.11-eiger/zen2")
    assert eiger.no_bwrap
    assert (eiger.runner.firecrest, eiger.runner.slurm_tag, eiger.runner.baremetal_tag) == (
        False,
        "eiger-slurm",
        None,
    )


def test_cells_are_values(plan: Plan) -> None:
    assert len({*plan.cells, *load_plan(SITE / "config.yaml").cells}) == len(plan.cells)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("prgenv-gnu", 5),
        ("prgenv-*", 5),
        ("prgenv-gnu/23.11", 2),
        ("prgenv-gnu:23.11", 2),
        ("*/2*.11", 5),
        ("prgenv-gnu@eiger", 2),
        ("@daint", 3),
        ("%gh200", 6),
        ("@clariden%a100", 1),
        ("forge/26.0@daint%gh200", 1),
        ("forge/26.0-daint/gh200", 1),
        ("*-eiger/*", 3),
        ("prgenv", 0),
        ("prgenv-gnu/23", 0),
    ],
)
def test_patterns(plan: Plan, pattern: str, count: int) -> None:
    assert len(plan.select([pattern]).cells) == count


def test_patterns_add_up_and_options_narrow(plan: Plan) -> None:
    assert len(plan.select(["forge", "python-mini"]).cells) == 3
    assert [cell.id for cell in plan.select(["forge", "python-mini"], system="daint").cells] == [
        "forge/26.0-daint/gh200"
    ]
    assert len(plan.select(uarch="zen2").cells) == 3
    assert plan.select() is plan


def test_changed_files_choose_the_cells_of_their_recipe(plan: Plan) -> None:
    recipe = SITE / "recipes" / "prgenv-gnu"
    assert [
        cell.id for cell in plan.select(changed=[recipe / "23.11" / "mc" / "extra" / "reframe.yaml"]).cells
    ] == ["prgenv-gnu/23.11-eiger/zen2"]
    assert len(plan.select(changed=[recipe / "24.11" / "gone.yaml"]).cells) == 3
    assert plan.select(changed=[]).cells == ()
    assert plan.select(changed=[recipe / "23.11-old" / "x", SITE / "README.md"]).cells == ()
    assert plan.select(changed=[SITE / "config.yaml"]).cells == plan.cells


def test_a_link_of_a_recipe_is_followed(tmp_path: Path) -> None:
    site = Site(tmp_path)
    shared = site.root / "shared" / "compilers.yaml"
    own = site.root / "recipes" / "prgenv-gnu" / "23.11" / "mc" / "compilers.yaml"
    shared.parent.mkdir()
    own.rename(shared)
    own.symlink_to("../../../../shared/compilers.yaml")
    plan = load_plan(site.config)
    assert plan.problems == ()
    assert [cell.id for cell in plan.select(changed=[shared]).cells] == ["prgenv-gnu/23.11-eiger/zen2"]


def test_problems_go_with_their_cells(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.replace("recipes/prgenv-gnu/23.11/mc/extra/reframe.yaml", "views: [develop]", "views: [devel]")
    site.write("recipes/old/1.0/config.yaml", "name: old\n")
    plan = load_plan(site.config)
    assert len(plan.errors) == 2
    assert len(plan.select(["prgenv-gnu/23.11@eiger"]).errors) == 1
    assert plan.select(["prgenv-gnu/23.11@clariden"]).errors == ()
    assert plan.select(["forge"]).errors == ()


def test_an_unknown_cell_and_an_unknown_file(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no cell 'x'"):
        plan.cell("x")
    with pytest.raises(UsageError, match="no such file"):
        load_plan(tmp_path / "config.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        load_plan(tmp_path)


def test_recipes_may_lie_elsewhere(tmp_path: Path) -> None:
    site = Site(tmp_path)
    (site.root / "recipes").rename(tmp_path / "elsewhere")
    assert load_plan(site.config, recipes=tmp_path / "elsewhere").problems == ()


def test_a_cell_of_ones_own_making() -> None:
    cell = Cell("app", "1.0", "box", "zen4", Path("/r"))
    assert (cell.id, cell.mount, cell.deploy) == ("app/1.0-box/zen4", "/user-environment", False)
    with pytest.raises(TypeError):
        cell.variables["X"] = "1"  # type: ignore[index]
