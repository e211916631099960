"""A small computing centre with nothing but real parts: registry, one uenvd on the login side and one on each node, Slurm, plugin, FUSE."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.cluster import Cluster, Result, missing, running_cluster
from support.daemon import Daemon, running_daemon
from support.publishing import Publisher, simple_image
from support.registry import RealRegistry, docker_registry
from support.slurmsite import built_plugin
from support.users import TestUser, ordinary_user

MOUNT_POINT = "/user-environment"
TOOLS_MOUNT_POINT = "/user-tools"
HASTY = "resolve: {ttl: 0s}\nmounts: {linger: 100ms}\n"
"""Of a uenvd that remembers nothing and lets go at once, so that tests need not wait."""


@dataclass
class Centre:
    """A small computing centre."""

    cluster: Cluster
    user: TestUser
    registry: RealRegistry
    plugin: Path
    login: Daemon
    nodes: dict[str, Daemon]

    def srun(self, *args: str, **options: object) -> Result:
        return self.cluster.srun(*args, user=self.user, **options)

    def batch(self, script: str, *args: str) -> tuple[str, str]:
        """Run a batch script to its end; return its state and output."""
        return self.finish(self.cluster.submit(f"#!/bin/bash\n{script}\n", *args, user=self.user))

    def finish(self, job: int) -> tuple[str, str]:
        state = self.cluster.wait_job(job).state
        path = self.cluster.scratch / f"slurm-{job}.out"
        return state, path.read_text() if path.exists() else ""

    def use_socket(self, name: str, *arguments: str) -> None:
        """Write plugstack.conf: which uenvd (`start_daemons`) is asked, and further arguments of the plugin."""
        socket = self.cluster.control_dir / name
        self.cluster.set_plugstack(f"required {self.plugin} socket={socket} {' '.join(arguments)}")


def start_daemons(
    stack: contextlib.ExitStack, cluster: Cluster, registry: str, name: str, *, settings: str = HASTY
) -> tuple[Daemon, dict[str, Daemon]]:
    """Start a uenvd for the login side and one for each node, which listen on sockets of this name."""

    def start(where: str, directory: Path) -> Daemon:
        workdir = cluster.dir / f"uenvd-{name}-{where}"
        return stack.enter_context(
            running_daemon(workdir, registry, extra=settings, control=directory / name)
        )

    return start("login", cluster.control_dir), {
        node: start(node, cluster.node_control_dir(node)) for node in cluster.nodes
    }


@contextlib.contextmanager
def running_centre(nodes: int, *, settings: str = HASTY) -> Iterator[Centre]:
    """Run one, with the image app/1.0 (mount point /user-environment; program ``say``, views default and plain)."""
    plugin = built_plugin()
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(running_cluster(nodes=nodes, namespaces=True, shared=True))
        user = stack.enter_context(ordinary_user(cluster.dir))
        copied = cluster.dir / "uenvd_spank.so"
        copied.write_bytes(plugin.read_bytes())
        copied.chmod(0o755)
        registry = stack.enter_context(docker_registry(cluster.dir / "registry"))
        publisher = Publisher(registry.url)
        for word in ("one", "two"):
            simple_image(cluster.dir / f"{word}.squashfs", "app", word)
        publisher.push(cluster.dir / "one.squashfs", "app/1.0", "v1", "latest")
        login, started = start_daemons(stack, cluster, registry.url, "control", settings=settings)
        yield Centre(cluster, user, registry, copied, login, started)


@contextlib.contextmanager
def tidied(centre: Centre) -> Iterator[Centre]:
    """The centre for one test; afterwards no job is left, no node drained, no image seen outside of jobs."""
    centre.use_socket("control")
    try:
        yield centre
        states = centre.cluster.node_states()
    finally:
        centre.cluster.cancel_all()
    assert not [node for node, state in states.items() if "drain" in state or "down" in state], states
    for table in (
        Path("/proc/self/mountinfo").read_text(),
        *map(centre.cluster.node_mounts, centre.cluster.nodes),
    ):
        assert shown(table, str(centre.cluster.dir)) == []


def shown(table: str, directory: str) -> list[str]:
    """Return the lines of a table of mounts that show an image where jobs have theirs, or below a directory; other tests have theirs elsewhere."""
    places = (MOUNT_POINT, TOOLS_MOUNT_POINT)
    return [
        line
        for line in table.splitlines()
        if " uenvd:" in line and (line.split()[4] in places or line.split()[4].startswith(f"{directory}/"))
    ]


@pytest.fixture(scope="session")
def centre_for_all(node: None) -> Iterator[Centre]:
    """Two nodes, for all modules."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    with running_centre(2) as centre:
        yield centre


@pytest.fixture
def centre(centre_for_all: Centre) -> Iterator[Centre]:
    """The centre in its standard state."""
    with tidied(centre_for_all) as tidy:
        yield tidy
