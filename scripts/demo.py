"""The whole of uenvd on this machine, as `make demo`: everything real, everything private, everything gone at the end.

Starts a registry, a Slurm cluster of two nodes with the plugin, and one uenvd for the login side and for each node. Then, as an ordinary
user who exists only for this purpose: builds the image python-sci/2026.11 (once), pushes, tests and releases it, and works with it.
Every step says what it does, checks what came out and how long it took. Exit status 0: every check held.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT / "tests"))

from support.cluster import Cluster, ClusterError, missing, running_cluster  # noqa: E402
from support.daemon import Daemon, running_daemon  # noqa: E402
from support.registry import docker_registry  # noqa: E402
from support.users import TestUser, ordinary_user  # noqa: E402

RECIPE = CHECKOUT / "recipes/python-sci/2026.11"
CACHE = Path(os.environ.get("UENVD_CACHE_DIR", "/var/tmp/uenvd-demo-cache"))
MOUNT = Path("/user-environment")
PROGRAMS = Path(sys.prefix).resolve() / "bin"
"""Resolved: .venv may be a link in a checkout that job users cannot enter."""
UENV = "python-sci/2026.11"
SYSTEM, UARCH, PIPELINE = "demo", "zen3", "4711"
COMMAND_S = 300.0
RESULT = "parallel and serial result are equal"


class DemoError(Exception):
    """A step went wrong; the message says which check and what was there instead."""


def check(holds: bool, what: str, found: str = "") -> None:
    """Print what was checked, or raise `DemoError`."""
    if not holds:
        raise DemoError(
            f"this does not hold: {what}" + (f"\n{textwrap.indent(found.strip(), '    ')}" if found else "")
        )
    print(f"    ✓ {what}", flush=True)


def show(command: str, output: str) -> None:
    """Print a command as a user would type it, and what it answered."""
    print(f"    $ {command}")
    print(textwrap.indent(output.rstrip(), "      "), flush=True)


class Steps:
    """Numbered steps with their durations."""

    def __init__(self) -> None:
        self.count = 0
        self.began_s = time.monotonic()

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Announce a step, and say how long it took."""
        self.count += 1
        print(f"\n{self.count}. {title}", flush=True)
        began_s = time.monotonic()
        yield
        print(f"    {time.monotonic() - began_s:.1f} s", flush=True)


