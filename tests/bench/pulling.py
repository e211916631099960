"""How fast a blob is pulled, against the oras command and skopeo: `make bench-pull`.

    pulling.py [--rounds N] [--size MIB] [--directory DIR] [--results DIR] [--only WORD]

A `docker-registry` on the loopback interface holds one blob of random bytes. Every round pulls it with each client in turn, over each link, so
that slow moments of the machine hit all of them; ratios are those of one round, and the figures are medians. All clients verify the digest.
What they write lies in ``--directory``, by default in memory: a disk would be measured instead of the clients. The clock of uenvd's row runs
inside a process that has its modules loaded and the interpreter's settings, as the daemon has; those of the others are whole commands. A new row
is one entry of `ROWS`.
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.orascli import oras_command
from support.registry import docker_registry, oras_manifest
from support.shaping import shaping_proxy
from uenvd.oci.files import hash_file
from uenvd.oci.manifest import EMPTY_BLOB, EMPTY_TYPE, Descriptor
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import open_remote

REPOSITORY, TAG = "bench/app", "v1"
SHAPED_BYTES_PER_S = 200_000_000
LIMIT_RSS_MIB = 150.0

PULL = """
import json, resource, sys, time
from pathlib import Path
from uenvd.cache.pull import pull_blob
from uenvd.cache.store import Store
from uenvd.daemon.app import settle
from uenvd.oci.manifest import Descriptor
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import never, no_progress, open_remote
url, root, repository, digest, size = sys.argv[1:]
store = Store(Path(root))
store.prepare()
remote = open_remote(parse_registry(url))
settle()
began = time.perf_counter()
pull_blob(remote, repository, Descriptor("x", digest, int(size)), store, progress=no_progress, cancelled=never)
print(json.dumps(time.perf_counter() - began))
"""


@dataclass(frozen=True)
class Scene:
    """What there is to pull, and where to."""

    url: str
    """Of the registry, over the link that is measured."""
    layer: Descriptor
    target: Path
    """An empty directory."""

    @property
    def host(self) -> str:
        """``host:port``."""
        return self.url.partition("://")[2]


@dataclass(frozen=True)
class Sample:
    """One pull."""

    seconds: float
    cpu_s: float
    rss_bytes: int


@dataclass(frozen=True)
class Row:
    """One client over one link."""

    client: str
    link: str
    pull: Callable[[Scene], Sample]


@dataclass(frozen=True)
class Limit:
    """At least how many times as fast one client is as another over a link."""

    link: str
    client: str
    other: str
    factor: float


def by_uenvd(scene: Scene) -> Sample:
    """Pull into a store as the daemon does."""
    blob = [REPOSITORY, scene.layer.digest, str(scene.layer.size_bytes)]
    return _run([sys.executable, "-c", PULL, scene.url, scene.target, *blob], inner=True)


def by_oras(scene: Scene) -> Sample:
    """``oras pull``."""
    program, why = oras_command()
    if program is None:
        raise LookupError(why)
    return _run([program, "pull", "--plain-http", "-o", scene.target, f"{scene.host}/{REPOSITORY}:{TAG}"])


def by_skopeo(scene: Scene) -> Sample:
    """``skopeo copy`` to a directory."""
    if shutil.which("skopeo") is None:
        raise LookupError("skopeo is not installed")
    source = f"docker://{scene.host}/{REPOSITORY}:{TAG}"
    policy = ["--insecure-policy", "--tmpdir", scene.target]
    return _run(["skopeo", *policy, "copy", "--src-tls-verify=false", source, f"dir:{scene.target}/copy"])


def _run(command: list[str | Path], *, inner: bool = False) -> Sample:
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen([str(word) for word in command], stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        said = output.read().decode(errors="replace")
    if process.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {process.returncode}: {said[-1000:]}")
    if inner:
        seconds = float(json.loads(said))
    return Sample(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


LOOPBACK, SHAPED = "loopback", "200 MB/s a connection"
ROWS = (
    Row("uenvd", LOOPBACK, by_uenvd),
    Row("oras", LOOPBACK, by_oras),
    Row("skopeo", LOOPBACK, by_skopeo),
    Row("uenvd", SHAPED, by_uenvd),
    Row("oras", SHAPED, by_oras),
)
LIMITS = (
    Limit(LOOPBACK, "uenvd", "oras", 1.1),
    Limit(LOOPBACK, "uenvd", "skopeo", 2.0),
    Limit(SHAPED, "uenvd", "oras", 3.0),
)

Samples = dict[Row, list[Sample]]


@contextmanager
def scenes(directory: Path, size_bytes: int) -> Iterator[dict[str, Scene]]:
    """Run a registry with one image, and a proxy for each link; yield link -> scene."""
    blob = directory / "blob"
    with blob.open("wb") as file:
        for _ in range(size_bytes >> 20):
            file.write(os.urandom(1 << 20))
    digest, size = hash_file(blob)
    layer = Descriptor("application/vnd.oci.image.layer.v1.tar", digest, size)
    with ExitStack() as stack:
        registry = stack.enter_context(docker_registry(directory / "registry"))
        remote = open_remote(parse_registry(registry.url))
        remote.push_blob(REPOSITORY, blob, layer)
        remote.push_bytes(REPOSITORY, EMPTY_BLOB, EMPTY_TYPE)
        remote.push_manifest(REPOSITORY, TAG, oras_manifest(digest, size))
        remote.close()
        blob.unlink()
        port = int(registry.url.rpartition(":")[2])
        proxy = stack.enter_context(shaping_proxy(port, SHAPED_BYTES_PER_S))
        target = directory / "target"
        yield {
            LOOPBACK: Scene(registry.url, layer, target),
            SHAPED: Scene(f"http://127.0.0.1:{proxy}", layer, target),
        }


def measure(rows: list[Row], where: dict[str, Scene], rounds: int) -> tuple[Samples, dict[Row, str]]:
    """Return the samples of each row, and why a row has none. The first round warms up and does not count."""
    samples: Samples = {row: [] for row in rows}
    missing: dict[Row, str] = {}
    for number in range(rounds + 1):
        for row in rows:
            scene = where[row.link]
            shutil.rmtree(scene.target, ignore_errors=True)
            scene.target.mkdir()
            try:
                sample = row.pull(scene)
            except LookupError as error:
                missing[row] = str(error)
                continue
            finally:
                shutil.rmtree(scene.target, ignore_errors=True)
            if number:
                samples[row].append(sample)
                rate = scene.layer.size_bytes / sample.seconds / 1e6
                print(f"round {number}: {row.link}: {row.client}: {rate:.0f} MB/s", file=sys.stderr)
    return samples, missing


def ratio(samples: Samples, limit: Limit) -> float | None:
    """Return the median over the rounds of how many times as fast; None without samples."""
    mine, theirs = (
        next((found for row, found in samples.items() if (row.client, row.link) == (client, limit.link)), [])
        for client in (limit.client, limit.other)
    )
    if not mine or not theirs:
        return None
    return statistics.median(b.seconds / a.seconds for a, b in zip(mine, theirs, strict=True))


def verdicts(samples: Samples) -> list[dict[str, Any]]:
    """Return what was asked for and what was found."""
    found: list[dict[str, Any]] = []
    for limit in LIMITS:
        value = ratio(samples, limit)
        name = f"{limit.link}: {limit.client} is at least {limit.factor:g} times as fast as {limit.other}"
        passed = value is not None and value >= limit.factor
        found.append({"limit": name, "value": value, "passed": passed if value is not None else None})
    peaks = [one.rss_bytes for row, all_ in samples.items() if row.client == "uenvd" for one in all_]
    peak = max(peaks) / 2**20 if peaks else None
    name = f"uenvd uses at most {LIMIT_RSS_MIB:g} MiB of memory"
    found.append(
        {"limit": name, "value": peak, "passed": peak <= LIMIT_RSS_MIB if peak is not None else None}
    )
    return found


def table(samples: Samples, missing: dict[Row, str], size_bytes: int) -> str:
    """Return the result as Markdown."""
    lines = ["| link | client | MB/s | lowest..highest | CPU s | peak RSS MiB |", "|---|---|---|---|---|---|"]
    for row, found in samples.items():
        if not found:
            lines.append(f"| {row.link} | {row.client} | not there: {missing.get(row, '')} | | | |")
            continue
        rates = sorted(size_bytes / one.seconds / 1e6 for one in found)
        cpu = statistics.median(one.cpu_s for one in found)
        rss = max(one.rss_bytes for one in found) / 2**20
        middle = statistics.median(rates)
        lines.append(
            f"| {row.link} | {row.client} | {middle:.0f} | {rates[0]:.0f}..{rates[-1]:.0f} | {cpu:.2f} | {rss:.0f} |"
        )
    lines.append("")
    for one in verdicts(samples):
        state = {True: "pass", False: "MISS", None: "not measured"}[one["passed"]]
        value = "" if one["value"] is None else f": {one['value']:.2f}"
        lines.append(f"- {state}: {one['limit']}{value}")
    return "\n".join(lines) + "\n"


def write(directory: Path, samples: Samples, missing: dict[Row, str], size_bytes: int) -> None:
    """Write ``pulling.json``, ``pulling.md`` and, where matplotlib is installed, ``pulling.svg``."""
    directory.mkdir(parents=True, exist_ok=True)
    about = {"cores": os.cpu_count(), "kernel": platform.release(), "load": os.getloadavg()[0]}
    rows = [
        {"link": row.link, "client": row.client, "missing": missing.get(row)}
        | {"samples": [vars(one) for one in found]}
        for row, found in samples.items()
    ]
    body = {"about": about, "size_bytes": size_bytes, "rows": rows, "limits": verdicts(samples)}
    (directory / "pulling.json").write_text(json.dumps(body, indent=1) + "\n")
    head = f"# Pulling an image\n\n{size_bytes >> 20} MiB, medians; {about}\n\n"
    (directory / "pulling.md").write_text(head + table(samples, missing, size_bytes))
    plot(directory / "pulling.svg", samples, size_bytes)


def plot(file: Path, samples: Samples, size_bytes: int) -> None:
    """Draw the rate of each row, a dot for each round. Does nothing without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "uenvd"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(samples) + 1.2))
    for place, (row, found) in enumerate(samples.items()):
        rates = [size_bytes / one.seconds / 1e6 for one in found]
        colour = "tab:blue" if row.client == "uenvd" else "tab:grey"
        if rates:
            axes.barh(place, statistics.median(rates), color=colour, alpha=0.5)
            axes.plot(rates, [place] * len(rates), ".", color="black", markersize=4)
    axes.set_yticks(range(len(samples)), [f"{row.link}: {row.client}" for row in samples])
    axes.invert_yaxis()
    axes.set_xlabel("MB/s, verified (right is faster)")
    axes.grid(axis="x", linewidth=0.3)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main() -> int:
    """Return the exit status: 1 where a limit was missed."""
    parser = argparse.ArgumentParser(description="Measure how fast a blob is pulled.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=1024, metavar="MIB")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="where to pull to")
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--only", default="", metavar="WORD", help="only links and clients with this word")
    options = parser.parse_args()
    rows = [row for row in ROWS if options.only in f"{row.link} {row.client}"]
    with (
        tempfile.TemporaryDirectory(prefix="uenvd-bench-", dir=options.directory) as name,
        scenes(Path(name), options.size << 20) as where,
    ):
        samples, missing = measure(rows, where, options.rounds)
    write(options.results, samples, missing, options.size << 20)
    print(table(samples, missing, options.size << 20))
    print(f"written to {options.results}")
    return 1 if any(one["passed"] is False for one in verdicts(samples)) else 0


if __name__ == "__main__":
    sys.exit(main())
