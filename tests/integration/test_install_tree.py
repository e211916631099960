"""What ``make install DESTDIR=`` leaves is complete, starts from wherever it lies, and systemd accepts it."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
PROGRAMS = ("uenvd", "uenvctl", "uenvd-publish", "uenvd-fs")


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    """A DESTDIR that everybody can traverse (pytest's own directories are closed to other users)."""
    with tempfile.TemporaryDirectory(prefix="uenvd-install-") as name:
        destdir = Path(name)
        destdir.chmod(0o755)
        for command in (
            [sys.executable, str(CHECKOUT / "scripts/install_tree.py"), "--destdir", name],
            ["make", "-C", str(CHECKOUT / "slurm-plugin"), "install", f"DESTDIR={name}"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        yield destdir


def run(
    *command: str | Path, user: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", **environment},
        user=user,
        group="nogroup" if user else None,
        extra_groups=[] if user else None,
        timeout=60,
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_runs_from_destdir(tree: Path, program: str) -> None:
    done = run(tree / "opt/uenvd/bin" / program, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert program in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_ordinary_user_runs_the_tool_through_a_link(tree: Path) -> None:
    link = tree / "uenvctl"
    link.symlink_to(tree / "opt/uenvd/bin/uenvctl")
    try:
        done = run(link, "--version", user="nobody")
    finally:
        link.unlink()
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"uenvctl \d+\.\d+\.\d+\n", done.stdout)


def test_man_and_completions_are_found(tree: Path) -> None:
    # man looks for pages beside the directories of PATH, so nobody has to set MANPATH
    found = run("man", "--where", "uenvctl-lock", PATH=f"{tree}/opt/uenvd/bin:/usr/bin:/bin")
    assert found.stdout == f"{tree}/opt/uenvd/share/man/man1/uenvctl-lock.1\n"
    for place in ("bash-completion/completions/uenvctl", "zsh/vendor-completions/_uenvctl"):
        assert "uenvctl __complete" in (tree / "usr/share" / place).read_text()
    fish = tree / "usr/share/fish/vendor_completions.d/uenvctl.fish"
    path = f"{tree}/opt/uenvd/bin:/usr/bin:/bin"
    done = run("fish", "--no-config", "-c", f"source {fish}; complete -C 'uenvctl doc'", PATH=path)
    assert done.stdout.split()[0] == "doctor"


def test_python_variables_of_the_caller_do_not_reach_the_programs(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "uenvd.py").write_text("raise SystemExit('the wrong module')")
    done = run(tree / "opt/uenvd/bin/uenvd", "--version", PYTHONPATH=str(tmp_path), PYTHONHOME="/nowhere")
    assert done.returncode == 0, done.stderr


def test_modules_come_from_the_tree_alone(tree: Path) -> None:
    environment = tree / "opt/uenvd/lib/uenvd"
    script = (
        "import sys, uenvd.daemon.app, uenvd.publish.main, uenvd.fuse.worker\n"
        "print(*{m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)}, sep='\\n')"
    )
    done = run(environment / "bin/python3", "-I", "-c", script)
    assert done.returncode == 0, done.stderr
    foreign = [
        line
        for line in done.stdout.splitlines()
        if not line.startswith((str(environment), "/usr/lib/python3"))
    ]
    assert foreign == []


def test_no_file_names_the_checkout_or_the_destdir(tree: Path) -> None:
    names = (os.fsencode(CHECKOUT), os.fsencode(tree))
    found = [
        str(path.relative_to(tree))
        for path in tree.rglob("*")
        if path.is_file() and not path.is_symlink() and path.name != "uenvd_spank.so"
        if any(name in path.read_bytes() for name in names)
    ]
    assert found == []


def test_everybody_may_read_and_only_the_owner_may_write(tree: Path) -> None:
    paths = [path for top in ("opt", "usr") for path in (tree / top).rglob("*") if not path.is_symlink()]
    closed = [str(path) for path in paths if ~path.stat().st_mode & (0o055 if path.is_dir() else 0o044)]
    open_to_all = [str(path) for path in paths if path.stat().st_mode & 0o022]
    assert (closed, open_to_all) == ([], [])


def test_example_configuration_is_valid(tree: Path) -> None:
    done = run(tree / "opt/uenvd/bin/uenvd", "--check", "--config", tree / "etc/uenvd/config.yaml")
    assert done.returncode == 0, done.stderr


def test_second_installation_keeps_the_configuration(tree: Path) -> None:
    config = tree / "etc/uenvd/config.yaml"
    before = config.read_text()
    config.write_text("system: mine\nregistry: oci-layout:/srv/images\n")
    try:
        done = run(sys.executable, CHECKOUT / "scripts/install_tree.py", "--destdir", tree)
        assert done.returncode == 0, done.stderr
        assert config.read_text().startswith("system: mine")
        assert run(tree / "opt/uenvd/bin/uenvctl", "--version").returncode == 0
    finally:
        config.write_text(before)


def test_prefix_is_written_into_the_units(tmp_path: Path) -> None:
    done = run(
        sys.executable,
        CHECKOUT / "scripts/install_tree.py",
        "--destdir",
        tmp_path,
        "--prefix",
        "/srv/apps/uenvd",
    )
    assert done.returncode == 0, done.stderr
    unit = (tmp_path / "usr/lib/systemd/system/uenvd.service").read_text()
    assert "ExecStart=/srv/apps/uenvd/bin/uenvd " in unit
    assert "/opt/uenvd" not in unit
    assert run(tmp_path / "srv/apps/uenvd/bin/uenvctl", "--version").returncode == 0


def test_plugin_is_installed_where_slurm_looks(tree: Path) -> None:
    (plugin,) = tree.rglob("uenvd_spank.so")
    assert (Path("/") / plugin.relative_to(tree)).parent.joinpath("auth_munge.so").exists()


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze (Debian: systemd) is missing"
)
def test_systemd_accepts_the_units(tree: Path) -> None:
    # systemd-analyze resolves dependencies within the root that it is given, so the system's own units have to be there.
    shutil.copytree("/lib/systemd/system", tree / "usr/lib/systemd/system", symlinks=True, dirs_exist_ok=True)
    try:
        done = run("systemd-analyze", "verify", "--man=no", f"--root={tree}", "uenvd.service", "uenvd.socket")
    finally:
        for unit in (tree / "usr/lib/systemd/system").iterdir():
            if not unit.name.startswith("uenvd."):
                shutil.rmtree(unit) if unit.is_dir() and not unit.is_symlink() else unit.unlink()
    about_us = [line for line in done.stderr.splitlines() if "uenvd" in line]
    assert (done.returncode, about_us) == (0, [])


@pytest.mark.skipif(
    shutil.which("systemd-sysusers") is None, reason="systemd-sysusers (Debian: systemd) is missing"
)
@pytest.mark.skipif(os.geteuid() != 0, reason="making users and directories below a root needs root")
def test_sysusers_and_tmpfiles_make_what_the_daemon_needs(tree: Path) -> None:
    made = run("systemd-sysusers", f"--root={tree}", "uenvd.conf")
    assert made.returncode == 0, made.stderr
    assert re.search(r"^uenvd-fs:.*:/usr/sbin/nologin$", (tree / "etc/passwd").read_text(), re.MULTILINE)
    made = run("systemd-tmpfiles", f"--root={tree}", "--create", "uenvd.conf")
    assert made.returncode == 0, made.stderr
    assert (tree / "user-environment").stat().st_mode & 0o7777 == 0o755


def unit_section(tree: Path, unit: str, section: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, strict=False, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keys keep their case
    parser.read(tree / "usr/lib/systemd/system" / unit)
    return dict(parser[section])


def test_units_keep_what_running_jobs_depend_on(tree: Path) -> None:
    service = unit_section(tree, "uenvd.service", "Service")
    assert service["Type"] == "notify"
    assert service["KillMode"] == "process"
    assert service["OOMPolicy"] == "continue"
    assert service["PrivateMounts"] == "yes"
    assert "WatchdogSec" in service
    assert "FileDescriptorStoreMax" in service
    for setting in (
        "ProtectSystem",
        "ProtectHome",
        "RestrictNamespaces",
        "ProtectKernelTunables",
        "PrivateUsers",
    ):
        assert setting not in service, f"{setting} would keep uenvd from its work"
    listener = unit_section(tree, "uenvd.socket", "Socket")
    assert (listener["ListenStream"], listener["SocketMode"]) == ("/run/uenvd/control", "0666")
