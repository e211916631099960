"""uenvctl with image files where no daemon runs: as an ordinary user, with real mounts; and nothing is left behind."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.fusetools import has_ended, until
from support.images import make_image
from support.users import TestUser, ordinary_user

UENVCTL = str(Path(sys.executable).parent / "uenvctl")
DEADLINE_S = 30.0

pytestmark = pytest.mark.usefixtures("node", "nothing_left")


@dataclass(frozen=True)
class Site:
    """A user, a directory that everybody can traverse, and images in it."""

    user: TestUser
    directory: Path

    @property
    def mount(self) -> str:
        """Where the image ``app`` wants to be mounted."""
        return str(self.directory / "mnt")

    def environ(self, **extra: str) -> dict[str, str]:
        return {**self.user.environ(), "UENVD_SOCKET": str(self.directory / "no-socket"), **extra}

    def popen(
        self, *arguments: str, prefix: Sequence[str] = (), env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[bytes]:
        who = (
            {}
            if prefix
            else {"user": self.user.uid, "group": self.user.gid, "extra_groups": list(self.user.groups)}
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            [*prefix, UENVCTL, *arguments],
            env=env or self.environ(),
            **{"cwd": self.directory, **pipes, **who, **options},
        )

    def uenvctl(
        self, *arguments: str, stdin: bytes = b"", **options: Any
    ) -> subprocess.CompletedProcess[str]:
        with self.popen(*arguments, **options) as process:
            try:
                out, err = process.communicate(stdin, DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(
            process.args, process.returncode, (out or b"").decode(), err.decode()
        )

    def processes(self) -> list[str]:
        """Return the command lines of all processes of the user; zombies wait for init and do not count."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                if _uid_of(pid) == self.user.uid and not has_ended(int(pid)):
                    found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue  # it ended meanwhile
        return found


def _uid_of(pid: str) -> int:
    """Return the real uid of a process; the owner of its directory in /proc may be another. Raises OSError."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("\nUid:\t")[2].split()[0])


def _env_json(name: str, mount: Path, views: dict[str, Any], **more: Any) -> str:
    return json.dumps(
        {"name": name, "description": f"the {name}", "mount": str(mount), "views": views, **more}
    )


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def _make_images(directory: Path) -> None:
    mount = directory / "mnt"
    trees = directory / "trees"
    default = {
        "description": "all of it",
        "env": {
            "version": 1,
            "values": {
                "list": {"PATH": [{"op": "prepend", "value": [f"{mount}/bin"]}]},
                "scalar": {"APP_HOME": str(mount), "CONFLICT": None},
            },
        },
    }
    other = {"env": {"version": 1, "values": {"scalar": {"OTHER": "${@USER@}'s"}}}}
    _write(trees / "app/meta/env.json", _env_json("app", mount, {"default": default, "other": other}))
    _write(trees / "app/bin/hello", "#!/bin/sh\necho hello from the image\n", 0o755)
    _write(trees / "app/bin/headless", "echo I have no interpreter line: $1\n", 0o755)
    _write(trees / "app/bin/lost", "#!/no/such/interpreter\n", 0o755)
    _write(trees / "app/secret", "secret", 0o600)
    (trees / "app/nested").mkdir()
    _write(
        trees / "tool/meta/env.json",
        _env_json(
            "tool",
            mount / "nested",
            {"default": {"env": {"values": {"scalar": {"TOOL": "1"}}}}},
            **{"default-view": "default"},
        ),
    )
    _write(trees / "bare/file", "bare")
    _write(
        trees / "old/meta/env.json",
        _env_json("old", mount, {"v": {"root": f"{mount}/env/v", "activate": f"{mount}/env/v/activate.sh"}}),
    )
    _write(
        trees / "old/env/v/activate.sh",
        f"export PATH={mount}/env/v/bin:/usr/bin:/bin;\nexport OLD=yes; touch /tmp/never\n",
    )
    for name in ("app", "tool", "bare", "old"):
        make_image(trees / name, directory / f"{name}.squashfs")
        (directory / f"{name}.squashfs").chmod(0o644)
    shutil.rmtree(trees)
    _write(directory / "text.squashfs", "this is no image\n" * 100)
    _write(directory / "cut.squashfs", "")
    (directory / "cut.squashfs").write_bytes((directory / "app.squashfs").read_bytes()[:200])
    shutil.copy(directory / "app.squashfs", directory / "private.squashfs")
    (directory / "private.squashfs").chmod(0o600)
    mount.mkdir()
    (directory / "elsewhere").mkdir()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    if os.geteuid() != 0:
        pytest.skip("needs root to make an ordinary user")
    directory = Path(tempfile.mkdtemp(prefix="uenvd-test-", dir="/var/tmp"))
    directory.chmod(0o755)
    try:
        _make_images(directory)
        with ordinary_user(directory, extra_group=True) as user:
            yield Site(user, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def nothing_left(site: Site) -> Iterator[None]:
    yield
    until(lambda: not site.processes(), "no process of the user is left")
    mounted = Path("/proc/self/mountinfo").read_text()
    assert str(site.directory) not in mounted


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
        assert any("uenvd.fuse.worker" in line for line in site.processes())
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


def test_the_server_is_killed(site: Site) -> None:
    script = f"echo ready; read line; cat {site.mount}/bin/hello; echo still here"
    with site.popen("run", "./app.squashfs", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        workers = [
            int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _is_worker(pid, site.user.uid)
        ]
        assert len(workers) == 1
        os.kill(workers[0], signal.SIGKILL)
        until(lambda: has_ended(workers[0]), "the worker ends")
        out, err = process.communicate(b"go\n", timeout=DEADLINE_S)
    assert out == b"still here\n"
    assert b"not connected" in err


def _is_worker(pid: str, uid: int) -> bool:
    try:
        return _uid_of(pid) == uid and b"uenvd.fuse.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_uenvctl_is_killed_while_the_server_starts(site: Site) -> None:
    with site.popen("run", "./app.squashfs", "true") as process:
        until(
            lambda: (
                process.poll() is not None or any("uenvd.fuse.worker" in line for line in site.processes())
            ),
            "the worker starts",
        )
        process.kill()


def test_modules_in_the_working_directory_are_not_the_servers(site: Site) -> None:
    for name in ("json.py", "trio.py", "uenvd.py", "socket.py"):
        _write(site.user.home / name, "raise SystemExit('imported from the working directory')")
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
    _write(site.user.home / ".bashrc", "PS1='mine> '\n")
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
