"""uenvctl with image files where no daemon runs: as an ordinary user, with real mounts; and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.filesite import DEADLINE_S, SERVER, UENVCTL, Site, check_nothing_left, file_site, uid_of, write
from support.fusetools import has_ended, until

pytestmark = pytest.mark.usefixtures("node", "nothing_left")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    if os.geteuid() != 0:
        pytest.skip("needs root to make an ordinary user")
    with file_site() as made:
        yield made


@pytest.fixture
def nothing_left(site: Site) -> Iterator[None]:
    yield
    check_nothing_left(site)


# --- run ----------------------------------------------------------------------------------------------------------------------------


def test_the_image_is_there_inside_and_not_outside(site: Site) -> None:
    done = site.uenvctl(
        "run",
        "./app.squashfs",
        "sh",
        "-c",
        f"{site.mount}/bin/hello; grep {site.mount} /proc/self/mountinfo; id -u; id -g",
    )
    assert done.stderr == ""
    assert done.returncode == 0
    hello, mount, uid, gid = done.stdout.splitlines()
    assert hello == "hello from the image"
    assert f"{site.mount} ro,nosuid,nodev" in mount
    assert f"- fuse.uenvd uenvd:{site.directory}/app.squashfs ro," in mount
    assert (uid, gid) == (str(site.user.uid), str(site.user.gid))
    assert os.listdir(site.mount) == []


def inherited_signals() -> tuple[int, int]:
    """Return the sets of signals that a child of this process has blocked and ignored (make, for one, leaves some blocked)."""
    status = Path("/proc/self/status").read_text()
    blocked, ignored = (int(status.split(f"{name}:")[1].split()[0], 16) for name in ("SigBlk", "SigIgn"))
    restored = 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1  # by subprocess
    return blocked, ignored & ~restored


def test_the_command_takes_the_place_of_uenvctl(site: Site) -> None:
    with site.popen(
        "run",
        "./app.squashfs",
        "--",
        "sh",
        "-c",
        "echo $$; grep -h -e SigIgn -e SigBlk /proc/self/status; ls -l /proc/self/fd",
    ) as process:
        out, _err = process.communicate(timeout=DEADLINE_S)
        pid, *rest = out.decode().splitlines()
        assert int(pid) == process.pid
    blocked, ignored = (int(line.split()[1], 16) for line in sorted(rest[:2]))
    assert (blocked, ignored) == inherited_signals()
    descriptors = [line for line in rest[2:] if "->" in line and "/proc/" not in line]
    assert len(descriptors) == 3


@pytest.mark.parametrize("status", [0, 1, 7, 66, 255])
def test_exit_status(site: Site, status: int) -> None:
    assert site.uenvctl("run", "./app.squashfs", "sh", "-c", f"exit {status}").returncode == status


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGPIPE])
def test_death_by_signal(site: Site, number: signal.Signals) -> None:
    assert site.uenvctl("run", "./app.squashfs", "sh", "-c", f"kill -{int(number)} $$").returncode == -number


@pytest.mark.parametrize(
    ("command", "status", "says"),
    [
        (["nosuch"], 127, "nosuch: command not found"),
        (["/no/such"], 127, "/no/such: command not found"),
        ([""], 127, "command not found"),
        (["/etc/passwd"], 126, "/etc/passwd: cannot be run: Permission denied"),
        (["/"], 126, "cannot be run"),
        (["lost"], 126, "cannot be run: its interpreter is missing"),
    ],
)
def test_commands_that_cannot_be_run(site: Site, command: list[str], status: int, says: str) -> None:
    done = site.uenvctl("run", "--view=default", "./app.squashfs", "--", *command)
    assert done.returncode == status
    assert says in done.stderr


def test_a_script_without_interpreter_line(site: Site) -> None:
    assert (
        site.uenvctl("run", "-v", "default", "./app.squashfs", "headless", "x").stdout
        == "I have no interpreter line: x\n"
    )


def test_a_closed_directory_in_path_hides_nothing(site: Site) -> None:
    done = site.uenvctl("run", "./app.squashfs", "nosuch", env=site.environ(PATH="/root/bin:/usr/bin"))
    assert done.returncode == 127
    assert (
        site.uenvctl("run", "./app.squashfs", "true", env=site.environ(PATH="/root/bin:/usr/bin")).returncode
        == 0
    )


def test_stdin_is_untouched(site: Site) -> None:
    data = bytes(range(256)) * 1000
    with site.popen("run", "./app.squashfs", "sha256sum") as process:
        out, _err = process.communicate(data, timeout=DEADLINE_S)
    expected = subprocess.run(["sha256sum"], input=data, capture_output=True, check=True).stdout
    assert out == expected


def test_closed_standard_descriptors(site: Site) -> None:
    script = f"{site.mount}/bin/hello >out; cat out >&3; rm out"
    command = f'exec "$0" run {site.directory}/app.squashfs sh -c "{script}" 3>&1 <&- >&- 2>&-'
    done = subprocess.run(
        ["sh", "-c", command, UENVCTL],
        env=site.environ(),
        cwd=site.user.home,
        user=site.user.uid,
        group=site.user.gid,
        extra_groups=[],
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.stdout == b"hello from the image\n"


def test_ctrl_c_reaches_the_command_and_not_the_server(site: Site) -> None:
    script = f"trap 'cat {site.mount}/bin/hello; exit 3' INT; echo ready; while :; do sleep 0.05; done"
    with site.popen("run", "./app.squashfs", "sh", "-c", script, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        os.killpg(process.pid, signal.SIGINT)
        out, _err = process.communicate(timeout=DEADLINE_S)
    assert b"hello from the image" in out
    assert process.returncode == 3


def test_the_command_is_killed(site: Site) -> None:
    with site.popen(
        "run", "./app.squashfs", "sh", "-c", "echo ready; sleep 60 & wait", start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert any(SERVER in line for line in site.processes())
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(DEADLINE_S)
    # nothing_left sees the worker end


def test_a_process_in_the_background_keeps_the_image(site: Site) -> None:
    script = f"(read line; cat {site.mount}/bin/hello) <&0 & exit 4"
    with site.popen("run", "./app.squashfs", "sh", "-c", script) as process:
        until(lambda: process.poll() is not None, "the command ends")
        assert process.returncode == 4
        out, _err = process.communicate(b"go\n", timeout=DEADLINE_S)
    assert b"hello from the image" in out


def test_all_of_the_server_is_killed(site: Site) -> None:
    """One alone costs nothing: test_server_of_a_file_is_killed."""
    script = f"echo ready; read line; cat {site.mount}/bin/hello; echo still here"
    with site.popen("run", "./app.squashfs", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        servers = _servers(site.user.uid)
        os.killpg(os.getpgid(servers[0]), signal.SIGKILL)
        for pid in servers:
            until(lambda pid=pid: has_ended(pid), "the server ends")  # type: ignore[misc]
        out, err = process.communicate(b"go\n", timeout=DEADLINE_S)
    assert out == b"still here\n"
    assert b"not connected" in err


@pytest.mark.parametrize("victim", range(4))
def test_server_of_a_file_is_killed(site: Site, victim: int) -> None:
    """Supervisor, standby and workers: a successor answers."""
    script = f"echo ready; read line; cat {site.mount}/bin/hello"
    with site.popen("run", "./app.squashfs", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        servers = until(
            lambda: len(found := _servers(site.user.uid)) == 4 and found, "all processes are there"
        )
        os.kill(servers[victim], signal.SIGKILL)
        until(lambda: has_ended(servers[victim]), "it ends")
        out, _err = process.communicate(b"go\n", timeout=DEADLINE_S)
    assert b"hello from the image" in out


def test_libfuse_where_it_is_asked_for(site: Site) -> None:
    script = f"cat {site.mount}/bin/hello; read line"
    with site.popen(
        "run", "./app.squashfs", "sh", "-c", script, env=site.environ(UENVD_TRANSPORT="pyfuse3")
    ) as process:
        assert process.stdout is not None
        assert b"hello from the image" in process.stdout.readline() + process.stdout.readline()
        assert any("uenvd.fuse.worker" in line for line in site.processes())
        process.communicate(b"go\n", timeout=DEADLINE_S)
    assert process.returncode == 0


def _servers(uid: int) -> list[int]:
    """Return the processes that serve a user's files."""
    return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _is_server(pid, uid)]


