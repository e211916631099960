"""A comment starts a plan, if the base branch says that its author may."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.forgedouble import PROJECT, SHA, TOKEN, ForgeDouble
from support.planning import Site
from uenvd.errors import BuildFailed, RecipeError, TriggerRefused, UsageError
from uenvd.publish import run as run_command
from uenvd.publish.main import main

ALLOW = """
pipelines:
  alps:
    users: [alice]
    variables: [SLURM_ACCOUNT]
    arguments: [--executor, slurm]
"""
COMMENT = "cscs-ci run alps;system=eiger;uarch=zen2;uenv=prgenv-gnu:23.11"


class Runs:
    """What `uenvd-publish run` was asked for, in place of doing it."""

    def __init__(self) -> None:
        self.asked: list[argparse.Namespace] = []
        self.account: list[str | None] = []
        self.end: int | Exception = 0

    def __call__(self, arguments: argparse.Namespace) -> int:
        self.asked.append(arguments)
        self.account.append(os.environ.get("SLURM_ACCOUNT"))
        if isinstance(self.end, Exception):
            raise self.end
        return self.end


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.delenv("SLURM_ACCOUNT", raising=False)
    for name in ("GITHUB_ACTIONS", "GITLAB_CI", "GITEA_ACTIONS", "FORGEJO_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    site = Site(tmp_path)
    site.write(".uenvd-ci.yaml", ALLOW)
    site.commit("base")
    site.branch()
    site.write("recipes/tools/forge/README", "x\n")
    site.commit()
    monkeypatch.chdir(site.root)
    return site


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    runs = Runs()
    monkeypatch.setattr(run_command, "run", runs)
    yield runs


def trigger(*words: str, user: str = "alice", base: str = "main") -> int:
    return main(["trigger", "--user", user, "--base", base, *words])


def log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_comment_of_the_slides(site: Site, runs: Runs) -> None:
    assert trigger(COMMENT) == 0
    (asked,) = runs.asked
    assert asked.patterns == ["prgenv-gnu/23.11-eiger/zen2"]
    assert asked.config == site.config
    assert asked.executor == "slurm"


def test_without_a_uenv_it_is_what_the_branch_changes(site: Site, runs: Runs) -> None:
    assert trigger("cscs-ci run alps;system=daint") == 0
    assert runs.asked[0].patterns == ["forge/26.0-daint/gh200"]


def test_variables_last_as_long_as_the_run(site: Site, runs: Runs) -> None:
    assert trigger(f"{COMMENT};SLURM_ACCOUNT=g42", "--with=--jobs=2") == 0
    assert runs.account == ["g42"]
    assert "SLURM_ACCOUNT" not in os.environ


def test_a_dry_run(site: Site, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert trigger(COMMENT, "--dry-run") == 0
    assert runs.asked == []
    document = json.loads(capsys.readouterr().out)
    assert document["cells"] == {"alps": ["prgenv-gnu/23.11-eiger/zen2"]}
    assert document["decision"] == "planned"
    assert document["head"] == site.git("rev-parse", "HEAD")
    assert document["base_commit"] == site.git("rev-parse", "main")
    assert document["commands"][0][-2:] == ["--", "prgenv-gnu/23.11-eiger/zen2"]


def test_the_list_of_the_branch_does_not_count(site: Site, runs: Runs) -> None:
    site.write(".uenvd-ci.yaml", ALLOW.replace("alice", "alice, mallory"))
    site.commit("let me in")
    assert trigger(COMMENT, user="mallory") == TriggerRefused.exit_status
    # Nor does a list that is no file, or none.
    site.git("checkout", "--quiet", "main")
    site.git("rm", "--quiet", ".uenvd-ci.yaml")
    site.commit()
    site.write(".uenvd-ci.yaml", ALLOW)
    assert trigger(COMMENT) == TriggerRefused.exit_status
    (site.root / ".uenvd-ci.yaml").unlink()
    (site.root / ".uenvd-ci.yaml").symlink_to("config.yaml")
    site.commit()
    assert trigger(COMMENT) == UsageError.exit_status
    assert runs.asked == []


@pytest.mark.parametrize(
    ("comment", "status"),
    [
        ("cscs-ci run other", TriggerRefused.exit_status),
        ("cscs-ci run alps,other", TriggerRefused.exit_status),
        (f"{COMMENT};PATH=/tmp", TriggerRefused.exit_status),
        ("cscs-ci run alps;uenv=nothing", UsageError.exit_status),
        ("cscs-ci run alps;system=eiger", UsageError.exit_status),
        ("cscs-ci run", UsageError.exit_status),
        ("hello", 0),
    ],
)
def test_what_starts_nothing(site: Site, runs: Runs, comment: str, status: int) -> None:
    assert trigger(comment) == status
    assert runs.asked == []


def test_broken_recipes_are_not_started(site: Site, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    site.write("recipes/prgenv-gnu/23.11/mc/config.yaml", "nome: x\n")
    assert trigger(COMMENT) == RecipeError.exit_status
    assert "recipes/prgenv-gnu/23.11/mc/config.yaml:" in capsys.readouterr().err
    assert runs.asked == []
    assert trigger("cscs-ci run alps;system=daint;uenv=forge:26.0") == 0


def test_the_status_is_that_of_the_run(site: Site, runs: Runs) -> None:
    runs.end = 3
    assert trigger(COMMENT) == 3
    runs.end = BuildFailed("no")
    assert trigger(COMMENT) == BuildFailed.exit_status


@pytest.mark.parametrize("kind", ["github", "gitlab"])
def test_events(site: Site, runs: Runs, tmp_path: Path, kind: str) -> None:
    event = tmp_path / "event.json"
    base = ["trigger", "--base", "main", "--event", str(event)]
    document: dict[str, Any] = {"action": "created", "comment": {"body": COMMENT, "user": {"login": "alice"}}}
    if kind == "gitlab":
        document = {
            "object_kind": "note",
            "user": {"username": "alice"},
            "object_attributes": {"note": COMMENT},
        }
    event.write_text(json.dumps(document))
    assert main(base) == 0
    assert len(runs.asked) == 1
    event.write_text(json.dumps(document).replace("alice", "mallory"))
    assert main(base) == TriggerRefused.exit_status
    event.write_text(json.dumps(document).replace("created", "edited"))
    assert main(base) == 0
    assert len(runs.asked) == (1 if kind == "github" else 2)
    assert main([*base, "--user", "alice"]) == UsageError.exit_status
    for text in ("[]", "{", "{}", '{"comment": 1}', "[" * 100_000):
        event.write_text(text)
        assert main(base) == UsageError.exit_status


def test_replay_from_the_log(site: Site, runs: Runs, tmp_path: Path) -> None:
    journal = tmp_path / "log.jsonl"
    runs.end = 5
    assert trigger(COMMENT, "--log", str(journal)) == 5
    assert trigger(COMMENT, "--log", str(journal), user="mallory") == TriggerRefused.exit_status
    started, failed, refused = log(journal)
    assert (started["decision"], failed["decision"], refused["decision"]) == ("started", "failed", "refused")
    assert started["id"] == failed["id"] != refused["id"]
    assert "mallory" in refused["reason"]
    assert journal.stat().st_mode & 0o077 == 0
    runs.end = 0
    with journal.open("a") as file:
        file.write('{"cut off')
        file.write("\n")
    replay = ["trigger", "--base", "main", "--log", str(journal), "--replay"]
    assert main([*replay, started["id"]]) == 0
    assert runs.asked[1].patterns == runs.asked[0].patterns
    last = json.loads(journal.read_text().splitlines()[-1])
    assert (last["replay_of"], last["decision"], last["user"]) == (started["id"], "passed", "alice")
    # It is decided anew.
    assert main([*replay, refused["id"]]) == TriggerRefused.exit_status
    assert main([*replay, "nothing"]) == UsageError.exit_status
    site.git("checkout", "--quiet", "main")
    site.write(".uenvd-ci.yaml", ALLOW.replace("alice", "bob"))
    site.commit()
    site.git("checkout", "--quiet", "feature")
    assert main([*replay, started["id"]]) == TriggerRefused.exit_status
    # And for the same commit only.
    site.commit("more")
    assert main([*replay, started["id"]]) == UsageError.exit_status


def test_the_status_of_the_pipeline(site: Site, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UENVD_STATUS_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "*")
    with ForgeDouble("gitea") as double:
        where = ["--forge", "gitea", "--api", double.api, "--project", PROJECT, "--sha", SHA, "--status"]
        assert trigger(COMMENT, *where) == 0
        assert [(post["context"], post["state"]) for post in double.posted] == [
            ("cscs/alps", "pending"),
            ("cscs/alps", "success"),
        ]
        assert (runs.asked[0].forge, runs.asked[0].sha) == ("gitea", SHA)
        runs.end = BuildFailed("no")
        assert trigger(COMMENT, *where) == BuildFailed.exit_status
        assert double.states["cscs/alps"] == "failure"
        posted = len(double.posted)
        # Whoever may start nothing does not decide over a status, either.
        assert trigger(COMMENT, *where, user="mallory") == TriggerRefused.exit_status
        assert len(double.posted) == posted


@pytest.mark.parametrize(
    "words", [[], [COMMENT, "--replay", "x"], ["--replay", "x"], [COMMENT, "--with=--no-such-option"]]
)
def test_misuse(site: Site, runs: Runs, words: list[str]) -> None:
    assert trigger(*words) == UsageError.exit_status
    assert main(["trigger", "--base", "main", COMMENT]) == UsageError.exit_status
    assert runs.asked == []
