"""The plan as a GitLab child pipeline and a GitHub workflow: valid by the schemas that are published, with the same jobs."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.planning import SITE, Site
from uenvd.errors import UsageError
from uenvd.publish import run as run_command
from uenvd.publish.main import main
from uenvd.publish.plan import Plan, load_plan
from uenvd.publish.plan.github import github_workflow
from uenvd.publish.plan.gitlab import gitlab_pipeline
from uenvd.publish.plan.jobs import JobOptions, secrets_of

OPTIONS = {
    "plain": JobOptions(),
    "all": JobOptions(
        "site/config.yaml",
        "my recipes",
        "v1",
        "slurm",
        ("pip install 'uenvd[publish]'", "echo $HOME"),
        "debian:12",
        ("fast",),
        "lab",
    ),
}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan(SITE / "config.yaml")


@pytest.mark.parametrize(
    ("schema", "writer"),
    [("vendor.gitlab-ci", gitlab_pipeline), ("vendor.github-workflows", github_workflow)],
)
def test_the_published_schema_takes_it(plan: Plan, schema: str, writer: Any, tmp_path: Path) -> None:
    paths = []
    plans = {name: (plan, options) for name, options in OPTIONS.items()}
    if writer is gitlab_pipeline:
        plans["nothing"] = (replace(plan, cells=()), JobOptions())
    for name, (one, options) in plans.items():
        paths.append(tmp_path / f"{name}.yml")
        paths[-1].write_text(writer(one, options))
    program = Path(sys.executable).parent / "check-jsonschema"
    words = [program, "--builtin-schema", schema, *paths]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def gitlab_jobs(text: str) -> dict[str, dict[str, Any]]:
    return {
        key: value
        for key, value in yaml.safe_load(text).items()
        if isinstance(value, dict) and "script" in value
    }


def test_the_jobs_of_gitlab(plan: Plan) -> None:
    jobs = gitlab_jobs(gitlab_pipeline(plan, JobOptions(deploy="v1")))
    assert set(jobs) == {
        cell.job_name(stage)
        for cell in plan.cells
        for stage in ("build", "test", "deploy")
        if stage != "deploy" or cell.deploy
    }
    build = jobs["build-prgenv-gnu/23.11-clariden/a100"]
    assert build["stage"] == "build"
    assert build["needs"] == []
    assert build["variables"]["SLURM_PARTITION"] == "normal"
    assert build["variables"]["SLURM_ACCOUNT"] == "site"
    assert build["variables"]["CSCS_NOTIFICATION_CONTEXT"] == "clariden-a100-prgenv-gnu:23.11"
    assert build["artifacts"]["reports"] == {"dotenv": "uenv.env"}
    assert "tags" not in build
    assert build["script"] == [
        "uenvd-publish run --config config.yaml --cell prgenv-gnu/23.11-clariden/a100 --stage build --executor firecrest --dotenv uenv.env"
    ]
    test = jobs["test-prgenv-gnu/23.11-clariden/a100"]
    assert test["needs"] == [{"job": "build-prgenv-gnu/23.11-clariden/a100", "artifacts": True}]
    assert test["artifacts"]["reports"] == {"junit": "uenv-junit.xml"}
    assert test["artifacts"]["when"] == "always"
    deploy = jobs["deploy-prgenv-gnu/23.11-clariden/a100"]
    assert {need["job"] for need in deploy["needs"]} == {
        "build-prgenv-gnu/23.11-clariden/a100",
        "test-prgenv-gnu/23.11-clariden/a100",
    }
    assert deploy["rules"][0]["when"] == "manual"
    assert jobs["build-forge/26.0-daint/gh200"]["tags"] == ["daint-slurm"]
    assert jobs["test-forge/26.0-daint/gh200"]["tags"] == ["daint-baremetal"]
    assert jobs["test-prgenv-gnu/23.11-eiger/zen2"]["tags"] == ["eiger-slurm"]


def test_the_commands_exist(plan: Plan) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    run_command.add_arguments(parser)
    options = JobOptions(recipes="my recipes", deploy="v1", policy="ci/policy.yaml")
    for name, job in gitlab_jobs(gitlab_pipeline(plan, options)).items():
        (script,) = job["script"]
        words = shlex.split(script)
        assert words[:2] == ["uenvd-publish", "run"]
        asked = parser.parse_args(words[2:])
        assert f"{asked.stage}-{asked.cell}" == name
        assert asked.recipes == Path("my recipes")
        assert asked.policy == (Path("ci/policy.yaml") if asked.stage == "deploy" else None)
    for job in yaml.safe_load(github_workflow(plan, options))["jobs"].values():
        (run,) = (step["run"] for step in job["steps"] if "uenvd-publish run" in step.get("run", ""))
        row = job["strategy"]["matrix"]["include"][0]
        words = shlex.split(
            run[run.index("uenvd-publish") :]
            .replace("$UENV_CELL", row["cell"])
            .replace("$UENV_EXECUTOR", row["executor"])
        )
        asked = parser.parse_args(words[2:])
        assert f"{asked.stage}-{asked.cell}" == row["job"]


def test_no_deployment_that_was_not_asked_for(plan: Plan) -> None:
    document = yaml.safe_load(gitlab_pipeline(plan, JobOptions()))
    assert document["stages"] == ["build", "test"]
    assert "deploy" not in yaml.safe_load(github_workflow(plan, JobOptions()))["jobs"]


def test_the_jobs_of_github_are_the_same(plan: Plan) -> None:
    options = JobOptions(deploy="v1")
    jobs = yaml.safe_load(github_workflow(plan, options))["jobs"]
    rows = [row for job in jobs.values() for row in job["strategy"]["matrix"]["include"]]
    assert {row["job"] for row in rows} == set(gitlab_jobs(gitlab_pipeline(plan, options)))
    assert len({row["artifact"] for row in jobs["build"]["strategy"]["matrix"]["include"]}) == len(plan.cells)
    assert jobs["build"]["name"] == "${{ matrix.job }}"
    assert not jobs["test"]["strategy"]["fail-fast"]
    assert jobs["test"]["needs"] == ["build"]
    runners = {row["cell"]: row["runner"] for row in rows if row["job"].startswith("test")}
    assert runners["forge/26.0-daint/gh200"] == ["self-hosted", "daint-baremetal"]
    assert runners["forge/26.0-clariden/gh200"] == ["self-hosted", "clariden"]


def test_secrets_are_given_to_the_one_step_that_needs_them(plan: Plan) -> None:
    assert secrets_of(plan.cells) == ("F7T_ML_CLIENT_ID", "F7T_ML_CLIENT_SECRET")
    document = yaml.safe_load(github_workflow(plan, JobOptions()))
    assert document["permissions"] == {"contents": "read"}
    triggers = document["on"]
    assert "pull_request_target" not in triggers
    assert "pull_request" not in triggers
    for job in document["jobs"].values():
        assert "secrets." not in str(job.get("env"))
        with_secrets = [step["name"] for step in job["steps"] if "secrets." in str(step)]
        assert len(with_secrets) == 1
        # Nothing of the configuration is pasted into a shell.
        assert not any("${{" in step.get("run", "") for step in job["steps"])


@pytest.mark.parametrize("writer", [gitlab_pipeline, github_workflow])
def test_the_same_plan_is_written_the_same(plan: Plan, writer: Any) -> None:
    assert writer(plan, JobOptions()) == writer(load_plan(SITE / "config.yaml"), JobOptions())


def test_bounds(plan: Plan) -> None:
    many = replace(plan, cells=tuple(replace(plan.cells[0], version=str(number)) for number in range(257)))
    assert len(gitlab_jobs(gitlab_pipeline(many, JobOptions()))) == 514
    with pytest.raises(UsageError, match="257 cells are more than GitHub takes"):
        github_workflow(many, JobOptions())
    with pytest.raises(UsageError, match="no cell is left"):
        github_workflow(replace(plan, cells=()), JobOptions())


def test_a_branch_that_touches_nothing_has_a_green_pipeline(plan: Plan) -> None:
    document = yaml.safe_load(gitlab_pipeline(replace(plan, cells=()), JobOptions(deploy="v1")))
    assert document["stages"] == ["build"]
    assert document["nothing-to-do"]["script"]


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Site(tmp_path)
    monkeypatch.chdir(site.root)
    assert (
        main(["plan", "forge@daint", "--write", "gitlab", "child.yml", "--deploy", "v1", "--runner", "fast"])
        == 0
    )
    assert set(gitlab_jobs(Path("child.yml").read_text())) == {
        f"{stage}-forge/26.0-daint/gh200" for stage in ("build", "test", "deploy")
    }
    assert [path.name for path in site.root.iterdir() if path.name.startswith(".")] == []
    capsys.readouterr()
    assert main(["plan", "forge@daint", "--write", "github", "-"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["jobs"]["build"]
    for words in (["jenkins", "x"], ["gitlab", "no/such/dir/x"]):
        assert main(["plan", "--write", *words]) != 0
    assert main(["plan", "--write", "gitlab", "-", "--deploy", "latest"]) == UsageError.exit_status
