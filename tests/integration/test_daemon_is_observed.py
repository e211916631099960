"""What an administrator sees of a running uenvd: metrics that Prometheus reads, a log that knows the job, a journal that outlives the daemon."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.daemon import Daemon, running_daemon
from support.fusetools import until
from support.publishing import Publisher, simple_image
from support.sessions import UENVCTL

pytestmark = pytest.mark.usefixtures("node")

JOB = 4711
BATCH = 0xFFFFFFFB


def values(text: str, name: str) -> dict[str, float]:
    """Return the samples of a metric by the value of its last label."""
    return {
        list(sample.labels.values())[-1] if sample.labels else "": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    if os.geteuid() != 0:
        pytest.skip("needs root: uenvd makes mounts for other users")
    with tempfile.TemporaryDirectory(prefix="uenvd-test-", dir="/var/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        registry = f"oci-layout:{directory / 'layout'}"
        publisher = Publisher(registry)
        publisher.push(simple_image(directory / "app.squashfs", "app", "hello"), "app/1.0", "v1")
        extra = f"log: {{format: json}}\nmetrics: {{port: {free_port()}}}\nmounts: {{linger: 100ms}}\n"
        with running_daemon(directory / "uenvd", registry, extra=extra) as running:
            yield running


def mount(daemon: Daemon, step: int) -> None:
    """Mount as a job step does, wait until it is usable, let go."""
    with daemon.client() as client:
        answer = client.ask("mount", uenv="app/1.0", view="default", job={"id": JOB, "step": step})
        assert answer["ok"], answer
        if answer["state"] == "waiting":
            assert client.ask("wait", lease=answer["lease"])["ok"]
        assert values(daemon.ask("metrics")["text"], "uenvd_leases") == {"": 1}


def test_what_happened_is_counted_logged_and_remembered(daemon: Daemon) -> None:
    mount(daemon, BATCH)
    mount(daemon, 0)
    assert daemon.ask("resolve", uenv="nosuch/1")["error"]["code"] == "unknown-label"

    text = daemon.ask("metrics")["text"]
    assert values(text, "uenvd_requests_total")["unknown-label"] == 1
    assert values(text, "uenvd_mounts_total")["pulled"] == 1
    assert sum(values(text, "uenvd_mounts_total").values()) == 2
    assert values(text, "uenvd_pulls_total") == {"ok": 1}
    assert values(text, "uenvd_pulled_bytes_total")[""] >= 4096
    assert values(text, "uenvd_cache_bytes")[""] >= 4096
    assert values(text, "process_open_fds")[""] > 5
    port = daemon.extra.partition("port: ")[2].partition("}")[0]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        assert values(reply.read().decode(), "uenvd_mounts_total") == values(text, "uenvd_mounts_total")

    told = [UENVCTL, "--socket", str(daemon.socket_path), "status"]
    shown = subprocess.run(told, capture_output=True, text=True, check=True).stdout
    assert "activity:  2 mounts (50% here already), 1 pull (" in shown
    assert "1 failure since" in shown
    assert (
        "uenvd_mounts_total{"
        in subprocess.run([*told, "--metrics"], capture_output=True, text=True, check=True).stdout
    )

    entries = [json.loads(line) for line in daemon.log.splitlines() if line.startswith("{")]
    pull = [entry for entry in entries if "pull of" in entry["message"]]
    assert len(pull) >= 2
    for entry in pull:
        assert (entry["op"], entry["job"], entry["step"], entry["uid"]) == ("mount", JOB, "batch", 0)
    refused = [entry for entry in entries if entry["message"].startswith("unknown-label")]
    assert [entry["op"] for entry in refused] == ["resolve"]

    steps = daemon.ask("job", job=JOB)["steps"]
    assert [step["step"] for step in steps] == [BATCH, 0]


def test_the_journal_survives_a_killed_daemon(daemon: Daemon) -> None:
    mount(daemon, 1)
    until(lambda: daemon.ask("job", job=JOB)["steps"], "it is written")
    before = daemon.ask("job", job=JOB)["steps"]
    daemon.kill()
    daemon.start()
    assert daemon.ask("job", job=JOB)["steps"] == before
    assert values(daemon.ask("metrics")["text"], "uenvd_mounts_total") == {}


@pytest.mark.parametrize("job", [0, -1, 2**32, "1", None, True, {"id": 1, "step": 0}])
def test_an_odd_job_number(daemon: Daemon, job: object) -> None:
    assert daemon.ask("job", job=job)["error"]["code"] == "protocol"
