"""The traps of ReFrame's reports, one by one: what does not pass although ReFrame's totals or exit status say so."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uenvd.errors import ReportError
from uenvd.publish.reframe.report import cleaned, empty_report, join, judge, with_problem


def case(name: str = "A", result: str = "pass", environ: str = "e", **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "unique_name": name,
        "display_name": name,
        "system": "demo",
        "partition": "local",
        "environ": environ,
        "result": result,
        "fail_phase": "sanity" if result == "fail" else None,
        "fail_reason": "wrong" if result == "fail" else None,
        **more,
    }


def report(*runs: list[dict[str, Any]], **info: Any) -> bytes:
    def counts(tests: list[dict[str, Any]]) -> dict[str, int]:
        return {
            "num_cases": len(tests),
            "num_failures": sum(test["result"] == "fail" for test in tests),
            "num_aborted": 0,
            # ReFrame counts what could not run as skipped.
            "num_skipped": sum(test["result"] in ("skip", "fail_deps") for test in tests),
        }

    first, last = (runs[0], runs[-1]) if runs else ([], [])
    session = {
        "data_version": "4.2",
        "hostname": "login7",
        "user": "alice",
        "cmdline": "reframe -c /home/alice/x",
        "uuid": "1",
        "time_elapsed": 1.5,
        **counts(last),
        "num_cases": len(first),
        **info,
    }
    documents = [
        {**counts(tests), "run_index": index, "testcases": tests} for index, tests in enumerate(runs)
    ]
    return json.dumps({"session_info": session, "runs": documents, "restored_cases": []}).encode()


def test_all_passed() -> None:
    verdict = judge(report([case("A"), case("B"), case("C", "skip"), case("D", "xfail")]))
    assert verdict.passing
    assert (verdict.passed, verdict.ran, verdict.skipped, verdict.failed) == (3, 3, 1, 0)
    assert str(verdict) == "3 of 3 tests passed, 1 skipped themselves"


@pytest.mark.parametrize("result", ["fail", "abort", "fail_deps", "xpass", "<unknown>", "anything new"])
def test_every_other_result_is_a_failure(result: str) -> None:
    verdict = judge(report([case("A"), case("B", result)]))
    assert not verdict.passing
    assert verdict.failed == 1
    assert len(verdict.problems) == 1
    assert verdict.problems[0].startswith("B @demo:local+e: ")


def test_nothing_selected_is_no_success() -> None:
    for raw in (report(), report([]), empty_report("4.10", 0.0)):
        verdict = judge(raw)
        assert verdict.empty
        assert verdict.problems == ("no test was selected",)


def test_only_skipped_is_no_success() -> None:
    verdict = judge(report([case("A", "skip")]))
    assert verdict.empty
    assert verdict.problems == ("every test skipped itself",)


def test_a_retry_counts_as_its_last_run_and_is_told() -> None:
    verdict = judge(report([case("A"), case("B", "fail")], [case("B")]))
    assert verdict.passing
    assert [one.name for one in verdict.retried] == ["B"]
    assert not judge(report([case("A", "fail")], [case("A", "fail")])).passing


def test_one_test_in_two_environments_is_two_cases() -> None:
    verdict = judge(report([case("A", environ="x"), case("A", "fail", environ="y")]))
    assert (verdict.of_environment("x"), verdict.of_environment("y"), verdict.of_environment("z")) == (
        1,
        1,
        0,
    )
    assert verdict.failed == 1


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "no JSON"),
        (b"[1]", "session_info"),
        (b'{"session_info": {}}', "session_info"),
        (report([case()], data_version="9.0"), "data version"),
        (report([case()], num_cases=2), "counts 2 test cases and lists 1"),
        (report([case(""), case("B")]).replace(b'"name": ""', b'"name": 3'), "no name"),
        (report([case("A"), case("A")]), "twice"),
        (report([case("A", "fail")]).replace(b'"num_failures": 1', b'"num_failures": 0'), "fewer failures"),
        (report([case()]).replace(b'"num_cases": 1', b'"num_cases": true'), "num_cases"),
        (
            report([case()]).replace(b'"restored_cases": []', b'"restored_cases": [{}]'),
            "an earlier session",
        ),
        (b"[" * 100_000, "no JSON"),
    ],
)
def test_what_is_no_honest_report_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(ReportError, match=reason):
        judge(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.text(max_size=3) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_a_damaged_report_raises_nothing_else(data: st.DataObject) -> None:
    document = json.loads(report([case("A"), case("B", "fail")], [case("B")]))
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = document
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and data.draw(st.booleans()):
                place = place[key]
                continue
            place[key] = data.draw(JSON)
            break
    with contextlib.suppress(ReportError):
        judge(json.dumps(document).encode())


def test_a_problem_of_the_session_is_a_failed_case() -> None:
    raw = with_problem(report([case()]), "session", "ReFrame crashed")
    verdict = judge(raw)
    assert verdict.problems == ("session: abort: ReFrame crashed",)
    assert json.loads(raw)["session_info"]["num_aborted"] == 1
    assert judge(with_problem(empty_report("4.10", 0.0), "session", "crashed")).failed == 1


def test_sessions_are_joined() -> None:
    whole = join([report([case("A")]), report([case("A", "fail", environ="host")]), empty_report("4", 0.0)])
    document = json.loads(whole)
    assert document["session_info"]["num_cases"] == 2
    assert document["session_info"]["num_failures"] == 1
    assert document["session_info"]["time_elapsed"] == 3.0
    assert judge(whole).failed == 1
    assert judge(join([empty_report("4", 0.0), report([case("A")])])).passing
    with pytest.raises(ReportError):
        join([report([case()], [case()]), report([case()])])


def test_what_is_private_is_left_out() -> None:
    raw = report(
        [
            case(
                "login7-test",
                stagedir="/home/alice/work/stage",
                job_nodelist=["vm", "nid001"],
                fail_reason="on nid001 of login7, not on login77",
                sourcesdir="/opt/tool/lib",
            )
        ]
    )
    clean = cleaned(raw, {"/home/alice/work": "WORKDIR", "/home/alice": "HOME", "alice": "USER", "x": "no"})
    document = json.loads(clean)
    (test,) = document["runs"][0]["testcases"]
    assert test["stagedir"] == "WORKDIR/stage"
    assert test["job_nodelist"] == ["node1", "node2"]
    assert test["fail_reason"] == "on node2 of host, not on login77"
    assert test["name"] == "login7-test"  # names of tests are kept: verdicts are compared by them
    assert test["sourcesdir"] == "/opt/tool/lib"
    info = document["session_info"]
    assert (info["hostname"], info["user"], info["cmdline"]) == ("", "", "")
    assert b"alice" not in clean
    assert judge(clean) == judge(raw) or judge(clean).passing
