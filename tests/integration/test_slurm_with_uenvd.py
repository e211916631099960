"""The main job with nothing but real parts: registry, one uenvd on the login side and one on each node, Slurm, plugin, FUSE."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from support.cluster import poll
from support.publishing import Publisher, make_squashfs, simple_image
from support.registry import FakeRegistry
from support.slurmcentre import MOUNT_POINT, Centre, start_daemons
from support.slurmsite import told

pytestmark = pytest.mark.usefixtures("node")

SLOW_SOCKET = "slow"


def test_srun_on_two_nodes_sees_the_image_with_its_view(centre: Centre) -> None:
    script = f"say; echo $WORD; cat {MOUNT_POINT}/word; echo; findmnt -no SOURCE,FSTYPE,OPTIONS {MOUNT_POINT}; id -u"
    done = centre.srun("-N2", "-n4", "--uenv=app/1.0", "--view=default", "bash", "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("one\n") == 12
    assert done.stdout.count(f"{centre.user.uid}\n") == 4
    mounts = [line for line in done.stdout.splitlines() if "fuse.uenvd" in line]
    assert len(mounts) == 4
    assert all(line.startswith("uenvd:sha256:") and " ro,nosuid,nodev" in line for line in mounts)
    assert list(Path(MOUNT_POINT).iterdir()) == []


def test_without_the_option_nothing_is_there(centre: Centre) -> None:
    done = centre.srun("ls", "-A", MOUNT_POINT)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_batch_script_and_its_steps_have_the_same_image(centre: Centre) -> None:
    script = f"""
        cat {MOUNT_POINT}/word; echo
        srun -N2 -n2 say
        srun -N1 -n1 --view=plain bash -c 'echo $PLAIN'
        srun -N1 -n1 --uenv=none ls -A {MOUNT_POINT}
    """
    state, output = centre.batch(script, "-N2", "--uenv=app/1.0", "--view=default")
    assert (state, output.split()) == ("COMPLETED", ["one", "one", "one", "yes"])


def test_an_unknown_label_is_refused_at_submission(centre: Centre) -> None:
    done = centre.srun("--uenv=app/9", "true")
    assert done.returncode != 0
    assert any("app/9" in line for line in told(done))
    assert any("hint: there is: app/1.0" in line for line in told(done))
    assert centre.cluster.jobs() == []


def test_a_queued_job_keeps_its_image_when_latest_moves(centre: Centre) -> None:
    publisher = Publisher(centre.registry.url)
    script = f"#!/bin/bash\ncat {MOUNT_POINT}/word; srun cat {MOUNT_POINT}/word\n"
    queued = centre.cluster.submit(script, "--hold", "--uenv=app/1.0", user=centre.user)
    first = publisher.remote.manifest("deploy/demo/zen3/app/1.0", "v1").digest
    second = publisher.push(centre.cluster.dir / "two.squashfs", "app/1.0", "v2", "latest")
    try:
        assert centre.srun("--uenv=app/1.0", "cat", f"{MOUNT_POINT}/word").stdout == "two"
        assert centre.srun("--uenv=app/1.0:v1", "cat", f"{MOUNT_POINT}/word").stdout == "one"
        assert centre.srun(f"--uenv=app/1.0@{first}", "cat", f"{MOUNT_POINT}/word").stdout == "one"
        assert centre.cluster.run(["scontrol", "release", str(queued)]).returncode == 0
        assert centre.finish(queued) == ("COMPLETED", "oneone")
    finally:
        publisher.retag("app/1.0", first, "latest")
    assert second != first


def test_a_mute_registry_does_not_stop_a_warm_label(centre: Centre) -> None:
    assert centre.srun("--uenv=app/1.0", "true").returncode == 0
    centre.registry.process.send_signal(signal.SIGSTOP)
    try:
        done = centre.srun("--uenv=app/1.0", "--view=default", "say")
        assert (done.returncode, done.stdout) == (0, "one\n")
        assert any("using what it said" in line for line in told(done))
    finally:
        centre.registry.process.send_signal(signal.SIGCONT)


def test_an_ordinary_users_own_file_runs_on_all_nodes(centre: Centre) -> None:
    own = simple_image(centre.user.home / "own.squashfs", "own", "mine")
    own.chmod(0o600)
    os.chown(own, centre.user.uid, centre.user.gid)
    done = centre.srun("-N2", "-n2", f"--uenv={own}", "--view=default", "say")
    assert (done.returncode, done.stdout) == (0, "mine\nmine\n"), done.stderr
    own.chmod(0o600)
    os.chown(own, 0, 0)
    done = centre.srun(f"--uenv={own}", "say")
    assert done.returncode != 0
    assert any("own.squashfs" in line for line in told(done))


def test_an_ordinary_users_own_image_has_a_name(centre: Centre) -> None:
    directory = centre.user.home / ".local/share/uenv/images"
    name = directory / "tiny/1.0.squashfs"
    name.parent.mkdir(parents=True)
    for path in (centre.user.home / ".local", *(centre.user.home / ".local").rglob("*")):
        os.chown(path, centre.user.uid, centre.user.gid)
    directory.parent.chmod(0o700)
    simple_image(name, "tiny", "mine")
    os.chown(name, centre.user.uid, centre.user.gid)
    done = centre.srun("-N2", "-n2", "--uenv=mine::tiny", "sh", "-c", f"cat {MOUNT_POINT}/word; echo")
    assert (done.returncode, done.stdout) == (0, "mine\n" * 2), done.stderr
    refused = centre.srun("--uenv=mine::tiny/2", "true")
    said = told(refused)
    assert refused.returncode != 0
    assert f"uenv: there is no own image tiny/2 in {directory}" in said
    assert any(line.startswith("uenv: hint: there is: mine::tiny/1.0") for line in said)
    assert centre.cluster.jobs() == []


def test_a_link_in_an_image_leads_no_mount_out_of_it(centre: Centre) -> None:
    """Root attaches the second image: behind the link it would be the node's /etc, with set-uid programs that believe it."""
    outer = make_squashfs(centre.user.home / "outer.squashfs", {"inside/f": ""}, links={"way-out": "/etc"})
    inner = make_squashfs(centre.user.home / "inner.squashfs", {"passwd": "root::0:0::/:/bin/sh\n"})
    both = f"{outer}:{MOUNT_POINT},{inner}:{MOUNT_POINT}"
    done = centre.srun(f"--uenv={both}/inside", "cat", f"{MOUNT_POINT}/inside/passwd")
    assert done.stdout == "root::0:0::/:/bin/sh\n", done.stderr  # a nested mount as such is fine
    done = centre.srun(f"--uenv={both}/way-out", "cat", "/etc/passwd")
    assert done.returncode != 0
    assert done.stdout == ""
    assert any("symbolic link" in line for line in told(done)), done.stderr


