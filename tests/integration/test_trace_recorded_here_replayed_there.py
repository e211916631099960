"""What a program reads is recorded on one node, attached to the image, and fetched first on another, which nobody has asked for it yet."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import Daemon, running_daemon
from support.fusetools import until
from support.lazyimage import MB, MOUNT_POINT, LazyImage, mounted, push_lazy
from support.registry import FakeRegistry
from uenvd.oci.attach import attachments
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import open_remote
from uenvd.oci.trace import PREFETCH_TYPE, fetch_trace

pytestmark = pytest.mark.usefixtures("node")

REPOSITORY = "deploy/demo/zen3/app/1.0"
LABEL = "app/1.0:v1@demo%zen3"
FAST = "mounts: {linger: 100ms}\nuarch: zen3\n"
READ = ("f08", "f03")
"""In this order."""


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        yield registry


@pytest.fixture
def image(fake: FakeRegistry, public_dir: Path) -> LazyImage:
    return push_lazy(fake, public_dir, files=2)


def publish_trace(fake: FakeRegistry, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``uenvd-publish trace``."""
    command = [sys.executable, "-m", "uenvd.publish.main", "trace", LABEL, "--registry", fake.url, *words]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=60, check=False, cwd="/"
    )


def record(
    fake: FakeRegistry, daemon: Daemon, read: tuple[str, ...], *words: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run it for a program that reads these files."""
    files = [f"{MOUNT_POINT}/{name}" for name in read]
    return publish_trace(
        fake, "--socket", daemon.socket_path, *words, "--", "sh", "-c", f"cat {' '.join(files)} > /dev/null"
    )


def asked_for(fake: FakeRegistry, image: LazyImage, since: int) -> list[tuple[int, int]]:
    """Return the byte ranges of the image that were asked for, in order."""
    found = []
    for seen in fake.seen[since:]:
        if seen.method == "GET" and re.search(image.blob_path, seen.path):
            first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", seen.headers["Range"]).groups()  # type: ignore[union-attr]
            found.append((int(first), int(last) + 1))
    return found


def test_what_is_recorded_on_one_node_is_fetched_first_on_another(
    public_dir: Path, fake: FakeRegistry
) -> None:
    image = push_lazy(fake, public_dir)
    out = public_dir / "trace.json"
    with running_daemon(public_dir / "one", fake.url, extra=FAST) as daemon:
        done = record(fake, daemon, READ, "--out", out)
        assert done.returncode == 0, done.stderr
    ranges = [(first, end) for first, end in json.loads(out.read_text())["ranges"]]
    read_bytes = sum(end - first for first, end in ranges)
    assert 2 * MB <= read_bytes < 5 * MB, "two files, what is in their chunks, and the metadata"

    remote = open_remote(parse_registry(fake.url))
    (attached,) = attachments(remote, REPOSITORY, image.digest, PREFETCH_TYPE)
    assert attached.digest == done.stdout.strip()
    traced = fetch_trace(remote, REPOSITORY, image.digest, image.size_bytes, 10)
    whole = [one for one in traced if one[1] - one[0] > MB / 2]
    assert len(whole) == 2
    assert whole[0][0] > whole[1][0], "in the order in which they were read"

    before = len(fake.seen)
    with running_daemon(public_dir / "two", fake.url, extra=FAST) as daemon, daemon.client() as client:
        mounted(client)
        until(lambda: "a trace of" in daemon.log, "it is replayed")

        until(
            lambda: len(list((daemon.cache / "partial").iterdir())) == 0,
            "all of it comes, read by nobody",
            20,
        )
    got = asked_for(fake, image, before)
    last = max(next(n for n, (first, end) in enumerate(got) if first <= at < end) for at, _end in whole)
    assert sum(end - first for first, end in got[: last + 1]) < image.size_bytes / 2, (
        "what was read there is fetched here before everything else"
    )


def test_a_program_that_fails_or_an_image_that_is_here_attaches_nothing(
    public_dir: Path, fake: FakeRegistry, image: LazyImage
) -> None:
    with running_daemon(public_dir / "one", fake.url, extra=FAST) as daemon:
        failed = publish_trace(fake, "--socket", daemon.socket_path, "--", "false")
        assert failed.returncode != 0
        assert "status 1" in failed.stderr
        assert daemon.ask("pull", uenv="app/1.0:v1")["ok"]
        until(lambda: daemon.ask("status")["images"] == [], "it is let go")
        here = record(fake, daemon, ("f00",))
        assert here.returncode != 0
        assert "in the cache already" in here.stderr
        assert "Traceback" not in here.stderr
    assert not attachments(open_remote(parse_registry(fake.url)), REPOSITORY, image.digest, PREFETCH_TYPE)


def test_a_trace_from_a_file_and_none_at_all(public_dir: Path, fake: FakeRegistry, image: LazyImage) -> None:
    trace = public_dir / "given.json"
    trace.write_text('{"version": 1, "ranges": [[4096, 8192]]}')
    assert publish_trace(fake, "--from", trace).returncode == 0
    remote = open_remote(parse_registry(fake.url))
    assert fetch_trace(remote, REPOSITORY, image.digest, image.size_bytes, 10) == [(4096, 8192)]
    trace.write_text('{"version": 1, "ranges": [[4096, 99999999999]]}')
    refused = publish_trace(fake, "--from", trace)
    assert refused.returncode != 0
    assert "names nothing" in refused.stderr
    nobody = publish_trace(fake, "--socket", public_dir / "absent", "--", "true")
    assert nobody.returncode != 0
    assert "no uenvd answers" in nobody.stderr
    assert "Traceback" not in nobody.stderr
