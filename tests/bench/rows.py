"""What is measured. A group is one mount of one server in one round; it gives the figures of some rows."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from environment import Contents, python_environment
from servers import Mounted

IMPORT = "import numpy, scipy, scipy.linalg, pandas"
WARM_PASSES = 7
WARM_IMPORTS = 10
_SAMPLE = {"files": 2000, "links": 2000, "directories": 500}

Figures = dict[str, float]


@dataclass(frozen=True)
class Row:
    """One line of the result. Smaller is better in all of them."""

    name: str
    unit: str
    against_kernel: float | None = None
    """Limit of the ratio to kernel squashfs."""
    against_squashfuse: float | None = None
    limit: float | None = None
    """Limit in the row's own unit."""


ROWS = (
    Row("warm open+close", "us", 1.75, 0.2),
    Row("warm open+read small", "us", 1.3, 0.2),
    Row("warm readlink", "us", 1.3, 0.5),
    Row("warm stat", "us", 1.3, 0.5),
    Row("warm listdir", "us", 1.3, 0.5),
    Row("warm missing name", "us"),
    Row("cold walk with stat", "us/entry", 1.25, 0.35),
    Row("cold walk with stat, a bound task", "us/entry", 1.25, 0.35),
    Row("cold small files, 1 reader", "us/file", 1.25, 0.5),
    Row("cold small files, 8 readers", "us/file", 0.5, 0.7),
    Row("cold large files", "s/GB", 0.65, 0.75),
    Row("cold import, 1 process", "s", 0.95, 0.9),
    Row("cold import, 8 processes", "s", 1.0, 0.85),
    Row("warm import, 1 process", "s"),
    Row("warm import, 8 processes", "s"),
    Row("replies in 10 warm imports", "", limit=0),
    Row("replies in 10 warm imports, isatty() aside", "", limit=0),
    Row("cold C compile", "s"),
    Row("warm C compile", "s"),
    Row("replies in 3 warm C compiles", "", limit=0),
    Row("full read, 1 reader", "s"),
    Row("full read, CPU of the server", "s"),
    Row("full read, CPU of all", "s"),
    Row("memory (PSS) after a full read", "MiB", limit=80),
)
"""Limits: what issue, plan and ``docs/performance.md`` promise; checked by `report`."""


@dataclass
class Bench:
    """What the groups share: the image's contents, the probe program, a directory for its lists."""

    contents: Contents
    probe: Path
    no_isatty: Path
    """To be preloaded."""
    scratch: Path
    uid: int = 0
    """Who runs the probe."""

    def listing(self, root: Path, paths: list[str]) -> Path:
        """Write absolute paths, each ended by NUL."""
        file = self.scratch / "list"
        file.write_bytes(b"".join(os.fsencode(root / path) + b"\0" for path in paths))
        return file

    def run(self, *words: str | Path) -> list[float]:
        """Run the probe; return the numbers that it prints."""
        done = subprocess.run(
            [self.probe, *words], capture_output=True, text=True, check=False, user=self.uid, group=self.uid
        )
        if done.returncode != 0:
            raise SystemExit(f"bench: {' '.join(map(str, words))}: {done.stderr.strip()}")
        return [float(word) for word in done.stdout.split()]


def _spread(paths: list[str], count: int) -> list[str]:
    step = max(1, len(paths) // count)
    return paths[::step][:count]


def _every_other_directory(contents: Contents) -> list[str]:
    chosen = set(contents.directories[::2])
    return [path for path in contents.small if (os.path.dirname(path) or ".") in chosen]


def warm(bench: Bench, mount: Mounted) -> Figures:
    """Repeat single operations on what the kernel can have cached."""
    contents, figures = bench.contents, {}
    small = _spread(contents.small, _SAMPLE["files"])
    operations = {
        "open": ("warm open+close", small),
        "openread": ("warm open+read small", small),
        "readlink": ("warm readlink", _spread(contents.links, _SAMPLE["links"])),
        "stat": ("warm stat", small),
        "listdir": ("warm listdir", _spread(contents.directories, _SAMPLE["directories"])),
        "missing": ("warm missing name", [f"{path}.missing" for path in small]),
    }
    for operation, (row, paths) in operations.items():
        if paths:
            listing = bench.listing(mount.root, paths)
            figures[row] = statistics.median(bench.run("repeat", operation, str(WARM_PASSES), listing)) / 1e3
    return figures


def walk(bench: Bench, mount: Mounted) -> Figures:
    """Find everything."""
    took_ns, count, _ = bench.run("walk", mount.root)
    return {"cold walk with stat": took_ns / count / 1e3}


def walk_bound(bench: Bench, mount: Mounted) -> Figures:
    """Find everything, on one processor."""
    may = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(may)})
    try:
        took_ns, count, _ = bench.run("walk", mount.root)
    finally:
        os.sched_setaffinity(0, may)
    return {"cold walk with stat, a bound task": took_ns / count / 1e3}


def _read(bench: Bench, mount: Mounted, paths: list[str], readers: int) -> tuple[float, float, float]:
    took_ns, count, size_bytes = bench.run("read", str(readers), bench.listing(mount.root, paths))
    return took_ns, count, size_bytes


def small_1(bench: Bench, mount: Mounted) -> Figures:
    """Read the small files of every other directory."""
    took_ns, count, _ = _read(bench, mount, _every_other_directory(bench.contents), 1)
    return {"cold small files, 1 reader": took_ns / count / 1e3}


def small_8(bench: Bench, mount: Mounted) -> Figures:
    """Read the same with eight processes, each in its own eighth of the directories."""
    took_ns, count, _ = _read(bench, mount, _every_other_directory(bench.contents), 8)
    return {"cold small files, 8 readers": took_ns / count / 1e3}


