"""How long uenvctl takes: ``--version``, ``run true`` on a warm image, a TAB, beside an interpreter that does nothing and ``true`` itself.

``run`` is timed through the daemon, and without any, where uenvctl itself serves a file of the user's. Interleaved, so that whatever else the
machine does hits all alike; medians and quartiles of wall time in milliseconds. The whole process is timed, from fork to wait, started by an
ordinary user. Needs root (a daemon and a user are made). Usage: uenvctl_latency.py [ROUNDS]
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.daemon import running_daemon
from support.publishing import Publisher, simple_image
from support.users import TestUser, ordinary_user

LIMITS_MS = {"uenvctl --version": 40.0, "uenvctl run true": 60.0, "TAB after run app": 50.0}
"""What docs promise, on a quiet machine."""
ALONE = "the same, no daemon"
ROUNDS = 60


def timed_ms(command: list[str], environ: dict[str, str], user: TestUser) -> float:
    """Run a command to its end; return its wall time."""
    began = time.perf_counter()
    subprocess.run(
        command,
        env=environ,
        stdout=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        check=True,
        user=user.uid,
        group=user.gid,
        extra_groups=user.groups,
        cwd=user.home,
    )
    return (time.perf_counter() - began) * 1e3


def main() -> int:
    """Measure; return 1 if a limit is exceeded."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    uenvctl = str(Path(sys.executable).parent / "uenvctl")
    directory = Path(tempfile.mkdtemp(prefix="uenvd-bench-", dir="/var/tmp"))
    directory.chmod(0o755)
    try:
        registry = f"oci-layout:{directory / 'layout'}"
        publisher = Publisher(registry)
        for number in range(40):
            publisher.push(
                simple_image(directory / "app.squashfs", "app", str(number)),
                f"app/{number}.0",
                "v1",
                "latest",
            )
        with running_daemon(directory / "uenvd", registry) as daemon, ordinary_user(directory) as user:
            environ = {**user.environ(), "UENVD_SOCKET": str(daemon.socket_path)}
            alone = {**user.environ(), "UENVD_SOCKET": str(directory / "no-socket")}
            commands = {
                "true": ["true"],
                "python3 -I -c pass": [sys.executable, "-I", "-c", "pass"],
                "uenvctl --version": [uenvctl, "--version"],
                "uenvctl run true": [uenvctl, "run", "app/1.0", "true"],
                ALONE: [uenvctl, "run", str(directory / "app.squashfs"), "true"],
                "TAB after run app": [uenvctl, "__complete", "bash", "uenvctl run app", "app"],
                "TAB after image": [uenvctl, "__complete", "bash", "uenvctl image ", ""],
            }
            subprocess.run([uenvctl, "image", "find"], env=environ, stdout=subprocess.DEVNULL, check=True)
            with daemon.client() as held:  # the image stays warm
                held.ask("mount", uenv="app/1.0")
                held.ask("pull", uenv="app/1.0")
                for name, command in commands.items():
                    timed_ms(command, alone if name == ALONE else environ, user)
                times: dict[str, list[float]] = {name: [] for name in commands}
                for _ in range(rounds):
                    for name, command in commands.items():
                        times[name].append(timed_ms(command, alone if name == ALONE else environ, user))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(
        f"{'':22} {'median':>8} {'25 %':>8} {'75 %':>8}   ms, {rounds} interleaved rounds, {os.cpu_count()} CPUs"
    )
    failed = False
    for name, found in times.items():
        low, middle, high = statistics.quantiles(found, n=4)
        limit = LIMITS_MS.get(name)
        late = limit is not None and middle > limit
        failed |= late
        verdict = "" if limit is None else f"   {'ABOVE' if late else 'below'} {limit:.0f}"
        print(f"{name:22} {middle:8.1f} {low:8.1f} {high:8.1f}{verdict}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
