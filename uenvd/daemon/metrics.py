"""What this daemon has counted, as Prometheus text (exposition format 0.0.4).

`METRICS` is the one set of the process; whoever has something to count imports it: ``METRICS.pulled_bytes.inc(n)``,
``METRICS.requests.inc(op="mount", result="ok")``, ``METRICS.pull_seconds.observe(3.2)``. What is a state, not an event, is asked for when the
text is made: ``METRICS.leases.read_from(lambda: len(leases))``.

Concurrency: everything may be called from any thread; a metric has a lock that is never held across anything that blocks. What a gauge reads
is called in the thread of the daemon's event loop, and must not block.

Label values come from fixed, small sets (an operation, an error's code, a state), never from users: no label, path or uid. A metric
keeps at most `MAX_SERIES` combinations; further ones are counted with every label ``other``.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeAlias

from uenvd import __version__
from uenvd.errors import InternalError, UenvError

log = logging.getLogger(__name__)

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
MAX_SERIES: Final = 200
QUICK_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds, seconds, for what a user waits for at a prompt."""
SLOW_S: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds, seconds, for transfers."""

_Key: TypeAlias = tuple[str, ...]
_Sample: TypeAlias = tuple[str, Sequence[tuple[str, str]], float]
"""Suffix of the name, labels, value."""


class Metric(ABC):
    """What all kinds have in common: a name, a help text, the names of its labels."""

    kind = "untyped"

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self.name = name
        self.text = text
        self.labels = tuple(labels)
        self._lock = threading.Lock()

    def _key(self, labels: Mapping[str, str], present: Mapping[_Key, object]) -> _Key:
        if labels.keys() != set(self.labels):
            raise ValueError(f"{self.name} has the labels {self.labels}, not {tuple(labels)}")
        key = tuple(labels[name] for name in self.labels)
        return key if key in present or len(present) < MAX_SERIES else ("other",) * len(key)

    @abstractmethod
    def samples(self) -> Iterable[_Sample]:
        """Return the present values."""

    def lines(self) -> Iterator[str]:
        """Yield the metric's part of the text."""
        yield f"# HELP {self.name} {_escaped(self.text, quotes=False)}"
        yield f"# TYPE {self.name} {self.kind}"
        for suffix, labels, value in self.samples():
            inner = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels)
            yield f"{self.name}{suffix}{f'{{{inner}}}' if inner else ''} {_number(value)}"


class Counter(Metric):
    """A number that only grows, for each combination of labels."""

    kind = "counter"

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, text, labels)
        self._values: dict[_Key, float] = {} if labels else {(): 0.0}

    def inc(self, amount: float = 1.0, **labels: str) -> None:
        """Add ``amount`` >= 0. Raises ValueError for a negative amount or labels that are not the metric's."""
        if amount < 0:
            raise ValueError(f"{self.name} cannot shrink")
        with self._lock:
            key = self._key(labels, self._values)
            self._values[key] = self._values.get(key, 0.0) + amount

    def value(self, **labels: str) -> float:
        """Return the count of one combination, 0 if it never happened."""
        with self._lock:
            return self._values.get(tuple(labels[name] for name in self.labels), 0.0)

    def total(self) -> float:
        """Return the sum over all combinations."""
        with self._lock:
            return math.fsum(self._values.values())

    def samples(self) -> Iterable[_Sample]:
        """Return the present values."""
        with self._lock:
            values = sorted(self._values.items())
        return [("", tuple(zip(self.labels, key, strict=True)), value) for key, value in values]


