"""The image of a submitted job is fetched into the shared cache, if the site wants that, and whatever becomes of it nobody waits for it."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.daemon import running_daemon
from support.registry import FakeRegistry, oras_manifest
from uenvd.oci.manifest import MANIFEST_TYPE

REPOSITORY = "deploy/demo/zen3/app/1.0"
UENV = "app/1.0:v1%zen3"

pytestmark = pytest.mark.usefixtures("node")


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def publish(fake: FakeRegistry) -> str:
    data = b"hsqs" + os.urandom(500_000)
    layer = fake.put_blob(data)
    fake.put_blob(b"{}")
    fake.put_manifest(REPOSITORY, "v1", oras_manifest(layer, len(data)), MANIFEST_TYPE)
    return layer


def test_a_submission_begins_the_pull(public_dir: Path) -> None:
    shared = public_dir / "shared"
    extra = f"cache: {{local: none, shared: {shared}}}\npull: {{prefetch_on_submit: true}}\n"
    with FakeRegistry() as fake:
        layer = publish(fake)
        fake.spoil("/blobs/", bytes_per_s=2_000_000)
        with running_daemon(public_dir / "node", fake.url, extra=extra) as daemon:
            answer = daemon.ask("resolve", uenv=UENV)
            assert answer["ok"], answer
            assert fake.count("GET", f"/blobs/{layer}") == 0, "a question is no submission"
            for _ in range(3):
                assert daemon.ask("resolve", uenv=UENV, submit=True)["ok"]
            wait_for(lambda: (shared / "blobs/sha256" / layer.removeprefix("sha256:")).exists())
            wait_for(lambda: len(daemon.ask("images")["records"]) == 1)
            assert daemon.ask("resolve", uenv=UENV)["images"][0]["cached"]
            assert daemon.ask("resolve", uenv=UENV, submit=True)["images"][0]["cached"] is None
            assert fake.count("GET", f"/blobs/{layer}") == 1


def test_without_a_shared_cache_or_the_sites_wish_nothing_is_fetched(public_dir: Path) -> None:
    with FakeRegistry() as fake:
        layer = publish(fake)
        for number, extra in enumerate(
            ("pull: {prefetch_on_submit: true}\n", f"cache: {{local: none, shared: {public_dir}/shared}}\n")
        ):
            with running_daemon(public_dir / f"node{number}", fake.url, extra=extra) as daemon:
                assert daemon.ask("resolve", uenv=UENV, submit=True)["ok"]
                assert daemon.ask("status")["ok"]
        assert fake.count("GET", f"/blobs/{layer}") == 0


def test_progress_has_rate_and_time_left(public_dir: Path) -> None:
    with FakeRegistry() as fake:
        publish(fake)
        fake.spoil("/blobs/", bytes_per_s=150_000)
        with running_daemon(public_dir / "node", fake.url) as daemon, daemon.client() as client:
            assert client.ask("pull", uenv=UENV)["ok"]
            told = [event for event in client.events if "rate_bytes_per_s" in event]
            assert told, client.events
            assert 30_000 < told[0]["rate_bytes_per_s"] < 400_000
            assert 0 <= told[0]["eta_s"] < 20 and "left" in told[0]["message"]
