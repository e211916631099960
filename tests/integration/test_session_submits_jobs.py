"""Slurm's commands inside a session of uenvctl, and login shells in job steps: real cluster, real uenvd on every side, an ordinary user."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.cluster import Cluster, Result, missing, running_cluster
from support.daemon import Daemon, running_daemon
from support.publishing import Publisher, env_json, make_squashfs, simple_image
from support.sessions import CHECKOUT, MOUNT, UENVCTL, view_values
from support.slurmsite import built_plugin
from support.terminal import terminal
from support.users import TestUser, ordinary_user

pytestmark = pytest.mark.usefixtures("node")

EXTRA = "resolve: {ttl: 0s}\nmounts: {linger: 100ms}\n"
PROFILE = 'PATH=/usr/local/bin:/usr/bin:/bin\nexport PATH\nfor i in /etc/profile.d/*.sh; do . "$i"; done\n'
VIEW = f"{MOUNT}/bin:{MOUNT}/more bin"
SYSTEM = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True)
class Centre:
    """A login node and a compute node, whose login shells reset PATH and have the hooks."""

    cluster: Cluster
    user: TestUser
    login: Daemon

    def session(self, *command: str, **env: str) -> Result:
        """Run a command in a session on the login node."""
        return self.cluster.run(
            [UENVCTL, "run", "--view=default", "app/1.0", "--", *command],
            user=self.user,
            env={"UENVD_SOCKET": str(self.login.socket_path), **env},
        )

    def srun(self, *command: str) -> Result:
        return self.cluster.srun("--uenv=app/1.0", "--view=default", *command, user=self.user)


@pytest.fixture(scope="module")
def centre(node: None) -> Iterator[Centre]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    plugin = built_plugin()
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(running_cluster(nodes=1, namespaces=True, shared=True))
        user = stack.enter_context(ordinary_user(cluster.dir))
        copied = cluster.dir / "uenvd_spank.so"
        copied.write_bytes(plugin.read_bytes())
        copied.chmod(0o755)
        cluster.set_plugstack(f"required {copied} socket={cluster.control_dir / 'control'}")
        registry = f"oci-layout:{cluster.dir / 'layout'}"
        publisher = Publisher(registry)
        image = make_squashfs(
            cluster.dir / "app.squashfs",
            {"bin/say": "#!/bin/sh\necho app\n", "word": "app"},
            meta=env_json("app", views={"default": view_values()}),
        )
        publisher.push(image, "app/1.0", "v1")
        publisher.push(simple_image(cluster.dir / "other.squashfs", "other", "other"), "other/1.0", "v1")
        login = stack.enter_context(
            running_daemon(
                cluster.dir / "login", registry, extra=EXTRA, control=cluster.control_dir / "control"
            )
        )
        control = cluster.node_control_dir("node1") / "control"
        stack.enter_context(running_daemon(cluster.dir / "n1", registry, extra=EXTRA, control=control))
        _give_login_shells(cluster)
        yield Centre(cluster, user, login)
        cluster.cancel_all()


def _give_login_shells(cluster: Cluster) -> None:
    """Let /etc/profile of the compute node be one that resets PATH, with the hooks below it."""
    etc = cluster.dir / "login-shells"
    (etc / "profile.d").mkdir(parents=True)
    shutil.copy(CHECKOUT / "etc/zz-uenvd.sh", etc / "profile.d")
    (etc / "profile").write_text(PROFILE)
    pid = (cluster.dir / "run" / "slurmd.node1.pid").read_text().strip()
    script = f"mount --bind {etc}/profile /etc/profile && mount --bind {etc}/profile.d /etc/profile.d"
    cluster_pids = cluster._in_pids(["nsenter", "-t", pid, "-m", "sh", "-c", script])
    assert cluster_pids.returncode == 0, cluster_pids.stderr


# --- inside a session on the login node ---------------------------------------------------------------------------------------------------


def test_squeue_and_sinfo(centre: Centre) -> None:
    done = centre.session("sh", "-c", "squeue -h && sinfo -h -o %T")
    assert (done.returncode, done.stdout, done.stderr) == (0, "idle\n", "")


def test_sbatch(centre: Centre) -> None:
    script = centre.cluster.scratch / "job.sh"
    script.write_text("#!/bin/bash\necho ran as $(id -u)\n")
    done = centre.session("sbatch", "--parsable", "--uenv=none", str(script))
    assert done.returncode == 0, done.stderr
    job = centre.cluster.wait_job(int(done.stdout.split(";")[0]))
    assert job.state == "COMPLETED"
    output = centre.cluster.scratch / f"slurm-{job.id}.out"
    assert output.read_text() == f"ran as {centre.user.uid}\n"


def test_srun_with_another_image(centre: Centre) -> None:
    done = centre.session(
        "srun", "-Q", "--uenv=other/1.0", "--view=default", "sh", "-c", f"say; cat {MOUNT}/word"
    )
    assert (done.returncode, done.stdout) == (0, "other\nother"), done.stderr


def test_salloc(centre: Centre) -> None:
    step = ("srun", "-Q", "--uenv=other/1.0", "--view=default", "say")
    done = centre.session("salloc", "-Q", "--uenv=none", *step)
    assert (done.returncode, done.stdout) == (0, "other\n"), done.stderr


def test_what_salloc_was_given_counts_in_its_shell(centre: Centre) -> None:
    steps = f"srun -Q cat {MOUNT}/word; echo; srun -Q --uenv=app/1.0 cat {MOUNT}/word"
    done = centre.session("salloc", "-Q", "--uenv=other/1.0", "sh", "-c", steps)
    assert (done.returncode, done.stdout) == (0, "other\napp"), done.stderr
    none = centre.session("salloc", "-Q", "--uenv=none", "srun", "-Q", "ls", "-A", MOUNT)
    assert (none.returncode, none.stdout) == (0, ""), none.stderr


def test_a_session_started_in_an_allocation_counts_in_it(centre: Centre) -> None:
    session = (UENVCTL, "--socket", str(centre.login.socket_path), "run", "app/1.0", "--")
    steps = f"srun -Q cat {MOUNT}/word; {' '.join(session)} srun -Q cat {MOUNT}/word"
    allocate = ["salloc", "-Q", "--uenv=other/1.0", "sh", "-c", steps]
    done = centre.cluster.run(allocate, user=centre.user)
    assert (done.returncode, done.stdout) == (0, "otherapp"), done.stderr


def test_a_label_that_does_not_exist(centre: Centre) -> None:
    done = centre.session("srun", "-Q", "--uenv=nosuch/1", "true")
    assert done.returncode != 0
    assert "no image is called 'nosuch/1'" in done.stderr


# --- login shells in steps ----------------------------------------------------------------------------------------------------------------


def test_a_login_shell_in_a_step(centre: Centre) -> None:
    done = centre.srun("bash", "-lc", 'echo "$PATH"; say')
    assert done.stdout == f"{VIEW}:{SYSTEM}:{MOUNT}/last\napp\n", done.stderr


def test_a_batch_script_with_a_login_shell_and_nested_steps(centre: Centre) -> None:
    script = (
        "#!/bin/bash -l\n"
        'echo "$PATH"\n'
        "export PATH=/mine:$PATH\n"
        "srun -Q bash -c 'echo \"$PATH\"'\n"
        "srun -Q bash -lc 'echo \"$PATH\"'\n"
        "srun -Q bash -c 'srun -Q --overlap bash -lc \"say; echo \\$WORD\"'\n"
    )
    job = centre.cluster.submit(script, "--uenv=app/1.0", "--view=default", user=centre.user)
    assert centre.cluster.wait_job(job).state == "COMPLETED"
    output = (centre.cluster.scratch / f"slurm-{job}.out").read_text()
    restored = f"{VIEW}:{SYSTEM}:{MOUNT}/last"
    assert output.splitlines() == [restored, f"/mine:{restored}", restored, "app", "hello"]


def test_an_interactive_login_shell(centre: Centre) -> None:
    user = centre.user
    become = ["setpriv", "--reuid", str(user.uid), "--regid", str(user.gid), "--clear-groups"]
    command = [*become, "srun", "-Q", "--uenv=app/1.0", "--view=default", "--pty", "bash", "-l"]
    environ = centre.cluster.environ(user, {"TERM": "dumb", "PS1": "> "})
    with terminal(command, environ, centre.cluster.scratch) as running:
        running.type('echo "path=$PATH"; say; exit 4')
        running.expect(f"^path={VIEW}:{SYSTEM}:{MOUNT}/last")
        running.expect("^app")
        assert running.finish() == 4


def test_without_an_image_a_login_shell_is_as_ever(centre: Centre) -> None:
    done = centre.cluster.srun(
        "bash", "-lc", 'echo "$PATH"', user=centre.user, env={"UENV_RESTORE": "PATH=/x"}
    )
    assert done.stdout == f"{SYSTEM}\n"


def test_the_daemon_remembers_what_a_job_used(centre: Centre) -> None:
    done = centre.srun("sh", "-c", "echo $SLURM_JOB_ID")
    job = int(done.stdout)
    socket = str(centre.cluster.node_control_dir("node1") / "control")
    asked = subprocess.run(
        [UENVCTL, "--socket", socket, "status", "--json"], capture_output=True, text=True, check=False
    )
    assert asked.returncode == 0
    from support.daemon import Client

    with Client(Path(socket)) as client:
        (step,) = client.ask("job", job=job)["steps"]
    assert (step["uid"], step["step"], step["views"]) == (centre.user.uid, 0, ["default"])
    assert step["label"].startswith("app/1.0:v1")
    assert step["digest"].startswith("sha256:")


def test_which_image_a_task_of_an_array_used(centre: Centre) -> None:
    done = centre.cluster.sbatch(
        "#!/bin/bash\necho $SLURM_JOB_ID\n", "--wait", "--array=3-4", "--uenv=app/1.0", user=centre.user
    )
    assert done.returncode == 0, done.stderr
    array = int(done.stdout.splitlines()[0])
    socket = str(centre.cluster.node_control_dir("node1") / "control")
    for task in (3, 4):
        (number,) = (centre.cluster.scratch / f"slurm-{array}_{task}.out").read_text().split()
        asked = centre.cluster.run([UENVCTL, "--socket", socket, "job", f"{array}_{task}", "--json"])
        assert asked.returncode == 0, asked.stderr
        answer = json.loads(asked.stdout)
        assert (answer["job"], [step["label"] for step in answer["steps"]]) == (
            int(number),
            [answer["steps"][0]["label"]],
        )
        assert answer["steps"][0]["label"].startswith("app/1.0:v1")
    nobodys = centre.cluster.run([UENVCTL, "--socket", socket, "job", f"{array}_9"])
    assert (nobodys.returncode, nobodys.stdout) == (66, "")
    assert "neither squeue nor sacct knows" in nobodys.stderr


def test_the_doctor_looks_for_the_plugin(centre: Centre) -> None:
    lines = centre.cluster.conf_file.with_name("plugstack.conf").read_text().splitlines()

    def slurm() -> tuple[str, str]:
        command = [UENVCTL, "--socket", str(centre.login.socket_path), "doctor", "--json"]
        checks = json.loads(centre.cluster.run(command, user=centre.user).stdout)["checks"]
        (one,) = [check for check in checks if check["name"] == "slurm"]
        return one["state"], one["what"]

    assert slurm() == ("ok", "srun has the option --uenv")
    try:
        centre.cluster.set_plugstack()
        assert slurm() == ("note", "srun has no option --uenv")
    finally:
        centre.cluster.set_plugstack(*lines)
