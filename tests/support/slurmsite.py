"""Fixtures of the Slurm tests: one cluster for the whole session, whose nodes differ like hosts and share their mounts like systemd's.

Each of login side, node1 and node2 has a stand-in for uenvd of its own.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.cluster import Cluster, Result, missing, running_cluster
from support.standin import StandIn, State
from support.users import TestUser, ordinary_user

CHECKOUT = Path(__file__).resolve().parents[2]
NOISE = re.compile(r"^srun: (error: spank: required plugin|error: Plugin stack post-option|job \d+ queued)")

DIGEST_1 = "sha256:" + "1" * 64
DIGEST_2 = "sha256:" + "2" * 64
DIGEST_TOOLS = "sha256:" + "3" * 64


@dataclass
class Site:
    """The cluster, two users and the daemons. ``mount`` is where the images app/1 and app/2 go, ``tools_mount`` where tools/1 goes."""

    cluster: Cluster
    user: TestUser
    other: TestUser
    plugin: Path
    login: StandIn
    nodes: Mapping[str, StandIn]
    mount: Path
    tools_mount: Path

    @property
    def daemons(self) -> list[StandIn]:
        """All three."""
        return [self.login, *self.nodes.values()]

    def update(self, **changes: Any) -> None:
        """Change the behaviour of all daemons."""
        for daemon in self.daemons:
            daemon.update(**copy.deepcopy(changes))

    def requests(self, op: str) -> list[dict[str, Any]]:
        """Return the requests of one kind to all daemons."""
        return [request for daemon in self.daemons for request in daemon.requests(op)]

    def srun(self, *args: str, **options: Any) -> Result:
        """Run srun as the user."""
        return self.cluster.srun(*args, user=options.pop("user", self.user), **options)

    def batch(self, script: str, *args: str, **options: Any) -> tuple[str, str]:
        """Run a batch script to its end; return the job's state and its output."""
        job = self.cluster.submit(f"#!/bin/bash\n{script}\n", *args, user=self.user, **options)
        state = self.cluster.wait_job(job).state
        path = self.cluster.scratch / f"slurm-{job}.out"
        return state, path.read_text() if path.exists() else ""

    def leaks(self) -> list[str]:
        """Return the lines of the mount tables of this machine and of the nodes' slurmd in which an image shows."""
        tables = [
            Path("/proc/self/mountinfo").read_text(),
            *map(self.cluster.node_mounts, self.cluster.nodes),
        ]
        places = (str(self.mount), str(self.tools_mount))
        return [line for table in tables for line in table.splitlines() if line.split()[4] in places]

    def configure(self, **arguments: object) -> None:
        """Write plugstack.conf with these arguments of the plugin besides its socket."""
        words = [
            f"socket={self.cluster.control_socket}",
            *(f"{name}={value}" for name, value in arguments.items()),
        ]
        self.cluster.set_plugstack(f"required {self.plugin} {' '.join(words)}")


def told(result: Result) -> list[str]:
    """Return the lines on stderr without those that Slurm adds to every refusal."""
    return [line for line in result.stderr.splitlines() if not NOISE.match(line)]


def uenv_lines(stderr: str) -> str:
    """Return the plugin's lines; those of srun itself may come before, between or after them."""
    return "".join(line for line in stderr.splitlines(keepends=True) if line.startswith("uenv: "))


def _standard_state(cluster: Cluster, mount: Path, tools_mount: Path) -> State:
    def image(name: str, place: Path, **views: list[list[Any]]) -> dict[str, Any]:
        directory = cluster.dir / "images" / name.replace("/", "-")
        return {"dir": str(directory), "mount": str(place), "views": views}

    default: list[list[Any]] = []
    default.append(["set", "APP_HOME", str(mount)])
    default.append(["prepend", "PATH", [str(mount / "bin")]])
    default.append(["append", "APP_LIST", ["a", "b"]])
    develop = [*default, ["set", "APP_DEVELOP", "1"], ["unset", "TOOLCONFLICT"]]
    return State(
        tags={"app/1": DIGEST_1, "app/2": DIGEST_2, "tools/1": DIGEST_TOOLS},
        images={
            DIGEST_1: image("app/1", mount, default=default, develop=develop),
            DIGEST_2: image("app/2", mount, default=default),
            DIGEST_TOOLS: image("tools/1", tools_mount, tools=[["set", "TOOLS", "1"]]),
        },
    )


def _make_images(cluster: Cluster) -> None:
    for name in ("app-1", "app-2", "tools-1"):
        directory = cluster.dir / "images" / name
        (directory / "bin").mkdir(parents=True)
        (directory / "hello").write_text(f"hello from {name}\n")
        program = directory / "bin" / "which-app"
        program.write_text(f"#!/bin/sh\necho {name}\n")
        program.chmod(0o755)


def built_plugin() -> Path:
    """Build the plugin if its sources changed, return it. Fails the test where it cannot be built."""
    done = subprocess.run(
        ["make", "-C", str(CHECKOUT / "slurm-plugin")], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.fail(f"the plugin cannot be built:\n{done.stdout}{done.stderr}")
    return CHECKOUT / "slurm-plugin" / "uenvd_spank.so"


@pytest.fixture(scope="session")
def slurm_site() -> Iterator[Site]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    plugin = built_plugin()
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(running_cluster(nodes=2, namespaces=True, shared=True))
        user = stack.enter_context(ordinary_user(cluster.dir, extra_group=True))
        other = stack.enter_context(ordinary_user(cluster.dir))
        # A copy that every user can read, wherever the checkout is.
        copied = cluster.dir / "uenvd_spank.so"
        copied.write_bytes(plugin.read_bytes())
        copied.chmod(0o755)
        mount, tools_mount = cluster.dir / "user-environment", cluster.dir / "user-tools"
        mount.mkdir()
        tools_mount.mkdir()
        _make_images(cluster)

        def daemon(name: str, directory: Path) -> StandIn:
            standin = StandIn(cluster.dir / f"standin-{name}", directory / "control")
            stack.callback(standin.kill)
            return standin

        login = daemon("login", cluster.control_dir)
        nodes = {node: daemon(node, cluster.node_control_dir(node)) for node in cluster.nodes}
        yield Site(cluster, user, other, copied, login, nodes, mount, tools_mount)


@pytest.fixture
def site(slurm_site: Site) -> Iterator[Site]:
    """The site in its standard state: all daemons run, all nodes are idle, no request counted.

    Afterwards no job is left, no node was drained by what the test did, and no image is visible outside of jobs.
    """
    state = _standard_state(slurm_site.cluster, slurm_site.mount, slurm_site.tools_mount)
    slurm_site.configure()
    for daemon in slurm_site.daemons:
        daemon.state = copy.deepcopy(state)
        daemon.start()
        daemon.forget_requests()
    try:
        yield slurm_site
        states = slurm_site.cluster.node_states()
        leaks = slurm_site.leaks()
    finally:
        slurm_site.cluster.cancel_all()
    assert not [node for node, name in states.items() if "drain" in name or "down" in name], states
    assert leaks == []


def mount_namespace(pid: int | str = "self") -> str:
    """Identify the mount namespace of a process."""
    return os.readlink(f"/proc/{pid}/ns/mnt")
