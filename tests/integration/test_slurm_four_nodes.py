"""Four nodes, each with its own uenvd and cache: what holds on two holds on more, and what fails on one is said by that one."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from support.cluster import missing, poll
from support.publishing import Publisher, simple_image
from support.registry import FakeRegistry
from support.slurmcentre import HASTY, MOUNT_POINT, Centre, running_centre, start_daemons, tidied
from support.slurmsite import told, uenv_lines

pytestmark = pytest.mark.usefixtures("node")

LIMIT_S = 5.0


@pytest.fixture(scope="module")
def four_nodes(node: None) -> Iterator[Centre]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    with running_centre(4, settings=f"{HASTY}namespaces: [deploy, build]\n") as centre:
        yield centre


@pytest.fixture
def four(four_nodes: Centre) -> Iterator[Centre]:
    with tidied(four_nodes) as tidy:
        yield tidy


def test_all_nodes_have_one_image_in_every_step(four: Centre) -> None:
    script = """
        say
        srun bash -c 'echo $SLURMD_NODENAME $(say) $UENV_DIGEST'
        srun -N4 -n4 --view=plain bash -c 'echo $PLAIN'
        srun -N2 -n2 --uenv=none bash -c 'echo ${UENV_LABEL:-nothing}'
    """
    state, output = four.batch(script, "-N4", "--ntasks-per-node=2", "--uenv=app/1.0", "--view=default")
    first, *lines = output.splitlines()
    assert (state, first) == ("COMPLETED", "one")
    seen = Counter(line for line in lines if line.startswith("node"))
    assert sorted(seen.values()) == [2, 2, 2, 2], output
    assert len({line.split()[2] for line in seen}) == 1
    assert (lines.count("yes"), lines.count("nothing")) == (4, 2)


def test_the_tag_moves_between_submission_steps_and_nodes(four: Centre) -> None:
    """Without uenvd where jobs are submitted the label is looked up once, on the first node, for the job's lifetime there."""
    publisher = Publisher(four.registry.url)
    first = publisher.remote.manifest("deploy/demo/zen3/app/1.0", "v1").digest
    four.use_socket("control", "login=optional")
    four.login.stop()
    try:
        flag = four.cluster.scratch / "moved"
        flag.unlink(missing_ok=True)
        step = f"srun -Q -N4 -n4 cat {MOUNT_POINT}/word; echo"
        script = f"{step}; touch {flag}.1; until [ -e {flag} ]; do sleep 0.02; done; {step}"
        shell = four.cluster.popen(
            ["salloc", "-Q", "-N4", "--uenv=app/1.0", "bash", "-c", script], user=four.user
        )
        assert poll((flag.parent / "moved.1").exists, 20), four.cluster.logs()
        publisher.push(four.cluster.dir / "two.squashfs", "app/1.0", "v2", "latest")
        flag.touch()
        said, errors = shell.communicate(timeout=30)
        assert (shell.returncode, said) == (0, "oneoneoneone\n" * 2), errors
        done = four.srun("-N4", "-n4", "--uenv=app/1.0", "cat", f"{MOUNT_POINT}/word")
        assert (done.returncode, done.stdout) == (0, "two" * 4), done.stderr  # another job
    finally:
        (four.cluster.scratch / "moved.1").unlink(missing_ok=True)
        four.login.start()
        publisher.retag("app/1.0", first, "latest")


def test_early_access_from_the_namespace_that_the_site_opened(four: Centre) -> None:
    Publisher(four.registry.url, namespace="build").push(four.cluster.dir / "two.squashfs", "app/1.0", "4711")
    done = four.srun("-N2", "-n2", "--uenv=build::app/1.0:4711", "--view=default", "say")
    assert (done.returncode, done.stdout) == (0, "two\ntwo\n"), done.stderr
    state, output = four.batch("say; srun -N4 -n4 say", "-N4", "--uenv=build::app/1.0:4711", "--view=default")
    assert (state, output) == ("COMPLETED", "two\n" * 5)
    done = four.srun("--uenv=secret::app/1.0", "true")
    assert done.returncode == 1
    assert told(done)[0].startswith("uenv: the namespace 'secret' is not open")


