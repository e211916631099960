"""Without a daemon, too: every mistake has its own status, a reason and a way out; shells start; the other commands say what they can."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from support.filesite import DEADLINE_S, UENVCTL, Site, check_nothing_left, file_site, write

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


# --- errors: each with its own status, a reason and a way out -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["./none.squashfs"], 66, "cannot open {dir}/none.squashfs: No such file"),
        (["."], 66, "is not a regular file"),
        (["./text.squashfs"], 76, "not a squashfs image"),
        (["./cut.squashfs"], 76, "cut.squashfs"),
        (["./private.squashfs"], 84, "Permission denied"),
        (["./bare.squashfs"], 83, "hint: name a mount point: ./bare.squashfs:/user-environment"),
        (["./bare.squashfs:/no/such/dir"], 81, "there is no such directory"),
        (["./bare.squashfs:/etc/passwd"], 81, "is no directory"),
        (["./bare.squashfs:./elsewhere"], 81, "absolute path"),
        (["./bare.squashfs:/a/../b"], 81, "absolute path"),
        (["./app.squashfs,./bare.squashfs:{dir}/mnt/"], 82, "both want to be mounted at {dir}/mnt"),
        (["./app.squashfs,{dir}/app.squashfs:{dir}/elsewhere"], 82, "named twice"),
        (["--view=zip", "./app.squashfs"], 70, "hint: available views: app:default, app:other"),
        (["--view=default", "./app.squashfs,./tool.squashfs"], 70, "ambiguous: app:default, tool:default"),
        (["--view=a b", "./app.squashfs"], 67, "  a b\n   ^"),
        (["./app.squashfs+"], 67, "^"),
        (["app.squashfs"], 78, "the file of this name is ./app.squashfs"),
        (["app/1:v1"], 78, "there is no socket"),
        (["./app.squashfs,app/1:v1"], 78, "hint: ask the site's administrators"),
    ],
)  # fmt: skip
def test_errors(site: Site, arguments: list[str], status: int, says: str) -> None:
    arguments = [argument.replace("{dir}", str(site.directory)) for argument in arguments]
    done = site.uenvctl("run", *arguments, "--", "echo", "ran")
    assert done.returncode == status, done.stderr
    assert says.replace("{dir}", str(site.directory)) in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "./app.squashfs"], "there is no command to run"),
        (["run"], "too few arguments"),
        (["run", "--vew=x", "./app.squashfs", "true"], "did you mean --view?"),
        (["start"], "too few arguments"),
        (["start", "a", "b"], "one argument too many"),
        (["rum"], "did you mean: uenvctl run"),
        (["image", "fnd"], "did you mean: uenvctl image find"),
        (["image"], "no command"),
        (["--frob"], "unknown option"),
        ([], "usage:"),
    ],
)
def test_slips_of_the_command_line(site: Site, arguments: list[str], says: str) -> None:
    done = site.uenvctl(*arguments)
    assert done.returncode == 66
    assert says in done.stderr
    assert done.stdout == ""


def test_user_namespaces_are_disabled(site: Site) -> None:
    # a limit of a user namespace of its own, so that no other process is concerned
    code = f"""
import os, sys
from uenvd import mounts
mounts.unshare(mounts.CLONE_NEWUSER)
mounts.map_self({site.user.uid}, {site.user.gid})
with open("/proc/sys/user/max_user_namespaces", "w") as file:
    file.write("0")
