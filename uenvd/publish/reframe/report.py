"""Reports of ReFrame: judged, joined, cleaned. Pure.

The format is that of ``reframe --report-file`` (ReFrame 4, data version 4; ``reframe/schemas/runreport.json``). ReFrame's own totals and exit
status are not enough for a verdict: ``num_cases`` counts the first run and ``num_failures`` the last one, a test that was not run because one
that it depends on failed is counted as skipped, and a run that selected nothing "passed". So a verdict is made of the single test cases.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from uenvd.errors import ReportError

MAX_REPORT_BYTES: Final = 64 << 20
MAX_CASES: Final = 100_000

TESTED: Final = "dev.uenvd.tested.digest"
"""Annotation: digest of the manifest whose image was mounted and tested."""
WAIVED: Final = "dev.uenvd.tested.waived"
"""Annotation: why tests that are missing do not matter, in somebody's words."""

BUILT_IN: Final = "UenvSmoke"
"""How the names of the tests begin that every image gets (`uenvd.publish.smoke`)."""

PASSING: Final = frozenset({"pass", "xfail"})
SKIPPED: Final = "skip"
_COUNTS: Final = ("num_cases", "num_failures", "num_aborted", "num_skipped")
_PRIVATE_INFO: Final = {
    "hostname": "",
    "user": "",
    "cmdline": "",
    "config_files": [],
    "log_files": [],
    "prefix_output": "",
    "prefix_stage": "",
    "workdir": "",
}
"""Fields of ``session_info`` that say where and by whom a test was run, and what a cleaned report has there."""


@dataclass(frozen=True)
class Case:
    """One test in one environment, as the last run that has it says."""

    name: str
    environment: str
    partition: str
    """``system:partition``."""
    result: str
    """``pass``, ``fail``, ``skip``, ``xfail``, ``xpass``, ``fail_deps``, ``abort``, or whatever ReFrame says else."""
    phase: str
    """In which it failed; empty if it did not."""
    reason: str
    attempts: int
    """In how many runs it was."""

    @property
    def passed(self) -> bool:
        """Whether it did what it was expected to do."""
        return self.result in PASSING

    @property
    def built_in(self) -> bool:
        """Whether it is one of those that every image gets."""
        return self.name.startswith(BUILT_IN)

    @property
    def skipped(self) -> bool:
        """Whether it skipped itself."""
        return self.result == SKIPPED

    def __str__(self) -> str:
        where = f"{self.name} @{self.partition}+{self.environment}" if self.environment else self.name
        if self.passed:
            return where
        what = f"failed in {self.phase}" if self.result == "fail" and self.phase else self.result
        return f"{where}: {what}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Verdict:
    """What a report says in the end."""

    cases: tuple[Case, ...]
    problems: tuple[str, ...]
    """Why it does not pass, a line each; empty if it does."""

    @property
    def passing(self) -> bool:
        """Whether there were tests, and none of them failed."""
        return not self.problems

    @property
    def ran(self) -> int:
        """How many tests did not skip themselves."""
        return sum(not case.skipped for case in self.cases)

    @property
    def passed(self) -> int:
        """How many tests passed."""
        return sum(case.passed for case in self.cases)

    @property
    def failed(self) -> int:
        """How many tests failed, were aborted or could not be run."""
        return sum(not case.passed and not case.skipped for case in self.cases)

    @property
    def skipped(self) -> int:
        """How many tests skipped themselves."""
        return sum(case.skipped for case in self.cases)

    @property
    def own(self) -> int:
        """How many tests were run that are not built in."""
        return sum(not case.skipped and not case.built_in for case in self.cases)

    @property
    def empty(self) -> bool:
        """Whether no test was run at all."""
        return self.ran == 0

    @property
    def retried(self) -> tuple[Case, ...]:
        """The tests that passed, but not at once."""
        return tuple(case for case in self.cases if case.passed and case.attempts > 1)

    def of_environment(self, name: str) -> int:
        """Return how many tests were run in an environment, those that are built in left out."""
        return sum(case.environment == name and not case.skipped and not case.built_in for case in self.cases)

    def __str__(self) -> str:
        text = f"{self.passed} of {self.ran} tests passed"
        if self.own < self.ran:
            text += f" ({self.ran - self.own} built in)"
        return text + (f", {self.skipped} skipped themselves" if self.skipped else "")


