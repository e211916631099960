"""The installed units under a real systemd: start by the first request, restart below a running session, a hung daemon, a clean end."""

from __future__ import annotations

import fnmatch
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import systemd
from support.publishing import Publisher, env_json, make_squashfs
from support.systemd import PrivateSystemd

CHECKOUT = Path(__file__).resolve().parents[2]
MOUNT = "/mnt"
FILES = 400
CONFIG = f"""\
system: demo
uarch: zen3
registry: oci-layout:{{directory}}/registry
worker: {{{{user: nobody}}}}
mounts: {{{{points: [{MOUNT}]}}}}
"""
WATCHDOG = """\
[Service]
WatchdogSec=2s
TimeoutAbortSec=1s
StandardOutput=append:{directory}/uenvd.log
StandardError=append:{directory}/uenvd.log
"""

SESSION = f"""\
next=0
read_one() {{
    [ "$(cat {MOUNT}/file$next)" = "content $next" ] || exit 9
    next=$((next + 1))
}}
read_one
echo started
while [ ! -e "$1" ]; do
    [ $next -ge {FILES // 2} ] || read_one
    sleep 0.02
done
while [ $next -lt {FILES} ]; do read_one; done
echo done
"""
"""Reads each file once, so that the kernel has to ask for it: half of them until the file $1 appears, then the others."""

pytestmark = pytest.mark.skipif(bool(systemd.missing()), reason=systemd.missing() or "it runs here")


