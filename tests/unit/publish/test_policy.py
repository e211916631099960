"""Policies for releases: every key is read, every fault is told with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from uenvd.errors import ConfigError, UsageError
from uenvd.publish.performance import Thresholds
from uenvd.publish.policy import Policy, Tests, Who, load_policy, parse_policy

ALL = """\
who: {users: [alice], groups: [release], ci: ["gitlab:hpc/uenv@main"]}
tests: {required: ["Says*"], minimum: 2, waivers: no, retries: no}
min_age: 2d
evidence: [uenv/sbom, uenv/provenance]
signature: {keys: /etc/keys}
performance: {worse: 5%, figures: {"Stream:*": 20 %}, lost: no}
"""


def test_every_key() -> None:
    assert parse_policy(ALL, "p.yaml") == Policy(
        Who(("alice",), ("release",), ("gitlab:hpc/uenv@main",)),
        Tests(("Says*",), 2, False, False),
        2 * 86400.0,
        ("uenv/sbom", "uenv/provenance"),
        Path("/etc/keys"),
        Thresholds(0.05, {"Stream:*": 0.2}),
        False,
    )
    assert parse_policy("", "p.yaml") == Policy()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tests: {requird: [x]}", "p.yaml:1: tests.requird"),
        ("min_age: soon", "p.yaml:1: min_age"),
        ("who: {}", "p.yaml:1: who: names nobody"),
        ("signature: {}", "signature.keys: is missing"),
        ("signature: {keys: keys}", "no absolute path"),
        ("performance:\n  figures:\n    a: 5", "p.yaml:3: performance.figures: '5' is no percentage"),
        ("performance: {worse: -5%}", "is no percentage"),
        ("evidence: {a: b}", "must be a list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_faults_name_file_line_and_key(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"p\.yaml:") as caught:
        parse_policy(text, "p.yaml")
    assert message in caught.value.message


def test_a_policy_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_policy(tmp_path / "none")