def large(bench: Bench, mount: Mounted) -> Figures:
    """Read the large files one after the other."""
    took_ns, _, size_bytes = _read(bench, mount, bench.contents.large, 1)
    return {"cold large files": took_ns / size_bytes}


def _import(mount: Mounted, processes: int, preload: Path | None = None) -> float:
    command = [mount.root / "bin/python3", "-c", IMPORT]
    environment = python_environment(mount.root)
    if preload is not None:
        environment["LD_PRELOAD"] = str(preload)
    began_s = time.perf_counter()
    running = [subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL) for _ in range(processes)]
    statuses = [process.wait() for process in running]
    if any(statuses):
        raise SystemExit(f"bench: an import failed on {mount.server.name}")
    return time.perf_counter() - began_s


def import_1(bench: Bench, mount: Mounted) -> Figures:
    """Start Python from the image and import, first cold, then again and again."""
    figures = {"cold import, 1 process": _import(mount, 1)}
    _import(mount, 1)  # what the first one left out, it had not asked for twice
    before = mount.replies()
    figures["warm import, 1 process"] = statistics.median(_import(mount, 1) for _ in range(WARM_IMPORTS))
    if mount.process is not None:
        figures["replies in 10 warm imports"] = mount.replies() - before
        before = mount.replies()
        for _ in range(WARM_IMPORTS):
            _import(mount, 1, bench.no_isatty)
        figures["replies in 10 warm imports, isatty() aside"] = mount.replies() - before
    figures["warm import, 8 processes"] = statistics.median(_import(mount, 8) for _ in range(3))
    return figures


def import_8(bench: Bench, mount: Mounted) -> Figures:
    """Eight processes at once, cold."""
    return {"cold import, 8 processes": _import(mount, 8)}


_SOURCE = """
#include <Python.h>
#include <numpy/arrayobject.h>
#include <arpa/inet.h>
#include <complex.h>
#include <fenv.h>
#include <linux/fuse.h>
#include <math.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <regex.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <tgmath.h>
int main(void) { return (int)sizeof(PyArrayObject) == 0; }
"""


def compile_c(bench: Bench, mount: Mounted) -> Figures:
    """Compile a file whose headers, some 300, all come from the image; the compiler is the machine's."""
    source = bench.scratch / "compiled.c"
    source.write_text(_SOURCE)
    include = mount.root / "include"
    numpy = mount.root / "lib/python3.11/site-packages/numpy/_core/include"
    places = [include / "lib/gcc/x86_64-linux-gnu/12/include", include, include / "x86_64-linux-gnu"]
    places += [include / "python3.11", numpy]
    command = ["gcc", "-c", "-nostdinc", "-w", "-o", str(bench.scratch / "compiled.o"), str(source)]
    command += [word for place in places for word in ("-isystem", str(place))]
    took_s: list[float] = []

    def compile_once() -> None:
        began_s = time.perf_counter()
        subprocess.run(command, check=True)
        took_s.append(time.perf_counter() - began_s)

    compile_once()
    figures = {"cold C compile": took_s.pop()}
    compile_once()
    before = mount.replies()
    for _ in range(3):
        compile_once()
    figures["warm C compile"] = statistics.median(took_s)
    if mount.process is not None:
        figures["replies in 3 warm C compiles"] = mount.replies() - before
    return figures


@contextmanager
def _machine_cpu(figures: Figures) -> Iterator[None]:
    """Note the CPU seconds of the readers, which are children of this process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    yield
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures["full read, CPU of all"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def full(bench: Bench, mount: Mounted) -> Figures:
    """Read every file once; then the memory of the server when it is idle again."""
    figures: Figures = {}
    before_s = mount.cpu_s()
    with _machine_cpu(figures):
        took_ns, _, _ = _read(bench, mount, bench.contents.files, 1)
    figures["full read, 1 reader"] = took_ns / 1e9
    if mount.process is not None:
        figures["full read, CPU of the server"] = mount.cpu_s() - before_s
        figures["full read, CPU of all"] += figures["full read, CPU of the server"]
        time.sleep(1.0)  # idle: helpers have gone to sleep, what is freed is freed
        figures["memory (PSS) after a full read"] = mount.pss_bytes() / (1 << 20)
    return figures


Group = Callable[[Bench, Mounted], Figures]

GROUPS: dict[str, tuple[Group, tuple[str, ...]]] = {
    "warm": (warm, tuple(row.name for row in ROWS[:6])),
    "walk": (walk, ("cold walk with stat",)),
    "walkbound": (walk_bound, ("cold walk with stat, a bound task",)),
    "small": (small_1, ("cold small files, 1 reader",)),
    "small8": (small_8, ("cold small files, 8 readers",)),
    "large": (large, ("cold large files",)),
    "import": (
        import_1,
        (
            "cold import, 1 process",
            "warm import, 1 process",
            "warm import, 8 processes",
            "replies in 10 warm imports",
            "replies in 10 warm imports, isatty() aside",
        ),
    ),
    "import8": (import_8, ("cold import, 8 processes",)),
    "compile": (compile_c, ("cold C compile", "warm C compile", "replies in 3 warm C compiles")),
    "full": (
        full,
        (
            "full read, 1 reader",
            "full read, CPU of the server",
            "full read, CPU of all",
            "memory (PSS) after a full read",
        ),
    ),
}
"""By the word for ``--rows``: the group and its rows."""


def possible(group: str, contents: Contents) -> bool:
    """Tell whether the image holds what the group needs."""
    needs = {
        "small": bool(contents.small),
        "small8": bool(contents.small),
        "large": bool(contents.large),
        "import": contents.has_python,
        "import8": contents.has_python,
        "compile": contents.has_headers,
    }
    return needs.get(group, True)