def _is_server(pid: str, uid: int) -> bool:
    try:
        return uid_of(pid) == uid and SERVER.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_uenvctl_is_killed_while_the_server_starts(site: Site) -> None:
    with site.popen("run", "./app.squashfs", "true") as process:
        until(
            lambda: process.poll() is not None or any(SERVER in line for line in site.processes()),
            "the worker starts",
        )
        process.kill()


def test_modules_in_the_working_directory_are_not_the_servers(site: Site) -> None:
    for name in ("json.py", "trio.py", "uenvd.py", "socket.py"):
        write(site.user.home / name, "raise SystemExit('imported from the working directory')")
    done = site.uenvctl("run", f"{site.directory}/app.squashfs", "echo", "fine", cwd=site.user.home)
    assert (done.stdout, done.stderr) == ("fine\n", "")


# --- several images, mount points, views --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", ["./app.squashfs,./tool.squashfs", "./tool.squashfs,./app.squashfs"])
def test_nested_images_in_any_order(site: Site, images: str) -> None:
    done = site.uenvctl(
        "run",
        images,
        "sh",
        "-c",
        f"ls {site.mount}/nested; echo $TOOL; echo $UENV_MOUNT_LIST; echo $UENV_VIEW",
    )
    assert done.returncode == 0, done.stderr
    listing, tool, mount_list, view = done.stdout.splitlines()
    assert (listing, tool) == ("meta", "1")
    names = [one.removeprefix("./") for one in images.split(",")]
    where = {"app.squashfs": site.mount, "tool.squashfs": f"{site.mount}/nested"}
    assert mount_list == ",".join(f"{site.directory}/{name}:{where[name]}" for name in names)
    assert view == f"{site.mount}/nested:tool:default"


