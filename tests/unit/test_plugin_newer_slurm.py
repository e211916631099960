"""A site's Slurm is newer than ours: the plugin compiles against its headers, without a warning, and is what that Slurm would load."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PLUGIN = Path(__file__).resolve().parents[2] / "slurm-plugin"
UNREACHABLE = 75


@pytest.fixture(scope="module", params=["trixie", "sid"])
def headers(request: pytest.FixtureRequest) -> Path:
    """The include directory of the Slurm of a Debian suite; fetched once, kept among what is built."""
    suite: str = request.param
    if shutil.which("apt-get") is None or shutil.which("gcc") is None:
        pytest.skip("needs gcc, and apt-get to fetch newer headers")
    done = subprocess.run(
        [PLUGIN / "tests" / "fetch-headers.sh", PLUGIN / "build" / "headers", suite],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == UNREACHABLE:
        pytest.skip(f"Debian's mirror cannot be reached: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    return PLUGIN / "build" / "headers" / suite / "usr" / "include"


def _version(include: Path) -> int:
    text = (include / "slurm" / "slurm_version.h").read_text()
    found = re.search(r"^#define SLURM_VERSION_NUMBER\s+(0x[0-9a-f]+)", text, re.MULTILINE)
    assert found is not None
    return int(found.group(1), 16)


def test_it_compiles_without_a_warning(headers: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "uenvd_spank.so"
    done = subprocess.run(
        ["make", "-C", str(PLUGIN), f"BUILD={tmp_path / 'build'}", f"PLUGIN={plugin}", "all"],
        capture_output=True,
        text=True,
        check=False,
        # Before those of this machine; Slurm's own headers are not held to our warnings.
        env={**os.environ, "CPPFLAGS": f"-isystem {headers}"},
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    # spank_plugin_version is compared with the version of the program that loads it.
    assert _version(headers) > _version(Path("/usr/include"))
    assert _version(headers).to_bytes(4, "little") in plugin.read_bytes()
