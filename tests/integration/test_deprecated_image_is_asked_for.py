"""Users of a deprecated image are told why, what to use instead and until when, from the first question that a node ever asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.daemon import running_daemon
from support.publishing import Publisher, simple_image
from support.registry import FakeRegistry
from uenvd.oci.index import read_index
from uenvd.publish.main import main

TOLD = "wrong BLAS; use app/2.0:v1 instead; it may be removed from 2099-03-31 on"


def test_the_daemon_tells_date_and_successor(public_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeRegistry() as fake:
        publisher = Publisher(fake.url)
        old = publisher.push(
            simple_image(public_dir / "old.squashfs", "app", "old"), "app/1.0", "v1", "latest"
        )
        publisher.push(simple_image(public_dir / "new.squashfs", "app", "new"), "app/2.0", "v1", "latest")
        words = ["app/1.0:v1@demo%zen3", "wrong BLAS", "--registry", fake.url]
        successor = ["--successor", "app/2.0:v1@demo%zen3", "--date", "2099-03-31"]
        assert main(["deprecate", *words, *successor]) == 0
        assert TOLD in capsys.readouterr().err
        entries = read_index(publisher.remote, "deploy", "demo").entries
        entry = entries["deploy/demo/zen3/app/1.0", old]
        assert (entry.successor, entry.removal, entry.deprecated) == ("app/2.0:v1", "2099-03-31", TOLD)
        with running_daemon(public_dir / "uenvd", fake.url) as daemon:
            resolved = daemon.ask("resolve", uenv="app/1.0:v1%zen3")
            assert any(TOLD in note for note in resolved["notes"]), resolved
            (record,) = [one for one in daemon.ask("find", uenv="app/1.0")["records"] if one["tag"] == "v1"]
            assert record["deprecated"] == TOLD
            assert daemon.ask("inspect", uenv="app/1.0:v1%zen3")["deprecated"] == TOLD
            fake.spoil(".*index.*", status=503)
            assert daemon.ask("resolve", uenv="app/2.0%zen3")["ok"], "advice is not worth a job"


def test_mistakes_are_found_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"oci-layout:{tmp_path}/layout"
    publisher = Publisher(address)
    image = simple_image(tmp_path / "app.squashfs", "app", "word")
    digest = publisher.push(image, "app/1.0", "v1")
    words = ["deprecate", "app/1.0:v1@demo%zen3"]
    for more, said in (
        (["why", "--date", "soon"], "is no day"),
        (["why", "--date", "2020-01-01"], "is over"),
        (["why", "--successor", "app/3.0:v1@demo%zen3"], "no such image"),
        (["why", "--successor", "app/1.0:v1@demo%zen3"], "deprecated image itself"),
        (["--undo", "--date", "2099-01-01"], "--undo takes neither"),
        ([], "either a REASON"),
    ):
        assert main([*words, *more, "--registry", address]) in {66, 68}, more
        assert said in capsys.readouterr().err
    assert publisher.remote.referrers("deploy/demo/zen3/app/1.0", digest, None) == []
