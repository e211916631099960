from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from uenvd.errors import UsageError
from uenvd.publish.pipeline.executors import Phase
from uenvd.publish.pipeline.executors.firecrest import one_cell, pack, unpack_lines
from uenvd.publish.pipeline.executors.local import slots
from uenvd.publish.pipeline.executors.script import batch_script, directives, requests
from uenvd.publish.pipeline.executors.slurm import ended
from uenvd.publish.pipeline.tasks import Failure, StageResult, Task, find_result
from uenvd.publish.plan import Cell, Plan, load_plan


def task(recipe: Path = Path("/r/app/1"), **variables: str) -> Task:
    cell = Cell("app", "1", "alpha", "zen3", recipe, partition="normal", variables=variables, deploy=True)
    return Task(cell, "build", "content-1", "scope")


def test_resources_become_options_and_the_rest_variables() -> None:
    one = task(SLURM_ACCOUNT="support", SLURM_TIMELIMIT="1:00:00", UENV_CIBUILDV_X="a b'c")
    assert requests(one, ["--time=2:00:00"]) == [
        "--partition=normal",
        "--account=support",
        "--time=1:00:00",
        "--time=2:00:00",
    ]
    script = batch_script(one, ["uenvd-publish", "run"], directives(one, "/w/100%.out", "/w/l", after="7"))
    assert "#SBATCH --job-name=build-app/1-alpha/zen3\n" in script
    assert f"#SBATCH --comment=uenvd-publish:{one.key}\n" in script
    assert "#SBATCH --output=/w/100%%.out\n" in script
    assert "#SBATCH --dependency=afterok:7\n" in script
    assert script.endswith("exec uenvd-publish run\n")
    done = subprocess.run(
        ["bash", "-c", script.replace("exec uenvd-publish run", 'printf %s "$UENV_CIBUILDV_X"')],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "a b'c"
    assert "SLURM_ACCOUNT=" not in script


@pytest.mark.parametrize("option", ["rm -rf /", "--x\n#SBATCH --wrap=evil"])
def test_options_cannot_smuggle(option: str) -> None:
    with pytest.raises(UsageError):
        requests(task(), [option])
    with pytest.raises(UsageError):
        requests(task(SLURM_ACCOUNT="a\n#SBATCH --uid=0"))


def test_keys_tell_runs_apart() -> None:
    one = task()
    keys = {
        one.key,
        Task(one.cell, "test", one.tag, one.scope).key,
        Task(one.cell, "build", "content-2", one.scope).key,
        Task(one.cell, "build", one.tag, "other").key,
    }
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("state", "code", "status", "reason"),
    [
        ("COMPLETED", "0:0", 0, ""),
        ("FAILED", "97:0", 97, ""),
        ("FAILED", "0:9", None, "Slurm says FAILED, exit code 0:9"),
        ("CANCELLED by 0", "0:0", None, "Slurm says CANCELLED"),
        ("TIMEOUT", "0:0", None, "its time limit was over"),
        ("OUT_OF_MEMORY", "0:125", None, "it needed more memory than it had"),
        ("", "", None, "Slurm says UNKNOWN"),
    ],
)
def test_how_jobs_end(state: str, code: str, status: int | None, reason: str) -> None:
    found = ended(state, code)
    assert (found.phase, found.status, found.reason) == (Phase.ENDED, status, reason)


def test_slots() -> None:
    assert slots(8, 9 << 30, 2 << 30) == 4
    assert slots(2, 100 << 30, 2 << 30) == 2
    assert slots(8, 1 << 20, 2 << 30) == 1
    assert slots(2, 1 << 30, 2 << 30, 6) == 6


def test_results_are_found_among_what_shells_print() -> None:
    one = task()
    result = StageResult(
        one.cell.id,
        "build",
        "r",
        "t",
        None,
        False,
        1.5,
        "",
        Failure("x", "why\nreally", "h", 9),
        (("c", "fail", "r"),),
    )
    other = StageResult("other/1-a/b", "build", "r", "t", "sha256:1", False, 1.0)
    text = f'motd\n{result.encode()}\n{other.encode()}\n{{"uenvd-stage": 1, broken\n'
    assert find_result(text, one) == result
    assert find_result("motd\n", one) is None
    assert find_result('{"uenvd-stage": 2, "cell": 1}\n', one) is None


def test_what_goes_through_firecrest_is_the_same_plan(tmp_path: Path) -> None:
    recipe = tmp_path / "recipes" / "app" / "1" / "zen3"
    (recipe / "extra").mkdir(parents=True)
    (recipe / "post-install").write_text("#!/bin/sh\n")
    (recipe / "post-install").chmod(0o755)
    (tmp_path / "shared.yaml").write_text("shared: 1\n")
    (recipe / "packages.yaml").symlink_to(tmp_path / "shared.yaml")
    (recipe / ".git").mkdir()
    one = task(recipe, SLURM_ACCOUNT="x")
    packed = pack(Plan((one.cell,), (), tmp_path / "config.yaml"), one)
    assert packed == pack(Plan((one.cell,), (), tmp_path / "config.yaml"), one)
    place = tmp_path / "with space" / "inputs"
    subprocess.run(["bash", "-c", "\n".join(unpack_lines(packed, str(place)))], check=True)
    there = load_plan(place / "config.yaml").cells
    assert [cell.id for cell in there] == [one.cell.id]
    assert (there[0].mount, there[0].deploy, dict(there[0].variables)) == (
        one.cell.mount,
        True,
        {"SLURM_ACCOUNT": "x"},
    )
    unpacked = there[0].recipe
    assert (unpacked / "packages.yaml").read_text() == "shared: 1\n"
    assert (unpacked / "post-install").stat().st_mode & 0o100
    assert not (unpacked / ".git").exists()
    assert b"app" in one_cell(one)
    shutil.rmtree(place)
