"""SLURM_UENV, SBATCH_UENV and SALLOC_UENV choose where no option does; an option goes before them, they before what is inherited."""

from __future__ import annotations

from support.slurmsite import Site, told


def test_each_program_has_its_own(site: Site) -> None:
    environ = {
        "SLURM_UENV": "app/1",
        "SLURM_UENV_VIEW": "default",
        "SBATCH_UENV": "app/2",
        "SBATCH_UENV_VIEW": "default",
    }
    assert site.srun("which-app", env=environ).stdout == "app-1\n"
    assert site.batch("which-app; srun which-app", env=environ) == ("COMPLETED", "app-2\napp-2\n")
    done = site.cluster.run(
        ["salloc", "-Q", "srun", "which-app"],
        user=site.user,
        env={"SALLOC_UENV": "app/2", "SALLOC_VIEW": "default"},
    )
    assert (done.returncode, done.stdout) == (0, "app-2\n"), done.stderr


def test_option_goes_before_and_none_drops(site: Site) -> None:
    environ = {"SLURM_UENV": "app/1", "SLURM_UENV_VIEW": "develop", "SBATCH_UENV": "nope/9"}
    done = site.srun("--uenv=app/2", "--view=default", "which-app", env=environ)
    assert (done.returncode, done.stdout) == (0, "app-2\n"), done.stderr
    done = site.srun("--uenv=none", "ls", "-A", str(site.mount), env=environ)
    assert (done.returncode, done.stdout) == (0, "")
    script = f"ls -A {site.mount}; srun ls -A {site.mount}; echo end"
    assert site.batch(script, "--uenv=none", env=environ) == ("COMPLETED", "end\n")


def test_wrong_value_is_refused_at_submission(site: Site) -> None:
    done = site.srun("true", env={"SLURM_UENV": "nope/9"})
    assert (done.returncode, told(done)[0]) == (1, "uenv: no image matches nope/9")
    done = site.cluster.sbatch("#!/bin/bash\ntrue\n", user=site.user, env={"SBATCH_UENV": "nope/9"})
    assert (done.returncode, done.stdout) == (1, "")


def test_a_job_is_told_what_it_has_and_may_choose_anew(site: Site) -> None:
    """The profile's SLURM_UENV must not replace, in the job's own sruns, what the job was submitted with."""
    script = """
        echo $SLURM_UENV $SLURM_UENV_VIEW
        srun which-app
        SLURM_UENV=app/2 srun bash -c 'which-app; srun --overlap -Q which-app'
        SLURM_UENV=none srun bash -c 'echo ${UENV_LABEL:-nothing}'
        srun which-app
    """
    state, output = site.batch(script, "--uenv=app/1", "--view=default", env={"SLURM_UENV": "nope/9"})
    assert state == "COMPLETED", output
    assert output.splitlines() == [
        *("app/1 default", "app-1"),
        *("app-2", "app-2"),
        *("nothing", "app-1"),
    ]


def test_a_variable_in_a_job_that_inherited_an_option_counts_on_the_node_too(site: Site) -> None:
    """Slurm goes on delivering the option of the outer job to the inner one; what was submitted goes before it."""
    out = site.cluster.scratch / "instead.out"
    script = f"SBATCH_UENV=app/2 sbatch --parsable -o {out} --wrap='cat {site.mount}/hello; srun cat {site.mount}/hello'"
    state, output = site.batch(script, "--uenv=app/1")
    assert state == "COMPLETED", output
    assert site.cluster.wait_job(int(output.splitlines()[-1])).state == "COMPLETED"
    assert out.read_text() == "hello from app-2\n" * 2
