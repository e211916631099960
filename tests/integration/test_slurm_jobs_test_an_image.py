"""uenvd-publish test --slurm: ReFrame's jobs get the image by its digest from the plugin and uenvd of each node, on a real private cluster."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.cluster import Cluster, Result, missing, running_cluster
from support.daemon import running_daemon
from support.publishing import Publisher
from support.reframetests import HANGS, HEAD, MEASURES, image_with_tests
from support.registry import RealRegistry, docker_registry
from support.slurmsite import built_plugin
from support.users import TestUser, ordinary_user
from uenvd.oci.attach import REFRAME_TYPE, VERDICT, attachments
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import open_remote
from uenvd.publish.reframe.report import judge

pytestmark = pytest.mark.usefixtures("node")

REPOSITORY = "build/demo/zen3/app/1"
PUBLISH = str(Path(sys.executable).parent / "uenvd-publish")

ENVIRONMENTS = """\
default: {features: [speaks], views: [default]}
host: {features: [plain], uenv: false}
"""
TESTS = (
    HEAD
    + """
@rfm.simple_test
class TwoNodes(rfm.RunOnlyRegressionTest):
    valid_systems = ['+remote']
    valid_prog_environs = ['+speaks']
    executable = "sh -c 'say; echo on $SLURMD_NODENAME with $WORD'"
    prerun_cmds = ['echo batch step has $WORD']
    num_tasks = 2
    num_tasks_per_node = 1
    time_limit = '1m'

    @sanity_function
    def said(self):
        return sn.all([
            sn.assert_eq(sn.count(sn.extractall('^hello$', self.stdout)), 2),
            sn.assert_found('^batch step has hello$', self.stdout),
            sn.assert_eq(sn.count_uniq(sn.extractall(r'^on (\\S+) with hello$', self.stdout, 1)), 2),
        ])

@rfm.simple_test
class BuiltInTheJob(rfm.RegressionTest):
    '''Compiling needs the image, too: it is done in a job.'''
    valid_systems = ['*']
    valid_prog_environs = ['+speaks']
    build_system = 'CustomBuild'
    sourcesdir = None
    executable = 'cat built'
    time_limit = '1m'

    @run_before('compile')
    def how(self):
        self.build_system.commands = ['say > built']

    @sanity_function
    def said(self):
        return sn.assert_found('^hello$', self.stdout)

@rfm.simple_test
class WithoutUenv(rfm.RunOnlyRegressionTest):
    valid_systems = ['*']
    valid_prog_environs = ['+plain']
    executable = 'ls -A /user-environment | wc -l'
    time_limit = '1m'

    @sanity_function
    def nothing(self):
        return sn.assert_found('^0$', self.stdout)
"""
)


@dataclass
class Centre:
    cluster: Cluster
    user: TestUser
    registry: RealRegistry

    def test(self, label: str, *words: str) -> Result:
        environ = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            "UENVD_REGISTRY": self.registry.url,
            "UENVD_SOCKET": str(self.cluster.control_dir / "control"),
        }
        command = [PUBLISH, "test", label, "--slurm", "--workdir", str(self.cluster.scratch), *words]
        return self.cluster.run(command, user=self.user, env=environ, timeout_s=120)


@pytest.fixture(scope="module")
def centre(node: None) -> Iterator[Centre]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    plugin = built_plugin()
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(running_cluster(nodes=2, namespaces=True, shared=True))
        user = stack.enter_context(ordinary_user(cluster.dir))
        copied = cluster.dir / "uenvd_spank.so"
        copied.write_bytes(plugin.read_bytes())
        copied.chmod(0o755)
        cluster.set_plugstack(f"required {copied} socket={cluster.control_dir / 'control'}")
        registry = stack.enter_context(docker_registry(cluster.dir / "registry"))
        extra = "namespaces: [deploy, build]\nresolve: {ttl: 0s}\nmounts: {linger: 100ms}\n"
        for where, directory in (
            ("login", cluster.control_dir),
            *((name, cluster.node_control_dir(name)) for name in cluster.nodes),
        ):
            workdir = cluster.dir / f"uenvd-{where}"
            stack.enter_context(
                running_daemon(workdir, registry.url, extra=extra, control=directory / "control")
            )
        yield Centre(cluster, user, registry)


def test_jobs_on_two_nodes_have_the_image_under_test(centre: Centre) -> None:
    measures = MEASURES.replace("{rate}", "100")
    image = image_with_tests(
        centre.cluster.dir / "app.squashfs", environments=ENVIRONMENTS, jobs=TESTS, measures=measures
    )
    digest = Publisher(centre.registry.url, namespace="build").push(image, "app/1", "7")
    done = centre.test("app/1:7@demo%zen3", "--json", "--partition", "two-nodes")
    assert done.returncode == 0, done.stderr + centre.cluster.logs()
    result = json.loads(done.stdout)
    assert result["digest"] == digest
    assert sorted(case["name"] for case in result["cases"]) == [
        "BuiltInTheJob",
        "Measures",  # with the image and on the bare node
        "Measures",
        "TwoNodes",
        "UenvSmoke %view=default",
        "WithoutUenv",
    ]
    remote = open_remote(parse_registry(centre.registry.url))
    (manifest,) = attachments(remote, REPOSITORY, digest, REFRAME_TYPE)
    assert manifest.annotations[VERDICT] == "pass"
    report = remote.small_blob(REPOSITORY, manifest.layers[0], 1 << 24)
    assert {case.partition for case in judge(report).cases} == {"demo:two-nodes"}


def test_where_slurm_has_no_plugin_the_image_fails(centre: Centre) -> None:
    image = image_with_tests(
        centre.cluster.dir / "other.squashfs",
        "other",
        environments="default: {features: [speaks]}\n",
        jobs=TESTS,
    )
    Publisher(centre.registry.url, namespace="build").push(image, "other/1", "7")
    centre.cluster.set_plugstack("")
    try:
        done = centre.test("other/1:7@demo%zen3")
    finally:
        plugin = centre.cluster.dir / "uenvd_spank.so"
        centre.cluster.set_plugstack(f"required {plugin} socket={centre.cluster.control_dir / 'control'}")
    assert done.returncode == 105, done.stderr
    assert "unrecognized option" in done.stderr


def test_jobs_that_hang_are_cancelled(centre: Centre) -> None:
    flag = centre.cluster.scratch / "hangs"
    tests = HANGS.replace("{flag}", str(flag))
    image = image_with_tests(centre.cluster.dir / "slow.squashfs", "slow", hangs=tests)
    digest = Publisher(centre.registry.url, namespace="build").push(image, "slow/1", "7")
    done = centre.test("slow/1:7@demo%zen3", "--timeout", "6s")
    assert done.returncode == 105, done.stderr
    assert "did not end within 6 s" in done.stderr
    assert flag.exists()
    centre.cluster.wait_idle()
    remote = open_remote(parse_registry(centre.registry.url))
    (manifest,) = attachments(remote, "build/demo/zen3/slow/1", digest, REFRAME_TYPE)
    assert manifest.annotations[VERDICT] == "fail"
