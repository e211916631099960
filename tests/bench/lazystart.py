"""How soon a job of an image that is not cached yet has started, and what an update moves: part of `make bench-pull`.

    lazystart.py [--rounds N] [--only WORD] [--merge] [--size MIB] [--keep DIR] [--results DIR]

A real Slurm with the plugin, a real uenvd on its login side and on its node, and a docker-registry behind a line of 1 Gbit/s in all (in a row
of its own with 14 ms of round trip). The image holds the numpy of this interpreter among ballast of random bytes. Each round measures all
rows in turn, each on an empty cache, from the start of ``srun --uenv`` to its end; ratios are those of one round, and the figures are medians.
A run may be done in pieces: ``--keep`` keeps image and registry for the next one, ``--only`` chooses rows, ``--merge`` adds to the rounds in
``lazystart.json``. Needs root and Slurm.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy

from support.cluster import Cluster, running_cluster
from support.daemon import Daemon, running_daemon
from support.line import Line, line
from support.publishing import env_json
from support.registry import docker_registry
from support.slurmsite import built_plugin
from support.users import TestUser, ordinary_user
from uenvd.oci.attach import attach, json_content
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import Remote, no_progress, open_remote
from uenvd.oci.trace import PREFETCH_TYPE, encode_trace
from uenvd.publish.push import Target, push_image

LINE_BYTES_PER_S: Final = 125e6
ROUND_TRIP_S: Final = 0.014
MOUNT: Final = "/user-environment"
NAMESPACE: Final = "deploy/demo/zen3/"
PYTHON: Final = os.path.realpath(sys.executable)
CODE: Final = f"import sys; sys.path.insert(0, '{MOUNT}/lib'); import numpy; assert numpy.__file__.startswith('{MOUNT}')"
IMPORT: Final = (PYTHON, "-S", "-c", CODE)
READ_ALL: Final = ("sh", "-c", f"find {MOUNT} -type f -exec cat {{}} + > /dev/null")


@dataclass(frozen=True)
class Row:
    """One way to start."""

    name: str
    program: tuple[str, ...]
    label: str
    lazy: bool
    far: bool = False


PLAIN, TRACED = "app/1.0:v1", "traced/1.0:v1"
ROWS: Final = (
    Row("whole import", IMPORT, PLAIN, lazy=False),
    Row("lazy import", IMPORT, PLAIN, lazy=True),
    Row("traced import", IMPORT, TRACED, lazy=True),
    Row("traced import, far", IMPORT, TRACED, lazy=True, far=True),
    Row("whole read", READ_ALL, PLAIN, lazy=False),
    Row("lazy read", READ_ALL, PLAIN, lazy=True),
)
UPDATE, SECOND = "update", "app/1.0:v2"


@dataclass
class Site:
    """Where jobs run, and the lines to the registry."""

    cluster: Cluster
    user: TestUser
    plugin: Path
    near: Line
    far: Line
    directory: Path
    """For the node's cache."""

    @contextmanager
    def daemons(self, way: Line, *, lazy: bool) -> Iterator[Daemon]:
        """Run uenvd on the login side and on the node, with empty caches; yield the node's."""
        cluster, url = self.cluster, f"http://127.0.0.1:{way.port}"
        cache = self.directory / "cache"
        extra = f"lazy: {'auto' if lazy else 'off'}\nmounts: {{linger: 0ms}}\ncache: {{local: {cache}}}\n"
        (node,) = cluster.nodes
        try:
            with (
                running_daemon(cluster.dir / "login", url, control=cluster.control_dir / "bench"),
                running_daemon(
                    cluster.dir / "node", url, extra=extra, control=cluster.node_control_dir(node) / "bench"
                ) as daemon,
            ):
                cluster.set_plugstack(f"required {self.plugin} socket={cluster.control_dir / 'bench'}")
                yield daemon
        finally:
            for path in (cache, cluster.dir / "login", cluster.dir / "node"):
                shutil.rmtree(path, ignore_errors=True)

    def measure(self, row: Row) -> dict[str, Any]:
        """Return seconds of one job, and the bytes that the line has moved by its end."""
        way = self.far if row.far else self.near
        with self.daemons(way, lazy=row.lazy):
            before, began_s = way.sent_bytes, time.perf_counter()
            done = self.cluster.srun(
                "-n1", f"--uenv={row.label}", *row.program, user=self.user, timeout_s=300
            )
            seconds, moved = time.perf_counter() - began_s, way.sent_bytes - before
        if done.returncode != 0:
            raise RuntimeError(f"{row.name}: srun ended with {done.returncode}: {done.stderr[-2000:]}")
        return {"seconds": seconds, "moved_bytes": moved}

    def trace(self) -> list[tuple[int, int]]:
        """Return what the import reads."""
        with self.daemons(self.near, lazy=True) as daemon, daemon.client() as client:
            lease = client.ask("mount", uenv=PLAIN)["lease"]
            done = self.cluster.srun("-n1", f"--uenv={PLAIN}", *IMPORT, user=self.user, timeout_s=300)
            assert done.returncode == 0, done.stderr
            ranges = client.ask("trace", lease=lease)["traces"][0]["ranges"]
        return [(first, end) for first, end in ranges]

    def update(self) -> dict[str, Any]:
        """Return how many bytes a second version moves when the first is cached."""
        with self.daemons(self.near, lazy=False) as daemon, daemon.client() as client:
            client.sock.settimeout(300)
            assert client.ask("pull", uenv=PLAIN)["ok"]
            before, began_s = self.near.sent_bytes, time.perf_counter()
            assert client.ask("pull", uenv=SECOND)["ok"]
            return {
                "seconds": time.perf_counter() - began_s,
                "moved_bytes": self.near.sent_bytes - before,
            }