def test_a_stopped_uenvd_ends_srun_with_a_clear_line_on_both_sides(centre: Centre) -> None:
    for daemon, where in ((centre.login, "login"), (centre.nodes["node1"], "node1")):
        daemon.signal(signal.SIGSTOP)
        try:
            begin = time.monotonic()
            done = centre.srun("-w", "node1", "--uenv=app/1.0", "true")
            assert time.monotonic() - begin < 5, where
            assert done.returncode != 0
            lines = [line for line in told(done) if "uenvd" in line]
            assert len(lines) >= 1, done.stderr
            assert where == "login" or any("node1" in line for line in lines)
        finally:
            daemon.signal(signal.SIGCONT)


def test_a_job_fails_clearly_where_uenvd_does_not_run(centre: Centre) -> None:
    daemon = centre.nodes["node2"]
    daemon.stop()
    try:
        state, output = centre.batch("echo ran", "-w", "node2", "--uenv=app/1.0")
        assert state == "FAILED"
        assert "ran" not in output
        assert "node2" in output
    finally:
        daemon.start()
    assert centre.srun("-w", "node2", "--uenv=app/1.0", "--view=default", "say").stdout == "one\n"


def test_scancel_during_a_cold_pull_frees_the_node(centre: Centre) -> None:
    with FakeRegistry() as slow, contextlib.ExitStack() as stack:
        image = simple_image(centre.cluster.dir / "big.squashfs", "big", "big", megabytes=30)
        Publisher(slow.url).push(image, "big/1", "v1")
        slow.spoil("/blobs/sha256", bytes_per_s=1_000_000)
        _login, nodes = start_daemons(stack, centre.cluster, slow.url, SLOW_SOCKET)
        centre.use_socket(SLOW_SOCKET)
        with centre.cluster.popen(
            ["srun", "-w", "node1", "--uenv=big/1", "echo", "ran"], user=centre.user
        ) as srun:
            pulling = nodes["node1"]
            assert poll(lambda: any(image["done_bytes"] for image in pulling.ask("status")["images"]), 10)
            (job,) = centre.cluster.jobs()
            begin = time.monotonic()
            centre.cluster.scancel(str(job))
            assert poll(lambda: centre.cluster.node_states()["node1"] == "idle", 5), centre.cluster.logs()
            assert time.monotonic() - begin <= 2
            output, _errors = srun.communicate(timeout=10)
            assert srun.returncode != 0
            assert "ran" not in output
        assert poll(lambda: pulling.ask("status")["images"] == [], 5)  # and the pull with it


def test_what_the_registry_serves_wrongly_never_runs(centre: Centre) -> None:
    with FakeRegistry() as lying, contextlib.ExitStack() as stack:
        publisher = Publisher(lying.url)
        publisher.push(centre.cluster.dir / "one.squashfs", "app/1.0", "v1", stock=True)
        text = centre.cluster.dir / "text.squashfs"
        text.write_text("this is no image\n" * 100)
        publisher.push(text, "text/1", "v1", stock=True)
        lying.spoil(f"/blobs/{_layer(publisher, 'app/1.0')}", corrupt=True)
        start_daemons(stack, centre.cluster, lying.url, "lying")
        centre.use_socket("lying")
        for label, word in ((f"app/1.0:{MOUNT_POINT}", "digest"), (f"text/1:{MOUNT_POINT}", "squashfs")):
            done = centre.srun(f"--uenv={label}", "echo", "ran")
            assert done.returncode != 0
            assert "ran" not in done.stdout
            assert any(word in line for line in told(done)), done.stderr
            state, output = centre.batch("echo ran", f"--uenv={label}")
            assert state == "FAILED"
            assert "ran" not in output.replace("this is", "")
            assert word in output


def _layer(publisher: Publisher, label: str) -> str:
    return publisher.remote.manifest(f"deploy/demo/zen3/{label}", "v1").layers[0].digest
