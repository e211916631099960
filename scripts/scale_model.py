"""What a thousand nodes cost that start one image at once: a discrete-event simulation with measured parameters (docs/scale.md).

Bytes are fluid: transfers share each link fairly (max-min), small questions queue for a server. Nodes ask with the pauses of
`uenvd.cache.pauses` and `uenvd.daemon.following`. Run:
``python scripts/scale_model.py [--nodes 1000] [--gigabytes 4] ...``; prints a table, or JSON with ``--json``.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from uenvd.cache.hosting import LOOK_S as SHOWN_S
from uenvd.cache.pace import LONGEST_WINDOW_S, WARM_S
from uenvd.cache.pauses import LONGEST_S, SHARE
from uenvd.daemon.following import LONGEST_LOOK_S, LOOK_S

ASK_S = 1.0
"""The shortest pause of a node that waits for another one's pull (`uenvd.cache.blobs`)."""
FILE_OPERATIONS = 9
"""Questions of such a node to the file server each time: is it there (3), may I pull (3), how far is it (3)."""
WATCH_OPERATIONS = 6
"""The same of a node that has started and follows: is it there, may I pull."""
LOOK_OPERATIONS = 4
"""Questions of such a node while somebody waits: begin and end of the map (open, read, read, close)."""
ALONE_S = WARM_S + LONGEST_WINDOW_S
"""A transfer begins with one connection."""
REGISTRY_REQUESTS = 2
"""Of a node whose job names a digest: manifest, config blob."""


@dataclass(frozen=True)
class Site:
    """The parameters. Bytes, bytes/s, seconds, operations/s."""

    nodes: int = 1000
    image_bytes: float = 4e9
    used: float = 0.08
    """Fraction of the image that is read until the program has started."""
    spread_s: float = 2.0
    """The nodes of a job begin within this time."""
    registry_bytes_per_s: float = 1.15e9
    connection_bytes_per_s: float = 2e8
    connections: int = 4
    registry_requests_per_s: float = 500.0
    node_bytes_per_s: float = 2.5e9
    disk_bytes_per_s: float = 1e9
    shared_write_bytes_per_s: float = 2e9
    shared_read_bytes_per_s: float = 5e10
    shared_operations_per_s: float = 5e4
    fixed_s: float = 0.3
    """From the last byte that is needed to a running program, and from the request to the first byte."""


@dataclass(frozen=True)
class Outcome:
    """What one way of doing it costs. Seconds after the first node began."""

    way: str
    first_s: float
    median_s: float
    last_s: float
    registry_copies: float
    registry_requests: int
    file_operations_per_s: float
    """Most in any second, of the waiting nodes together."""
    whole_s: float
    """When every node has all the bytes that it is going to have."""


@dataclass
class Link:
    """Something that bytes pass through."""

    bytes_per_s: float


@dataclass(eq=False)
class Flow:
    """Bytes on their way through links; no faster than ``limit_bytes_per_s``."""

    left_bytes: float
    links: tuple[Link, ...]
    limit_bytes_per_s: float
    done: Callable[[], None]


