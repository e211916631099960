"""Old images go, and nobody who holds one loses it: on a directory, on docker-registry (no tags deleted), on one that deletes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from support.cluster import missing, running_cluster
from support.publishing import Publisher, simple_image
from support.registry import FakeRegistry, docker_registry
from uenvd.errors import ManifestError, NotFound
from uenvd.oci.attach import REFRAME_TYPE, Content, attach
from uenvd.oci.index import read_index
from uenvd.oci.remote import Remote
from uenvd.publish import queue, retire
from uenvd.publish.main import main

APP = "deploy/demo/zen3/app/1.0"
Command = Callable[..., int]


@pytest.fixture(params=["layout", "docker", "fake"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "layout":
        yield f"oci-layout:{tmp_path}/layout"
    elif request.param == "docker":
        with docker_registry(tmp_path / "docker") as registry:
            yield registry.url
    else:
        with FakeRegistry() as fake:
            yield fake.url


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("UENVD_SYSTEM", "demo")
    monkeypatch.setenv("UENVD_UARCH", "zen3")
    monkeypatch.setattr(retire, "read_queue", lambda: None)

    def run(address: str, *words: str) -> int:
        return main([*words, "--registry", address])

    return run


def published(address: str, directory: Path, count: int = 3) -> tuple[Remote, list[str]]:
    """Publish images v1 ... of one environment, the last one is latest; each with something attached."""
    publisher = Publisher(address)
    digests = []
    for number in range(1, count + 1):
        image = simple_image(directory / f"{number}.squashfs", "app", f"word {number}")
        tags = [f"v{number}", "latest"] if number == count else [f"v{number}"]
        made = (datetime.now(UTC) - timedelta(days=1000 - number)).isoformat()
        digests.append(publisher.push(image, "app/1.0", *tags, created=made))
        attach(publisher.remote, APP, digests[-1], REFRAME_TYPE, [Content("report.json", b"{}")])
    assert main(["reindex", "--system", "demo", "--registry", address]) == 0
    return publisher.remote, digests


def there(remote: Remote, digest: str) -> bool:
    try:
        remote.manifest(APP, digest)
    except (NotFound, ManifestError):
        return False
    return True


def test_from_the_first_look_to_the_last_byte(
    address: str,
    tmp_path: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remote, (one, two, latest) = published(address, tmp_path)
    lock = tmp_path / "project" / "uenv.lock"
    lock.parent.mkdir()
    lock.write_text(json.dumps({"version": 1, "images": [{"digest": two}]}))
    words = ["retire", "--older-than", "180", "--locked", str(lock.parent)]
    capsys.readouterr()
    assert command(address, *words) == 0
    shown = capsys.readouterr()
    assert re.search(rf"^retire +app/1.0:v1 +%zen3 +{one[7:19]}", shown.out, re.MULTILINE)
    assert f"locked by {lock}" in shown.out and "it is latest" in shown.out and "--yes" in shown.err
    assert remote.tags(APP) == ["latest", "v1", "v2", "v3"], "nothing happened"

    assert command(address, *words, "--yes") == 0
    capsys.readouterr()
    assert there(remote, one), "who has the digest still can use it"
    untagged = not address.startswith("http") or "v1" not in remote.tags(APP)
    if not untagged:
        entry = read_index(remote, "deploy", "demo").entries[APP, one]
        assert entry.deprecated is not None and "retired" in entry.deprecated, "users are told at least"
    else:
        assert remote.tags(APP) == ["latest", "v2", "v3"]

    assert command(address, *words, "--yes", "--json") == 0
    found = {body["digest"]: body for body in json.loads(capsys.readouterr().out)["images"]}
    assert found[one]["action"] == "wait" and there(remote, one)

    job = queue.Queue(datetime.now(UTC) - timedelta(days=1), frozenset(), 1)
    monkeypatch.setattr(retire, "read_queue", lambda: job)
    assert command(address, *words, "--grace", "0", "--yes") == 0
    assert there(remote, one), "a job from before is still there"

    monkeypatch.setattr(retire, "read_queue", lambda: None)
    assert command(address, *words, "--grace", "0", "--yes") == 0
    assert not there(remote, one) and there(remote, two) and there(remote, latest)
    assert [tag for tag in remote.every_tag(APP) if one[7:] in tag] == [], "nothing of it is left"
    assert {entry.digest for entry in read_index(remote, "deploy", "demo").entries.values()} == {two, latest}
    if address.startswith("oci-layout"):
        blobs = Path(address.removeprefix("oci-layout:")) / "blobs" / "sha256"
        assert (
            sum(path.stat().st_size > 4000 and path.read_bytes()[:4] == b"hsqs" for path in blobs.iterdir())
            == 2
        )
    capsys.readouterr()
    assert command(address, *words, "--yes") == 0 and "freed now: 0.0" in capsys.readouterr().out


def test_a_registry_that_deletes_nothing_is_named(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeRegistry() as fake:
        fake.deletes = ""
        remote, (one, _two, _latest) = published(fake.url, tmp_path)
        words = ["retire", "--keep", "2", "--yes"]
        assert command(fake.url, *words) == 0
        assert "takes no tags away" in capsys.readouterr().err
        assert command(fake.url, *words, "--grace", "0") == 95
        said = capsys.readouterr().err
        assert one in said and "own interface" in said and there(remote, one)


def test_a_registry_that_deletes_the_image_with_its_tag(tmp_path: Path, command: Command) -> None:
    """As some do: the image is put back, for jobs have its digest."""
    with FakeRegistry() as fake:
        remote, (one, _two, _latest) = published(fake.url, tmp_path)
        fake.tag_takes_manifest = True
        assert command(fake.url, "retire", "--keep", "2", "--yes") == 0
        assert there(remote, one) and "v1" not in remote.tags(APP)


def test_a_deletion_that_broke_off_is_finished(tmp_path: Path, command: Command) -> None:
    with FakeRegistry() as fake:
        remote, (one, _two, _latest) = published(fake.url, tmp_path)
        assert command(fake.url, "retire", "--keep", "2", "--yes") == 0
        assert remote.delete(APP, one), "killed here: the image is gone and what was attached to it is not"
        assert any(one[7:] in tag for tag in remote.every_tag(APP))
        assert command(fake.url, "retire", "--keep", "2", "--grace", "0", "--yes") == 0
        assert not any(one[7:] in tag for tag in remote.every_tag(APP))


def test_a_queue_that_does_not_answer_stops_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "squeue").write_text(
        "#!/bin/sh\necho slurm_load_jobs error: Unable to contact slurm controller >&2\nexit 1\n"
    )
    (programs / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    assert (
        main(["retire", "--keep", "1", "--system", "demo", "--registry", f"oci-layout:{tmp_path}/none"]) == 95
    )
    said = capsys.readouterr().err
    assert "Unable to contact" in said and "--no-queue" in said


def test_what_protects_must_be_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "retire",
        "--keep",
        "1",
        "--system",
        "demo",
        "--no-queue",
        "--registry",
        f"oci-layout:{tmp_path}/none",
    ]
    assert main([*words, "--locked", str(tmp_path / "gone")]) == 66
    assert "must be readable" in capsys.readouterr().err
    assert main(["retire", "--keep", "0", "--system", "demo"]) == 66


def test_jobs_in_a_real_queue_hold_their_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What Slurm itself says of a job that waits: its comment keeps an image from being retired, its age keeps one from being deleted."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    address = f"oci-layout:{tmp_path}/layout"
    monkeypatch.setenv("UENVD_UARCH", "zen3")
    remote, (one, two, _latest) = published(address, tmp_path)
    words = ["retire", "--keep", "1", "--grace", "0", "--system", "demo", "--registry", address]

    def decisions(*more: str) -> dict[str, str]:
        capsys.readouterr()
        assert main([*words, "--json", *more]) == 0
        found = {}
        for body in json.loads(capsys.readouterr().out)["images"]:
            found[body["digest"]] = f"{body['action']}: {body['reason']}"
        return found

    with running_cluster(nodes=1) as cluster:
        monkeypatch.setenv("SLURM_CONF", str(cluster.conf_file))
        assert queue.read_queue() == queue.Queue(None, frozenset(), 0)
        naming = cluster.submit("#!/bin/sh\ntrue\n", "--hold", f"--comment=uenv={two}")
        there_now = queue.read_queue()
        assert there_now is not None and there_now.jobs == 1
        assert there_now.digests == {two}
        assert there_now.oldest is not None and there_now.oldest <= datetime.now(UTC)
        decided = decisions("--yes")
        assert decided[one].startswith("retire: ")
        assert decided[two] == "keep: a job in the queue names it"
        # The job may hold the first one, too, by a digest that Slurm shows nobody: it is older than the retirement.
        assert "is still there, from before it was retired" in decisions("--yes")[one]
        assert there(remote, one) and there(remote, two)
        cluster.scancel(str(naming))
        cluster.wait_job(naming)
        assert queue.read_queue() == queue.Queue(None, frozenset(), 0), "what has ended holds nothing"
        decided = decisions("--yes")
        assert decided[one].startswith("delete: ") and decided[two].startswith("retire: ")
        assert not there(remote, one) and there(remote, two)
