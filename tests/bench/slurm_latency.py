"""What the plugin costs a job step: `srun -n1 true` with and without it, interleaved in one run, by an ordinary user: `make bench-slurm`.

    slurm_latency.py [--rounds N] [--out DIRECTORY]

A private cluster of one node, a real registry, a uenvd on the login side and one on the node. In each round every variant runs once, in
an order that changes; between two sruns there is a pause, in which Slurm finishes the job before (its end would otherwise run beside the next
one's start, on machines of few processors). A figure is the shift to the plugstack without the plugin *in the same round*: the median of
the means of all pairs of differences (Hodges and Lehmann), which needs far fewer rounds than the plain median of the differences, shown beside
it. The interval is what 95 % of resampled runs give. Rounds alternate between a node at rest and one whose uenvd pulls an image as fast as it
can, again and again. Needs root. Writes ``slurm_latency.json`` and ``slurm_latency.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from support.publishing import Publisher, simple_image  # noqa: E402
from support.slurmcentre import Centre, running_centre  # noqa: E402

RESULTS = HERE.parents[1] / "bench/results"
ROUNDS = 60
BLOCK = 5
"""Rounds between a change from rest to pulling and back."""
PULLED_MB = 300
PAUSE_S = 0.15
SEED = 20
RESAMPLED = 400

BASE = "no plugin"
VARIANTS: dict[str, tuple[str, ...]] = {
    BASE: (),
    "plugin, no --uenv": (),
    "plugin, warm image": ("--uenv=app/1.0", "--view=default"),
}
LIMITS_MS = {
    ("rest", "plugin, no --uenv"): 0.5,
    ("rest", "plugin, warm image"): 3.0,
    ("pulling", "plugin, warm image"): 10.0,
}
"""(state of the node, variant): how much slower than `BASE` in the same state."""

Figures = dict[str, dict[str, list[float]]]
"""State -> variant -> milliseconds, one for each round."""


@contextmanager
def pulling(centre: Centre, label: str) -> Iterator[list[int]]:
    """Let the node's uenvd pull the image, drop it, pull it again; yields a list with the sizes of the pulls so far."""
    daemon = centre.nodes["node1"]
    stop = threading.Event()
    pulls: list[int] = []

    def pull() -> None:
        while not stop.is_set():
            with daemon.client() as client:
                done = client.ask("pull", uenv=label)
                if not done["ok"]:
                    raise RuntimeError(done["error"]["message"])
                pulls.append(done["images"][0]["size_bytes"])
                client.ask("evict", uenv=label)

    thread = threading.Thread(target=pull, daemon=True)
    thread.start()
    try:
        yield pulls
    finally:
        stop.set()
        thread.join(60)


def run_once(centre: Centre, variant: str) -> float:
    """Return how many milliseconds one srun takes."""
    time.sleep(PAUSE_S)
    if variant == BASE:
        centre.cluster.set_plugstack()
    else:
        centre.use_socket("control")
    begin = time.perf_counter()
    done = centre.srun("-n1", *VARIANTS[variant], "true")
    took_ms = (time.perf_counter() - begin) * 1e3
    if done.returncode != 0:
        raise RuntimeError(f"srun failed ({variant}): {done.stderr}")
    return took_ms


def measure(centre: Centre, rounds: int) -> tuple[Figures, float]:
    """Run all rounds in both states; return the figures and the speed of the pulls in MB/s."""
    order = random.Random(SEED)
    figures: Figures = {state: {name: [] for name in VARIANTS} for state in ("rest", "pulling")}

    def block(state: str, count: int) -> None:
        for _round in range(count):
            for variant in order.sample(list(VARIANTS), len(VARIANTS)):
                figures[state][variant].append(run_once(centre, variant))

    for variant in VARIANTS:
        run_once(centre, variant)
    pulled, pulling_s = 0, 0.0
    for start in range(0, rounds, BLOCK):
        count = min(BLOCK, rounds - start)
        block("rest", count)
        begin = time.monotonic()
        with pulling(centre, "big/1") as pulls:
            block("pulling", count)
        pulling_s += time.monotonic() - begin
        pulled += sum(pulls)
    return figures, pulled / 1e6 / pulling_s


def differences(figures: Figures, state: str, variant: str) -> list[float]:
    """Return how much slower than `BASE` each round was, in ms."""
    pairs = zip(figures[state][variant], figures[state][BASE], strict=True)
    return [value - base for value, base in pairs]


def shift(values: list[float]) -> float:
    """Return the median of the means of all pairs of values, each with itself too (Hodges and Lehmann, 1963)."""
    pairs = itertools.combinations_with_replacement(values, 2)
    return statistics.median((one + other) / 2 for one, other in pairs)


def interval(values: list[float]) -> tuple[float, float]:
    """Return what 95 % of resampled runs give as the shift."""
    chance = random.Random(SEED)
    found = sorted(shift(chance.choices(values, k=len(values))) for _ in range(RESAMPLED))
    edge = RESAMPLED // 40
    return found[edge], found[-1 - edge]


def table(figures: Figures) -> str:
    """Return the figures as a Markdown table, and the verdicts below."""
    lines = [
        "| node | `srun -n1 true` | median ms | p10 | p90 | more than without, ms | 95 % | median of differences | limit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for state, variants in figures.items():
        for variant, values in variants.items():
            tenths = statistics.quantiles(values, n=10)
            more = " | | "
            if variant != BASE:
                found = differences(figures, state, variant)
                low, high = interval(found)
                more = f"{shift(found):+.2f} | {low:+.2f} to {high:+.2f} | {statistics.median(found):+.2f}"
            limit = LIMITS_MS.get((state, variant))
            lines.append(
                f"| {state} | {variant} | {statistics.median(values):.1f} | {tenths[0]:.1f} | {tenths[-1]:.1f} "
                f"| {more} | {'' if limit is None else f'+{limit:g}'} |"
            )
    return "\n".join(lines)


def verdicts(figures: Figures) -> list[tuple[bool, str]]:
    """Judge each limit."""
    found = []
    for (state, variant), limit in LIMITS_MS.items():
        value = shift(differences(figures, state, variant))
        passed = value <= limit
        found.append(
            (
                passed,
                f"{'pass' if passed else 'MISS'}  {state}: {variant}: {value:+.2f} ms, limit +{limit:g} ms",
            )
        )
    return found


def main() -> int:
    """Measure, print, write; the exit status says whether every limit was kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    with running_centre(1, settings="") as centre:
        image = simple_image(centre.cluster.dir / "big.squashfs", "big", "big", megabytes=PULLED_MB)
        Publisher(centre.registry.url).push(image, "big/1", "v1")
        figures, speed = measure(centre, chosen.rounds)
    found = verdicts(figures)
    text = table(figures)
    print(text, f"\npulling: {speed:.0f} MB/s, {chosen.rounds} rounds in each state\n", sep="\n")
    print("\n".join(line for _passed, line in found))
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "slurm_latency.md").write_text(text + "\n")
    (chosen.out / "slurm_latency.json").write_text(
        json.dumps({"rounds": chosen.rounds, "pulling_mb_per_s": speed, "ms": figures}, indent=1)
    )
    return 0 if all(passed for passed, _line in found) else 1


if __name__ == "__main__":
    sys.exit(main())
