"""The bytes are not there yet: the job waits in its task, says so, and scancel frees the node at once."""

from __future__ import annotations

import time

import pytest

from support.cluster import poll
from support.slurmsite import DIGEST_1, Site, uenv_lines

FREE_S = 2.0


def _waiting(site: Site, tasks: int) -> bool:
    return len(site.nodes["node1"].requests("wait")) >= tasks


@pytest.mark.parametrize("kind", ["srun", "sbatch"])
def test_scancel_frees_the_node(site: Site, kind: str) -> None:
    site.nodes["node1"].update(waiting=True)
    if kind == "srun":
        client = site.cluster.popen(["srun", "-n3", "-w", "node1", "--uenv=app/1", "true"], user=site.user)
        tasks = 3
    else:
        client = None
        site.cluster.submit("#!/bin/bash\necho ran\n", "-w", "node1", "--uenv=app/1", user=site.user)
        tasks = 1
    assert poll(lambda: _waiting(site, tasks), 10)
    (job,) = site.cluster.jobs()
    start = time.monotonic()
    site.cluster.scancel(str(job))
    assert poll(lambda: site.cluster.node_states()["node1"] == "idle", FREE_S)
    assert time.monotonic() - start <= FREE_S
    assert site.cluster.job_state(job) == "CANCELLED"
    if client is not None:
        client.communicate(timeout=10)
        assert client.returncode != 0
    assert poll(lambda: not [line for line in site.cluster.processes() if "slurmstepd" in line], 5)


def test_interrupt_of_srun_frees_the_node(site: Site) -> None:
    site.nodes["node1"].update(waiting=True)
    client = site.cluster.popen(["srun", "-w", "node1", "--uenv=app/1", "true"], user=site.user)
    assert poll(lambda: _waiting(site, 1), 10)
    client.terminate()
    client.communicate(timeout=10)
    assert client.returncode != 0
    assert poll(lambda: site.cluster.node_states()["node1"] == "idle", 5)


def test_progress_is_shown_once_a_node_and_the_job_then_runs(site: Site) -> None:
    site.nodes["node1"].update(waiting=True)
    client = site.cluster.popen(
        [
            "srun",
            "-Q",
            "-n3",
            "-w",
            "node1",
            "--uenv=app/1",
            "--view=default",
            "bash",
            "-c",
            "which-app; echo $APP_LIST",
        ],
        user=site.user,
    )
    assert client.stderr is not None
    line = client.stderr.readline()
    assert line.startswith("uenv: node1: pulling app/1: ")
    assert line.endswith(" of 91 MB\n")
    site.nodes["node1"].update(waiting=False)
    said, errors = client.communicate(timeout=10)
    assert (client.returncode, errors) == (0, "")
    assert sorted(said.splitlines()) == ["a:b"] * 3 + ["app-1"] * 3
    assert {request["peer_uid"] for request in site.nodes["node1"].requests("wait")} == {0}, (
        "not against the user's limit"
    )


def test_a_short_wait_is_silent(site: Site) -> None:
    site.nodes["node1"].update(waiting=True)
    client = site.cluster.popen(
        ["srun", "-Q", "-w", "node1", "--uenv=app/1", "cat", f"{site.mount}/hello"], user=site.user
    )
    assert poll(lambda: _waiting(site, 1), 10)
    site.nodes["node1"].update(waiting=False)
    said, errors = client.communicate(timeout=10)
    assert (client.returncode, said, errors) == (0, "hello from app-1\n", "")


def test_pull_fails(site: Site) -> None:
    error = {
        "code": "digest-mismatch",
        "exit_status": 75,
        "message": f"{DIGEST_1[:15]} arrived damaged",
        "hint": "nothing was used",
    }
    site.nodes["node1"].update(waiting=True, fail={"wait": error})
    done = site.srun("-w", "node1", "-n2", "--uenv=app/1", "true")
    assert done.returncode == 1
    assert uenv_lines(done.stderr).startswith(
        f"uenv: node1: {DIGEST_1[:15]} arrived damaged\nuenv: hint: nothing was used\n"
    )
    assert done.stderr.count("arrived damaged") == 1


def test_batch_script_waits_too(site: Site) -> None:
    site.nodes["node1"].update(waiting=True)
    job = site.cluster.submit(
        "#!/bin/bash\nwhich-app\n", "-w", "node1", "--uenv=app/1", "--view=default", user=site.user
    )
    assert poll(lambda: _waiting(site, 1), 10)
    assert site.cluster.job_state(job) == "RUNNING"
    site.nodes["node1"].update(waiting=False)
    assert site.cluster.wait_job(job).state == "COMPLETED"
    assert (site.cluster.scratch / f"slurm-{job}.out").read_text() == "app-1\n"
