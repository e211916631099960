"""The benchmark measures, judges and writes: on a tiny image, one round of the quick rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import images
from support.fusetools import open_to_all

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.append(str(BENCH))

import report  # noqa: E402


@pytest.mark.skipif(os.geteuid() != 0, reason="the benchmark mounts as root")
def test_a_run_of_some_rows(tmp_path: Path) -> None:
    open_to_all()
    tree = images.build_tree(
        tmp_path / "tree", block_sizes=(4 << 10,), many=20, large_bytes=2 << 20, special=False
    )
    image = images.make_image(tree, tmp_path / "image")
    out = tmp_path / "out"
    servers = "kernel,channel-2"
    done = subprocess.run(
        [
            sys.executable,
            BENCH / "serving.py",
            "--rounds",
            "1",
            "--image",
            image,
            "--out",
            out,
            "--servers",
            servers,
            "--rows",
            "warm,walk,large,full",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "serving.json").read_text())
    assert list(result["figures"]) == servers.split(",")
    rows = set(result["figures"]["channel-2"])
    assert {"warm open+close", "cold walk with stat", "cold large files", "full read, 1 reader"} < rows
    assert all(len(values) == 1 and values[0] >= 0 for values in result["figures"]["kernel"].values())
    assert {(one["row"], one["against"]) for one in result["verdicts"]} > {
        ("warm stat", "kernel"),
        ("cold large files", "kernel"),
        ("memory (PSS) after a full read", None),
    }
    assert "| warm readlink, us |" in (out / "serving.md").read_text()
    assert "warm readlink" in done.stdout
    assert (out / "serving.svg").read_text().startswith("<?xml")


def test_ratios_are_those_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import report

    results = {
        "kernel": {"warm stat": [1.0, 10.0, 2.0], "cold large files": [1.0]},
        "channel-2": {"warm stat": [1.2, 12.0, 4.0], "cold large files": [0.66]},
    }
    assert report.ratio(results, "channel-2", "kernel", "warm stat") == pytest.approx(1.2)
    assert report.ratio(results, "channel-2", "squashfuse_ll", "warm stat") is None
    judged = {verdict.row.name: verdict for verdict in report.verdicts(results)}
    assert judged["warm stat"].passed
    assert not judged["cold large files"].passed
    assert str(judged["cold large files"]) == "MISS  cold large files: 0.66x kernel, limit 0.65x"
    table = report.table(results, {"kernel": None, "channel-2": None, "pyfuse3": "why"})
    assert "| warm stat, us | 2 | 4 | not there | 1.20 of kernel (<= 1.3) |" in table
    assert "**0.66 of kernel (<= 0.65) MISS**" in table


def test_rows_of_several_runs_make_one_result(tmp_path: Path) -> None:
    about = {"image": "i", "kernel": "k", "cores": 2, "python": "3", "rounds": 2}
    first = {
        "kernel": {"warm stat": [1.0, 2.0]},
        "channel-2": {"warm stat": [2.0, 2.0], "cold large files": [9.0, 9.0]},
    }
    report.write(tmp_path, first, {**about, "noted": "once"}, dict.fromkeys(first))
    second = {
        "kernel": {"cold large files": [4.0, 4.0, 4.0]},
        "channel-2": {"cold large files": [2.0, 2.0, 2.0]},
    }
    results, facts = report.merged(tmp_path, second, {**about, "rounds": 3})
    assert results["channel-2"] == {"warm stat": [2.0, 2.0], "cold large files": [2.0, 2.0, 2.0]}
    assert report.ratio(results, "channel-2", "kernel", "warm stat") == 1.5
    assert facts["rounds"] == 2 and facts["noted"] == "once"
    with pytest.raises(report.OtherMeasureError, match="image"):
        report.merged(tmp_path, second, {**about, "image": "another"})
