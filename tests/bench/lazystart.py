"""How soon a program of an image that is not cached yet has started, and what an update moves: part of `make bench-pull`.

    lazystart.py [--rounds N] [--size MIB] [--directory DIR] [--results DIR]

A real uenvd behind a line of 1 Gbit/s in all (and, in rows of their own, 14 ms of round trip) to a docker-registry. The image holds the numpy of
this interpreter among ballast of random bytes. Each round measures all rows in turn, on an empty cache; ratios are those of one round, and the
figures are medians. A whole start is: pull, mount, import. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy

from support.daemon import Client, running_daemon
from support.fusetools import NOBODY, Session, session
from support.line import Line, line
from support.publishing import env_json
from support.registry import docker_registry
from uenvd.oci.attach import attach, json_content
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import no_progress, open_remote
from uenvd.oci.trace import PREFETCH_TYPE, encode_trace
from uenvd.publish.push import Target, push_image

LINE_BYTES_PER_S: Final = 125e6
ROUND_TRIP_S: Final = 0.014
MOUNT: Final = "/user-environment"
REPOSITORY: Final = "deploy/demo/zen3/app/1.0"
LABEL: Final = "app/1.0:v1"
IMPORT: Final = (
    "__import__('subprocess').run([__import__('sys').executable, '-S', '-c',"
    f' \'import sys; sys.path.insert(0, "{MOUNT}/lib"); import numpy; assert numpy.__file__.startswith("{MOUNT}")\'])'
    ".returncode"
)
READ_ALL: Final = f"__import__('subprocess').run('cat {MOUNT}/ballast/* {MOUNT}/lib/numpy/*.py > /dev/null', shell=True).returncode"


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
    command = ["mksquashfs", tree, image, "-comp", "zstd", "-no-fragments", "-all-root", "-all-time", "1"]
    subprocess.run([*command, "-quiet", "-no-progress"], check=True, capture_output=True)
    return image


@contextmanager
def started(directory: Path, way: Line, *, lazy: bool) -> Iterator[tuple[Client, Session, float]]:
    """Start on an empty cache; yield (connection, session, when it began)."""
    extra = f"lazy: {'auto' if lazy else 'off'}\nmounts: {{linger: 0ms}}\n"
    with (
        running_daemon(directory / "uenvd", f"http://127.0.0.1:{way.port}", extra=extra) as daemon,
        daemon.client() as client,
    ):
        client.sock.settimeout(300)
        began_s = time.perf_counter()
        lease = client.ask("mount", uenv=LABEL)["lease"]
        done = client.ask("wait", lease=lease)
        assert done["ok"], done
        client.lease = lease  # type: ignore[attr-defined]
        with session(NOBODY, client.descriptors[0], MOUNT) as inside:
            yield client, inside, began_s
    shutil.rmtree(directory / "uenvd")


def timed(directory: Path, way: Line, what: str, *, lazy: bool) -> dict[str, Any]:
    """Return seconds to the end of an expression, the bytes moved by then, and the trace."""
    before = way.sent_bytes
    with started(directory, way, lazy=lazy) as (client, inside, began_s):
        status = inside.eval(what)
        seconds, moved = time.perf_counter() - began_s, way.sent_bytes - before
        assert status == 0, status
        traces = client.ask("trace", lease=client.lease)["traces"] if lazy else []  # type: ignore[attr-defined]
    return {"seconds": seconds, "moved_bytes": moved, "ranges": traces[0]["ranges"] if traces else []}


def update(directory: Path, way: Line) -> int:
    """Return how many bytes a second version moves when the first is cached."""
    with (
        running_daemon(directory / "uenvd", f"http://127.0.0.1:{way.port}", extra="lazy: off\n") as daemon,
        daemon.client() as client,
    ):
        client.sock.settimeout(300)
        assert client.ask("pull", uenv=LABEL)["ok"]
        before = way.sent_bytes
        assert client.ask("pull", uenv="app/1.0:v2")["ok"]
        moved = way.sent_bytes - before
    shutil.rmtree(directory / "uenvd")
    return moved


def main() -> int:
    """Return the exit status: 1 where a limit was missed."""
    parser = argparse.ArgumentParser(description="Measure lazy starts and updates.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=1024, metavar="MIB")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="uenvd-bench-", dir=options.directory) as name:
        directory = Path(name)
        directory.chmod(0o755)
        image = make_image(directory, options.size)
        size_bytes = image.stat().st_size
        with docker_registry(directory / "registry") as registry:
            port = int(registry.url.rpartition(":")[2])
            remote = open_remote(parse_registry(registry.url))
            digest = push_image(
                remote, image, Target(REPOSITORY, "v1"), hashing=no_progress, progress=no_progress
            ).digest
            image.unlink()
            with line(port, LINE_BYTES_PER_S) as near, line(port, LINE_BYTES_PER_S, ROUND_TRIP_S) as far:
                for number in range(options.rounds):
                    one: dict[str, Any] = {
                        "whole import": timed(directory, near, IMPORT, lazy=False),
                        "lazy import": timed(directory, near, IMPORT, lazy=True),
                        "whole read": timed(directory, near, READ_ALL, lazy=False),
                        "lazy read": timed(directory, near, READ_ALL, lazy=True),
                    }
                    if number == 0:
                        trace = json_content("trace.json", encode_trace(one["lazy import"]["ranges"]))
                        attach(remote, REPOSITORY, digest, PREFETCH_TYPE, [trace])
                    one["traced import"] = timed(directory, near, IMPORT, lazy=True)
                    one["traced import, far"] = timed(directory, far, IMPORT, lazy=True)
                    for row in one.values():
                        row.pop("ranges")
                    rounds.append(one)
                    print(json.dumps(one), file=sys.stderr)
                second = make_image(directory, options.size, 0.05)
                second_bytes = second.stat().st_size
                push_image(
                    remote, second, Target(REPOSITORY, "v2"), hashing=no_progress, progress=no_progress
                )
                moved = update(directory, near)

    def ratio(row: str, other: str) -> float:
        return statistics.median(one[row]["seconds"] / one[other]["seconds"] for one in rounds)

    found = [
        ("lazy import / whole import", ratio("lazy import", "whole import"), 1 / 8),
        (
            "bytes moved before a lazy import ends",
            statistics.median(one["lazy import"]["moved_bytes"] for one in rounds) / size_bytes,
            0.10,
        ),
        ("traced import at 14 ms / without", ratio("traced import, far", "traced import"), 1.5),
        ("lazy read of everything / whole", ratio("lazy read", "whole read"), 1.1),
        ("bytes moved by an update of 5 % of the files", moved / second_bytes, 0.06),
    ]
    verdicts = [
        {"limit": name, "value": value, "most": most, "passed": value <= most} for name, value, most in found
    ]
    options.results.mkdir(parents=True, exist_ok=True)
    result = {"size_bytes": size_bytes, "rounds": rounds, "verdicts": verdicts}
    (options.results / "lazystart.json").write_text(json.dumps(result, indent=1))
    for one in verdicts:
        print(
            f"{'ok  ' if one['passed'] else 'MISS'} {one['limit']}: {one['value']:.3f} (at most {one['most']:.3f})"
        )
    return 0 if all(one["passed"] for one in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
