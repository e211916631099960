"""Test reports in the forms of ReFrame, for tests of what is done with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def report(*runs: Sequence[tuple[str, str]], **info: Any) -> bytes:
    """Return what ``reframe --report-file`` writes; a run is a list of (name, result). ``info`` goes into session_info."""
    written = []
    for index, cases in enumerate(runs):
        written.append(
            {
                "run_index": index,
                "num_cases": len(cases),
                "num_failures": sum(result == "fail" for _name, result in cases),
                "num_aborted": 0,
                "num_skipped": sum(result == "skip" for _name, result in cases),
                "testcases": [
                    {
                        "name": name,
                        "display_name": name,
                        "unique_name": name,
                        "system": "generic",
                        "partition": "default",
                        "environ": "builtin",
                        "result": result,
                        "fail_phase": "sanity" if result == "fail" else None,
                        "fail_reason": "wrong answer" if result == "fail" else None,
                    }
                    for name, result in cases
                ],
            }
        )
    first = len(runs[0]) if runs else 0
    session = {"data_version": "4.2", "version": "4.10.4", "num_cases": first, **info}
    return json.dumps({"session_info": session, "runs": written, "restored_cases": []}).encode()


def junit(*cases: tuple[str, str], tests: int | None = None) -> bytes:
    """Return what ``reframe --report-junit`` writes."""
    failed = sum(result == "fail" for _name, result in cases)
    body = "".join(
        f'<testcase classname="T" name="{name}" time="1.0">'
        + ('<failure type="failure" message="sanity"/>' if result == "fail" else "")
        + ("<skipped/>" if result == "skip" else "")
        + "</testcase>"
        for name, result in cases
    )
    total = len(cases) if tests is None else tests
    return (
        f'<?xml version="1.0"?><testsuites><testsuite errors="0" failures="{failed}" name="ReFrameStages" tests="{total}">'
        f"{body}</testsuite></testsuites>"
    ).encode()
