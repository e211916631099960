"""Sites configure Slurm differently: the image is there, and scancel ends a waiting task, whatever tracks the processes."""

from __future__ import annotations

import shutil

import pytest

from support.cluster import missing, poll, running_cluster
from support.slurmsite import built_plugin
from support.standin import StandIn
from support.users import ordinary_user

CONFIGURATIONS = {
    "pgid": ["ProctrackType=proctrack/pgid"],
    "extern step": ["PrologFlags=Contain"],
    "affinity": ["TaskPlugin=task/affinity", "JobAcctGatherType=jobacct_gather/linux"],
}


@pytest.mark.skipif(missing() != "", reason=missing())
@pytest.mark.parametrize("lines", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_image_and_scancel(lines: list[str]) -> None:
    plugin = built_plugin()
    with running_cluster(nodes=1, conf=lines) as cluster, ordinary_user(cluster.dir) as user:
        copied = shutil.copy(plugin, cluster.dir)
        cluster.set_plugstack(f"required {copied} socket={cluster.control_socket}")
        mount, image = cluster.dir / "mount", cluster.dir / "image"
        mount.mkdir()
        image.mkdir()
        (image / "hello").write_text("hello\n")
        daemon = StandIn(cluster.dir / "standin", cluster.control_socket)
        daemon.start()
        try:
            offered = {"dir": str(image), "mount": str(mount), "views": {}}
            daemon.update(tags={"app/1": "sha256:aa"}, images={"sha256:aa": offered})
            done = cluster.srun("--uenv=app/1", "cat", f"{mount}/hello", user=user)
            assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")
            daemon.update(waiting=True)
            client = cluster.popen(["srun", "-n2", "--uenv=app/1", "true"], user=user)
            assert poll(lambda: len(daemon.requests("wait")) == 2, 10)
            cluster.scancel(*map(str, cluster.jobs()))
            assert poll(lambda: cluster.node_states()["node1"] == "idle", 2)
            client.communicate(timeout=10)
            assert client.returncode != 0
        finally:
            daemon.kill()