class Demo:
    """The running parts, and what the user does with them."""

    def __init__(self, workdir: Path, resources: contextlib.ExitStack) -> None:
        self.workdir = workdir
        self.resources = resources
        self.steps = Steps()
        self.registry = ""
        self.digest = ""
        self.cluster: Cluster
        self.user: TestUser
        self.daemons: dict[str, Daemon] = {}

    # ---- the site

    def release(self) -> None:
        """Build, push, test and release the image as somebody of the site's staff would: by one command, as an ordinary user."""
        # Where the user can read it, wherever the checkout is.
        shutil.copytree(RECIPE, self.cluster.scratch / "recipes" / UENV)
        images = CACHE / "images"
        images.mkdir(parents=True, exist_ok=True)
        with lent(CACHE, self.user):
            done = self.shell(
                f"uenvd-publish run recipes/{UENV} --system {SYSTEM} --uarch {UARCH} --pipeline {PIPELINE}"
                f" --slurm --deploy v1 --out {images} --cache {CACHE}",
                {"UENVD_REGISTRY": self.registry},
            )
        self.digest = done.stdout.strip()
        check(done.returncode == 0 and self.digest.startswith("sha256:"), "the registry has it", done.stderr)
        check("8 of 8 tests passed" in done.stderr, "ReFrame's jobs passed, on two nodes", done.stderr)
        done = self.shell(
            f"uenvd-publish show {UENV}:v1 --system {SYSTEM} --uarch {UARCH}",
            {"UENVD_REGISTRY": self.registry},
        )
        check(
            done.returncode == 0 and self.digest in done.stdout and "passed" in done.stdout,
            "it is released, with the verdict of its tests",
            done.stdout + done.stderr,
        )

    def start_daemons(self, service_user: TestUser) -> None:
        """Start a uenvd for the login side and for each node, with a cache each."""
        # Jobs that test an image get it from the namespace of builds.
        extra = f"uarch: {UARCH}\nworker: {{user: {service_user.name}}}\nnamespaces: [deploy, build]\n"
        for name in ("login", *self.cluster.nodes):
            # What a node sees at the login side's path is its own: the same path leads to another daemon everywhere.
            directory = self.cluster.control_dir if name == "login" else self.cluster.node_control_dir(name)
            self.daemons[name] = self.resources.enter_context(
                running_daemon(directory, self.registry, system=SYSTEM, extra=extra)
            )

    @property
    def control_socket(self) -> Path:
        """The path at which the login side and each node find their daemon."""
        return self.cluster.control_dir / "run/control"

    # ---- the user

    def run(
        self,
        command: Sequence[str],
        shown: str,
        *,
        input: str | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as the user on the login side; show it and its output."""
        environment = {
            "PATH": f"{PROGRAMS}:/usr/local/bin:/usr/bin:/bin",
            "UENVD_SOCKET": str(self.control_socket),
            **(variables or {}),
        }
        done = self.cluster.run(command, user=self.user, env=environment, input=input, timeout_s=COMMAND_S)
        show(shown, done.stdout + done.stderr)
        return done

    def shell(
        self, line: str, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a line as the user would type it."""
        return self.run(["bash", "-c", line], line, variables=variables)

    def parallel_job(self) -> None:
        """Run the MPI program on both nodes."""
        done = self.shell(
            f"srun -N2 -n4 --ntasks-per-node=2 --uenv={UENV} --view=default --mpi=pmi2 python3 heat.py"
        )
        check(
            done.returncode == 0 and RESULT in done.stdout,
            "4 ranks computed what one process computes",
            done.stderr,
        )
        nodes = {
            line.split(" on ")[1].split(":")[0]
            for line in done.stdout.splitlines()
            if line.startswith("rank ")
        }
        check(nodes == set(self.cluster.nodes), "the ranks were on both nodes", done.stdout)
        check(
            "from /user-environment/env/default/bin/python3" in done.stdout,
            "Python is the image's",
            done.stdout,
        )

    def mounts(self) -> None:
        """Look at the mount point inside a job and outside."""
        line = f"srun -n1 --uenv={UENV} findmnt -n -o TARGET,SOURCE,FSTYPE,OPTIONS {MOUNT}"
        done = self.shell(line)
        check(
            " fuse" in done.stdout and f"uenvd:{self.digest}" in done.stdout,
            "inside it is a FUSE mount",
            done.stdout,
        )
        done = self.shell(f"srun -n1 findmnt {MOUNT}; ls -A {MOUNT} | wc -l")
        check(done.stdout.strip() == "0", "in a job without --uenv it is an empty directory", done.stdout)
        everywhere = Path("/proc/self/mountinfo").read_text(errors="replace")
        check(
            str(MOUNT) not in everywhere and not any(MOUNT.iterdir()),
            "on the host it is an empty directory",
            everywhere,
        )

    def refusal(self) -> None:
        """Ask for what does not exist."""
        done = self.shell("srun -N2 --uenv=python-sci/2027.01 hostname")
        check(
            done.returncode != 0 and "python-sci/2027.01" in done.stderr,
            "it is refused before anything is queued",
        )
        check(self.cluster.jobs() == [], "no job is left")

    def batch_job(self) -> None:
        """Submit a script whose own sruns inherit the environment."""
        done = self.shell("sbatch --parsable nested.sbatch")
        check(done.returncode == 0, "it is submitted", done.stderr)
        job = self.cluster.wait_job(int(done.stdout.split(";")[0]), COMMAND_S)
        output = (self.cluster.scratch / "heat.out").read_text()
        show("cat heat.out", output)
        check(job.state == "COMPLETED" and job.exit_code == "0:0", "the job is COMPLETED 0:0", job.state)
        check(
            "python3 is /user-environment/env/default/bin/python3" in output,
            "the batch step has the environment",
            output,
        )
        check(RESULT in output, "so has the srun in it", output)

    def run_command(self) -> None:
        """Run commands without Slurm."""
        done = self.shell(f"uenvctl run {UENV} --view default -- python3 heat.py")
        check(done.returncode == 0 and RESULT in done.stdout, "it runs on the login node", done.stderr)
        done = self.shell(f"uenvctl run {UENV} --view default -- mpiexec -n 2 python3 heat.py")
        check(done.returncode == 0 and RESULT in done.stdout, "with MPI, too", done.stderr)
        done = self.shell(f"uenvctl run {UENV} --view default -- python3 -c 'raise SystemExit(7)'; echo $?")
        check(done.stdout.strip() == "7", "the command's exit status comes back", done.stdout)

    def session(self) -> None:
        """Use a shell, its commands coming from a script."""
        script = (
            "command -v python3\nfindmnt -n -o FSTYPE /user-environment\nuenvctl status\nid -un\nexit 3\n"
        )
        done = self.run(
            ["bash", "-c", f"uenvctl start {UENV} --view=default; echo status $?"],
            f"printf '{script.encode('unicode_escape').decode()}' | uenvctl start {UENV} --view=default; echo status $?",
            input=script,
        )
        lines = done.stdout.splitlines()
        check("/user-environment/env/default/bin/python3" in lines, "the shell has the view", done.stdout)
        check(any(line.startswith("fuse") for line in lines), "and the mount", done.stdout)
        check(self.user.name in lines, "the user is still himself", done.stdout)
        answers = any(line.startswith("uenvd:") and f"system {SYSTEM}" in line for line in lines)
        check(answers, "and can ask his uenvd", done.stdout)
        check(lines[-1] == "status 3", "the shell's exit status comes back", done.stdout)

    def nothing_left(self) -> None:
        """See that jobs and sessions took everything with them."""
        self.cluster.wait_idle()
        check(set(self.cluster.node_states().values()) == {"idle"}, "both nodes are idle")
        check(not any(MOUNT.iterdir()), f"{MOUNT} is empty")
        owner = subprocess.run(
            ["pgrep", "-u", str(self.user.uid), "-a"], capture_output=True, text=True, check=False
        )
        check(owner.stdout == "", "the user has no process", owner.stdout)

    # ---- the whole

    def play(self) -> None:
        """Do everything, in order."""
        step = self.steps.step
        with step("Start a registry (docker-registry)"):
            registry = self.resources.enter_context(docker_registry(self.workdir / "registry"))
            self.registry = registry.url
            print(f"    {self.registry}")
        with step(
            "Start Slurm with two nodes that load the plugin, and a uenvd for the login side and for each node"
        ):
            self.user = self.resources.enter_context(ordinary_user(self.workdir))
            service_user = self.resources.enter_context(ordinary_user(self.workdir))
            slurm = self.workdir / "slurm"
            slurm.mkdir()
            # Job users load the plugin, and they may not be able to reach this checkout.
            plugin = shutil.copy(CHECKOUT / "slurm-plugin/uenvd_spank.so", slurm)
            self.cluster = self.resources.enter_context(
                running_cluster(nodes=2, workdir=slurm, namespaces=True)
            )
            self.cluster.set_plugstack(f"required {plugin} socket={self.control_socket}")
            self.start_daemons(service_user)
            for name in ("heat.py", "nested.sbatch"):
                shutil.copy(CHECKOUT / "scripts/demo" / name, self.cluster.scratch)
            check(set(self.cluster.node_states().values()) == {"idle"}, "both nodes are idle")
            check(len(self.daemons) == 3, "three daemons serve")
        with step(
            f"Build {UENV} (Python, numpy, scipy, mpi4py, MPICH), push, test as jobs, release: as an ordinary user"
        ):
            self.release()
        with step("What is there?"):
            done = self.shell("uenvctl image ls")
            check(
                done.returncode == 0 and "python-sci/2026.11" in done.stdout,
                "the image is listed",
                done.stderr,
            )
        with step("An MPI program on 4 ranks over 2 nodes"):
            self.parallel_job()
        with step(f"{MOUNT} inside a job, and outside"):
            self.mounts()
        with step("A batch script with an srun in it"):
            self.batch_job()
        with step("An image that does not exist"):
            self.refusal()
        with step("Without Slurm: uenvctl run"):
            self.run_command()
        with step("An interactive session, scripted: uenvctl start"):
            self.session()
        with step("What is left of it all?"):
            self.nothing_left()


def requirements() -> str:
    """Say what keeps the demo from running here; empty when nothing does."""
    if os.geteuid() != 0:
        return "the demo needs root: it makes users, mounts and a Slurm cluster"
    if not Path("/dev/fuse").exists():
        return "there is no /dev/fuse (modprobe fuse; in a container: --device /dev/fuse)"
    if not (CHECKOUT / "slurm-plugin/uenvd_spank.so").exists():
        return "the plugin is not built: make setup"
    return missing()


@contextlib.contextmanager
def mount_point() -> Iterator[None]:
    """Make the mount point if it is missing, and remove it again."""
    made = not MOUNT.exists()
    if made:
        MOUNT.mkdir(mode=0o755)
    elif any(MOUNT.iterdir()):
        raise DemoError(f"{MOUNT} is in use: it is not empty")
    try:
        yield
    finally:
        if made:
            MOUNT.rmdir()


@contextlib.contextmanager
def lent(directory: Path, user: TestUser) -> Iterator[None]:
    """Give a directory and all in it to a user for a while; to root again in the end, as the user will not exist any more."""

    def give(uid: int, gid: int) -> None:
        for path in (directory, *directory.rglob("*")):
            os.chown(path, uid, gid, follow_symlinks=False)

    give(user.uid, user.gid)
    try:
        yield
    finally:
        give(0, 0)


def keep_logs(workdir: Path) -> Path:
    """Copy the logs out of the working directory before it is removed; return where they are."""
    kept = Path(tempfile.mkdtemp(prefix="uenvd-demo-logs-"))
    for pattern in ("**/*.log", "slurm/log/*", "slurm/scratch/*.out"):
        for path in workdir.glob(pattern):
            if path.is_file():
                shutil.copy(path, kept / str(path.relative_to(workdir)).replace("/", "-"))
    return kept


def explain(error: BaseException) -> str:
    """Return one line or more on why it ended."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(error) or type(error).__name__


def stop(number: int, _frame: FrameType | None) -> None:
    """End like Ctrl-C, so that everything is cleaned up."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    """Return the exit status."""
    reason = requirements()
    if reason:
        print(f"demo: {reason}", file=sys.stderr)
        return 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    began_s = time.monotonic()
    os.umask(0o022)
    try:
        with tempfile.TemporaryDirectory(prefix="uenvd-demo-", ignore_cleanup_errors=True) as name:
            workdir = Path(name)
            workdir.chmod(0o755)
            with contextlib.ExitStack() as resources:
                try:
                    resources.enter_context(mount_point())
                    Demo(workdir, resources).play()
                except BaseException as error:
                    print(
                        f"\nFAILED: {explain(error)}\nThe logs are in {keep_logs(workdir)}",
                        file=sys.stderr,
                        flush=True,
                    )
                    raise
                finally:
                    # From here on nothing interrupts the cleaning up.
                    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                        signal.signal(number, signal.SIG_IGN)
                    print("\nStopping everything", flush=True)
    except (KeyboardInterrupt, DemoError, ClusterError, RuntimeError, OSError, subprocess.SubprocessError):
        return 1
    print(f"\nDone: everything held, nothing is left. {time.monotonic() - began_s:.1f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
