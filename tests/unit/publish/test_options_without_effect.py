"""An option that a mode of a command would ignore is refused before anything is done: who gave it meant something by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.planning import SITE
from uenvd.errors import UsageError
from uenvd.publish.main import main

RECIPE = Path(__file__).parents[3] / "recipes/fits/2026.11"


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UENVD_REGISTRY", "UENVD_SYSTEM", "UENVD_UARCH", "UENVD_USER_NAMESPACE", "UENVD_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    for name in ("GITLAB_CI", "GITHUB_ACTIONS", "GITEA_ACTIONS", "FORGEJO_ACTIONS", "UENVD_STATUS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "R"
    recipe.mkdir()
    (recipe / "config.yaml").write_text("name: a\nversion: 1\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("build R a/1 --out there", "--out is for a build without LABEL"),
        ("build R a/1 --out there --explain", "--out is for a build without LABEL"),
        ("build R a/1 --against b/1", "--against is for --explain"),
        ("build R a/1 --explain --check", "--check"),
        ("build R a/1 --explain --again", "--again"),
        ("build R a/1 --explain --run", "--run"),
        ("build R a/1 --explain --no-tests", "--no-tests"),
        ("build R a/1 --registry https://registry.example.org", "--registry"),
        ("build R mine::a/1 --token-file t", "--token-file"),
        ("build R --no-tests", "--no-tests is for LABEL"),
        ("build R --explain --check", "--check"),
        ("build R --explain --again", "--again"),
        ("build R --explain --run", "--run"),
        ("build R --explain --out there --against a/1", "--out"),
        (
            "build {recipe} --explain --against mine::a/1 --registry oci-layout:x",
            "--registry is for a registry",
        ),
        ("build R --against a/1", "--against is for --explain"),
        ("build R --registry https://registry.example.org", "--registry"),
        ("build R --system daint", "--system"),
        ("build R --explain --uarch zen3", "--uarch"),
        ("validate R --recipes-dir D", "--recipes-dir is for --config"),
        ("validate R --cluster-config D", "--cluster-config is for --config"),
        ("validate --config C --no-stack-config --stack-config S", "--stack-config is for Stackinator"),
        ("validate --config C --no-stack-config --cluster-config D", "--cluster-config is for Stackinator"),
        ("plan --deploy v1", "--deploy is for --write"),
        ("plan --executor slurm", "--executor is for --write"),
        ("plan --before true", "--before is for --write"),
        ("plan --image i", "--image is for --write"),
        ("plan --runner r", "--runner is for --write"),
        ("plan --write gitlab - --json", "--json shows the plan"),
        ("plan --write gitlab - --policy p", "--policy is for releases"),
        ("status success --context c --config other.yaml", "--config is for --cell"),
        ("status success --context c --site s", "--site is for --cell"),
        ("trigger --base main --replay 1 --log L --user ada", "--replay says who"),
        ("lock R --source https://example.org/a.tar --file F", "--file is for packages"),
        ("lock R --source https://example.org/a.tar --toolchain", "--toolchain is for packages"),
        ("test a/1:1@s%u --slurm-option=-N2", "--slurm-option is for jobs"),
        ("test a/1:1@s%u --partition p", "--partition is for jobs"),
        ("test a/1:1@s%u --slurm --through file", "--through is for tests on this machine"),
        ("run R --config other.yaml", "--config is for a plan, and R is"),
        ("run R --work W", "--work is for a plan"),
        ("run R --executor slurm", "--executor is for a plan"),
        ("run R --junit F", "--junit is for a plan"),
        ("run R --dotenv F", "--dotenv is for a plan"),
        ("run R --retest", "--retest is for a plan"),
        ("run R --changed main", "--changed is for a plan"),
        ("run R --sbatch-option=-N2", "--sbatch-option is for a plan"),
        ("run R --status-token-file T", "--status-token-file is for a plan"),
        ("run R --partition p", "--partition is for jobs"),
        ("run R --policy P", "--policy is for a release"),
        ("run R --sign K", "--sign is for a release"),
        ("run --no-latest", "--no-latest is for a release"),
        ("run --out O", "--out is for the directory of one recipe"),
        ("run --sbatch-option=-N2", "--sbatch-option is for --executor slurm and firecrest"),
        ("run --poll 5s", "--poll is for --executor slurm and firecrest"),
        ("run --executor slurm --jobs 2", "--jobs is for --executor local"),
        ("run --executor slurm --memory-per-job 8G", "--memory-per-job is for --executor local"),
        ("run --executor slurm --remote-dir /d", "--remote-dir is for --executor firecrest"),
        ("run --cell c --changed main", "--changed chooses cells"),
        ("run --cell c --deployed", "--deployed chooses cells"),
        ("run --cell c --uarch zen3", "--uarch chooses cells"),
        ("run --stage test --deploy v1", "--deploy is for the stage deploy"),
        ("run --cell c --stage build --jobs 2", "--jobs is for a run of several stages"),
        ("run --cell c --stage build --forge gitea", "--forge is for a run of several stages"),
        ("deploy test::a/1:1@s%u --tag v1 --from build2 --registry oci-layout:x", "two namespaces"),
        ("list test::a --namespace build --system s", "two namespaces"),
        ("catalogue out --uarch zen3", "unrecognized arguments: --uarch"),
        ("retire --uarch zen3", "unrecognized arguments: --uarch"),
        ("storage --uarch zen3", "unrecognized arguments: --uarch"),
        ("reindex --uarch zen3", "unrecognized arguments: --uarch"),
    ],
)
def test_it_is_refused(words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.format(recipe=RECIPE).split()) == UsageError.exit_status
    assert said in capsys.readouterr().err
    assert [path.relative_to(tmp_path).name for path in tmp_path.rglob("*")] == ["R", "config.yaml"]


@pytest.mark.parametrize(
    "words",
    [
        "run --config {config} --forge gitea --api https://forge.example.org/api/v1 --project a/b --sha "
        + 40 * "a",
        "run --config {config} --sha " + 40 * "a",
    ],
)
def test_who_names_a_forge_wants_its_statuses_posted(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.format(config=SITE / "config.yaml").split()) == UsageError.exit_status
    assert "no forge was named" in capsys.readouterr().err
