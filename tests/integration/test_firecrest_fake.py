"""The FirecREST of the tests refuses what the real one refuses, and its jobs run, wait, fail and end as Slurm's do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import firecrest
import pytest
import requests

from support.firecrestdouble import CLIENT, SECRET, Double, firecrest_double
from support.fusetools import until

DEADLINE_S = 20.0


@pytest.fixture
def double() -> Iterator[Double]:
    with firecrest_double() as double:
        yield double


@pytest.fixture
def token(double: Double) -> str:
    form = {"grant_type": "client_credentials", "client_id": CLIENT, "client_secret": SECRET}
    reply = requests.post(f"{double.url}/token", data=form, timeout=DEADLINE_S)
    assert reply.status_code == 200
    return str(reply.json()["access_token"])


@pytest.fixture
def client(double: Double) -> Iterator[Any]:
    """The library that users of the real one have."""
    api = firecrest.v2.Firecrest(
        double.url, firecrest.ClientCredentialsAuth(CLIENT, SECRET, f"{double.url}/token")
    )
    api.disable_client_logging = True
    yield api
    api.close_session()


def script(directory: Path, text: str, *options: str) -> str:
    lines = ["#!/bin/bash -l"]
    lines += [f"#SBATCH {option}" for option in ("--job-name=j", f"--output={directory}/out", *options)]
    return "\n".join([*lines, f"#SBATCH --error={directory}/err", text, ""])


def submit(client: Any, directory: Path, text: str, *options: str) -> int:
    return int(client.submit("alpha", str(directory), script_str=script(directory, text, *options))["jobId"])


def job(client: Any, number: int) -> dict[str, Any]:
    (found,) = client.job_info("alpha", str(number))
    return dict(found)


def ended(client: Any, number: int) -> dict[str, Any]:
    """Wait for the end of a job; return its status."""

    def look() -> dict[str, Any] | None:
        status = job(client, number)["status"]
        return None if status["state"] in ("PENDING", "RUNNING") else status

    return dict(until(look, "the job to end", DEADLINE_S))


def test_only_its_client_gets_tokens(double: Double) -> None:
    good = {"grant_type": "client_credentials", "client_id": CLIENT, "client_secret": SECRET}
    for change in ({"client_secret": "other"}, {"client_id": "other"}, {"grant_type": "password"}):
        reply = requests.post(f"{double.url}/token", data={**good, **change}, timeout=DEADLINE_S)
        assert reply.status_code == 401
    assert double.tokens == {}


def test_nothing_without_a_token_that_is_good(double: Double, token: str) -> None:
    url = f"{double.url}/compute/alpha/jobs"
    for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": f"Basic {token}"}):
        assert requests.get(url, headers=headers, timeout=DEADLINE_S).status_code == 401
    headers = {"Authorization": f"Bearer {token}"}
    assert requests.get(url, headers=headers, timeout=DEADLINE_S).json() == {"jobs": None}
    double.tokens[token] = 0.0
    assert requests.get(url, headers=headers, timeout=DEADLINE_S).status_code == 401


def test_a_client_renews_its_token(double: Double, client: Any) -> None:
    double.token_s = 1.0
    assert client.job_info("alpha") == []
    for known in double.tokens:
        double.tokens[known] = 0.0
    double.token_s = 300.0
    client._authorization._access_token = None  # as when its time is over
    assert client.job_info("alpha") == []
    assert len(double.tokens) == 2


def test_a_busy_service_says_so(double: Double, token: str) -> None:
    double.busy = 1
    headers = {"Authorization": f"Bearer {token}"}
    reply = requests.get(f"{double.url}/compute/alpha/jobs", headers=headers, timeout=DEADLINE_S)
    assert (reply.status_code, reply.headers["Retry-After"]) == (429, "0")
    assert requests.get(f"{double.url}/compute/alpha/jobs", headers=headers, timeout=DEADLINE_S).ok


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/compute/alpha/jobs/7", None, 404),
        ("DELETE", "/compute/alpha/jobs/7", None, 404),
        ("GET", "/status/systems", None, 404),
        ("PUT", "/compute/alpha/jobs", None, 501),
        ("POST", "/compute/alpha/jobs", {"job": {"working_directory": "/no/such", "script": "x"}}, 400),
        ("GET", "/filesystem/alpha/ops/tail?path=/no/such&bytes=10", None, 404),
    ],
)
def test_what_is_not_there(
    double: Double, token: str, method: str, path: str, body: Any, status: int
) -> None:
    reply = requests.request(
        method,
        double.url + path,
        data=json.dumps(body) if body else None,
        headers={"Authorization": f"Bearer {token}"},
        timeout=DEADLINE_S,
    )
    assert reply.status_code == status
    assert not double.jobs


def test_a_job_is_its_script(client: Any, tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    client.mkdir("alpha", str(place), create_parents=True)
    client.mkdir("alpha", str(place), create_parents=True)
    number = submit(client, place, "pwd; echo said >&2; exit 3")
    assert ended(client, number) == {
        "state": "FAILED",
        "stateReason": "None",
        "exitCode": 3,
        "interruptSignal": 0,
    }
    assert (place / "out").read_text() == f"{place}\n"
    assert client.tail("alpha", str(place / "err"), num_bytes=3)["content"] == "id\n"
    assert job(client, number)["workingDirectory"] == str(place)
    assert [one["jobId"] for one in client.job_info("alpha")] == [number]
    assert client.job_info("beta") == [], "another cluster has other jobs"


def test_a_job_waits_for_the_one_before(client: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    first = submit(client, tmp_path, f"until [ -e {gate} ]; do sleep 0.02; done")
    second = submit(client, tmp_path, "true", f"--dependency=afterok:{first}")
    assert [one["status"]["state"] for one in client.job_info("alpha")] == ["RUNNING", "PENDING"]
    gate.touch()
    assert ended(client, second)["state"] == "COMPLETED"
    failing = submit(client, tmp_path, "exit 1")
    after = submit(client, tmp_path, "true", f"--dependency=afterok:{failing}")
    last = submit(client, tmp_path, "true", f"--dependency=afterok:{after}")
    assert [ended(client, number)["state"] for number in (failing, after, last)] == [
        "FAILED",
        "CANCELLED",
        "CANCELLED",
    ]


def test_cancelling_ends_the_job(client: Any, double: Double, tmp_path: Path) -> None:
    number = submit(client, tmp_path, "exec sleep 1000")
    process = double.jobs[number].process
    assert process is not None
    client.cancel_job("alpha", str(number))
    assert process.poll() is not None
    assert ended(client, number)["state"] == "CANCELLED"


def test_its_jobs_end_with_it(tmp_path: Path) -> None:
    with firecrest_double() as double:
        running = double.submit("alpha", str(tmp_path), script(tmp_path, "exec sleep 1000"))
        waiting = double.submit(
            "alpha", str(tmp_path), script(tmp_path, "true", f"--dependency=afterok:{running.id}")
        )
    assert running.process is not None and running.process.poll() is not None
    assert (waiting.state, waiting.process) == ("CANCELLED", None)


def test_faults_on_demand(double: Double, client: Any, tmp_path: Path) -> None:
    double.faults = [("GET /compute/alpha/jobs/", 503)]
    number = submit(client, tmp_path, "exit 0")
    assert len(client.job_info("alpha")) == 1, "another request"
    with pytest.raises(firecrest.FirecrestException, match="503"):
        client.job_info("alpha", str(number))
    assert job(client, number)["jobId"] == number
    assert ended(client, number)["state"] == "COMPLETED"
    double.forgotten.add(number)
    assert client.job_info("alpha") == [] and job(client, number)["jobId"] == number
    double.forgotten.clear()
    double.late = 1
    assert client.job_info("alpha") == []
    assert len(client.job_info("alpha")) == 1
