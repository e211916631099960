"""The registry and the configuration go apart: what is missing, too much, or built of another recipe is named; and what everything takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.publishing import Publisher, simple_image
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import open_remote
from uenvd.publish.drift import compare
from uenvd.publish.main import main
from uenvd.publish.plan.cell import Cell


def cell(name: str, version: str = "1.0", *, deploy: bool = True) -> Cell:
    return Cell(name, version, "demo", "zen3", Path("/nonexistent"), deploy=deploy)


def test_each_way_to_drift(tmp_path: Path) -> None:
    address = f"oci-layout:{tmp_path}/layout"
    images = [simple_image(tmp_path / f"{word}.squashfs", "app", word) for word in ("old", "new")]
    releases, builds = Publisher(address), Publisher(address, namespace="build")
    old = releases.push(images[0], "same/1.0", "v1", "latest")
    builds.push(images[0], "same/1.0", "content-same")
    releases.push(images[0], "other/1.0", "v1", "latest")
    new = builds.push(images[1], "other/1.0", "content-other")
    releases.push(images[0], "unbuilt/1.0", "v1", "latest")
    releases.push(images[0], "unlisted/1.0", "v1")
    releases.push(images[0], "stranger/1.0", "v1")
    releases.push(images[0], "elsewhere/1.0", "v1", uarch="a100")
    cells = [cell("same"), cell("other"), cell("unbuilt"), cell("missing"), cell("unlisted", deploy=False)]
    found = compare(open_remote(parse_registry(address)), cells, "deploy", lambda one: f"content-{one.name}")
    states = {one.repository.split("/")[3]: one for one in found}
    assert {name: one.state for name, one in states.items()} == {
        "same": "same",
        "other": "other",
        "unbuilt": "unknown",
        "missing": "missing",
        "unlisted": "extra",
        "stranger": "extra",
    }
    assert states["other"].built == new and states["other"].deployed == old
    assert "under deploy" in states["unlisted"].remark and "not know" in states["stranger"].remark


def test_the_command_reads_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"oci-layout:{tmp_path}/layout"
    Publisher(address).push(simple_image(tmp_path / "a.squashfs", "app", "a"), "app/1.0", "v1", "latest")
    config = tmp_path / "config.yaml"
    config.write_text(
        "clusters:\n  demo:\n    targets: [{uarch: zen3, partition: normal}]\n    runner: f7t\n"
        "uenvs:\n  app:\n    '1.0':\n      recipes: {zen3: 1.0}\n      deploy: {demo: [zen3]}\n"
        "  gone:\n    '2.0':\n      recipes: {zen3: 2.0}\n      deploy: {demo: [zen3]}\n"
    )
    assert main(["drift", "--config", str(config), "--registry", address, "--json"]) == 1
    states = {one["repository"]: one["state"] for one in json.loads(capsys.readouterr().out)["images"]}
    assert states == {"deploy/demo/zen3/app/1.0": "unknown", "deploy/demo/zen3/gone/2.0": "missing"}
    assert main(["drift", "--config", str(config), "--registry", address]) == 1
    assert "missing" in capsys.readouterr().out


def test_what_several_have_is_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"oci-layout:{tmp_path}/layout"
    one, two = (
        simple_image(tmp_path / f"{word}.squashfs", "app", word, megabytes=1) for word in ("one", "two")
    )
    releases, builds = Publisher(address), Publisher(address, namespace="build")
    for publisher in (releases, builds):
        publisher.push(one, "app/1.0", "v1")
    releases.push(two, "app/2.0", "v1", "latest")
    releases.push(one, "copy/1.0", "v1")
    assert main(["storage", "--registry", address, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    app, copy = found["environments"]
    assert (app["name"], app["images"], app["versions"], copy["images"]) == ("app", 3, 2, 1)
    sizes = one.stat().st_size + two.stat().st_size
    assert sizes < app["total_bytes"] < sizes + 20_000 and app["total_bytes"] == found["total_bytes"]
    assert two.stat().st_size < app["own_bytes"] < two.stat().st_size + 10_000
    assert copy["own_bytes"] == 0, "the build has all of it"
    assert main(["storage", "--registry", address, "--system", "demo", "--namespace", "deploy"]) == 0
    assert "together" in capsys.readouterr().out
