"""A session of a user's own file, without a daemon: the channel against libfuse. ``python tests/bench/session_of_a_file.py [ROUNDS]``, as root.

Columns: wall time of ``uenvctl run FILE true``; then, inside of a session, microseconds for the first and for each further open+close of
2,000 files (timed in Python, which itself takes some 2 us), and MB/s of a cold file of 64 MB.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NOBODY = 65534
FILES = 2000
LARGE_BYTES = 64 << 20
TRANSPORTS = ("pyfuse3", "channel")
INSIDE = """
import json, os, sys, time
names = [f'/mnt/d{i % 40}/f{i}' for i in range(int(sys.argv[1]))]
def once():
    began = time.perf_counter()
    for name in names: os.close(os.open(name, os.O_RDONLY))
    return (time.perf_counter() - began) / len(names) * 1e6
cold, warm = once(), min(once() for _ in range(5))
began = time.perf_counter()
with open('/mnt/large', 'rb', buffering=0) as file:
    while file.read(1 << 20): pass
print(json.dumps([cold, warm, os.path.getsize('/mnt/large') / 1e6 / (time.perf_counter() - began)]))
"""


def make(directory: Path) -> Path:
    """Make the image."""
    tree = directory / "tree"
    for number in range(FILES):
        path = tree / f"d{number % 40}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(50) * 40)
    block = b"".join(os.urandom(64) + bytes(64) for _ in range(8192))
    (tree / "large").write_bytes(block * (LARGE_BYTES // len(block)))
    image = directory / "image.squashfs"
    subprocess.run(["mksquashfs", tree, image, "-comp", "zstd", "-quiet", "-no-progress"], check=True)
    image.chmod(0o644)
    return image


def run(image: Path, transport: str, *command: str) -> tuple[float, str]:
    """Run a command in a session of an ordinary user; return seconds and output."""
    uenvctl = str(Path(sys.executable).parent / "uenvctl")
    began = time.perf_counter()
    done = subprocess.run(
        [uenvctl, "run", f"{image}:/mnt", "--", *command],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        env={"PATH": "/usr/bin:/bin", "UENVD_SOCKET": "/nonexistent", "UENVD_TRANSPORT": transport},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd="/",
    )
    return time.perf_counter() - began, done.stdout


def main(rounds: int) -> None:
    """Measure, interleaved; print medians."""
    told: dict[str, list[list[float]]] = {transport: [] for transport in TRANSPORTS}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as base:
        Path(base).chmod(0o755)
        image = make(Path(base))
        for _ in range(rounds):
            for transport in TRANSPORTS:
                start_s, _nothing = run(image, transport, "true")
                with image.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                _seconds, output = run(image, transport, "/usr/bin/python3", "-c", INSIDE, str(FILES))
                told[transport].append([start_s * 1e3, *json.loads(output)])
    print(
        f"{'':10} {'run true, ms':>14} {'first open, us':>16} {'warm open, us':>15} {'cold large, MB/s':>18}"
    )
    for transport, rows in told.items():
        start, first, warm, large = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{transport:10} {start:14.0f} {first:16.1f} {warm:15.2f} {large:18.0f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
