"""Statuses of commits at GitHub, Gitea and GitLab, against doubles that check what the real ones check."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.forgedouble import NUMBER, PROJECT, SHA, TOKEN, ForgeDouble
from support.planning import SITE
from uenvd.errors import StatusNotPosted, UsageError
from uenvd.publish.main import main
from uenvd.publish.plan import load_plan
from uenvd.publish.plan.forges import KINDS, STATES, Forge, State, Status, post_status
from uenvd.publish.status import forge_of_environment, job_url, status_of

CI_VARIABLES = (
    "CI_API_V4_URL", "CI_COMMIT_SHA", "CI_JOB_URL", "CI_PROJECT_ID", "FORGEJO_ACTIONS", "FORGEJO_TOKEN", "GH_TOKEN", "GITEA_ACTIONS",
    "GITEA_TOKEN", "GITHUB_ACTIONS", "GITHUB_API_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID", "GITHUB_SERVER_URL", "GITHUB_SHA",
    "GITHUB_TOKEN", "GITLAB_CI", "GITLAB_TOKEN", "UENVD_STATUS_TOKEN",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CI_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture(params=KINDS)
def double(request: pytest.FixtureRequest) -> Iterator[ForgeDouble]:
    with ForgeDouble(request.param) as double:
        yield double


def forge(double: ForgeDouble, token: str = TOKEN, project: str = PROJECT) -> Forge:
    return Forge(double.kind, double.api, project, SHA, token)  # type: ignore[arg-type]


class Pauses:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def clock(self) -> float:
        return self.now


def post(double: ForgeDouble, status: Status, **options: str) -> Pauses:
    pauses = Pauses()
    post_status(forge(double, **options), status, sleep=pauses.sleep, clock=pauses.clock)
    return pauses


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_one_of_the_forge(double: ForgeDouble, state: State) -> None:
    post(double, Status("cscs/x", state, "words", "https://ci.site.example/1"))
    assert len(double.posted) == 1
    assert double.posted[0]["target_url"] == "https://ci.site.example/1"


def test_each_cell_has_its_context(double: ForgeDouble) -> None:
    for cell in load_plan(SITE / "config.yaml").cells:
        post(double, status_of(cell, "success", "12 of 12 tests", "test"))
    assert len(double.states) == 10
    assert "cscs/eiger-zen2-prgenv-gnu:23.11" in double.states
    assert double.posted[0]["description"] == "test: 12 of 12 tests"


def test_a_long_description_is_cut(double: ForgeDouble) -> None:
    post(double, Status("cscs/x", "failure", "ä\n" * 500))
    description = double.posted[0]["description"]
    assert len(description) == 140
    assert "\n" not in description
    assert description.endswith("…")


def test_the_same_status_twice_is_no_error(double: ForgeDouble) -> None:
    for state in ("pending", "pending", "running", "running", "success", "success"):
        post(double, Status("cscs/x", state))  # type: ignore[arg-type]
    assert double.states == {"cscs/x": "success"}


def test_a_busy_forge_is_asked_again(double: ForgeDouble) -> None:
    double.faults += [
        (503, {}),
        None,
        (429, {"Retry-After": "7"}),
        (500, {}),
        (403, {"X-RateLimit-Remaining": "0"}),
    ]
    pauses = post(double, Status("cscs/x", "success"))
    assert len(double.posted) == 1
    assert pauses.slept == [0.5, 1.0, 7.0, 4.0, 8.0]


def test_not_for_ever(double: ForgeDouble) -> None:
    double.faults += [(503, {})] * 100
    pauses = Pauses()
    with pytest.raises(StatusNotPosted, match="503"):
        post_status(forge(double), Status("cscs/x", "success"), sleep=pauses.sleep, clock=pauses.clock)
    assert pauses.now < 60
    double.faults[:] = [(429, {"Retry-After": "3600"})]
    before = pauses.now
    with pytest.raises(StatusNotPosted, match="429"):
        post_status(forge(double), Status("cscs/x", "success"), sleep=pauses.sleep, clock=pauses.clock)
    assert pauses.now == before


@pytest.mark.parametrize("fault", ["token", "project"])
def test_what_will_not_change_is_not_asked_again(double: ForgeDouble, fault: str) -> None:
    with pytest.raises(StatusNotPosted, match="is the token allowed") as caught:
        post(double, Status("cscs/x", "success"), **{fault: "site/wrong"})
    assert double.requests == 1
    assert TOKEN not in str(caught.value)
    assert "site/wrong" not in str(caught.value)


def test_a_redirect_does_not_get_the_token(double: ForgeDouble) -> None:
    with ForgeDouble(double.kind) as other:
        double.faults.append((302, {"Location": f"{other.api}/elsewhere"}))
        with pytest.raises(StatusNotPosted, match="302"):
            post(double, Status("cscs/x", "success"))
        assert other.requests == 0
        assert other.stray == []


def test_nobody_listens() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        pauses = Pauses()
        nobody = Forge("github", f"http://127.0.0.1:{held.getsockname()[1]}", PROJECT, SHA, TOKEN)
        with pytest.raises(StatusNotPosted, match="no answer"):
            post_status(nobody, Status("cscs/x", "success"), sleep=pauses.sleep, clock=pauses.clock)
        assert pauses.slept[:3] == [0.5, 1.0, 2.0]


def test_a_forge_that_never_answers_is_left() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        forge = Forge("github", f"http://127.0.0.1:{mute.getsockname()[1]}", PROJECT, SHA, TOKEN)
        began_s = time.monotonic()
        with pytest.raises(StatusNotPosted, match="no answer"):
            post_status(forge, Status("cscs/x", "success"), patience_s=1.0)
        assert time.monotonic() - began_s < 10


@pytest.mark.parametrize(
    "wrong",
    [
        {"api": "http://forge.site.example"},
        {"api": "https://user@forge.site.example"},
        {"api": "file:///etc/passwd"},
        {"api": "https://forge.site.example/?x"},
        {"sha": "main"},
        {"sha": "0123abc"},
        {"project": "a/../b"},
        {"project": "name"},
        {"project": "a/b?x=1"},
        {"token": ""},
        {"token": "two words"},
        {"token": "line\nbreak"},
    ],
)
def test_what_would_be_pasted_into_a_request_is_checked(wrong: dict[str, str]) -> None:
    good = {"api": "https://forge.site.example", "project": PROJECT, "sha": SHA, "token": TOKEN}
    Forge("github", **good)
    with pytest.raises(UsageError):
        Forge("github", **{**good, **wrong})


def test_bounds_of_a_status() -> None:
    forge = Forge("gitlab", "https://forge.site.example", NUMBER, SHA, TOKEN)
    for status in (
        Status("", "success"),
        Status("x" * 256, "success"),
        Status("x", "success", "", "javascript:alert(1)"),
    ):
        with pytest.raises(UsageError):
            post_status(forge, status)
    assert TOKEN not in repr(forge)


def test_the_variables_of_ci_systems() -> None:
    github = {
        "GITHUB_ACTIONS": "true", "GITHUB_API_URL": "https://api.forge.example", "GITHUB_REPOSITORY": PROJECT, "GITHUB_SHA": SHA,
        "GITHUB_TOKEN": TOKEN, "GITHUB_SERVER_URL": "https://forge.example", "GITHUB_RUN_ID": "7",
    }  # fmt: skip
    assert forge_of_environment(github) == Forge("github", "https://api.forge.example", PROJECT, SHA, TOKEN)
    assert job_url(github) == "https://forge.example/site/uenv/actions/runs/7"
    gitea = {**github, "GITEA_ACTIONS": "true", "GITHUB_API_URL": "https://git.example/api/v1"}
    assert forge_of_environment(gitea) == Forge("gitea", "https://git.example/api/v1", PROJECT, SHA, TOKEN)
    gitlab = {
        "GITLAB_CI": "true", "CI_API_V4_URL": "https://lab.example/api/v4", "CI_PROJECT_ID": NUMBER, "CI_COMMIT_SHA": SHA,
        "GITLAB_TOKEN": TOKEN, "CI_JOB_URL": "https://lab.example/jobs/1",
    }  # fmt: skip
    assert forge_of_environment(gitlab) == Forge("gitlab", "https://lab.example/api/v4", NUMBER, SHA, TOKEN)
    assert job_url(gitlab) == "https://lab.example/jobs/1"
    for environ in (github, gitea, gitlab):
        assert (
            forge_of_environment({key: value for key, value in environ.items() if "TOKEN" not in key}) is None
        )
    assert forge_of_environment({}) is None


def test_the_command(
    double: ForgeDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--forge", double.kind, "--api", double.api, "--project", PROJECT, "--sha", SHA]
    what = ["--config", str(SITE / "config.yaml"), "--cell", "prgenv-gnu/23.11-eiger/zen2", "--stage", "test"]
    assert main(["status", "success", *what, *where]) == UsageError.exit_status
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    capsys.readouterr()
    assert main(["status", "success", *what, *where, "--status-token-file", str(token)]) == 0
    out, err = capsys.readouterr()
    assert out == "cscs/eiger-zen2-prgenv-gnu:23.11\n"
    assert TOKEN not in out + err
    monkeypatch.setenv("UENVD_STATUS_TOKEN", TOKEN)
    assert main(["status", "running", "--context", "cscs/alps", *where]) == 0
    assert list(double.states) == ["cscs/eiger-zen2-prgenv-gnu:23.11", "cscs/alps"]
    capsys.readouterr()
    assert main(["status", "failure", "--context", "cscs/alps", *where, "--dry-run"]) == 0
    assert TOKEN not in capsys.readouterr().out
    assert len(double.posted) == 2
    assert main(["status", "failure", *where]) == UsageError.exit_status
    token.chmod(0o644)
    assert main(["status", "success", *what, *where, "--status-token-file", str(token)]) != 0