class Gauge(Metric):
    """A state, read when the text is made. Without a reader, or when the reader fails, it has no samples."""

    kind = "gauge"

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, text, labels)
        self._read: Callable[[], float | Mapping[str, float]] | None = None

    def read_from(self, read: Callable[[], float | Mapping[str, float]]) -> None:
        """Take the value from a function: a number, or for a gauge with one label a mapping from the label's value to a number."""
        self._read = read

    def set(self, value: float) -> None:
        """Keep a value until the next one."""
        self._read = lambda: value

    def samples(self) -> Iterable[_Sample]:
        """Return the present values."""
        if self._read is None:
            return []
        try:
            value = self._read()
        except Exception:  # one broken reader must not cost the site all other metrics
            log.exception("%s cannot be read", self.name)
            return []
        if isinstance(value, Mapping):
            return [("", ((self.labels[0], key),), number) for key, number in sorted(value.items())]
        return [("", (), value)]


class Histogram(Metric):
    """How often a value was at most each of some bounds; its sum and count."""

    kind = "histogram"

    def __init__(
        self, name: str, text: str, labels: Sequence[str] = (), *, bounds: Sequence[float] = QUICK_S
    ) -> None:
        super().__init__(name, text, labels)
        self.bounds = tuple(bounds)
        self._counts: dict[_Key, list[int]] = {} if labels else {(): self._fresh()}
        self._sums: dict[_Key, float] = {} if labels else {(): 0.0}

    def _fresh(self) -> list[int]:
        return [0] * (len(self.bounds) + 1)

    def observe(self, value: float, **labels: str) -> None:
        """Count a value, in the metric's unit."""
        with self._lock:
            key = self._key(labels, self._counts)
            self._counts.setdefault(key, self._fresh())[bisect.bisect_left(self.bounds, value)] += 1
            self._sums[key] = self._sums.get(key, 0.0) + value

    def quantile(self, fraction: float) -> float | None:
        """Return the upper bound of the bucket that holds this quantile over all labels; None without values, inf beyond the last bound."""
        with self._lock:
            counts = [sum(column) for column in zip(*self._counts.values(), strict=True)]
        wanted = fraction * sum(counts)
        if not wanted:
            return None
        seen = 0
        for bound, count in zip((*self.bounds, math.inf), counts, strict=True):
            seen += count
            if seen >= wanted:
                return bound
        return math.inf

    def samples(self) -> Iterable[_Sample]:
        """Return the present values: cumulative buckets, sum and count."""
        with self._lock:
            rows = [(key, list(counts), self._sums[key]) for key, counts in sorted(self._counts.items())]
        found: list[_Sample] = []
        for key, counts, total in rows:
            labels = tuple(zip(self.labels, key, strict=True))
            seen = 0
            for bound, count in zip((*self.bounds, math.inf), counts, strict=True):
                seen += count
                found.append(("_bucket", (*labels, ("le", _number(bound))), seen))
            found.append(("_sum", labels, total))
            found.append(("_count", labels, seen))
        return found


