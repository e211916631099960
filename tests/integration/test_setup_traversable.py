"""A checkout below a closed directory: ``make setup`` puts the programs where ordinary users can run them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "uenvd", "scripts")

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="becoming another user, to try what he can run, needs root"
)


def call(
    *command: str | Path, cwd: Path | str = "/", user: str | None = None
) -> subprocess.CompletedProcess[str]:
    # Without an index pip can fetch nothing: a set-up that wants the network a second time fails here.
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "PIP_NO_INDEX": "1",
        "PIP_NO_CACHE_DIR": "1",
    }
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        user=user,
        group="nogroup" if user else None,
        extra_groups=[] if user else None,
        timeout=120,
    )


@pytest.fixture(scope="module")
def closed() -> Iterator[Path]:
    """A copy of the checkout in a directory of mode 0700, set up; its environment borrows the dependencies of this one."""
    with tempfile.TemporaryDirectory(prefix="uenvd-closed-") as name:
        checkout = Path(name) / "clone"
        checkout.mkdir()
        for entry in NEEDED:
            source = CHECKOUT / entry
            if source.is_dir():
                shutil.copytree(source, checkout / entry, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, checkout / entry)
        where = Path(call(checkout / "scripts/setup.sh", "--where").stdout.strip())
        assert where.parent == Path("/var/tmp")
        try:
            made = call("/usr/bin/python3", "-m", "venv", where)
            assert made.returncode == 0, made.stderr
            (site,) = where.glob("lib/python3*/site-packages")
            (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
            done = call(checkout / "scripts/setup.sh")
            assert done.returncode == 0, done.stdout + done.stderr
            yield checkout
        finally:
            shutil.rmtree(where, ignore_errors=True)


def program(checkout: Path, name: str) -> Path:
    return (checkout / ".venv").resolve() / "bin" / name


def test_nobody_runs_the_programs(closed: Path) -> None:
    assert (closed / ".venv").is_symlink()
    assert call("test", "-e", closed / "scripts", user="nobody").returncode != 0, "the checkout is not closed"
    for name in ("uenvctl", "uenvd"):
        done = call(program(closed, name), "--version", user="nobody")
        assert done.returncode == 0, done.stderr


def test_nobody_imports_the_worker(closed: Path) -> None:
    script = "import uenvd.fuse.worker; print(uenvd.fuse.worker.__file__)"
    done = call(program(closed, "python"), "-c", script, user="nobody")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("/var/tmp/uenvd-venv-")


def test_the_proof_of_make_test_succeeds(closed: Path) -> None:
    done = call(closed / "scripts/check-nobody.sh", cwd=closed)
    assert (done.returncode, done.stderr) == (0, "")
    assert "user nobody runs" in done.stdout


def test_second_run_does_nothing(closed: Path) -> None:
    done = call(closed / "scripts/setup.sh")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_changed_source_is_installed_again(closed: Path) -> None:
    source = closed / "uenvd/errors.py"
    source.write_text(source.read_text() + "\nCHANGED = True\n")
    done = call(closed / "scripts/setup.sh")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        call(program(closed, "python"), "-c", "from uenvd.errors import CHANGED", user="nobody").returncode
        == 0
    )


def test_directory_of_somebody_else_is_refused() -> None:
    with tempfile.TemporaryDirectory(prefix="uenvd-closed-") as name:
        scripts = Path(name) / "scripts"
        scripts.mkdir()
        for entry in ("setup.sh", "apt-packages.txt"):
            shutil.copy(CHECKOUT / "scripts" / entry, scripts)
        for entry in ("pyproject.toml", "uenvd"):
            (Path(name) / entry).symlink_to(CHECKOUT / entry)
        where = Path(call(scripts / "setup.sh", "--where").stdout.strip())
        where.mkdir()
        try:
            os.chown(where, 65534, 65534)
            done = call(scripts / "setup.sh")
        finally:
            where.rmdir()
        assert done.returncode == 1
        assert "is not a directory of yours" in done.stderr


def test_open_checkout_keeps_its_environment_inside() -> None:
    with tempfile.TemporaryDirectory(prefix="uenvd-open-") as name:
        Path(name).chmod(0o755)
        scripts = Path(name) / "scripts"
        scripts.mkdir()
        shutil.copy(CHECKOUT / "scripts/setup.sh", scripts)
        done = call(scripts / "setup.sh", "--where")
        assert done.stdout == f"{name}/.venv\n"


def test_interpreter_is_the_systems() -> None:
    assert Path(sys.executable).resolve().parent == Path("/usr/bin"), (
        "tests run in .venv, made with /usr/bin/python3"
    )
