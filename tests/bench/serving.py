"""How fast an image is served, against squashfuse_ll and the kernel's own squashfs: `make bench`.

    serving.py [--rounds N]

Every round mounts the image anew with each server in turn, so that slow moments of the machine hit all of them; the figures are medians.
"Cold" is the first access after a mount: the server has to be asked; the image file itself is in the page cache. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.fusetools import is_mounted, until
from support.images import content

PROGRAMS = Path(sys.prefix) / "bin"
DIRECTORIES, FILES_EACH, SMALL_BYTES = 60, 60, 6000
LARGE_BYTES = 96 << 20
READ_BYTES = 1 << 20
UENVCTL_RUNS = 15


def make_image(directory: Path) -> Path:
    """Squash a tree of small files in many directories and one large file."""
    tree = directory / "tree"
    for number in range(DIRECTORIES):
        (tree / f"dir{number}").mkdir(parents=True)
        for file in range(FILES_EACH):
            (tree / f"dir{number}/file{file}").write_bytes(content(SMALL_BYTES, number * FILES_EACH + file))
    piece = content(8 << 20, 7)
    with (tree / "large").open("wb") as large:
        for number in range(LARGE_BYTES // len(piece)):
            large.write(piece[number:] + piece[:number])
    image = directory / "image.squashfs"
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    command: list[str | Path] = [
        "mksquashfs",
        tree,
        image,
        "-comp",
        "zstd",
        "-no-fragments",
        "-all-root",
        "-no-progress",
        "-quiet",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    shutil.rmtree(tree)
    return image


@contextlib.contextmanager
def mounted(command: list[str | Path], point: Path) -> Iterator[Path]:
    """Serve an image with a program that stays in the foreground, or with mount(8), which does not."""
    server = subprocess.Popen([str(word) for word in command], stderr=subprocess.DEVNULL)
    try:
        until(lambda: is_mounted(point), f"{command[0]} mounts")
        yield point
    finally:
        subprocess.run(["umount", point], check=False)
        server.wait(10)


def walk(root: Path) -> list[Path]:
    """Stat everything; return the small files, in random but reproducible order."""
    found = []
    for directory, _names, files in os.walk(root):
        for name in files:
            path = Path(directory, name)
            if path.stat().st_size == SMALL_BYTES:
                found.append(path)
    random.Random(1).shuffle(found)
    return found


def read_small(paths: list[Path]) -> None:
    """Open, read and close each."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.read(descriptor, SMALL_BYTES)
        os.close(descriptor)


def read_in_threads(paths: list[Path], readers: int) -> None:
    """The same with several readers."""
    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(read_small, (paths[number::readers] for number in range(readers))))


def read_large(root: Path) -> None:
    """Read the large file from begin to end."""
    with (root / "large").open("rb", buffering=0) as file:
        while file.read(READ_BYTES):
            pass


def seconds(work: Callable[[], object]) -> float:
    """Return how long it took."""
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def measure(serve: Callable[[], contextlib.AbstractContextManager[Path]]) -> dict[str, float]:
    """Return the figures of one round of one server."""
    figures = {}
    with serve() as root:
        files: list[Path] = []
        figures["cold walk with stat, us a file"] = (
            seconds(lambda: files.extend(walk(root))) * 1e6 / (DIRECTORIES * FILES_EACH)
        )
        half = len(files) // 2
        figures["cold small files, 1 reader, us"] = seconds(lambda: read_small(files[:half])) * 1e6 / half
        figures["cold small files, 8 readers, us"] = (
            seconds(lambda: read_in_threads(files[half:], 8)) * 1e6 / half
        )
        figures["warm open+read small file, us"] = seconds(lambda: read_small(files)) * 1e6 / len(files)
        figures["cold large file, s/GB"] = seconds(lambda: read_large(root)) * 1e9 / LARGE_BYTES
    return figures


def start_up(image: Path) -> float:
    """Return the milliseconds of `uenvctl run FILE true`, no daemon involved."""
    command: list[str | Path] = [PROGRAMS / "uenvctl", "run", f"{image}:/mnt", "--", "true"]
    return seconds(lambda: subprocess.run(command, check=True, stdin=subprocess.DEVNULL)) * 1e3


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description="Measure how fast an image is served.")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("bench: mounting needs root", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="uenvd-bench-", dir="/var/tmp") as name:
        directory = Path(name)
        image = make_image(directory)
        point = directory / "mnt"
        point.mkdir()
        commands: dict[str, list[str | Path]] = {
            "uenvd-fs": [PROGRAMS / "uenvd-fs", image, point, "-f"],
            "squashfuse_ll": ["squashfuse_ll", "-f", image, point],
            "kernel": ["mount", "-t", "squashfs", "-o", "loop,ro", image, point],
        }
        results: dict[str, list[dict[str, float]]] = {server: [] for server in commands}
        for _ in range(options.rounds):
            for server, command in commands.items():
                results[server].append(measure(lambda command=command: mounted(command, point)))  # type: ignore[misc]
        print(
            f"{image.stat().st_size / 1e6:.0f} MB image, {options.rounds} rounds, medians; smaller is better\n"
        )
        print(f"{'':34}" + "".join(f"{server:>16}" for server in commands))
        for figure in results["uenvd-fs"][0]:
            medians = (statistics.median(one[figure] for one in rounds) for rounds in results.values())
            print(f"{figure:34}" + "".join(f"{median:16.2f}" for median in medians))
        runs = [start_up(image) for _ in range(UENVCTL_RUNS)]
        print(f"{'uenvctl run FILE true, ms':34}{statistics.median(runs):16.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