class Metrics:
    """Every metric of the daemon. The names are an interface: dashboards use them (docs/operations.md)."""

    def __init__(self) -> None:
        self.info = Gauge("uenvd_info", "Version of this uenvd; always 1.", ("version",))
        self.info.read_from(lambda: {__version__: 1.0})
        self.start_time = Gauge("uenvd_start_time_seconds", "When this uenvd started, seconds of the epoch.")
        self.start_time.set(time.time())

        self.requests = Counter(
            "uenvd_requests_total",
            "Requests on the control socket by operation and result (ok, or the error's code).",
            ("op", "result"),
        )
        self.request_seconds = Histogram(
            "uenvd_request_seconds",
            "From a request to its final frame; 'wait' and 'pull' last as long as the pull.",
            ("op",),
        )
        self.connections = Gauge("uenvd_connections", "Open connections of the control socket.")
        self.refused_connections = Counter(
            "uenvd_refused_connections_total", "Connections refused or cut off, by reason.", ("reason",)
        )

        self.mounts = Counter(
            "uenvd_mounts_total",
            "Images mounted for a user: served already, joined (being pulled for another), cached, pulled, or a file of the user's own.",
            ("how",),
        )
        self.ready_seconds = Histogram(
            "uenvd_ready_seconds",
            "From the request for a mount to the moment at which its files can be read.",
            ("how",),
            bounds=QUICK_S + SLOW_S[6:],
        )
        self.image_failures = Counter(
            "uenvd_image_failures_total", "Images that could not be served, by the error's code.", ("code",)
        )
        self.leases = Gauge("uenvd_leases", "Leases: job steps and sessions that use images now.")
        self.images = Gauge("uenvd_images", "Images on this node by state.", ("state",))

        self.pulls = Counter(
            "uenvd_pulls_total", "Pulls that ended, by result (ok, or the error's code).", ("result",)
        )
        self.pulled_bytes = Counter(
            "uenvd_pulled_bytes_total", "Bytes of images that came from the registry."
        )
        self.pull_seconds = Histogram(
            "uenvd_pull_seconds", "Duration of pulls that succeeded.", bounds=SLOW_S
        )
        self.pulls_running = Gauge("uenvd_pulls_running", "Pulls under way.")

        self.registry_requests = Counter(
            "uenvd_registry_questions_total",
            "Questions to the registry, by result (ok, or the error's code).",
            ("result",),
        )
        self.registry_seconds = Histogram("uenvd_registry_seconds", "Duration of questions to the registry.")

        self.workers = Gauge("uenvd_workers", "Processes that serve images.")
        self.worker_ends = Counter(
            "uenvd_worker_ends_total",
            "Ends of such processes: idle (nobody uses the image any more) or unexpected.",
            ("how",),
        )
        self.takeovers = Counter(
            "uenvd_takeovers_total",
            "What went on in spite of a death: worker, supervisor (by a successor) or daemon (images adopted).",
            ("what",),
        )

        self.cache_bytes = Gauge("uenvd_cache_bytes", "Size of the node's cache.")
        self.cache_free_bytes = Gauge("uenvd_cache_free_bytes", "Room left on the cache's file system.")
        self.evictions = Counter(
            "uenvd_evictions_total", "Images removed from the cache, by cause.", ("cause",)
        )
        self.evicted_bytes = Counter("uenvd_evicted_bytes_total", "Bytes that their removal freed.")
        self.scrubbed_bytes = Counter(
            "uenvd_scrubbed_bytes_total", "Bytes of the cache that were hashed again."
        )
        self.quarantined = Counter("uenvd_quarantined_total", "Images of the cache that were found damaged.")

        self.descriptors = Gauge("process_open_fds", "Open file descriptors of uenvd.")
        self.memory_bytes = Gauge(
            "process_resident_memory_bytes", "Resident memory of uenvd, without its workers."
        )
        self.cpu_seconds = Counter(
            "process_cpu_seconds_total", "Processor time of uenvd, without its workers."
        )

    def __iter__(self) -> Iterator[Metric]:
        return (one for one in vars(self).values() if isinstance(one, Metric))

    @contextlib.contextmanager
    def question(self) -> Iterator[None]:
        """Count and time a question to the registry."""
        began_s = time.monotonic()
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
            raise
        finally:
            self.registry_requests.inc(result=result_of(failure))
            self.registry_seconds.observe(time.monotonic() - began_s)

    def succeeded(self) -> float:
        """Return how many requests were carried out."""
        return math.fsum(
            value for _suffix, labels, value in self.requests.samples() if ("result", "ok") in labels
        )

    def text(self) -> str:
        """Return all metrics in the exposition format; ends with a newline."""
        spent = time.process_time() - self.cpu_seconds.value()
        if spent > 0:
            self.cpu_seconds.inc(spent)
        return "".join(f"{line}\n" for one in self for line in one.lines())


METRICS: Final = Metrics()


def result_of(error: BaseException | None) -> str:
    """Return what to count an outcome under: ``ok``, the code of an error of the tree, ``timeout``, ``cancelled`` or ``internal``."""
    if error is None:
        return "ok"
    if isinstance(error, UenvError):
        return error.code
    return {"TooSlowError": "timeout", "Cancelled": "cancelled"}.get(type(error).__name__, InternalError.code)


def _escaped(text: str, *, quotes: bool = True) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))
