"""Slurm keeps one value of a plugin's option for all components of a heterogeneous job, the last: what would differ is refused."""

from __future__ import annotations

import pytest

from support.slurmsite import Site, told

REASON = "uenv: the components of a heterogeneous job cannot have different environments, because Slurm knows only one for all: "


def test_same_value_or_only_in_the_first(site: Site) -> None:
    for second in (["--uenv=app/1", "--view=default"], []):
        done = site.srun(
            "-n1", "--uenv=app/1", "--view=default", "which-app", ":", "-n1", *second, "which-app"
        )
        assert (done.returncode, done.stdout) == (0, "app-1\napp-1\n"), done.stderr
    assert len(site.login.requests("resolve")) == 2


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (["--uenv=app/1"], ["--uenv=app/2"], "the first has --uenv=app/1, another --uenv=app/2"),
        ([], ["--uenv=app/2"], "the first has no --uenv, another --uenv=app/2"),
        (["--uenv=app/1"], ["--uenv=none"], "the first has --uenv=app/1, another --uenv=none"),
        (
            ["--uenv=app/1", "--view=default"],
            ["--uenv=app/1", "--view=develop"],
            "the first has --view=default, another --view=develop",
        ),
    ],
    ids=["another", "late", "none", "view"],
)
def test_different_values_are_refused_at_submission(
    site: Site, first: list[str], second: list[str], said: str
) -> None:
    before = site.cluster.submit("#!/bin/bash\ntrue\n")
    script = "#!/bin/bash\ntrue\n"
    for done in (
        site.srun("-n1", *first, "true", ":", "-n1", *second, "true"),
        site.cluster.sbatch(script, "-n1", *first, ":", "-n1", *second, user=site.user),
        site.cluster.run(["salloc", "-n1", *first, ":", "-n1", *second, "true"], user=site.user),
        site.cluster.sbatch(
            f"#!/bin/bash\n#SBATCH -n1 {' '.join(first)}\n#SBATCH hetjob\n#SBATCH -n1 {' '.join(second)}\ntrue\n",
            user=site.user,
        ),
    ):
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert told(done)[0] == REASON + said
        assert told(done)[1].startswith("uenv: hint: give every component the same, ")
    assert site.cluster.submit("#!/bin/bash\ntrue\n") == before + 1, "nothing was submitted in between"


def test_batch_job_and_its_steps_in_all_components(site: Site) -> None:
    script = "which-app; srun --het-group=0,1 which-app; srun --het-group=1 --uenv=app/2 which-app"
    state, output = site.batch(script, "-n1", "--uenv=app/1", "--view=default", ":", "-n1")
    assert (state, output) == ("COMPLETED", "app-1\napp-1\napp-1\napp-2\n"), output


def test_groups_get_environments_of_their_own_by_steps(site: Site) -> None:
    """The way out that the hint names."""
    script = "srun --het-group=0 --uenv=app/1 --view=default which-app; srun --het-group=1 --uenv=app/2 --view=default which-app"
    assert site.batch(script, "-n1", ":", "-n1") == ("COMPLETED", "app-1\napp-2\n")
