"""A private Slurm cluster on this machine: munged, slurmctld and N slurmd, gone without a trace when it is closed.

All its processes live in one pid namespace whose init ends when our end of a pipe closes, also when we are killed: nothing a job
does (daemonising, ignoring signals) outlives the cluster. The login side is the caller's own namespace; nodes may get a
mount and UTS namespace each, so that they differ like hosts: own host name, own ``/etc/hosts``, own directory of control sockets.

Layout of ``cluster.dir`` (everybody may traverse it):
  ``control/``        of the login side, and of every node without namespaces: ``socket=`` in plugstack.conf points into it
  ``nodes/<name>/``   what node <name> sees at ``control/`` when ``namespaces`` is set
  ``scratch/``        mode 1777, the jobs' working directory
  ``log/``            of all daemons
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from support.users import TestUser

_PROGRAMS = (
    "munged",
    "munge",
    "slurmctld",
    "slurmd",
    "srun",
    "sbatch",
    "salloc",
    "scontrol",
    "sinfo",
    "unshare",
    "nsenter",
)
_PORTS = range(20000, 30000)  # below Linux's ephemeral range (32768..60999)
_START_S = 20.0
_STOP_S = 10.0
_POLL_S = 0.01
_COMMAND_S = 60.0
_TERMINAL = frozenset(
    {
        "COMPLETED",
        "FAILED",
        "CANCELLED",
        "TIMEOUT",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "BOOT_FAIL",
        "DEADLINE",
        "PREEMPTED",
    }
)

Result = subprocess.CompletedProcess[str]


class ClusterError(RuntimeError):
    """The cluster did not start or did not answer; the message ends with the daemons' logs."""


@dataclass(frozen=True)
class Job:
    """What ``scontrol show job`` says. ``exit_code`` is ``status:signal``."""

    id: int
    state: str
    exit_code: str
    reason: str
    fields: Mapping[str, str]

    @property
    def finished(self) -> bool:
        """Whether no more will happen to it."""
        return self.state in _TERMINAL


def missing() -> str:
    """Say why no cluster can run on this machine; empty when one can."""
    if os.geteuid() != 0:
        return "a Slurm cluster needs root (mount and pid namespaces)"
    absent = [name for name in _PROGRAMS if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)} (Debian: slurm-wlm munge util-linux)" if absent else ""


