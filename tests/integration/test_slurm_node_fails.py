"""Something is wrong only on the node: one clear line with its name, a failed job, and the node stays in service."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.slurmsite import DIGEST_1, Site, uenv_lines

UNPULLABLE = {
    "code": "registry-unreachable",
    "exit_status": 71,
    "message": "the registry does not answer",
    "hint": "try again later",
}


def _refuse(site: Site) -> None:
    site.nodes["node1"].update(fail={"mount": UNPULLABLE})


def _kill(site: Site) -> None:
    site.nodes["node1"].kill()


def _too_few(site: Site) -> None:
    site.nodes["node1"].update(extra_fds=-1)


def _too_many(site: Site) -> None:
    site.nodes["node1"].update(extra_fds=2)


def _garbage(site: Site) -> None:
    site.nodes["node1"].update(raw={"mount": "\x00\xff\n"})


def _no_mount_point(site: Site) -> None:
    image = site.nodes["node1"].state.images[DIGEST_1]
    site.nodes["node1"].update(images={DIGEST_1: {**image, "mount": "/no/such/place"}})


def _file_as_mount_point(site: Site) -> None:
    image = site.nodes["node1"].state.images[DIGEST_1]
    site.nodes["node1"].update(images={DIGEST_1: {**image, "mount": "/etc/passwd"}})


def _old_protocol(site: Site) -> None:
    site.nodes["node1"].update(
        raw={"mount": '{"ok":true,"state":"ready","lease":"x","mounts":[{"mount":"relative"}]}\n'}
    )


CASES: list[tuple[Callable[[Site], None], str]] = [
    (_refuse, "uenv: node1: the registry does not answer\nuenv: hint: try again later\n"),
    (_kill, "uenv: node1: uenvd is not running: "),
    (_too_few, "uenv: node1: uenvd announced 1 mounts and sent 0\n"),
    (_too_many, "uenv: node1: uenvd announced 1 mounts and sent 3\n"),
    (_garbage, "uenv: node1: an answer of uenvd is malformed: "),
    (_old_protocol, "uenv: node1: an answer of uenvd is malformed: "),
    (
        _no_mount_point,
        "uenv: node1: the mount point /no/such/place of app/1 does not exist\nuenv: hint: ask the site's administrators",
    ),
    (_file_as_mount_point, "uenv: node1: the mount point /etc/passwd of app/1 is not a directory\n"),
]


def _run(site: Site, option: str) -> str:
    marker = site.cluster.scratch / "ran"
    marker.unlink(missing_ok=True)
    done = site.srun("-w", "node1", "-n2", option, "touch", str(marker))
    assert done.returncode == 1
    assert not marker.exists(), "a task ran without its environment"
    assert "srun: error: node1: tasks 0-1: Exited with exit code 1" in done.stderr
    assert site.cluster.node_states()["node1"] not in ("drained", "draining", "down")
    return uenv_lines(done.stderr)


@pytest.mark.parametrize(("damage", "text"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_tasks_do_not_run(site: Site, damage: Callable[[Site], None], text: str) -> None:
    # What resolves to an explicit mount point elsewhere is decided on the node by its own daemon.
    if damage in (_no_mount_point, _file_as_mount_point):
        place = "/no/such/place" if damage is _no_mount_point else "/etc/passwd"
        said = _run(site, f"--uenv=app/1:{place}")
    else:
        damage(site)
        said = _run(site, "--uenv=app/1")
    assert said.startswith(text)
    assert said.count("uenv: node1:") == 1, "one line for all tasks of a node"


def test_batch_job_fails_and_says_why(site: Site) -> None:
    job = site.cluster.submit("#!/bin/bash\necho ran\n", "--hold", "--uenv=app/1", user=site.user)
    for daemon in site.nodes.values():
        daemon.update(fail={"mount": UNPULLABLE})
    site.cluster.run(["scontrol", "release", str(job)])
    found = site.cluster.wait_job(job)
    assert (found.state, found.exit_code) == ("FAILED", "1:0")
    output = (site.cluster.scratch / f"slurm-{job}.out").read_text()
    assert output == "uenv: node1: the registry does not answer\nuenv: hint: try again later\n"
    assert set(site.cluster.node_states().values()) == {"idle"}


def test_one_of_two_nodes(site: Site) -> None:
    _refuse(site)
    done = site.srun("-N2", "-n4", "--uenv=app/1", "-K", "cat", f"{site.mount}/hello")
    assert done.returncode == 1
    assert done.stderr.splitlines().count("uenv: node1: the registry does not answer") == 1
    assert "uenv: node2" not in done.stderr


def test_step_after_a_failed_one_works(site: Site) -> None:
    _refuse(site)
    assert site.srun("-w", "node1", "--uenv=app/1", "true").returncode == 1
    site.nodes["node1"].update(fail={})
    assert (
        site.srun("-w", "node1", "--uenv=app/1", "cat", f"{site.mount}/hello").stdout == "hello from app-1\n"
    )


def test_variable_of_the_users_making_is_resolved_by_the_daemon(site: Site) -> None:
    environ = {"SLURM_UENVD_IMAGES": "nope/9", "SLURM_UENVD_SPEC": "app/1"}
    done = site.srun("-w", "node1", "--uenv=app/1", "true", env=environ)
    assert done.returncode == 1
    assert uenv_lines(done.stderr).startswith("uenv: node1: no image matches nope/9\n")
    (asked,) = site.nodes["node1"].requests("mount")
    assert asked["uid"] == site.user.uid


def test_mount_point_was_removed_from_the_node(site: Site) -> None:
    site.mount.rmdir()
    try:
        done = site.srun("--uenv=app/1", "true")
    finally:
        site.mount.mkdir()
    assert done.returncode == 1
    assert uenv_lines(done.stderr).startswith(
        f"uenv: node1: the mount point {site.mount} of app/1 does not exist\n"
    )