def make_image(directory: Path, size_mib: int, change: float = 0.0) -> Path:
    """Squash numpy and ballast; ``change``: which part of the ballast is of a second version."""
    tree = directory / "tree"
    if not tree.exists():
        source = Path(numpy.__file__).parents[1]
        for name in ("numpy", "numpy.libs"):
            if (source / name).exists():
                shutil.copytree(source / name, tree / "lib" / name)
        (tree / "meta").mkdir()
        (tree / "meta" / "env.json").write_bytes(env_json("app"))
        (tree / "ballast").mkdir()
        for number in range(size_mib * 4):
            (tree / "ballast" / f"{number:05}").write_bytes(os.urandom(256 << 10))
    for path in sorted((tree / "ballast").iterdir())[:: max(1, int(1 / change))] if change else ():
        path.write_bytes(os.urandom(256 << 10))
    image = directory / f"image{change}.squashfs"
    command = [
        "mksquashfs",
        str(tree),
        str(image),
        "-comp",
        "zstd",
        "-no-fragments",
        "-all-root",
        "-all-time",
        "1",
    ]
    subprocess.run([*command, "-quiet", "-no-progress"], check=True, capture_output=True)
    return image


def push(remote: Remote, image: Path, label: str) -> str:
    """Push an image as `uenvd-publish push` does; return its digest."""
    name, _, tag = label.partition(":")
    target = Target(NAMESPACE + name, tag)
    return push_image(remote, image, target, hashing=no_progress, progress=no_progress).digest


def prepare(directory: Path, remote: Remote, size_mib: int) -> dict[str, Any]:
    """Push the image under both labels and a second version; return their sizes in bytes, and the digest of the one that will have a trace."""
    image = make_image(directory, size_mib)
    push(remote, image, PLAIN)
    about: dict[str, Any] = {PLAIN: image.stat().st_size, TRACED: push(remote, image, TRACED)}
    image.unlink()
    second = make_image(directory, size_mib, 0.05)
    push(remote, second, SECOND)
    about[SECOND] = second.stat().st_size
    second.unlink()
    shutil.rmtree(directory / "tree")
    return about


@contextmanager
def running_site(directory: Path, registry_port: int) -> Iterator[Site]:
    """Run Slurm and lay the lines."""
    with ExitStack() as stack:
        cluster = stack.enter_context(running_cluster(nodes=1, namespaces=True, shared=True))
        user = stack.enter_context(ordinary_user(cluster.dir))
        plugin = cluster.dir / "uenvd_spank.so"
        shutil.copy(built_plugin(), plugin)
        plugin.chmod(0o755)
        near = stack.enter_context(line(registry_port, LINE_BYTES_PER_S))
        far = stack.enter_context(line(registry_port, LINE_BYTES_PER_S, ROUND_TRIP_S))
        yield Site(cluster, user, plugin, near, far, directory)