os.execv(sys.argv[1], sys.argv[1:])
"""
    who = ["setpriv", f"--reuid={site.user.uid}", f"--regid={site.user.gid}", "--clear-groups"]
    done = site.uenvctl("run", "./app.squashfs", "true", prefix=[*who, sys.executable, "-c", code])
    assert done.returncode == 95, done.stderr
    assert "cannot make a user namespace" in done.stderr
    assert "max_user_namespaces" in done.stderr


def test_fuse_is_closed_to_users(site: Site) -> None:
    closed = site.directory / "closed"
    closed.touch(mode=0o600)
    script = f'mount --bind {closed} /dev/fuse && exec setpriv --reuid {site.user.uid} --regid {site.user.gid} --clear-groups "$@"'
    done = site.uenvctl("run", "./app.squashfs", "true", prefix=["unshare", "-m", "sh", "-c", script, "sh"])
    assert done.returncode == 95, done.stderr
    assert "cannot open /dev/fuse: Permission denied" in done.stderr
    assert "chmod 0666 /dev/fuse" in done.stderr


def test_root_needs_no_user_namespace(site: Site) -> None:
    done = site.uenvctl(
        "run",
        "./private.squashfs",
        "sh",
        "-c",
        f"cat {site.mount}/secret; cat /proc/self/uid_map",
        prefix=["env"],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("secret")
    assert "4294967295" in done.stdout
    assert os.listdir(site.mount) == []


# --- start --------------------------------------------------------------------------------------------------------------------------


def test_start_takes_commands_from_stdin(site: Site) -> None:
    done = site.uenvctl("start", "--view=default", "./app.squashfs", stdin=b"hello\nexit 9\n")
    assert (done.stdout, done.returncode) == ("hello from the image\n", 9)


@pytest.mark.parametrize("shell", ["/bin/dash", ""])
def test_start_uses_the_users_shell(site: Site, shell: str) -> None:
    done = site.uenvctl(
        "start", "./app.squashfs", stdin=b"readlink /proc/$$/exe\n", env=site.environ(SHELL=shell)
    )
    assert done.stdout.strip() == os.path.realpath(shell or "/bin/bash")


@pytest.mark.parametrize("command", ["start", "run"])
def test_no_session_inside_a_session(site: Site, command: str) -> None:
    inner = f"unset UENV_MOUNT_LIST UENV_VIEW\n{UENVCTL} {command} ./tool.squashfs true\necho $?\n"
    done = site.uenvctl(
        "start",
        "./app.squashfs",
        stdin=inner.replace(" true", "" if command == "start" else " true").encode(),
    )
    assert done.stdout == "93\n"
    assert "inside a session" in done.stderr
    assert "hint: leave it first: exit" in done.stderr


def test_forged_variables_make_no_session(site: Site) -> None:
    env = site.environ(UENV_MOUNT_LIST="/x:/y", UENV_VIEW="/y:x:default")
    assert site.uenvctl("run", "./app.squashfs", "true", env=env).returncode == 0


def test_an_interactive_shell_shows_the_session(site: Site) -> None:
    write(site.user.home / ".bashrc", "PS1='mine> '\n")
    primary, replica = pty.openpty()
    try:
        with site.popen(
            "start", "./app.squashfs", stdin=replica, stdout=replica, stderr=replica, start_new_session=True
        ) as process:
            os.close(replica)
            _read_until(primary, b"[app.squashfs] mine> ")
            os.write(primary, b"ls -1 /proc/$$/fd | wc -l; exit 6\n")
            _read_until(primary, b"exit\r\n")
            assert process.wait(DEADLINE_S) == 6
    finally:
        os.close(primary)


def _read_until(descriptor: int, wanted: bytes) -> bytes:
    seen = b""
    deadline = time.monotonic() + DEADLINE_S
    while wanted not in seen:
        ready = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]
        assert ready, f"only {seen!r}"
        try:
            seen += os.read(descriptor, 4096)
        except OSError:  # EIO: the other end is closed
            break
    assert wanted in seen
    return seen


# --- the other commands -------------------------------------------------------------------------------------------------------------


def test_inspect_a_file(site: Site) -> None:
    done = site.uenvctl("image", "inspect", "./app.squashfs")
    assert done.returncode == 0, done.stderr
    assert f"mount:        {site.mount}" in done.stdout
    assert "  default  all of it" in done.stdout
    facts = json.loads(site.uenvctl("image", "inspect", "--json", "./app.squashfs").stdout)
    assert facts["views"] == [
        {"name": "default", "description": "all of it"},
        {"name": "other", "description": ""},
    ]
    assert facts["mount"] == site.mount
    assert "views:  none" in site.uenvctl("image", "inspect", "./bare.squashfs").stdout


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("./none", 66),
        (".", 66),
        ("./text.squashfs", 76),
        ("./cut.squashfs", 76),
        ("./private.squashfs", 84),
        ("app", 78),
    ],
)
def test_inspect_errors(site: Site, path: str, status: int) -> None:
    done = site.uenvctl("image", "inspect", path)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr


def test_status_tells_what_the_kernel_says(site: Site) -> None:
    outside = site.uenvctl("status")
    assert outside.returncode == 0
    assert "session:  none" in outside.stdout
    assert "there is no socket" in outside.stdout
    inside = site.uenvctl("run", "./app.squashfs", "env", "-i", UENVCTL, "status", "--json")
    facts = json.loads(inside.stdout)
    assert facts["session"] == [
        {
            "source": f"{site.directory}/app.squashfs",
            "mount": site.mount,
            "label": f"{site.directory}/app.squashfs",
        }
    ]
    assert facts["daemon"] is None


@pytest.mark.parametrize("command", [["image", "find"], ["image", "ls"], ["image", "pull", "app"]])
def test_commands_that_need_the_daemon(site: Site, command: list[str]) -> None:
    done = site.uenvctl(*command)
    assert done.returncode == 78
    assert "hint: ask the site's administrators" in done.stderr


def test_nothing_to_pull_of_a_file(site: Site) -> None:
    assert site.uenvctl("image", "pull", "./app.squashfs").returncode == 66


def test_nobody_reads_the_data(site: Site) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = site.uenvctl("image", "inspect", "./app.squashfs", stdout=write_end)
    finally:
        os.close(write_end)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == ""


def test_the_disk_for_the_data_is_full(site: Site) -> None:
    with open("/dev/full", "wb") as full:
        done = site.uenvctl("image", "inspect", "./app.squashfs", stdout=full)
    assert done.returncode == 64
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
