"""Many real daemons on one shared directory, for an image that none of them has: how often is it sent, and when can each of them use it?

Run as root: ``python tests/bench/storm.py [--daemons 16] [--requests 4] [--megabytes 64] [--rate MB_PER_S]``: many requests to each daemon for
an image without chunk list. Prints one JSON object.

``python tests/bench/storm.py --start [--daemons 16] [--megabytes 256] [--line MB_PER_S] [--rounds 3]``: one job on each node, which reads a few
files of an image with a chunk list (three of one MiB each, from begin, middle and end), behind a line of that rate in all; by turns with
``lazy: off`` and ``lazy: auto``. Prints a JSON object for each round and way.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.daemon import Client, running_daemon
from support.fusetools import session
from support.lazyimage import MOUNT_POINT, LazyImage, push_lazy
from support.line import line
from support.nfsdouble import NOBODY
from support.publishing import Publisher, simple_image
from support.registry import FakeRegistry, RealRegistry, docker_registry
from uenvd.oci.files import hash_file


def storm(
    top: Path, daemons: int, requests: int, megabytes: int, rate_bytes_per_s: int | None
) -> dict[str, Any]:
    """Return copies sent, seconds from the first request to the last byte usable, and what was asked for."""
    image = simple_image(top / "app.squashfs", "app", "app", megabytes=megabytes)
    size_bytes, digest = image.stat().st_size, hash_file(image)[0]
    shared = top / "shared"
    shared.mkdir(mode=0o700)
    os.chown(shared, NOBODY, NOBODY)
    extra = f"mounts: {{linger: 100ms}}\ncache: {{local: none, shared: {shared}, user: nobody}}\n"
    failures: list[object] = []
    ready_s: list[float] = []
    with FakeRegistry() as fake, ExitStack() as stack:
        Publisher(fake.url).push(image, "app/1.0", "v1")
        if rate_bytes_per_s is not None:
            fake.spoil(f"/blobs/{digest}", bytes_per_s=rate_bytes_per_s)
        nodes = [
            stack.enter_context(running_daemon(top / f"node{number}", fake.url, extra=extra))
            for number in range(daemons)
        ]
        clients = [stack.enter_context(node.client()) for node in nodes for _ in range(requests)]
        began_s = time.monotonic()
        leases = [client.ask("mount", uenv="app/1.0") for client in clients]

        def wait(number: int) -> None:
            answer = leases[number]
            done = clients[number].ask("wait", lease=answer["lease"]) if answer["ok"] else answer
            if not done["ok"]:
                failures.append(done["error"])

            ready_s.append(time.monotonic() - began_s)

        threads = [threading.Thread(target=wait, args=(number,)) for number in range(len(clients))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took_s = time.monotonic() - began_s
        sent = 0
        for seen in list(fake.seen):
            if seen.method == "GET" and seen.path.endswith(f"/blobs/{digest}"):
                asked = seen.headers.get("Range", f"bytes=0-{size_bytes - 1}").removeprefix("bytes=")
                first, _, last = asked.partition("-")
                sent += int(last or size_bytes - 1) - int(first) + 1
    return {
        "daemons": daemons,
        "requests": len(clients),
        "image_bytes": size_bytes,
        "copies": round(sent / size_bytes, 4),
        "rate_bytes_per_s": rate_bytes_per_s,
        "first_s": round(min(ready_s), 2),
        "median_s": round(statistics.median(ready_s), 2),
        "seconds": round(took_s, 2),
        "failed": len(failures),
    }


def start(
    top: Path, registry: RealRegistry, image: LazyImage, *, daemons: int, way: str, line_bytes_per_s: float
) -> dict[str, Any]:
    """Return when the first, the median and the last job has read its files, in seconds after the first request, and what that cost."""
    shared = top / "shared"
    shared.mkdir(mode=0o700)
    os.chown(shared, NOBODY, NOBODY)
    extra = f"lazy: {way}\nmounts: {{linger: 0ms}}\ncache: {{local: none, shared: {shared}, user: nobody}}\n"
    last = len(image.files) - 1
    names = [f"f{number:02}" for number in (0, last // 2, last)]
    wanted = [hashlib.sha256(image.files[name]).hexdigest() for name in names]
    code = f"[__import__('hashlib').sha256(open('{MOUNT_POINT}/'+name,'rb').read()).hexdigest() for name in {names}]"
    ready_s: list[float] = []
    wrong: list[object] = []
    blob = shared / "blobs/sha256" / image.layer.removeprefix("sha256:")
    with (
        line(int(registry.url.rpartition(":")[2]), line_bytes_per_s) as way_to_it,
        ExitStack() as stack,
    ):
        nodes = [
            stack.enter_context(
                running_daemon(top / f"node{number}", f"http://127.0.0.1:{way_to_it.port}", extra=extra)
            )
            for number in range(daemons)
        ]
        clients = [stack.enter_context(node.client()) for node in nodes]
        began_s = time.monotonic()

        def job(client: Client) -> None:
            answer = client.ask("mount", uenv="app/1.0:v1")
            with session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
                done = client.ask("wait", lease=answer["lease"])
                found = inside.eval(code)
                ready_s.append(time.monotonic() - began_s)
                if not done["ok"] or found != wanted:
                    wrong.append(found)
                while not blob.exists():
                    time.sleep(0.1)

        threads = [threading.Thread(target=job, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        whole_s, sent = time.monotonic() - began_s, way_to_it.sent_bytes
    shutil.rmtree(shared)
    return {
        "way": way,
        "daemons": daemons,
        "image_bytes": image.size_bytes,
        "line_bytes_per_s": line_bytes_per_s,
        "first_s": round(min(ready_s), 2),
        "median_s": round(statistics.median(ready_s), 2),
        "last_s": round(max(ready_s), 2),
        "whole_s": round(whole_s, 2),
        "copies": round(sent / image.size_bytes, 4),
        "failed": len(wrong),
    }


def starts(top: Path, daemons: int, megabytes: int, line_bytes_per_s: float, rounds: int) -> int:
    """Measure both ways by turns; return an exit status."""
    good = True
    with docker_registry(top / "registry") as registry:
        image = push_lazy(registry, top / "image", files=megabytes)
        for number in range(rounds):
            for way in ("off", "auto"):
                place = top / f"{way}{number}"
                place.mkdir(mode=0o755)
                found = start(
                    place, registry, image, daemons=daemons, way=way, line_bytes_per_s=line_bytes_per_s
                )
                print(json.dumps(found), flush=True)
                good = good and found["failed"] == 0 and (way == "off" or found["copies"] <= 1.02)
                shutil.rmtree(place, ignore_errors=True)
    return 0 if good else 1


def main() -> int:
    """Run one storm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--daemons", type=int, default=16)
    parser.add_argument("--requests", type=int, default=4, help="of each daemon, at once")
    parser.add_argument("--megabytes", type=int)
    parser.add_argument("--rate", type=float, help="of each connection, MB/s (default: none)")
    parser.add_argument("--start", action="store_true", help="jobs that start, with and without lazy starts")
    parser.add_argument(
        "--line", type=float, default=25.0, help="of the line to the registry, MB/s (with --start)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="with --start")
    args = parser.parse_args()
    rate = None if args.rate is None else round(args.rate * 1e6)
    top = Path(tempfile.mkdtemp(prefix="uenvd-storm-", dir="/var/tmp"))
    top.chmod(0o755)
    try:
        if args.start:
            return starts(top, args.daemons, args.megabytes or 256, args.line * 1e6, args.rounds)
        found = storm(top, args.daemons, args.requests, args.megabytes or 64, rate)
    finally:
        shutil.rmtree(top, ignore_errors=True)
    print(json.dumps(found))
    return 0 if found["copies"] <= 1.02 and not found["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