def poll(condition: Callable[[], bool], timeout_s: float, *, interval_s: float = _POLL_S) -> bool:
    """Return True as soon as the condition holds, False when it did not within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval_s)
    return True


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in random.sample(_PORTS, k=len(_PORTS)):
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise ClusterError("no free TCP ports")


class Cluster:
    """A running cluster, as a context manager.

    ``nodes``: how many, named ``node1`` ...; ``cpus`` each claims (not what the machine has).
    ``plugstack``: lines of plugstack.conf (see `set_plugstack`).
    ``namespaces``: give each node its own mount and UTS namespace.
    ``shared``: give the nodes shared mount propagation, what hosts with systemd have: a mount that a plugin forgets to contain is
    then seen by slurmd (`node_mounts`) and by all other jobs.
    ``workdir``: an existing directory that everybody can traverse (default: a temporary one, removed at the end).
    """

    def __init__(
        self,
        *,
        nodes: int = 2,
        cpus: int = 8,
        workdir: Path | None = None,
        plugstack: Sequence[str] = (),
        namespaces: bool = False,
        shared: bool = False,
        conf: Sequence[str] = (),
    ) -> None:
        reason = missing()
        if reason:
            raise ClusterError(reason)
        self.nodes = tuple(f"node{number}" for number in range(1, nodes + 1))
        self.shared = shared
        self.namespaces = namespaces
        self._cpus = cpus
        self._conf_extra = tuple(conf)
        self._own_dir = workdir is None
        self.dir = Path(tempfile.mkdtemp(prefix="uenvd-slurm-")) if workdir is None else workdir
        self.dir.chmod(0o755)
        self.control_dir = self.dir / "control"
        self.scratch = self.dir / "scratch"
        self.log_dir = self.dir / "log"
        self.conf_file = self.dir / "etc" / "slurm.conf"
        self._plugstack = tuple(plugstack)
        self._init: subprocess.Popen[bytes] | None = None
        self._init_pid = 0
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._slurmds: dict[str, subprocess.Popen[bytes]] = {}
        self._clients: list[subprocess.Popen[str]] = []

    # ---- life

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start all daemons and wait until every node is idle. Raises `ClusterError`."""
        self._write_files()
        self._start_init()
        run = self.dir / "run"
        munge_socket = run / "munge.socket"
        self._daemon(
            "munged",
            [
                *("munged", "-F", f"--key-file={self.dir}/etc/munge.key", f"--socket={munge_socket}"),
                *(f"--pid-file={run}/munged.pid", f"--log-file={self.log_dir}/munged.log"),
                *(f"--seed-file={run}/munged.seed", "--num-threads=10"),
            ],
        )
        self._await("munged", lambda: self._ok(["munge", "-n", f"--socket={munge_socket}"]))
        self._daemon("slurmctld", ["slurmctld", "-D", "-c", "-i"])
        # A slurmd that finds no controller sleeps a second before it asks again.
        self._await("slurmctld", lambda: self._ok(["scontrol", "ping"]))
        for node in self.nodes:
            self.start_node(node)
        self._await("the nodes", lambda: all(state == "idle" for state in self.node_states().values()))

    def stop(self) -> None:
        """End every process of the cluster and remove its files; never raises, may be called twice."""
        for client in self._clients:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(client.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                client.wait(_STOP_S)
            for stream in (client.stdin, client.stdout, client.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        self._clients.clear()
        if self._init is not None:
            if self._init.stdin is not None:
                self._init.stdin.close()
            try:
                self._init.wait(
                    _STOP_S
                )  # the kernel has killed and reaped the whole namespace when this returns
            except subprocess.TimeoutExpired:
                self._init.kill()
                self._init.wait()
            self._init = None
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(_STOP_S)
        self._daemons.clear()
        self._slurmds.clear()
        if self._own_dir:
            shutil.rmtree(self.dir, ignore_errors=True)

    def start_node(self, node: str) -> None:
        """Start this node's slurmd (also again after `kill_node`)."""
        command = ["slurmd", "-D", "-N", node]
        if self.namespaces:
            share = (
                "mount --make-rshared / && " if self.shared else ""
            )  # after the binds, or they would reach other nodes
            script = (
                'hostname "$1" && mount --bind "$2/nodes/$1" "$2/control" && mount --bind "$2/etc/hosts" /etc/hosts'
                f" && {share}shift 2 && exec" + ' "$@"'
            )
            command = [
                *("unshare", "--mount", "--uts", "--propagation", "private"),
                *("bash", "-c", script, "bash", node, str(self.dir), *command),
            ]
        self._slurmds[node] = self._daemon(f"slurmd.{node}", command)

    def kill_node(self, node: str) -> None:
        """Kill this node's slurmd at once; its jobs' slurmstepd and tasks live on."""
        self._in_pids(["bash", "-c", f"kill -9 $(cat {self.dir}/run/slurmd.{node}.pid)"])
        self._slurmds.pop(node).wait(_STOP_S)

    # ---- what it is made of

    def node_control_dir(self, node: str) -> Path:
        """Return the directory of control sockets that a job on this node sees at ``control_dir``."""
        return self.dir / "nodes" / node if self.namespaces else self.control_dir

    @property
    def control_socket(self) -> Path:
        """Where plugstack.conf says that uenvd listens (the same path on the login side and on all nodes)."""
        return self.control_dir / "control"

    def set_plugstack(self, *lines: str) -> None:
        """Replace plugstack.conf; takes effect for the next command, nothing restarts."""
        target = self.conf_file.with_name("plugstack.conf")
        fresh = target.with_suffix(".new")
        fresh.write_text("".join(f"{line}\n" for line in lines))
        fresh.rename(target)

    def log(self, node: str) -> str:
        """Return the log of this node's slurmd and its steps."""
        path = self.log_dir / f"slurmd.{node}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def node_mounts(self, node: str) -> str:
        """Return the mount table that slurmd of this node has, as in ``/proc/self/mountinfo``."""
        pid = (self.dir / "run" / f"slurmd.{node}.pid").read_text().strip()
        return self._in_pids(["cat", f"/proc/{pid}/mountinfo"]).stdout

    def processes(self) -> list[str]:
        """Return the command lines of all processes in the cluster's pid namespace."""
        return self._in_pids(["ps", "-eo", "pid=,args="]).stdout.splitlines()

    def logs(self, tail_bytes: int = 4000) -> str:
        """Return the ends of all logs, for a message."""
        parts = []
        for path in sorted(self.log_dir.glob("*")):
            text = path.read_text(errors="replace")[-tail_bytes:].strip()
            if text:
                parts.append(f"--- {path.name}\n{text}")
        return "\n".join(parts)

    # ---- commands

    def environ(self, user: TestUser | None = None, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of a login shell on the login node; ``user`` None is root."""
        base = (
            user.environ() if user else {"PATH": os.environ.get("PATH", ""), "HOME": "/root", "USER": "root"}
        )
        return {**base, "SLURM_CONF": str(self.conf_file), **(extra or {})}

    def run(
        self,
        command: Sequence[str],
        *,
        user: TestUser | None = None,
        env: Mapping[str, str] | None = None,
        input: str | None = None,
        timeout_s: float = _COMMAND_S,
        cwd: Path | None = None,
    ) -> Result:
        """Run a command on the login node to its end; its status is the caller's to check."""
        return subprocess.run(
            command,
            input="" if input is None else input,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            cwd=cwd or self.scratch,
            env=self.environ(user, env),
            user=user.uid if user else None,
            group=user.gid if user else None,
            extra_groups=user.groups if user else None,
        )

    def popen(
        self,
        command: Sequence[str],
        *,
        user: TestUser | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[str]:
        """Start a command on the login node, in a process group of its own; killed at the latest when the cluster stops."""
        client = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd or self.scratch,
            env=self.environ(user, env),
            user=user.uid if user else None,
            group=user.gid if user else None,
            extra_groups=user.groups if user else None,
            process_group=0,
        )
        self._clients.append(client)
        return client

    def srun(self, *args: str, user: TestUser | None = None, **options: object) -> Result:
        """Run ``srun -Q ARGS`` (quiet: no "queued and waiting" while an earlier job completes); options as for `run`."""
        return self.run(["srun", "-Q", *args], user=user, **options)  # type: ignore[arg-type]

    def sbatch(self, script: str, *args: str, user: TestUser | None = None, **options: object) -> Result:
        """Run ``sbatch --parsable ARGS`` with this script text on stdin; stdout is the job's number."""
        return self.run(["sbatch", "--parsable", *args], user=user, input=script, **options)  # type: ignore[arg-type]

    def submit(self, script: str, *args: str, user: TestUser | None = None, **options: object) -> int:
        """Submit a batch script that must be accepted, return the job's number. Raises `ClusterError`."""
        done = self.sbatch(script, *args, user=user, **options)
        if done.returncode != 0:
            raise ClusterError(f"sbatch failed ({done.returncode}): {done.stderr}")
        return int(done.stdout.split(";")[0])

    def job(self, job_id: int) -> Job:
        """Return what the controller says about the job. Raises `ClusterError` when it does not know it."""
        done = self.run(["scontrol", "show", "job", "-o", str(job_id)])
        if done.returncode != 0:
            raise ClusterError(f"job {job_id}: {done.stderr.strip()}")
        fields = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
        return Job(job_id, fields["JobState"], fields["ExitCode"], fields["Reason"], fields)

    def job_state(self, job_id: int) -> str:
        """Return the job's state, for example ``RUNNING``."""
        return self.job(job_id).state

    def wait_job(self, job_id: int, timeout_s: float = 30.0) -> Job:
        """Wait until the job is finished. Raises `ClusterError`."""
        if not poll(lambda: self.job(job_id).finished, timeout_s, interval_s=0.05):
            raise ClusterError(f"job {job_id} is {self.job_state(job_id)} after {timeout_s} s\n{self.logs()}")
        return self.job(job_id)

    def jobs(self) -> list[int]:
        """Return the numbers of all jobs that are queued, running or completing."""
        return [int(word) for word in self.run(["squeue", "-h", "-o", "%A"]).stdout.split()]

    def node_states(self) -> dict[str, str]:
        """Return each node's state as sinfo names it: ``idle``, ``mixed``, ``drained`` ..."""
        lines = self.run(["sinfo", "-h", "-N", "-o", "%N %T"]).stdout.splitlines()
        return {name: state.rstrip("*") for name, state in (line.split() for line in lines)}

    def wait_idle(self, timeout_s: float = 20.0) -> None:
        """Wait until no job is left and every node is idle. Raises `ClusterError`, also for a drained node."""
        if not poll(lambda: set(self.node_states().values()) == {"idle"}, timeout_s, interval_s=0.05):
            raise ClusterError(f"nodes are {self.node_states()}\n{self.logs()}")

    def scancel(self, *args: str) -> Result:
        """Run ``scancel ARGS`` as root."""
        return self.run(["scancel", *args])

    def cancel_all(self) -> None:
        """Cancel every job, put every node back to work and wait until all is idle: between tests."""
        jobs = self.jobs()
        if jobs:
            self.scancel(*map(str, jobs))
        for node, state in self.node_states().items():
            if state.startswith(("drain", "down")):
                self.run(["scontrol", "update", f"nodename={node}", "state=resume"])
        self.wait_idle()

    # ---- inside

    def _write_files(self) -> None:
        for name in ("etc", "run", "log", "state", "spool", "control", "nodes", "scratch"):
            (self.dir / name).mkdir(exist_ok=True)
            (self.dir / name).chmod(0o755)
        self.scratch.chmod(0o1777)
        for node in self.nodes:
            (self.dir / "nodes" / node).mkdir(exist_ok=True)
        key = self.dir / "etc" / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        (self.dir / "etc" / "hosts").write_text(
            f"127.0.0.1 localhost {socket.gethostname()} {' '.join(self.nodes)}\n::1 localhost\n"
        )
        controller, *ports = _free_ports(1 + len(self.nodes))
        lines = [
            "ClusterName=uenvdtest",
            "SlurmctldHost=localhost",
            f"SlurmctldPort={controller}",
            f"AuthInfo=socket={self.dir}/run/munge.socket",
            "SlurmUser=root",
            "SlurmdUser=root",
            f"StateSaveLocation={self.dir}/state",
            f"SlurmdSpoolDir={self.dir}/spool/%n",
            f"SlurmctldPidFile={self.dir}/run/slurmctld.pid",
            f"SlurmdPidFile={self.dir}/run/slurmd.%n.pid",
            f"SlurmctldLogFile={self.log_dir}/slurmctld.log",
            f"SlurmdLogFile={self.log_dir}/slurmd.%n.log",
            "ProctrackType=proctrack/linuxproc",  # the default, cgroup, lets the daemons start and every step fail
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SlurmdParameters=config_overrides",  # nodes may claim more CPUs than there are
            "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1",
            "LaunchParameters=use_interactive_step",
            "ReturnToService=2",
            "KillWait=2",
            "EioTimeout=3",
            "MailProg=/bin/true",
            "MpiDefault=none",
            *self._conf_extra,
        ]
        lines += [
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={self._cpus} State=UNKNOWN"
            for node, port in zip(self.nodes, ports, strict=True)
        ]
        lines.append("PartitionName=p Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        self.conf_file.write_text("".join(f"{line}\n" for line in lines))
        self.set_plugstack(*self._plugstack)

    def _start_init(self) -> None:
        """Start pid 1 of the cluster's namespace; it reaps orphans and ends at EOF on its stdin."""
        note = self.dir / "run" / "init.pid"
        note.unlink(missing_ok=True)
        self._init = subprocess.Popen(
            [
                *("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"),
                *("--propagation", "shared" if self.shared else "private"),
                *("bash", "-c", 'echo ready >"$1"; while read -r _; do :; done', "bash", str(note)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C must not end the init before stop() has cancelled what needs it
        )
        self._await("the pid namespace", note.exists)
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text().split()
        self._init_pid = int(children[0])

    def _entered(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", "-t", str(self._init_pid), "-m", "-p", *command]

    def _in_pids(self, command: Sequence[str]) -> Result:
        return subprocess.run(
            self._entered(command), capture_output=True, text=True, check=False, timeout=_COMMAND_S, cwd="/"
        )

    def _daemon(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self.log_dir / f"{name}.out").open("ab") as log:
            daemon = subprocess.Popen(
                self._entered(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={
                    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                    "HOME": "/root",
                    "SLURM_CONF": str(self.conf_file),
                },
                process_group=0,
            )
        self._daemons.append(daemon)
        return daemon

    def _ok(self, command: Sequence[str]) -> bool:
        return self.run(command, timeout_s=_START_S).returncode == 0

    def _await(self, what: str, condition: Callable[[], bool]) -> None:
        def ready_or_dead() -> bool:
            return condition() or any(daemon.poll() is not None for daemon in self._daemons)

        if not poll(ready_or_dead, _START_S) or not condition():
            raise ClusterError(
                f"{what} did not start within {_START_S:.0f} s, or a daemon ended\n{self.logs()}"
            )


@contextlib.contextmanager
def running_cluster(**options: object) -> Iterator[Cluster]:
    """Start a cluster, once more with other ports when a port was taken in between."""
    try:
        cluster = Cluster(**options).__enter__()  # type: ignore[arg-type]
    except ClusterError:
        if missing():
            raise
        cluster = Cluster(**options).__enter__()  # type: ignore[arg-type]
    with contextlib.ExitStack() as stack:
        stack.callback(cluster.stop)
        yield cluster
