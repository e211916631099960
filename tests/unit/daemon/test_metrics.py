"""The exposition text is what Prometheus' own parser reads; counts are right whoever counts."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from uenvd.daemon.metrics import MAX_SERIES, Counter, Gauge, Histogram, Metrics, result_of
from uenvd.errors import UnknownLabel


def parsed(text: str) -> dict[str, Any]:
    """Return the families of a text by name; the parser of a foreign implementation."""
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(text: str, family: str) -> dict[tuple[tuple[str, str], ...], float]:
    return {
        (("", one.name.removeprefix(family)), *sorted(one.labels.items())): one.value
        for one in parsed(text)[family].samples
    }


def text_of(metric: Counter | Gauge | Histogram) -> str:
    return "".join(f"{line}\n" for line in metric.lines())


def test_every_metric_is_understood_and_explained() -> None:
    metrics = Metrics()
    metrics.requests.inc(op="mount", result="ok")
    metrics.pull_seconds.observe(3.0)
    text = metrics.text()
    assert text.endswith("\n")
    families = parsed(text)
    names = {metric.name.removesuffix("_total") for metric in metrics}
    assert families.keys() == names
    for metric in metrics:
        family = families[metric.name.removesuffix("_total")]
        assert family.type == metric.kind
        assert family.documentation == metric.text
        assert metric.text.endswith(".")


def test_names_follow_the_conventions() -> None:
    for metric in Metrics():
        assert metric.name.startswith(("uenvd_", "process_"))
        assert metric.name.endswith("_total") == isinstance(metric, Counter)
        assert not metric.name.endswith(("_ms", "_kb", "_mb"))


def test_a_counter_counts_for_each_combination() -> None:
    counter = Counter("c_total", "C.", ("op", "result"))
    counter.inc(op="a", result="ok")
    counter.inc(2.5, op="a", result="ok")
    counter.inc(op="b", result="no")
    assert counter.value(op="a", result="ok") == 3.5
    assert counter.value(op="never", result="ok") == 0
    assert counter.total() == 4.5
    assert sum(samples(text_of(counter), "c").values()) == 4.5


def test_a_counter_without_labels_starts_at_zero() -> None:
    assert "c_total 0\n" in text_of(Counter("c_total", "C."))


def test_misuse_is_an_error() -> None:
    counter = Counter("c_total", "C.", ("op",))
    for labels in ({}, {"other": "x"}, {"op": "x", "more": "y"}):
        with pytest.raises(ValueError, match="has the labels"):
            counter.inc(**labels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot shrink"):
        counter.inc(-1, op="x")


def test_the_number_of_series_is_bounded() -> None:
    counter = Counter("c_total", "C.", ("who",))
    for number in range(MAX_SERIES + 50):
        counter.inc(who=str(number))
    assert len(list(counter.samples())) == MAX_SERIES + 1
    assert counter.value(who="other") == 50


def test_label_values_and_help_are_escaped() -> None:
    hostile = 'a"b\\c\nd{},='
    counter = Counter("c_total", "First \\ line\nsecond.", ("who",))
    counter.inc(who=hostile)
    family = parsed(text_of(counter))["c"]
    assert family.documentation == "First \\ line\nsecond."
    assert family.samples[0].labels == {"who": hostile}


def test_a_histogram_is_cumulative() -> None:
    histogram = Histogram("h_seconds", "H.", bounds=(0.1, 1.0, 10.0))
    for value in (0.05, 0.1, 0.5, 5.0, 50.0):
        histogram.observe(value)
    family = parsed(text_of(histogram))["h_seconds"]
    buckets = {one.labels["le"]: one.value for one in family.samples if one.name.endswith("_bucket")}
    assert buckets == {"0.1": 2, "1": 3, "10": 4, "+Inf": 5}
    others = {one.name: one.value for one in family.samples if not one.name.endswith("_bucket")}
    assert others == {"h_seconds_sum": 55.65, "h_seconds_count": 5}


def test_quantiles_are_upper_bounds() -> None:
    histogram = Histogram("h_seconds", "H.", ("op",), bounds=(0.1, 1.0, 10.0))
    assert histogram.quantile(0.5) is None
    for value in (0.05, 0.5, 0.6):
        histogram.observe(value, op="a")
    histogram.observe(100.0, op="b")
    assert histogram.quantile(0.25) == 0.1
    assert histogram.quantile(0.5) == 1.0
    assert histogram.quantile(0.99) == math.inf


def test_a_gauge_is_read_when_it_is_shown() -> None:
    gauge = Gauge("g", "G.", ("state",))
    assert text_of(gauge) == "# HELP g G.\n# TYPE g gauge\n"
    state = {"serving": 2.0}
    gauge.read_from(lambda: state)
    state["pulling"] = 1.0
    assert 'g{state="pulling"} 1\ng{state="serving"} 2\n' in text_of(gauge)


def test_a_gauge_that_cannot_be_read_costs_only_itself(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()

    def broken() -> float:
        raise RuntimeError("no")

    metrics.leases.read_from(broken)
    families = parsed(metrics.text())
    assert families["uenvd_leases"].samples == []
    assert families["uenvd_info"].samples
    assert "uenvd_leases cannot be read" in caplog.text


@pytest.mark.parametrize(
    "value", [0.0, -1.5, 1e300, 123456789012345678.0, math.inf, -math.inf, math.nan, 0.1]
)
def test_numbers_survive(value: float) -> None:
    gauge = Gauge("g", "G.")
    gauge.set(value)
    (sample,) = parsed(text_of(gauge))["g"].samples
    assert sample.value == value or (math.isnan(value) and math.isnan(sample.value))


def test_threads_lose_no_count() -> None:
    counter = Counter("c_total", "C.", ("op",))
    histogram = Histogram("h", "H.")

    def count() -> None:
        for _ in range(2000):
            counter.inc(op="x")
            histogram.observe(0.01)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.value(op="x") == 8000
    assert [one[2] for one in histogram.samples() if one[0] == "_count"] == [8000]


def test_results() -> None:
    assert result_of(None) == "ok"
    assert result_of(UnknownLabel("x")) == "unknown-label"
    assert result_of(RuntimeError()) == "internal"


def test_a_question_is_counted_however_it_ends() -> None:
    metrics = Metrics()
    with metrics.question():
        pass
    with pytest.raises(UnknownLabel), metrics.question():
        raise UnknownLabel("x")
    assert metrics.registry_requests.value(result="ok") == 1
    assert metrics.registry_requests.value(result="unknown-label") == 1
    assert metrics.registry_seconds.quantile(1.0) is not None