def judge(raw: bytes) -> Verdict:
    """Judge a report of at most `MAX_REPORT_BYTES` bytes. Raises `ReportError` for anything that is none.

    It passes if at least one test was run and each that was run did what was expected. A test that ran again counts as its last run.
    """
    document = parse(raw)
    cases = _cases(document)
    problems = [str(case) for case in cases if not case.passed and not case.skipped]
    if not cases:
        problems.append("no test was selected")
    elif all(case.skipped for case in cases):
        problems.append("every test skipped itself")
    return Verdict(tuple(cases), tuple(problems))


def parse(raw: bytes) -> dict[str, Any]:
    """Parse and check a report: its form, its version, and that its totals are those of its tests. Raises `ReportError`."""
    if len(raw) > MAX_REPORT_BYTES:
        raise ReportError(
            f"the report has {len(raw)} bytes, more than the {MAX_REPORT_BYTES} that are allowed"
        )
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ReportError("the report is no JSON") from error
    info = document.get("session_info") if isinstance(document, dict) else None
    runs = document.get("runs") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(info, dict) or not isinstance(runs, list):
        raise ReportError("the report has no session_info and runs: it is not one of ReFrame's")
    version = str(info.get("data_version"))
    if not re.fullmatch(r"[34]\.\d+(\.\d+)?", version):
        raise ReportError(f"the report has the unknown data version {version[:40]!r}")
    if document.get("restored_cases"):
        raise ReportError(
            "the report takes results from an earlier session", hint="run all tests in one session"
        )
    total = 0
    for index, run in enumerate(runs):
        tests = run.get("testcases") if isinstance(run, dict) else None
        if not isinstance(tests, list) or not all(isinstance(test, dict) for test in tests):
            raise ReportError(f"run {index} of the report has no list of test cases")
        total += len(tests)
        if total > MAX_CASES:
            raise ReportError(f"the report has more than {MAX_CASES} test cases")
        said = _count(run, "num_cases", f"run {index}")
        if said != len(tests):
            raise ReportError(f"run {index} of the report counts {said} test cases and lists {len(tests)}")
        failed = sum(test.get("result") == "fail" for test in tests)
        if _count(run, "num_failures", f"run {index}") < failed:
            raise ReportError(f"run {index} of the report counts fewer failures than it lists")
    first = len(runs[0]["testcases"]) if runs else 0
    if "num_cases" in info and _count(info, "num_cases", "the session") != first:
        raise ReportError(
            f"the session of the report counts {info['num_cases']} test cases and lists {first}"
        )
    return document


def _count(body: Mapping[str, Any], key: str, what: str) -> int:
    value = body.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ReportError(f"{what} of the report has no valid {key}")
    return value


def _cases(document: Mapping[str, Any]) -> list[Case]:
    """Return each test case once, as it ended; in the order of the report."""
    found: dict[tuple[str, str, str], Case] = {}
    for run in document["runs"]:
        seen: set[tuple[str, str, str]] = set()
        for test in run["testcases"]:
            name = _text(test, "display_name") or _text(test, "unique_name") or _text(test, "name")
            partition = f"{_text(test, 'system')}:{_text(test, 'partition')}"
            key = (_text(test, "unique_name") or name, partition, _text(test, "environ"))
            result = _text(test, "result")
            if not name or not result:
                raise ReportError("a test case of the report has no name or no result")
            if key in seen:
                raise ReportError(f"the report has the test case {name} twice in one run")
            seen.add(key)
            attempts = found[key].attempts + 1 if key in found else 1
            found[key] = Case(
                name, key[2], partition, result, _text(test, "fail_phase"), _reason(test), attempts
            )
    return list(found.values())


def _text(test: Mapping[str, Any], key: str) -> str:
    value = test.get(key)
    return value[:1000] if isinstance(value, str) else ""


def _reason(test: Mapping[str, Any]) -> str:
    return " ".join(_text(test, "fail_reason").split())[:300]