class World:
    """The simulation: events in the order of time, and flows between them."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.moved_bytes: dict[int, float] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._flows: dict[tuple[tuple[int, ...], float], list[Flow]] = {}
        self._number = 0

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Do something at a time."""
        self._number += 1
        heapq.heappush(self._events, (time_s, self._number, action))

    def send(self, flow: Flow) -> None:
        """Begin a transfer."""
        self._flows.setdefault((tuple(map(id, flow.links)), flow.limit_bytes_per_s), []).append(flow)

    def run(self) -> None:
        """Go on until nothing happens any more."""
        while self._events or self._flows:
            rates = self._rates()
            ends = [
                (min(flow.left_bytes for flow in flows) / rates[key], key)
                for key, flows in self._flows.items()
            ]
            soonest_s = min(ends)[0] if ends else float("inf")
            next_s = self._events[0][0] - self.now_s if self._events else float("inf")
            step_s = max(0.0, min(soonest_s, next_s))
            self.now_s += step_s
            ended: list[Flow] = []
            for key, flows in list(self._flows.items()):
                for flow in flows:
                    flow.left_bytes -= rates[key] * step_s
                for link in flows[0].links:
                    moved = rates[key] * step_s * len(flows)
                    self.moved_bytes[id(link)] = self.moved_bytes.get(id(link), 0.0) + moved
                ended += [flow for flow in flows if flow.left_bytes <= 1.0]
                self._flows[key] = [flow for flow in flows if flow.left_bytes > 1.0]
                if not self._flows[key]:
                    del self._flows[key]
            for flow in ended:
                flow.done()
            while self._events and self._events[0][0] <= self.now_s + 1e-9:
                heapq.heappop(self._events)[2]()

    def _rates(self) -> dict[tuple[tuple[int, ...], float], float]:
        """Share the links: the most crowded one first gives each of its flows the same (progressive filling)."""
        waiting = dict(self._flows)
        free = {id(link): link.bytes_per_s for flows in waiting.values() for link in flows[0].links}
        rates: dict[tuple[tuple[int, ...], float], float] = {}
        while waiting:
            users = {one: sum(len(flows) for key, flows in waiting.items() if one in key[0]) for one in free}
            shares = {one: free[one] / count for one, count in users.items() if count}
            limits = {key: min([key[1], *(shares[one] for one in key[0])]) for key in waiting}
            lowest = min(limits.values())
            for key in [key for key, limit in limits.items() if limit <= lowest * (1 + 1e-12)]:
                rates[key] = lowest
                for one in key[0]:
                    free[one] = max(0.0, free[one] - lowest * len(waiting[key]))
                del waiting[key]
        return rates


class Storm:
    """All nodes of a site start one image that is nowhere but in the registry."""

    def __init__(self, site: Site, way: str, seed: int = 1) -> None:
        self.site, self.way = site, way
        self._chance = random.Random(seed)
        self._world = World()
        self._registry = Link(site.registry_bytes_per_s)
        self._shared_read = Link(site.shared_read_bytes_per_s)
        self._shared_write = Link(site.shared_write_bytes_per_s)
        self._pulled_s: float | None = None
        self._shown_s: float | None = None
        """When what a start needs can be seen by the others."""
        self._pulling = False
        self._answered_s = 0.0
        self._ready: list[float] = []
        self._whole: list[float] = []
        self._asked: dict[int, int] = {}

    def run(self) -> Outcome:
        """Simulate it."""
        begin = sorted(self._chance.uniform(0.0, self.site.spread_s) for _ in range(self.site.nodes))
        for when_s in begin:
            self._world.at(when_s, self._start)
        self._world.run()
        moved = self._world.moved_bytes.get(id(self._registry), 0.0)
        return Outcome(
            self.way,
            min(self._ready),
            statistics.median(self._ready),
            max(self._ready),
            moved / self.site.image_bytes,
            self.site.nodes * REGISTRY_REQUESTS,
            max(self._asked.values(), default=0),
            max(self._whole, default=0.0),
        )

    def _start(self) -> None:
        # The registry answers one question after the other.
        now_s = max(self._world.now_s, self._answered_s)
        self._answered_s = now_s + REGISTRY_REQUESTS / self.site.registry_requests_per_s
        self._world.at(self._answered_s, self._know)

    def _know(self) -> None:
        match self.way:
            case "local":
                self._fetch(self.site.image_bytes, self._is_ready_and_whole)
            case "local, lazy":
                self._fetch(self.site.image_bytes * self.site.used, self._fill)
            case _:
                self._look(self._world.now_s)

    def _fetch(self, size_bytes: float, done: Callable[[], None]) -> None:
        site = self.site
        store = site.disk_bytes_per_s if self.way.startswith("local") else site.shared_write_bytes_per_s
        most = min(site.node_bytes_per_s, store)
        links = (self._registry,) if self.way.startswith("local") else (self._registry, self._shared_write)
        alone = min(most, site.connection_bytes_per_s)
        together = min(most, site.connections * site.connection_bytes_per_s)
        first = min(size_bytes, alone * ALONE_S)

        def go_on() -> None:
            if size_bytes > first:
                self._world.send(Flow(size_bytes - first, links, together, done))
            else:
                done()

        self._world.send(Flow(first, links, alone, go_on))

    def _fill(self) -> None:
        self._is_ready()
        self._fetch(self.site.image_bytes * (1 - self.site.used), self._is_whole)

    def _look(self, since_s: float) -> None:
        """Look into the shared directory: read it, pull it, or come again."""
        now_s = self._world.now_s
        if self._pulled_s is not None:
            self._read_shared(self._is_ready_and_whole)
        elif not self._pulling:
            self._pulling = True
            if self.way == "shared, lazy":
                first = self.site.image_bytes * self.site.used
                self._fetch(first, self._leader_is_ready)
            else:
                self._fetch(self.site.image_bytes, self._has_pulled)
        elif self.way == "shared, lazy":
            self._watch(since_s)
            self._follow(since_s)
        else:
            self._ask(FILE_OPERATIONS)
            pause_s = self._pause(now_s - since_s, ASK_S, LONGEST_S)
            self._world.at(now_s + pause_s, lambda: self._look(since_s))

    def _follow(self, since_s: float) -> None:
        """Wait for what the start needs, which the node that pulls needs, too."""
        now_s = self._world.now_s
        if self._shown_s is not None and now_s >= self._shown_s:
            self._read_shared(self._is_ready)
            return
        self._ask(LOOK_OPERATIONS)
        pause_s = self._pause(now_s - since_s, LOOK_S, LONGEST_LOOK_S)
        self._world.at(now_s + pause_s, lambda: self._follow(since_s))

    def _watch(self, since_s: float) -> None:
        """Look for the end of the pull."""
        now_s = self._world.now_s
        if self._pulled_s is not None:
            self._is_whole()
            return
        self._ask(WATCH_OPERATIONS)
        pause_s = self._pause(now_s - since_s, ASK_S, LONGEST_S)
        self._world.at(now_s + pause_s, lambda: self._watch(since_s))

    def _ask(self, operations: int) -> None:
        second = int(self._world.now_s)
        self._asked[second] = self._asked.get(second, 0) + operations

    def _pause(self, waited_s: float, least_s: float, longest_s: float) -> float:
        return max(least_s, min(longest_s, SHARE * waited_s)) * self._chance.uniform(0.8, 1.2)

    def _read_shared(self, done: Callable[[], None]) -> None:
        needed = self.site.image_bytes * self.site.used
        self._world.send(Flow(needed, (self._shared_read,), self.site.node_bytes_per_s, done))

    def _leader_is_ready(self) -> None:
        self._shown_s = self._world.now_s + SHOWN_S
        self._is_ready()
        self._fetch(self.site.image_bytes * (1 - self.site.used), self._is_pulled)

    def _has_pulled(self) -> None:
        self._is_ready()
        self._is_pulled()

    def _is_pulled(self) -> None:
        self._pulled_s = self._world.now_s
        self._whole.append(self._world.now_s)

    def _is_ready(self) -> None:
        self._ready.append(self._world.now_s + self.site.fixed_s)

    def _is_whole(self) -> None:
        self._whole.append(self._world.now_s)

    def _is_ready_and_whole(self) -> None:
        self._is_ready()
        self._is_whole()