def test_one_node_without_uenvd_speaks_for_itself(four: Centre) -> None:
    four.nodes["node3"].stop()
    try:
        begin = time.monotonic()
        done = four.srun("-N4", "-n8", "-K", "--uenv=app/1.0", "sleep", "60")
        assert time.monotonic() - begin < LIMIT_S
        assert done.returncode != 0
        said = [line for line in uenv_lines(done.stderr).splitlines() if "hint" not in line]
        assert len(said) == 1
        assert said[0].startswith("uenv: node3: uenvd is not running: ")
        state, output = four.batch("srun -N4 -n4 -K echo ran; echo status $?", "-N4", "--uenv=app/1.0")
        assert state == "COMPLETED"  # the script went on
        assert "status 1" in output
        assert "uenv: node3: uenvd is not running" in output
    finally:
        four.nodes["node3"].start()
    done = four.srun("-N4", "-n4", "--uenv=app/1.0", "--view=default", "say")
    assert (done.returncode, done.stdout) == (0, "one\n" * 4)


def test_uenvd_killed_before_during_and_after_the_start(four: Centre) -> None:
    """The job runs with its environment, or fails clearly within seconds; never without it."""
    victim = four.nodes["node2"]
    victim.kill()  # before: as in test_one_node_without_uenvd, and it comes back while the job waits in the queue
    job = four.cluster.submit(
        f"#!/bin/bash\nsrun -N4 -n4 cat {MOUNT_POINT}/word\n",
        "-N4",
        "--hold",
        "--uenv=app/1.0",
        user=four.user,
    )
    victim.start()
    four.cluster.run(["scontrol", "release", str(job)])
    assert four.finish(job) == ("COMPLETED", "one" * 4)
    flag = four.cluster.scratch / "go"  # after: while the program runs
    flag.unlink(missing_ok=True)
    script = f"echo up; until [ -e {flag} ]; do sleep 0.02; done; cat {MOUNT_POINT}/word"
    running = four.cluster.popen(
        ["srun", "-Q", "-N4", "-n4", "--uenv=app/1.0", "bash", "-c", script], user=four.user
    )
    assert running.stdout is not None
    assert [running.stdout.readline() for _task in range(4)] == ["up\n"] * 4
    victim.kill()
    try:
        flag.touch()
        said, errors = running.communicate(timeout=10)
        assert (running.returncode, said) == (0, "one" * 4), errors
    finally:
        victim.start()
    with FakeRegistry() as slow:  # during: while the bytes are awaited
        image = simple_image(four.cluster.dir / "big.squashfs", "big", "big", megabytes=20)
        Publisher(slow.url).push(image, "big/1", "v1")
        slow.spoil("/blobs/sha256", bytes_per_s=1_000_000)
        with contextlib.ExitStack() as stack:
            _login, nodes = start_daemons(stack, four.cluster, slow.url, "slow")
            four.use_socket("slow")
            waiting = four.cluster.popen(
                ["srun", "-N2", "-w", "node1,node2", "-K", "--uenv=big/1", "echo", "ran"], user=four.user
            )

            def is_pulling() -> bool:
                return all(
                    any(image["done_bytes"] for image in nodes[name].ask("status")["images"])
                    for name in ("node1", "node2")
                )

            assert poll(is_pulling, 10)
            begin = time.monotonic()
            nodes["node2"].kill()
            said, errors = waiting.communicate(timeout=10)
            assert time.monotonic() - begin < LIMIT_S
            assert waiting.returncode != 0
            assert "ran" not in said
            assert "uenv: node2: uenvd closed the connection without an answer\n" in errors


def test_components_on_different_nodes_have_one_environment(four: Centre) -> None:
    done = four.srun(
        *("-N2", "-n2", "--uenv=app/1.0", "--view=default", "say"),
        *(":", "-N2", "-n2", "--uenv=app/1.0", "--view=default", "say"),
    )
    assert (done.returncode, done.stdout) == (0, "one\n" * 4), done.stderr