def join(reports: Sequence[bytes]) -> bytes:
    """Return one report of the sessions of several, each of one run; the first one's session is that of the whole. Raises `ReportError`."""
    documents = [parse(raw) for raw in reports]
    whole = documents[0]
    if not whole["runs"]:
        whole["runs"].append({**dict.fromkeys(_COUNTS, 0), "run_index": 0, "testcases": []})
    if any(len(document["runs"]) > 1 for document in documents):
        raise ReportError("only reports of one run can be joined")
    info, run = whole["session_info"], whole["runs"][0]
    for other in documents[1:]:
        for more in other["runs"]:
            run["testcases"] += more["testcases"]
            for key in _COUNTS:
                run[key] = run.get(key, 0) + more.get(key, 0)
        later = other["session_info"]
        for key in ("time_end", "time_end_unix"):
            info[key] = later.get(key, info.get(key))
        elapsed = (info.get("time_elapsed"), later.get("time_elapsed"))
        info["time_elapsed"] = sum(part for part in elapsed if isinstance(part, (int, float)))
    for key in _COUNTS:
        info[key] = run.get(key, 0)
    return json.dumps(whole).encode()


def empty_report(version: str, when_unix_s: float) -> bytes:
    """Return the report of a session in which no test was selected, for which ReFrame itself writes none."""
    info = {
        "data_version": "4.2",
        "version": version,
        "uuid": "",
        "time_start_unix": when_unix_s,
        "time_end_unix": when_unix_s,
        "time_elapsed": 0.0,
        **dict.fromkeys(_COUNTS, 0),
        **_PRIVATE_INFO,
    }
    return json.dumps({"session_info": info, "runs": [], "restored_cases": []}).encode()


def with_problem(raw: bytes, name: str, reason: str) -> bytes:
    """Return the report with one more test case that was aborted: what happened to the session itself. Raises `ReportError`."""
    document = parse(raw)
    if not document["runs"]:
        document["runs"].append({**dict.fromkeys(_COUNTS, 0), "run_index": 0, "testcases": []})
    first = document["runs"][0]
    first["testcases"].append(
        {
            "name": name,
            "unique_name": name,
            "display_name": name,
            "filename": "",
            "system": "",
            "partition": "",
            "environ": "",
            "result": "abort",
            "fail_phase": "session",
            "fail_reason": reason,
            "job_completion_time_unix": None,
            "time_total": None,
            "perfvalues": {},
        }
    )
    for counts in (first, document["session_info"]):
        counts["num_cases"] = len(first["testcases"])
        counts["num_aborted"] = counts.get("num_aborted", 0) + 1
    return json.dumps(document).encode()


def cleaned(raw: bytes, private: Mapping[str, str]) -> bytes:
    """Return the report without what is nobody else's business: host names, the user, command lines, paths of the machine.

    Args:
        raw: a report.
        private: texts that are replaced wherever they occur, and their replacements; host names of the session and of jobs are added.
            Texts of less than three characters are left alone.

    Raises:
        ReportError: the report is malformed.

    """
    document = parse(raw)
    info = document["session_info"]
    replacements = dict(private)
    nodes = {info["hostname"]: "host"} if isinstance(info.get("hostname"), str) else {}
    for run in document["runs"]:
        for test in run["testcases"]:
            listed = test.get("job_nodelist")
            if isinstance(listed, list):
                test["job_nodelist"] = [nodes.setdefault(str(node), f"node{len(nodes)}") for node in listed]
    replacements = nodes | replacements
    info.update({key: value for key, value in _PRIVATE_INFO.items() if key in info})
    words = sorted((text for text in replacements if len(text) >= 3), key=len, reverse=True)
    if words:
        # Longest first, and host names only as whole words: a host called "test" must not change every "tests".
        pattern = re.compile(
            "|".join(
                re.escape(word) if "/" in word else rf"(?<![\w-]){re.escape(word)}(?![\w-])" for word in words
            )
        )
        document = _replaced(document, pattern, replacements)
    return json.dumps(document, separators=(",", ":")).encode()


def _replaced(value: Any, pattern: re.Pattern[str], replacements: Mapping[str, str]) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, str):
        return pattern.sub(lambda found: replacements[found.group()], value)
    if isinstance(value, list):
        return [_replaced(item, pattern, replacements) for item in value]
    if isinstance(value, dict):
        kept = {"name", "unique_name", "display_name", "system", "partition", "environ", "result", "hashcode"}
        return {
            key: item if key in kept else _replaced(item, pattern, replacements)
            for key, item in value.items()
        }
    if isinstance(value, float) and not math.isfinite(value):
        return None  # no JSON
    return value
