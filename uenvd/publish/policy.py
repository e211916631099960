"""The policy of a site for releases: a YAML file. Pure; what the keys mean is in docs/publishing.md.

Every key is optional, and what is not asked for is not checked; but that tests of this very digest passed is asked for always.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import yaml

from uenvd import yamlfile as y
from uenvd.errors import UsageError
from uenvd.publish.performance import DEFAULT_THRESHOLD, Thresholds

MANUAL: Final = "docs/publishing.md"
_DIALECT: Final = y.Dialect(manual=MANUAL)


@dataclass(frozen=True)
class Who:
    """Who may promote: one match is enough."""

    users: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    ci: tuple[str, ...] = ()
    """Patterns of ``gitlab:GROUP/PROJECT@REF`` and ``github:OWNER/REPOSITORY@REF``."""


@dataclass(frozen=True)
class Tests:
    """Which tests must have been run."""

    __test__ = False

    required: tuple[str, ...] = ()
    """Patterns of names; each must match a test that passed."""
    minimum: int = 0
    """How many of the image's own tests, besides those that are built in."""
    waivers: bool = True
    """Whether a waiver may stand for tests that were not run."""
    retries: bool = True
    """Whether a test may have passed at a second attempt."""


@dataclass(frozen=True)
class Policy:
    """What is demanded of an image before it is released."""

    who: Who | None = None
    """None: everybody who has the rights in the registry."""
    tests: Tests = field(default_factory=Tests)
    min_age_s: float = 0.0
    """Since the image was first tested."""
    evidence: tuple[str, ...] = ()
    """Types of attachments that must be there."""
    keys: Path | None = None
    """Directory of the keys one of which must have signed; None: no signature is asked for."""
    performance: Thresholds | None = None
    """None: figures are shown and not judged."""
    may_lose_figures: bool = True
    """Whether a figure that the release before has may be missing."""


def load_policy(path: Path) -> Policy:
    """Read a policy. Raises `UsageError` where it cannot be read, `ConfigError` that names file, line and key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the policy {path} cannot be read: {error}") from error
    return parse_policy(text, str(path))


def parse_policy(text: str, source: str) -> Policy:
    """Parse a policy; ``source`` is its name in messages. Raises `ConfigError`."""
    top = y.Section(source, "", y.compose(text, source, _DIALECT), 1, _DIALECT)
    who, tests = top.section("who"), top.section("tests")
    signature, performance = top.section("signature"), top.section("performance")
    policy = Policy(
        who=Who(who.take("users", y.texts, ()), who.take("groups", y.texts, ()), who.take("ci", y.texts, ()))
        if "who" in top
        else None,
        tests=Tests(
            tests.take("required", y.texts, ()),
            tests.take("minimum", y.count, 0),
            tests.take("waivers", y.truth, True),
            tests.take("retries", y.truth, True),
        ),
        min_age_s=top.take("min_age", _age, 0.0),
        evidence=top.take("evidence", y.texts, ()),
        keys=signature.need("keys", y.path) if "signature" in top else None,
        performance=Thresholds(
            performance.take("worse", _percent, DEFAULT_THRESHOLD), performance.take("figures", _figures, {})
        )
        if "performance" in top
        else None,
        may_lose_figures=performance.take("lost", y.truth, True),
    )
    for section in (who, tests, signature, performance, top):
        section.end()
    if policy.who == Who():
        top.fail("who", "names nobody", hint="leave it out, or name users, groups or ci")
    return policy


def _age(node: yaml.Node) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*d", y.text(node))
    return float(match[1]) * 86400.0 if match else y.seconds(node)


def _percent(node: yaml.Node) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", y.text(node))
    if match is None:
        raise ValueError(f"{y.text(node)!r} is no percentage (for example 10%)")
    return float(match[1]) / 100


def _figures(node: yaml.Node) -> dict[str, float]:
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("must be a mapping of TEST:VARIABLE to percentages")  # noqa: TRY004 -- the document's fault
    found = {}
    for key, value in node.value:
        try:
            found[y.text(key)] = _percent(value)
        except ValueError as error:
            raise y.BadItem(str(error), y.line_of(value)) from error
    return found