WAYS = ("local", "local, lazy", "shared", "shared, lazy")


def outcomes(site: Site) -> list[Outcome]:
    """Simulate each way."""
    return [Storm(site, way).run() for way in WAYS]


def table(found: list[Outcome]) -> str:
    """Return a Markdown table."""
    lines = [
        "| cache | first node, s | median, s | last, s | copies sent by the registry | file operations/s |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.way} | {one.first_s:.1f} | {one.median_s:.1f} | {one.last_s:.1f} | {one.registry_copies:.2f}"
        f" | {one.file_operations_per_s:.0f} |"
        for one in found
    ]
    return "\n".join(lines)


def main() -> None:
    """Print what a site costs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=Site.nodes)
    parser.add_argument("--gigabytes", type=float, default=Site.image_bytes / 1e9)
    parser.add_argument("--used", type=float, default=Site.used, help="fraction read until the start")
    parser.add_argument("--registry", type=float, default=Site.registry_bytes_per_s / 1e9, help="GB/s")
    parser.add_argument("--mirrors", type=int, default=0, help="each as fast as the registry")
    parser.add_argument("--shared-read", type=float, default=Site.shared_read_bytes_per_s / 1e9, help="GB/s")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    site = replace(
        Site(),
        nodes=args.nodes,
        image_bytes=args.gigabytes * 1e9,
        used=args.used,
        registry_bytes_per_s=args.registry * 1e9 * (1 + args.mirrors),
        shared_read_bytes_per_s=args.shared_read * 1e9,
    )
    found = outcomes(site)
    print(json.dumps([asdict(one) for one in found], indent=1) if args.json else table(found))


if __name__ == "__main__":
    main()
