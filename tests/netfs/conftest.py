"""The file server and its clients. These tests run in the guest of ``scripts/netfs.py`` (``make netfs``), and say so elsewhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import netfs
from support.nfscache import prepare, quick_claims

OPTIONS = {
    "nfs3": "vers=3,nolock,hard,timeo=50",
    "nfs42": "vers=4.2,hard,timeo=50",
    # Nothing is asked again for two minutes unless something makes the client ask.
    "nfs3-long": "vers=3,nolock,hard,timeo=50,acregmin=120,acregmax=120,acdirmin=120,acdirmax=120",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("UENVD_NETFS"):
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs the guest that `make netfs` starts"))


@pytest.fixture(scope="session")
def server() -> Iterator[netfs.Server]:
    running = netfs.Server()
    yield running
    running.close()


@pytest.fixture(scope="session", params=list(OPTIONS))
def nodes(server: netfs.Server, request: pytest.FixtureRequest) -> Iterator[list[netfs.Node]]:
    with netfs.nodes(3, OPTIONS[request.param]) as made:
        yield made


@pytest.fixture
def root(server: netfs.Server, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory for this test's cache as the nodes see it; it belongs to `netfs.USER`."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[:60]
    place = netfs.EXPORT / name
    place.mkdir()
    place.chmod(0o700)
    os.chown(place, netfs.USER, netfs.USER)
    yield netfs.SHARED / name
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def three(nodes: list[netfs.Node], root: Path) -> Iterator[tuple[netfs.Node, netfs.Node, netfs.Node]]:
    """Three nodes with one prepared directory, and the usual times."""
    first, second, third = nodes
    for node in nodes:
        node.do(quick_claims, 30.0, 15.0, 2.0)
        node.do(prepare, root, node.name)
    yield first, second, third
