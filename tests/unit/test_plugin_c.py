"""The C unit tests of the Slurm plugin (sanitizers, fake libslurm, fake daemon), and the golden frames read by the Python side."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from uenvd import protocol
from uenvd.errors import ProtocolError, UenvError

CHECKOUT = Path(__file__).resolve().parents[2]
PLUGIN = CHECKOUT / "slurm-plugin"
VECTORS = CHECKOUT / "tests" / "vectors" / "control"
EXPORTED = {
    *("plugin_name", "plugin_type", "plugin_version", "spank_plugin_version"),
    *("slurm_spank_init", "slurm_spank_init_post_opt", "slurm_spank_task_init_privileged"),
    *("slurm_spank_local_user_init", "slurm_spank_task_init", "slurm_spank_exit"),
}

needs_compiler = pytest.mark.skipif(
    shutil.which("gcc") is None or not Path("/usr/include/slurm/spank.h").exists(),
    reason="needs gcc and Slurm's headers (Debian: gcc libslurm-dev libjson-c-dev)",
)


def _make(*arguments: str, **environ: str) -> str:
    done = subprocess.run(
        ["make", "--silent", "-C", str(PLUGIN), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environ},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_compiler
def test_c_unit_tests(public_dir: Path) -> None:
    output = _make("check", TMPDIR=str(public_dir))
    ran = re.search(r"^(\d+) tests$", output, re.MULTILINE)
    assert ran is not None
    assert int(ran.group(1)) >= 60
    skipped = [line for line in output.splitlines() if line.startswith("skip")]
    assert skipped == [] or os.geteuid() != 0
    assert list(public_dir.iterdir()) == []


@needs_compiler
def test_plugin_exports_its_hooks_and_nothing_else() -> None:
    _make()
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", PLUGIN / "uenvd_spank.so"], capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[-1] for line in symbols.splitlines()} == EXPORTED


@needs_compiler
def test_install_goes_to_the_plugin_directory(public_dir: Path) -> None:
    _make("install", f"DESTDIR={public_dir}", "PLUGIN_DIR=/usr/lib/slurm")
    assert (public_dir / "usr/lib/slurm/uenvd_spank.so").stat().st_mode & 0o777 == 0o755


def _vectors(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((VECTORS / name).read_text())
    return found


@pytest.mark.parametrize("case", _vectors("requests.json"), ids=lambda case: case["name"])
def test_the_daemon_understands_the_plugins_requests(case: dict[str, Any]) -> None:
    request = protocol.parse_request(case["frame"])
    args = dict(case["args"])
    job = (args.pop("job"), args.pop("step")) if "job" in args else None
    if "groups" in args:
        args["groups"] = tuple(args["groups"])
    assert request == protocol.Request(**args, job=job)


@pytest.mark.parametrize("case", _vectors("replies.json"), ids=lambda case: case["name"])
def test_python_reads_the_replies_alike(case: dict[str, Any]) -> None:
    reader = protocol.FrameReader(protocol.MAX_REPLY_BYTES)
    reader.feed(case["frame"].encode() + b"\n")
    try:
        frame = reader.next_frame()
        assert frame is not None
    except ProtocolError:
        assert case["kind"] == "malformed"
        return
    if case["kind"] == "failure":
        with pytest.raises(UenvError, match=re.escape(case["expect"]["message"])):
            protocol.raise_failure(frame)
    elif case["kind"] in ("event", "success", "unusable"):
        protocol.raise_failure(frame)
        assert ("event" in frame) == (case["kind"] == "event")
