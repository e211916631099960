"""The run that submitted Slurm jobs is killed: they go on, the next run finds them again. One that is asked to stop cancels them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cluster import Cluster, missing, poll, running_cluster
from support.plans import NAMES, Site, make_site, outcome
from support.registry import FakeRegistry
from uenvd.publish.plan import load_plan

pytestmark = pytest.mark.usefixtures("node")
DEADLINE_S = 120.0


@pytest.fixture
def cluster(node: None) -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    with running_cluster(nodes=1) as cluster:
        yield cluster


def jobs(cluster: Cluster) -> dict[str, str]:
    """Return job number -> state of all that the controller remembers."""
    lines = cluster.run(["squeue", "-h", "-t", "all", "-o", "%A %T"]).stdout.splitlines()
    return dict(line.split() for line in lines)


def test_jobs_survive_their_submitter(cluster: Cluster, tmp_path: Path) -> None:
    site: Site = make_site(tmp_path, names=NAMES[:1], machines=(("alpha", "zen3"),))
    (cell,) = load_plan(site.config).cells
    work = tmp_path / "work"
    with FakeRegistry() as registry:
        words = site.words(registry.url, "--executor=slurm", f"--work={work}", "--poll=0.2s", "--json")
        first = cluster.popen(words, cwd=tmp_path)
        assert poll(lambda: len(jobs(cluster)) == 2, DEADLINE_S)
        first.kill()
        first.wait()
        submitted = jobs(cluster)
        done = site.run(
            registry.url,
            *("--executor=slurm", f"--work={work}", "--poll=0.2s", "--json"),
            env=cluster.environ(),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert outcome(done.stdout)[cell.id]["stages"] == {"build": "passed", "test": "passed"}
        assert jobs(cluster).keys() == submitted.keys()

    # Another registry has nothing of it: two new jobs, and a polite end.
    with FakeRegistry() as registry:
        words = site.words(registry.url, "--executor=slurm", f"--work={work}", "--poll=0.2s", "--json")
        second = cluster.popen(words, cwd=tmp_path)
        assert poll(lambda: len(jobs(cluster)) == 4, DEADLINE_S)
        second.send_signal(signal.SIGTERM)
        assert second.wait(DEADLINE_S) == 128 + signal.SIGTERM
        assert cluster.jobs() == []