@pytest.fixture(scope="module")
def host() -> Iterator[PrivateSystemd]:
    """A booted systemd in which only uenvd.socket was started."""
    directory = Path(tempfile.mkdtemp(prefix="uenvd-systemd-", dir="/var/tmp"))
    try:
        directory.chmod(0o755)
        installed = subprocess.run(
            [sys.executable, str(CHECKOUT / "scripts/install_tree.py"), "--destdir", str(directory / "tree")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert installed.returncode == 0, installed.stderr
        (directory / "tree/etc/uenvd/config.yaml").write_text(CONFIG.format(directory=directory))
        files: dict[str, bytes | str] = {f"file{number}": f"content {number}\n" for number in range(FILES)}
        image = make_squashfs(directory / "image.squashfs", files, meta=env_json("tools", mount=MOUNT))
        Publisher(f"oci-layout:{directory}/registry").push(image, "tools/1", "v1")
        dropins = {"uenvd.service": WATCHDOG.format(directory=directory)}
        with PrivateSystemd(directory, ("uenvd.socket",), dropins) as running:
            yield running
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def said(host: PrivateSystemd) -> str:
    log = host.directory / "uenvd.log"
    return f"{host.log}\n{log.read_text() if log.exists() else ''}"


def use(host: PrivateSystemd) -> None:
    """Run a command in the image as an ordinary user."""
    done = host.run("uenvctl", "run", "tools/1", "--", "cat", f"{MOUNT}/file7", user="nobody")
    assert (done.returncode, done.stdout) == (0, "content 7\n"), done.stderr + said(host)


def until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


@contextmanager
def session_through(host: PrivateSystemd, name: str) -> Iterator[None]:
    """A session that reads while the block runs, and has to end well after it."""
    stop = host.directory / f"stop {name}"
    session = host.popen(
        "uenvctl", "run", "tools/1", "--", "bash", "-c", SESSION, "bash", stop, user="nobody"
    )
    try:
        assert session.stdout is not None
        assert session.stdout.readline() == "started\n"
        yield
        stop.touch()
        output = session.communicate(timeout=60)[0]
    finally:
        session.kill()
        session.wait()
    assert (session.returncode, output) == (0, "done\n"), said(host)


def wait_for_another(host: PrivateSystemd, before: str) -> None:
    """Wait for a daemon that is not ``before``."""
    until(
        lambda: host.show("uenvd.service", "MainPID") not in (before, "0"),
        "systemd starts the daemon again",
    )


def test_first_request_starts_the_daemon(host: PrivateSystemd) -> None:
    host.run("systemctl", "stop", "uenvd.service")
    assert host.show("uenvd.service", "ActiveState") == "inactive"
    use(host)
    assert host.show("uenvd.service", "ActiveState") == "active"
    assert host.show("uenvd.service", "StatusText").startswith("serving demo from ")


def test_session_survives_restart_and_sudden_death_of_the_daemon(host: PrivateSystemd) -> None:
    use(host)
    with session_through(host, "restart"):
        assert host.run("systemctl", "restart", "uenvd.service").returncode == 0, said(host)
        use(host)
        before = host.show("uenvd.service", "MainPID")
        assert host.run("kill", "-9", before).returncode == 0
        wait_for_another(host, before)
        use(host)


def test_session_survives_the_death_of_all_processes_of_uenvd(host: PrivateSystemd) -> None:
    """systemd keeps the connection and the requests in hand for the next daemon."""
    with session_through(host, "all"):
        until(lambda: host.show("uenvd.service", "NFileDescriptorStore") != "0", "systemd keeps descriptors")
        before = host.show("uenvd.service", "MainPID")
        assert host.run("pkill", "-9", "-f", r"uenvd\.fuse|bin/uenvd --config").returncode == 0
        wait_for_another(host, before)
    use(host)


def test_hung_daemon_is_replaced(host: PrivateSystemd) -> None:
    use(host)
    before = host.show("uenvd.service", "MainPID")
    host.run("kill", "-STOP", before)
    wait_for_another(host, before)
    use(host)


def block(title: str, number: int = 0) -> str:
    """Return a block of commands of a section of docs/operations.md."""
    section = (
        (CHECKOUT / "docs/operations.md").read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    )
    return section.split("```\n")[2 * number + 1]


def test_upgrade_below_a_running_session(host: PrivateSystemd) -> None:
    """As docs/operations.md says, with a tree that calls itself another version; only what is private here (opt, etc) is in it."""
    new = host.directory / "uenvd-tree"
    for name in ("opt", "etc/uenvd"):
        shutil.copytree(host.directory / "tree" / name, new / name, symlinks=True)
    (package,) = new.glob("opt/uenvd/lib/uenvd/lib/python3*/site-packages/uenvd")
    (package / "__init__.py").write_text('__version__ = "99.0"\n')
    for compiled in package.glob("__pycache__/__init__.*.pyc"):
        compiled.unlink()
    with session_through(host, "upgrade"):
        commands = block("Upgrade").replace("uenvd-tree", str(new))
        done = host.run("bash", "-ec", commands)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "uenvd ok: uenvd 99.0 answers" in done.stdout
        assert host.run("pkill", "-9", "-u", "nobody", "-f", r"uenvd\.fuse").returncode == 0
        use(host)


def test_every_installed_file_is_named_where_it_is_removed(host: PrivateSystemd) -> None:
    """The section "Uninstall": each file of the tree is matched by one of its patterns, and none of them matches anything else of /usr."""
    words = [word for line in block("Uninstall").splitlines() for word in shlex.split(line, comments=True)]
    patterns = [word for word in words if word.startswith("/")]
    tree = host.directory / "tree"
    installed = [f"/{path.relative_to(tree)}" for path in tree.rglob("*") if not path.is_dir()]
    assert len(installed) > 100
    left = [
        path
        for path in installed
        if not any(fnmatch.fnmatchcase(path, one) or path.startswith(f"{one}/") for one in patterns)
        and not path.endswith("/uenvd_spank.so")
    ]
    assert left == []
    harmless = {"/usr/lib", "/user-environment", "/user-tools"}  # a place to look in, and two for rmdir
    assert all("uenv" in one for one in patterns if one not in harmless), patterns


def test_nothing_is_left_when_it_is_stopped(host: PrivateSystemd) -> None:
    use(host)
    assert host.run("systemctl", "stop", "uenvd.socket", "uenvd.service").returncode == 0
    try:
        until(lambda: "uenvd." not in host.run("ps", "-eo", "args").stdout, "all processes of the daemon end")
        assert host.run("test", "-e", "/run/uenvd/control").returncode != 0
        refused = host.run("uenvctl", "run", "tools/1", "--", "true", user="nobody")
        assert refused.returncode == 78, refused.stderr
    finally:
        host.run("systemctl", "start", "uenvd.socket")
