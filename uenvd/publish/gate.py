"""Whether an image may be deployed: what its attached test reports say. Every reason to refuse is a message of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree

from uenvd.errors import DeployRefused, ReportError
from uenvd.oci.attach import REFRAME_TYPE, VERDICT, attachments, when
from uenvd.oci.manifest import TITLE, Descriptor, Manifest
from uenvd.oci.remote import Remote
from uenvd.publish.reframe.report import MAX_REPORT_BYTES, TESTED, WAIVED, judge

_SHOWN: Final = 8
_HOW_TO_TEST: Final = "test it: uenvd-publish test LABEL@DIGEST"
_HOW_TO_WAIVE: Final = _HOW_TO_TEST + "; or name who answers for it: --waive-tests 'REASON'"


@dataclass(frozen=True)
class Gate:
    """Why an image may pass."""

    verdict: str
    """``passed`` or ``waived``, as in `uenvd.oci.index.VERDICTS`."""
    remark: str
    """How many tests passed, or why none were needed."""
    notes: tuple[str, ...] = ()
    """Lines for the user."""


def check_tested(remote: Remote, repository: str, digest: str, waiver: str | None = None) -> Gate:
    """Find out whether the newest report of this very digest passes.

    ``waiver``: why it does not matter that no tests were run. A test that failed cannot be waived. Raises `DeployRefused`.
    """
    reports = attachments(remote, repository, digest, REFRAME_TYPE)
    if not reports:
        if remote.referrers(repository, digest, REFRAME_TYPE):
            raise DeployRefused(f"the reports listed for {digest} belong to other images", hint=_HOW_TO_TEST)
        if waiver:
            return Gate("waived", waiver)
        raise DeployRefused(f"no test report is attached to {digest}", hint=_HOW_TO_WAIVE)
    newest = when(reports[0].annotations)
    # Where two claim the same moment neither is the newer one: both must pass.
    gates = [
        _one(remote, repository, digest, report, waiver)
        for report in reports
        if when(report.annotations) == newest
    ]
    return gates[0]


def newest_report(remote: Remote, repository: str, digest: str) -> bytes | None:
    """Return the newest report of this very digest; None without one, or where it is JUnit XML. Raises `DeployRefused` for what is no report."""
    for report in attachments(remote, repository, digest, REFRAME_TYPE):
        if report.annotations.get(TESTED) not in {None, digest}:
            continue
        raw, is_xml = _content(remote, repository, report, f"the report {report.digest[:19]}")
        return None if is_xml else raw
    return None


def _one(remote: Remote, repository: str, digest: str, report: Manifest, waiver: str | None) -> Gate:
    name = f"the report {report.digest[:19]}"
    tested = report.annotations.get(TESTED)
    if tested is not None and tested != digest:
        raise DeployRefused(f"{name} is of a test of another image, {tested}", hint=_HOW_TO_TEST)
    raw, is_xml = _content(remote, repository, report, name)
    try:
        ran, summary, problems, notes = _judge_junit(raw) if is_xml else _judge_json(raw)
    except ReportError as error:
        raise DeployRefused(f"{name} cannot be believed: {error.message}", hint=_HOW_TO_TEST) from error
    waived = report.annotations.get(WAIVED) or waiver
    if ran == 0:
        if waived:
            return Gate("waived", waived)
        raise DeployRefused(f"{name} says that no test was run ({'; '.join(problems)})", hint=_HOW_TO_WAIVE)
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DeployRefused(
            f"{name} says that tests failed ({summary}):\n{shown}{more}",
            hint="failed tests cannot be waived: mend the image or the test, and test again",
        )
    if report.annotations.get(VERDICT) == "fail":
        raise DeployRefused(
            f"{name} is marked as failed, though its test cases passed ({summary})",
            hint="the log of uenvd-publish test says what else was wrong",
        )
    return Gate("passed", summary, notes)


def _content(remote: Remote, repository: str, report: Manifest, name: str) -> tuple[bytes, bool]:
    """Return (the report, whether it is JUnit XML)."""
    known = [(layer, kind) for layer in report.layers if (kind := _kind(layer)) is not None]
    if len(known) > 1 and any(kind == "json" for _layer, kind in known):
        known = [(layer, kind) for layer, kind in known if kind == "json"]
    if len(known) != 1:
        raise DeployRefused(
            f"{name} has {len(known)} files that could be a report where one is expected", hint=_HOW_TO_TEST
        )
    layer, kind = known[0]
    if layer.size_bytes > MAX_REPORT_BYTES:
        raise DeployRefused(
            f"{name} has {layer.size_bytes} bytes, more than the {MAX_REPORT_BYTES} that are read",
            hint=_HOW_TO_TEST,
        )
    return remote.small_blob(repository, layer, MAX_REPORT_BYTES), kind == "xml"


def _kind(layer: Descriptor) -> str | None:
    title = layer.annotations.get(TITLE, "").lower()
    for kind in ("json", "xml"):
        if title.endswith(f".{kind}") or layer.media_type.partition(";")[0].endswith(
            ("/" + kind, "+" + kind)
        ):
            return kind
    return None


def _judge_json(raw: bytes) -> tuple[int, str, tuple[str, ...], tuple[str, ...]]:
    verdict = judge(raw)
    notes = tuple(f"{case} passed only at attempt {case.attempts}" for case in verdict.retried)
    return verdict.ran, str(verdict), verdict.problems, notes


def _judge_junit(raw: bytes) -> tuple[int, str, tuple[str, ...], tuple[str, ...]]:
    """Judge a report in JUnit's form, as ReFrame writes with ``--report-junit``: what pipelines of early 2024 attach."""
    if b"<!DOCTYPE" in raw or b"<!ENTITY" in raw:
        raise ReportError("it has a document type declaration, which a report has no use for")
    try:
        root = ElementTree.fromstring(raw)  # noqa: S314 -- without a DTD there is nothing to expand
    except (ElementTree.ParseError, ValueError) as error:
        raise ReportError("it is no XML") from error
    suites = [root] if root.tag == "testsuite" else root.findall("testsuite")
    if root.tag not in {"testsuite", "testsuites"} or not suites:
        raise ReportError("it has no test suites")
    cases = [case for suite in suites for case in suite.findall("testcase")]
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None and case not in failed]
    try:
        said = [sum(int(suite.get(key, "0")) for suite in suites) for key in ("tests", "failures", "errors")]
    except ValueError as error:
        raise ReportError("its totals are no numbers") from error
    if said[0] != len(cases) or said[1] + said[2] != len(failed):
        raise ReportError(
            f"it counts {said[0]} tests and {said[1] + said[2]} failures, and lists {len(cases)} and {len(failed)}"
        )
    ran = len(cases) - len(skipped)
    problems = tuple(str(case.get("name")) for case in failed) or (() if ran else ("no test was selected",))
    return ran, f"{ran - len(failed)} of {ran} tests passed", problems, ()
