"""No uenvd where a job is submitted (a gateway, slurmrestd): its first node says what the labels mean, and all others are told."""

from __future__ import annotations

import shutil

import pytest

from support.slurmsite import DIGEST_2, Site, told, uenv_lines


@pytest.fixture
def gateway(site: Site) -> Site:
    """The site with no daemon on the login side, and node2 believing that app/1 is another image: it must not be asked."""
    site.configure(login="optional")
    site.login.kill()
    site.cluster.control_socket.unlink()
    site.nodes["node2"].update(tags={"app/1": DIGEST_2})
    return site


NOTE = "uenv: no uenvd here: the job's first node looks app/1 up"


def test_srun_on_two_nodes(gateway: Site) -> None:
    done = gateway.srun("-N2", "-n4", "--uenv=app/1", "--view=default", "which-app")
    assert (done.returncode, done.stdout) == (0, "app-1\n" * 4), done.stderr
    assert told(done) == [NOTE]
    assert [request["uenv"] for request in gateway.requests("resolve")] == ["app/1"]
    (asked,) = gateway.nodes["node1"].requests("resolve")
    assert (asked["peer_uid"], asked["uid"], asked["view"]) == (0, gateway.user.uid, "default")


@pytest.mark.parametrize("export", ["ALL", "NONE"])
def test_batch_job_and_its_steps(gateway: Site, export: str) -> None:
    script = f"cat {gateway.mount}/hello; /usr/bin/srun -N2 -n2 /bin/cat {gateway.mount}/hello"
    submitted = gateway.cluster.sbatch(
        f"#!/bin/bash\n{script}\n", "-N2", f"--export={export}", "--uenv=app/1", user=gateway.user
    )
    assert submitted.stderr == NOTE + "\n"
    job = int(submitted.stdout)
    assert gateway.cluster.wait_job(job).state == "COMPLETED"
    output = (gateway.cluster.scratch / f"slurm-{job}.out").read_text()
    assert output == "hello from app-1\n" * 3
    assert len(gateway.requests("resolve")) == 1


def test_steps_of_an_allocation(gateway: Site) -> None:
    script = f"srun -N2 -n2 cat {gateway.mount}/hello; srun -w node2 -N1 -n1 cat {gateway.mount}/hello"
    done = gateway.cluster.run(
        ["salloc", "-Q", "-N2", "--uenv=app/1", "bash", "-c", script], user=gateway.user
    )
    assert (done.returncode, done.stdout) == (0, "hello from app-1\n" * 3), done.stderr
    asked = gateway.requests("resolve")
    assert len(asked) == 2
    assert asked == gateway.nodes["node1"].requests("resolve")
    assert len({request["job"]["id"] for request in asked}) == 1, "uenvd answers a job alike each time"


def test_unknown_label_ends_the_step_and_frees_the_nodes(gateway: Site) -> None:
    done = gateway.srun("-N2", "--uenv=nope/1", "echo", "ran")
    assert (done.returncode, done.stdout) == (1, "")
    assert "uenv: node1: no image matches nope/1\n" in done.stderr
    assert gateway.batch("echo ran", "--uenv=nope/1")[0] == "FAILED"
    done = gateway.srun("--uenv=app/1", "--view=zz", "true")
    assert "uenv: node1: app/1 has no view zz\n" in done.stderr


def test_no_daemon_on_the_first_node_either(gateway: Site) -> None:
    gateway.nodes["node1"].kill()
    done = gateway.srun("-N2", "--uenv=app/1", "echo", "ran")
    assert (done.returncode, done.stdout) == (1, "")
    assert "uenv: node1: uenvd is not running: " in done.stderr


def test_a_site_that_does_not_say_so_refuses(gateway: Site) -> None:
    gateway.configure()
    done = gateway.srun("--uenv=app/1", "true")
    assert (done.returncode, told(done)[0].partition(": /")[0]) == (1, "uenv: uenvd is not running")


def test_submitted_past_the_plugin(gateway: Site) -> None:
    """As slurmrestd does: the job comes with variables only. Its batch script is told; a step of several nodes may not guess."""
    environ = {"SLURM_UENVD_SPEC": "app/1", "SLURM_UENVD_VIEW": "default"}
    gateway.cluster.set_plugstack()  # of the submitting side
    job = gateway.cluster.submit(
        "#!/bin/bash\nwhich-app; srun -N2 -n2 which-app\n",
        *("-N2", "--hold"),
        user=gateway.user,
        env=environ,
    )
    gateway.configure(login="optional")
    gateway.cluster.run(["scontrol", "release", str(job)])
    assert gateway.cluster.wait_job(job).state == "COMPLETED"
    assert (gateway.cluster.scratch / f"slurm-{job}.out").read_text() == "app-1\n" * 3
    # An srun on a host whose plugstack.conf lacks the plugin: the nodes must not each decide.
    bare = gateway.cluster.scratch / "bare"
    bare.mkdir()
    shutil.copy(gateway.cluster.conf_file, bare)
    environ["SLURM_CONF"] = str(bare / "slurm.conf")
    done = gateway.srun("-N2", "-n2", "which-app", env=environ)
    assert (done.returncode, done.stdout) == (1, "")
    assert "uenv: node2: srun did not find out what 'app/1' means, " in done.stderr
    assert gateway.srun("-N1", "-w", "node1", "which-app", env=environ).stdout == "app-1\n"


def test_first_node_that_does_not_answer(gateway: Site) -> None:
    with gateway.nodes["node1"].paused():
        done = gateway.srun("-N2", "--uenv=app/1", "echo", "ran")
    assert (done.returncode, done.stdout) == (1, "")
    assert "uenv: node1: uenvd does not answer: " in uenv_lines(done.stderr)