def test_a_mount_point_of_the_users_own(site: Site) -> None:
    own = site.user.home / "here"
    own.mkdir()
    os.chown(own, site.user.uid, site.user.gid)
    done = site.uenvctl("run", f"./bare.squashfs:{own}", "cat", f"{own}/file")
    assert done.stdout == "bare"


def test_views(site: Site) -> None:
    script = 'echo "$PATH|$APP_HOME|${CONFLICT-unset}|$CONFLICTS|$OTHER"; echo "$UENV_VIEW|$UENV_LABEL|$UENV_DIGEST"'
    done = site.uenvctl(
        "run",
        "--view=default,app:other",
        "./app.squashfs",
        "sh",
        "-c",
        script,
        env=site.environ(CONFLICT="1", CONFLICTS="2"),
    )
    first, second = done.stdout.splitlines()
    assert first == f"{site.mount}/bin:{site.user.environ()['PATH']}|{site.mount}|unset|2|{site.user.name}'s"
    assert second == f"{site.mount}:app:default,{site.mount}:app:other|./app.squashfs|"


def test_without_a_view_nothing_is_changed(site: Site) -> None:
    done = site.uenvctl("run", "./app.squashfs", "env")
    environ = dict(line.split("=", 1) for line in done.stdout.splitlines())
    added = {"UENV_MOUNT_LIST", "UENV_VIEW", "UENV_LABEL", "UENV_DIGEST", "UENV_APPLIED"}
    assert environ.keys() - site.environ().keys() == added
    assert {name: value for name, value in environ.items() if name not in added} == site.environ()


def test_a_view_of_an_image_of_early_2024(site: Site) -> None:
    done = site.uenvctl("run", "-v", "v", "./old.squashfs", "sh", "-c", "echo $PATH $OLD")
    assert done.stderr == ""
    assert done.stdout == f"{site.mount}/env/v/bin:{site.user.environ()['PATH']} yes\n"
    assert not Path("/tmp/never").exists()


def test_odd_variables_survive(site: Site) -> None:
    env = site.environ(**{"BASH_FUNC_x%%": "() {  echo function\n}", "a.b": "1", "NL": "a\nb"})
    done = site.uenvctl(
        "run",
        "-v",
        "default",
        "./app.squashfs",
        "bash",
        "-c",
        "x; env",
        env=env,
    )
    assert done.stdout.startswith("function\n")
    assert "\na.b=1\n" in done.stdout
    assert "\nNL=a\nb\n" in done.stdout
