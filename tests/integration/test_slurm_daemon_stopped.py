"""uenvd is gone or hangs: srun and sbatch end with the clear line within 5 s, on both sides."""

from __future__ import annotations

import time

from support.cluster import poll
from support.slurmsite import Site, told, uenv_lines

LIMIT_S = 5.0


def test_not_running_at_submission(site: Site) -> None:
    site.login.kill()
    for command in (["srun", "--uenv=app/1", "true"], ["sbatch", "--uenv=app/1", "--wrap=true"]):
        done = site.cluster.run(command, user=site.user)
        assert done.returncode == 1
        assert told(done)[:2] == [
            f"uenv: uenvd is not running: {site.cluster.control_socket}: Connection refused",
            "uenv: hint: ask the site's administrators to start it: systemctl start uenvd",
        ]
    site.cluster.control_socket.unlink()
    assert "No such file or directory" in told(site.srun("--uenv=app/1", "true"))[0]


def test_stopped_at_submission(site: Site) -> None:
    expected = f"uenv: uenvd does not answer: nothing came from {site.cluster.control_socket} for 3.0 s"
    commands = (["srun", "--uenv=app/1", "true"], ["sbatch", "--uenv=app/1", "--wrap=true"])
    with site.login.paused():
        start = time.monotonic()
        clients = [site.cluster.popen(command, user=site.user) for command in commands]
        said = [client.communicate(timeout=10)[1] for client in clients]
        assert time.monotonic() - start < LIMIT_S
    assert [client.returncode for client in clients] == [1, 1]
    assert [text.splitlines()[0] for text in said] == [expected, expected]
    assert site.cluster.jobs() == []


def test_stopped_on_the_node(site: Site) -> None:
    job = site.cluster.submit(
        "#!/bin/bash\necho ran\n", "--hold", "-w", "node2", "--uenv=app/1", user=site.user
    )
    with site.nodes["node1"].paused(), site.nodes["node2"].paused():
        site.cluster.run(["scontrol", "release", str(job)])
        start = time.monotonic()
        done = site.srun("-w", "node1", "--uenv=app/1", "true")
        assert time.monotonic() - start < LIMIT_S
        assert done.returncode == 1
        assert uenv_lines(done.stderr).startswith("uenv: node1: uenvd does not answer: nothing came from ")
        assert site.cluster.wait_job(job).state == "FAILED"
    output = (site.cluster.scratch / f"slurm-{job}.out").read_text()
    assert output.startswith("uenv: node2: uenvd does not answer: ")
    assert "ran" not in output


def test_stopped_while_bytes_are_awaited(site: Site) -> None:
    site.configure(silence_ms=1500)
    site.nodes["node1"].update(waiting=True)
    waiting = site.cluster.popen(["srun", "-Q", "-w", "node1", "--uenv=app/1", "true"], user=site.user)
    assert poll(lambda: bool(site.nodes["node1"].requests("wait")), 10)
    with site.nodes["node1"].paused():
        _, said = waiting.communicate(timeout=LIMIT_S)
    assert waiting.returncode == 1
    assert "uenv: node1: uenvd does not answer: nothing came from " in said


def test_killed_while_bytes_are_awaited(site: Site) -> None:
    site.nodes["node1"].update(waiting=True)
    waiting = site.cluster.popen(["srun", "-Q", "-w", "node1", "--uenv=app/1", "true"], user=site.user)
    assert poll(lambda: bool(site.nodes["node1"].requests("wait")), 10)
    site.nodes["node1"].kill()
    _, said = waiting.communicate(timeout=LIMIT_S)
    assert waiting.returncode == 1
    assert "uenv: node1: uenvd closed the connection without an answer" in said


def test_killed_while_the_job_runs(site: Site) -> None:
    flag = site.cluster.scratch / "killed"
    flag.unlink(missing_ok=True)
    script = f"echo up; until [ -e {flag} ]; do sleep 0.05; done; cat {site.mount}/hello"
    running = site.cluster.popen(
        ["srun", "-Q", "-w", "node1", "--uenv=app/1", "bash", "-c", script], user=site.user
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "up\n"
    site.nodes["node1"].kill()
    flag.touch()
    said, errors = running.communicate(timeout=10)
    assert (running.returncode, said, errors) == (0, "hello from app-1\n", "")
