"""How fast an image is served: kernel squashfs, squashfuse_ll and both transports of uenvd, interleaved in one run: `make bench`.

    serving.py [--rounds N] [--rows WORD,...] [--servers NAME,...] [--image FILE] [--no-fragments] [--uid N]
               [--out DIRECTORY] [--add]

``--rows``: groups (warm walk walkbound small small8 large import import8 compile full) or parts of row names. Needs root.
`docs/performance.md` says what the rows mean. Writes ``serving.json``, ``serving.md`` and ``serving.svg``; a run of some rows or servers
only prints, unless ``--out`` is given. ``--add`` keeps what the directory holds of the rows that are not measured now, so that all rows
can be measured in several runs.
"""

from __future__ import annotations

import argparse
import gzip
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import environment  # noqa: E402
import report  # noqa: E402
from rows import GROUPS, Bench, possible  # noqa: E402
from servers import PROGRAM, SERVERS, cached_share, forget, mounted  # noqa: E402

RESULTS = HERE.parents[1] / "bench/results"
UENVCTL_RUNS = 15
START_UP = "uenvctl run FILE true, ms"


def build(source: str, directory: Path, *options: str) -> Path:
    """Compile a C file of this directory."""
    out = directory / Path(source).stem
    subprocess.run(["gcc", "-O2", *options, "-o", out, HERE / source], check=True)
    return out


def chosen_groups(words: str | None) -> list[str]:
    """Return the groups that ``--rows`` means. Raises `SystemExit` when a word means none."""
    if words is None:
        return list(GROUPS)
    found: list[str] = []
    for word in filter(None, (word.strip() for word in words.split(","))):
        exact = [word] if word in GROUPS else []
        names = exact or [name for name, (_, rows) in GROUPS.items() if any(word in row for row in rows)]
        if not names:
            raise SystemExit(f"bench: no row has {word!r} in its name; groups: {' '.join(GROUPS)}")
        found += [name for name in names if name not in found]
    return found


def about(image: Path, contents: environment.Contents, rounds: int) -> dict[str, Any]:
    """Return what a reader of the figures has to know of the machine and the image."""
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "rounds": rounds,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "image": f"{image.stat().st_size / 1e6:.0f} MB, {contents.size_bytes / 1e6:.0f} MB unpacked, "
        f"{len(contents.files)} files, {contents.inodes} inodes",
    }
    with suppress(OSError):
        config = gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
        wanted = ("CONFIG_SQUASHFS_DECOMP_", "CONFIG_SQUASHFS_FRAGMENT_CACHE_SIZE")
        facts["kernel squashfs"] = " ".join(
            line.removeprefix("CONFIG_SQUASHFS_") for line in config.splitlines() if line.startswith(wanted)
        )
    return facts


def dropped() -> int:
    """Return how often anybody has emptied the machine's caches through ``drop_caches``."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("drop_pagecache", "drop_slab")))


def start_up(image: Path) -> list[float]:
    """Return the milliseconds of `uenvctl run FILE true`, no daemon involved, of several runs."""
    command = [PROGRAM.with_name("uenvctl"), "run", f"{image}:/mnt", "--", "true"]
    took_ms = []
    for _ in range(UENVCTL_RUNS):
        began_s = time.perf_counter()
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        took_ms.append((time.perf_counter() - began_s) * 1e3)
    return took_ms


def measure(bench: Bench, image: Path, groups: list[str], servers: list[str], rounds: int) -> report.Results:
    """Run everything; within a round each group goes over all servers, in an order that turns from round to round."""
    results: report.Results = {name: {} for name in servers}
    for number in range(rounds):
        for group in groups:
            turn = number % len(servers)
            for name in servers[turn:] + servers[:turn]:
                with mounted(SERVERS[name], image) as mount:
                    figures = GROUPS[group][0](bench, mount)
                for row, value in figures.items():
                    results[name].setdefault(row, []).append(value)
        print(f"bench: round {number + 1} of {rounds}", file=sys.stderr)
    return results


def main() -> int:
    """Return the exit status: 0 also when a limit is missed, which is said."""
    parser = argparse.ArgumentParser(description="Measure how fast an image is served.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", help="groups or parts of row names, by commas")
    parser.add_argument("--servers", help=f"by commas, of: {' '.join(SERVERS)}")
    parser.add_argument(
        "--image", type=Path, help="another image; rows for which it has nothing are left out"
    )
    parser.add_argument("--no-fragments", action="store_true", help="the image as uenvd-publish makes it")
    parser.add_argument(
        "--out", type=Path, help=f"where to write (default {RESULTS.relative_to(HERE.parents[1])})"
    )
    parser.add_argument(
        "--uid", type=int, default=0, help="who walks and reads (imports and compiles are root's)"
    )
    parser.add_argument("--add", action="store_true", help="keep the rows there that are not measured now")
    parser.add_argument("--spread", action="store_true", help="also print lowest and highest figures")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("bench: mounting needs root", file=sys.stderr)
        return 1
    groups = chosen_groups(options.rows)
    names = options.servers.split(",") if options.servers else list(SERVERS)
    if unknown := [name for name in names if name not in SERVERS]:
        raise SystemExit(f"bench: no server {unknown[0]!r}; there are: {' '.join(SERVERS)}")
    there = {name: SERVERS[name].missing() for name in names}
    present = [name for name, why in there.items() if why is None]
    image = options.image or environment.build_image(("-no-fragments",) if options.no_fragments else ())
    with tempfile.TemporaryDirectory(prefix="uenvd-bench-", dir="/var/tmp") as scratch:
        directory = Path(scratch)
        with mounted(SERVERS["kernel"], image) as mount:
            contents = environment.survey(mount.root)
        forget(image)
        if share := cached_share(image):
            print(f"bench: {share:.0%} of the image cannot be dropped from the page cache", file=sys.stderr)
        groups = [group for group in groups if possible(group, contents)]
        no_isatty = build("no_isatty.c", directory, "-shared", "-fPIC")
        bench = Bench(contents, build("probe.c", directory), no_isatty, directory, options.uid)
        directory.chmod(0o755)
        dropped_before = dropped()
        results = measure(bench, image, groups, present, options.rounds)
        if dropped() != dropped_before:
            print(
                "bench: somebody emptied the machine's caches meanwhile; warm rows are void", file=sys.stderr
            )
        facts = about(image, contents, options.rounds)
        print(report.table(results, there))
        if options.spread:
            print(report.spread(results))
        for verdict in report.verdicts(results):
            print(verdict)
        if options.out or options.add or not (options.rows or options.servers or options.image):
            directory = options.out or RESULTS
            if options.add:
                results, facts = report.merged(directory, results, facts)
            if START_UP not in facts:
                facts[START_UP] = round(statistics.median(start_up(image)), 1)
            shown = {name: there.get(name) for name in SERVERS if name in results or name in there}
            report.write(directory, results, facts, shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