def verdicts(rounds: list[dict[str, Any]], sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what was asked for and what was found; ``value`` is None where a row is missing."""

    def ratio(row: str, other: str) -> float | None:
        found = [one[row]["seconds"] / one[other]["seconds"] for one in rounds if row in one and other in one]
        return statistics.median(found) if found else None

    def moved(row: str, of: str) -> float | None:
        found = [one[row]["moved_bytes"] / sizes[of] for one in rounds if row in one]
        return statistics.median(found) if found else None

    found = [
        ("lazy import / whole import", ratio("lazy import", "whole import"), 1 / 8),
        ("bytes moved before a lazy import ends", moved("lazy import", PLAIN), 0.10),
        ("traced import at 14 ms / without", ratio("traced import, far", "traced import"), 1.5),
        ("lazy read of everything / whole", ratio("lazy read", "whole read"), 1.1),
        ("bytes moved by an update of 5 % of the files", moved(UPDATE, SECOND), 0.06),
    ]
    return [
        {"limit": name, "value": value, "most": most, "passed": None if value is None else value <= most}
        for name, value, most in found
    ]


def report(results: Path, rounds: list[dict[str, Any]], sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """Write ``lazystart.json``, ``lazystart.md`` and, where matplotlib is installed, ``lazystart.svg``; return the verdicts."""
    results.mkdir(parents=True, exist_ok=True)
    found = verdicts(rounds, sizes)
    about = {"cores": os.cpu_count(), "kernel": platform.release()}
    body = {"about": about, "sizes": sizes, "rounds": rounds, "verdicts": found}
    (results / "lazystart.json").write_text(json.dumps(body, indent=1) + "\n")
    lines = ["# Starts on an empty cache", "", f"{sizes[PLAIN] >> 20} MiB, 1 Gbit/s, medians; {about}", ""]
    lines += ["| row | rounds | s | lowest..highest | MB moved |", "|---|---|---|---|---|"]
    for name in [*(row.name for row in ROWS), UPDATE]:
        samples = [one[name] for one in rounds if name in one]
        if samples:
            seconds = sorted(one["seconds"] for one in samples)
            moved = statistics.median(one["moved_bytes"] for one in samples) / 1e6
            lines.append(
                f"| {name} | {len(samples)} | {statistics.median(seconds):.2f} | {seconds[0]:.2f}..{seconds[-1]:.2f} | {moved:.1f} |"
            )
    lines.append("")
    for one in found:
        state = {True: "pass", False: "MISS", None: "not measured"}[one["passed"]]
        value = "" if one["value"] is None else f": {one['value']:.3f}"
        lines.append(f"- {state}: {one['limit']}, at most {one['most']:.3f}{value}")
    (results / "lazystart.md").write_text("\n".join(lines) + "\n")
    plot(results / "lazystart.svg", rounds)
    print("\n".join(lines[4:]))
    return found


def plot(file: Path, rounds: list[dict[str, Any]]) -> None:
    """Draw the seconds of each row, a dot for each round. Does nothing without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "uenvd"
    from matplotlib import pyplot

    names = [row.name for row in ROWS if any(row.name in one for one in rounds)]
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(names) + 1.2))
    for place, name in enumerate(names):
        seconds = [one[name]["seconds"] for one in rounds if name in one]
        colour = "tab:grey" if name.startswith("whole") else "tab:blue"
        axes.barh(place, statistics.median(seconds), color=colour, alpha=0.5)
        axes.plot(seconds, [place] * len(seconds), ".", color="black", markersize=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("seconds from srun to its end, empty cache, 1 Gbit/s (left is faster)")
    axes.grid(axis="x", linewidth=0.3)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main() -> int:
    """Return the exit status: 1 where a limit was missed."""
    parser = argparse.ArgumentParser(description="Measure lazy starts and updates.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=1024, metavar="MIB")
    parser.add_argument("--only", default="", metavar="WORD", help="only rows with this word")
    parser.add_argument("--merge", action="store_true", help="add to the rounds that were measured before")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="for caches and registry")
    parser.add_argument("--keep", type=Path, help="keep image and registry here for the next run")
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    before = options.results / "lazystart.json"
    rounds = json.loads(before.read_text())["rounds"] if options.merge and before.exists() else []
    with ExitStack() as stack:
        if options.keep is None:
            name = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="uenvd-bench-", dir=options.directory)
            )
            directory = Path(name)
        else:
            directory = options.keep
            directory.mkdir(exist_ok=True)
        directory.chmod(0o755)
        registry = stack.enter_context(docker_registry(directory / "registry"))
        remote = open_remote(parse_registry(registry.url))
        stack.callback(remote.close)
        known = directory / "images.json"
        sizes = json.loads(known.read_text()) if known.exists() else prepare(directory, remote, options.size)
        site = stack.enter_context(running_site(directory, int(registry.url.rpartition(":")[2])))
        if not known.exists():
            trace = json_content("trace.json", encode_trace(site.trace()))
            attach(remote, NAMESPACE + TRACED.partition(":")[0], sizes[TRACED], PREFETCH_TYPE, [trace])
            known.write_text(json.dumps(sizes))
        for _ in range(options.rounds):
            one: dict[str, Any] = {}
            for row in ROWS:
                if options.only in row.name:
                    one[row.name] = site.measure(row)
                    print(row.name, one[row.name], file=sys.stderr, flush=True)
            rounds.append(one)
            report(options.results, rounds, sizes)
        if options.only in UPDATE:
            rounds[-1][UPDATE] = site.update()
    found = report(options.results, rounds, sizes)
    return 1 if any(one["passed"] is False for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
