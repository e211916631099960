"""The fake registry is what it says it is: checked by skopeo and by plain HTTP, not by our client."""

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.registry import PASSWORD, USER, FakeRegistry, docker_registry, oras_manifest


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry(page=2) as registry:
        yield registry


def get(registry: FakeRegistry, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(registry.host, timeout=5)
    try:
        connection.request(
            "GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def test_skopeo_copies_through_it_and_a_real_one(tmp_path: Path) -> None:
    blob = b"hsqs" + bytes(100_000)
    with FakeRegistry() as fake, docker_registry(tmp_path / "real") as real:
        digest = fake.put_blob(blob)
        fake.put_blob(b"{}")
        raw = oras_manifest(digest, len(blob))
        fake.put_manifest("team/app", "v1", raw, "application/vnd.oci.image.manifest.v1+json")
        there = real.url.removeprefix("http://")
        copy = ["skopeo", "copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false"]
        subprocess.run([*copy, f"docker://{fake.host}/team/app:v1", f"docker://{there}/a/b:v1"], check=True)
        subprocess.run([*copy, f"docker://{there}/a/b:v1", f"docker://{fake.host}/back:v2"], check=True)
        assert fake.manifests["back"][fake.tags["back"]["v2"]][1] == raw


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_skopeo_logs_in_to_it(tmp_path: Path, auth: str) -> None:
    with FakeRegistry(auth=auth) as fake:
        blob = fake.put_blob(b"x")
        fake.put_blob(b"{}")
        fake.put_manifest(
            "private/app", "v1", oras_manifest(blob, 1), "application/vnd.oci.image.manifest.v1+json"
        )
        inspect = ["skopeo", "inspect", "--raw", "--tls-verify=false"]
        url = f"docker://{fake.host}/private/app:v1"
        assert subprocess.run([*inspect, url], capture_output=True, check=False).returncode != 0
        done = subprocess.run(
            [*inspect, "--creds", f"{USER}:{PASSWORD}", url], capture_output=True, check=True
        )
        assert json.loads(done.stdout)["artifactType"] == "application/x-squashfs"


def test_ranges(fake: FakeRegistry) -> None:
    path = f"/v2/a/blobs/{fake.put_blob(b'0123456789')}"
    response, body = get(fake, path, Range="bytes=2-5")
    assert (response.status, body, response.headers["Content-Range"]) == (206, b"2345", "bytes 2-5/10")
    assert get(fake, path, Range="bytes=20-25")[0].status == 416
    fake.spoil("/blobs/", ignore_range=True)
    response, body = get(fake, path, Range="bytes=2-5")
    assert (response.status, body) == (200, b"0123456789")


def test_lists_have_pages(fake: FakeRegistry) -> None:
    for tag in "abc":
        fake.put_manifest("r", tag, tag.encode(), "x")
    response, body = get(fake, "/v2/r/tags/list")
    assert json.loads(body)["tags"] == ["a", "b"]
    link = response.headers["Link"]
    response, body = get(fake, link[1 : link.index(">")])
    assert json.loads(body)["tags"] == ["c"] and "Link" not in response.headers


def test_rules_count_down_and_are_logged(fake: FakeRegistry) -> None:
    fake.spoil("/v2/$", status=503, headers={"Retry-After": "1"}, times=1)
    assert [get(fake, "/v2/")[0].status for _ in range(2)] == [503, 200]
    assert fake.count("GET", "^/v2/$") == 2


def test_bodies_are_spoilt(fake: FakeRegistry) -> None:
    data = bytes(1000)
    path = f"/v2/a/blobs/{fake.put_blob(data)}"
    fake.spoil("/blobs/", corrupt=True, times=1)
    body = get(fake, path)[1]
    assert len(body) == 1000 and body != data
    fake.spoil("/blobs/", truncate_bytes=10, times=1)
    with pytest.raises(http.client.IncompleteRead):
        get(fake, path)
    fake.spoil("/blobs/", reset=True, times=1)
    with pytest.raises(ConnectionError):
        get(fake, path)
    fake.spoil("/blobs/", bytes_per_s=5000, times=1)
    begin = time.monotonic()
    assert get(fake, path)[1] == data
    assert 0.1 < time.monotonic() - begin < 2


@pytest.mark.parametrize("how", [{"silent": True}, {"stall_bytes": 10}, {"drip_headers_s": 0.3}])
def test_silence_lasts_until_the_end(how: dict[str, bool | int | float]) -> None:
    with FakeRegistry() as fake:
        path = f"/v2/a/blobs/{fake.put_blob(bytes(1000))}"
        fake.spoil("/blobs/", **how)
        connection = http.client.HTTPConnection(fake.host, timeout=0.2)
        with pytest.raises(TimeoutError):
            connection.request("GET", path)
            connection.getresponse().read()
        connection.close()
    with (
        pytest.raises(ConnectionError),
        socket.create_connection((fake.host.partition(":")[0], int(fake.host.partition(":")[2]))),
    ):
        pass
