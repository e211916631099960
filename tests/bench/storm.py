"""Many real daemons on one shared directory, and many requests to each, for an image that none of them has: how often is it sent?

Run as root: ``python tests/bench/storm.py [--daemons 16] [--requests 4] [--megabytes 64]
[--rate MB_PER_S]``. Prints one JSON object.
"""

from __future__ import annotations

import argparse
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

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.daemon import running_daemon
from support.nfsdouble import NOBODY
from support.publishing import Publisher, simple_image
from support.registry import FakeRegistry
from uenvd.oci.files import hash_file


def storm(
    top: Path, daemons: int, requests: int, megabytes: int, rate_bytes_per_s: int | None
) -> dict[str, float | None]:
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


def main() -> int:
    """Run one storm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--daemons", type=int, default=16)
    parser.add_argument("--requests", type=int, default=4, help="of each daemon, at once")
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rate", type=float, help="of each connection, MB/s (default: none)")
    args = parser.parse_args()
    rate = None if args.rate is None else round(args.rate * 1e6)
    top = Path(tempfile.mkdtemp(prefix="uenvd-storm-", dir="/var/tmp"))
    top.chmod(0o755)
    try:
        found = storm(top, args.daemons, args.requests, args.megabytes, rate)
    finally:
        shutil.rmtree(top, ignore_errors=True)
    print(json.dumps(found))
    return 0 if found["copies"] <= 1.02 and not found["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
