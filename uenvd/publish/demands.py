"""Whether an image may be released by a site's policy: each demand is a check of its own, and all are made, also after one is not met."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from grp import getgrgid
from pathlib import Path

from uenvd.errors import DeployRefused, NotFound, ReportError, UenvError
from uenvd.oci.attach import REFRAME_TYPE, attachments, when
from uenvd.oci.reference import repository_of, split_repository
from uenvd.oci.remote import Remote
from uenvd.oci.signatures import read_keys, verify
from uenvd.publish.comparison import compare_with_previous
from uenvd.publish.gate import Gate, check_tested, newest_report
from uenvd.publish.options import DEPLOY
from uenvd.publish.policy import Policy, Tests, Who
from uenvd.publish.provenance import ci_identity
from uenvd.publish.push import Target
from uenvd.publish.reframe.report import judge

_SHOWN = 8


@dataclass(frozen=True)
class Identity:
    """Who asks for a promotion."""

    user: str
    groups: tuple[str, ...]
    ci: str | None


@dataclass(frozen=True)
class Check:
    """One demand of the policy, and whether it is met."""

    name: str
    passed: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok     ' if self.passed else 'REFUSED'}  {self.name}: {self.text}"


def identity(environ: Mapping[str, str]) -> Identity:
    """Return who this process is: by the kernel, and what the CI says of its job."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    groups = []
    for gid in {os.getgid(), *os.getgroups()}:
        try:
            groups.append(getgrgid(gid).gr_name)
        except KeyError:
            continue
    return Identity(user, tuple(sorted(groups)), ci_identity(environ))


def check_policy(
    remote: Remote,
    source: Target,
    digest: str,
    tag: str,
    policy: Policy,
    *,
    who: Identity,
    now: datetime,
    namespace: str = DEPLOY,
    waiver: str | None = None,
    will_be_signed: bool = False,
) -> list[Check]:
    """Check everything that a policy demands of an image; all demands are checked, also after one is not met.

    Args:
        remote: where the image is.
        source: its repository (the reference does not matter).
        digest: of its manifest.
        tag: under which it is to be released.
        policy: what is demanded.
        who: asks for it.
        now: with a time zone.
        namespace: where it is to be released.
        waiver: why missing tests do not matter.
        will_be_signed: it gets a good signature before it is released.

    Raises:
        RegistryError: and the remote's other errors, where a question has no answer.

    """
    repository = source.repository
    checks = [check_who(policy.who, who)] if policy.who is not None else []
    checks.append(_tag(remote, repository, digest, tag, namespace))
    checks += _tests(remote, repository, digest, policy.tests, waiver)
    if policy.min_age_s > 0:
        checks.append(_age(remote, repository, digest, policy.min_age_s, now))
    for kind in policy.evidence:
        there = bool(attachments(remote, repository, digest, kind))
        checks.append(Check("evidence", there, f"{kind} is {'attached' if there else 'not attached'}"))
    if policy.keys is not None:
        checks.append(_signature(remote, repository, digest, tag, policy.keys, will_be_signed))
    checks.append(_performance(remote, repository, digest, policy, namespace))
    return checks


def check_who(allowed: Who, who: Identity) -> Check:
    """Check who asks: this does not depend on the image."""
    mine = f"{who.user}{f' in {who.ci}' if who.ci else ''}"
    if who.user in allowed.users:
        return Check("who", True, f"{who.user} may")
    for group in who.groups:
        if group in allowed.groups:
            return Check("who", True, f"members of {group} may")
    for pattern in allowed.ci:
        if who.ci is not None and fnmatchcase(who.ci, pattern):
            return Check("who", True, f"{who.ci} may")
    return Check(
        "who",
        False,
        f"{mine} may not: the policy names {', '.join((*allowed.users, *allowed.groups, *allowed.ci))}",
    )


def _tag(remote: Remote, repository: str, digest: str, tag: str, namespace: str) -> Check:
    parts = split_repository(repository)
    assert parts is not None  # the image was found there
    target = repository_of(namespace, *parts[1:])
    try:
        there = remote.resolve(target, tag)
    except NotFound:
        return Check("tag", True, f"{tag} is free")
    if there == digest:
        return Check("tag", True, f"{tag} is this image already")
    return Check("tag", False, f"{tag} is another image already ({there}), and released tags never change")


def _tests(remote: Remote, repository: str, digest: str, wanted: Tests, waiver: str | None) -> list[Check]:
    try:
        gate: Gate = check_tested(remote, repository, digest, waiver)
    except DeployRefused as error:
        return [Check("tests", False, error.message)]
    if gate.verdict == "waived":
        checks = [
            Check(
                "tests",
                wanted.waivers,
                f"waived: {gate.remark}" + ("" if wanted.waivers else "; the policy allows no waivers"),
            )
        ]
        if not wanted.required and not wanted.minimum:
            return checks
    else:
        checks = [Check("tests", True, gate.remark)]
    try:
        raw = newest_report(remote, repository, digest)
        verdict = judge(raw) if raw is not None else None
    except (DeployRefused, ReportError) as error:
        return [*checks, Check("tests", False, error.message)]
    if verdict is None:
        if wanted.required or wanted.minimum or not wanted.retries:
            checks.append(Check("tests", False, "no report of ReFrame in JSON says which tests were run"))
        return checks
    passed = [case.name for case in verdict.cases if case.passed]
    for pattern in wanted.required:
        found = any(fnmatchcase(name, pattern) for name in passed)
        checks.append(Check("required test", found, f"{pattern} {'passed' if found else 'was not run'}"))
    own = sum(case.passed and not case.built_in for case in verdict.cases)
    if wanted.minimum:
        checks.append(
            Check("number of tests", own >= wanted.minimum, f"{own} of its own, {wanted.minimum} needed")
        )
    if not wanted.retries:
        again = ", ".join(case.name for case in verdict.retried[:_SHOWN])
        checks.append(
            Check("retries", not again, f"{again} passed only at a later attempt" if again else "none")
        )
    return checks


def _age(remote: Remote, repository: str, digest: str, wanted_s: float, now: datetime) -> Check:
    times = [when(report.annotations) for report in attachments(remote, repository, digest, REFRAME_TYPE)]
    known = [time for time in times if time.year > 1]
    if not known:
        return Check("age", False, "no report says when it was tested, so nobody knows since when it waits")
    age = now - min(known)
    wanted = timedelta(seconds=wanted_s)
    return Check("age", age >= wanted, f"first tested {_duration(age)} ago, {_duration(wanted)} needed")


def _duration(span: timedelta) -> str:
    hours = span.total_seconds() / 3600
    if hours >= 48:
        return f"{hours / 24:.1f} d"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"


def _signature(
    remote: Remote, repository: str, digest: str, tag: str, keys: Path, will_be_signed: bool
) -> Check:
    if will_be_signed:
        return Check("signature", True, "it will be signed")
    try:
        key = verify(remote, repository, digest, read_keys(keys), tag)
    except UenvError as error:
        return Check("signature", False, error.message)
    return Check("signature", True, f"by {key.name}")


def _performance(remote: Remote, repository: str, digest: str, policy: Policy, namespace: str) -> Check:
    try:
        compared = compare_with_previous(
            remote, repository, digest, namespace=namespace, thresholds=policy.performance
        )
    except (DeployRefused, ReportError) as error:
        return Check("performance", policy.performance is None, f"not compared: {error.message}")
    if compared is None:
        return Check("performance", True, "nothing to compare with")
    lost = bool(compared.comparison.lost) and not policy.may_lose_figures
    bad = policy.performance is not None and (bool(compared.comparison.worse) or lost)
    return Check("performance", not bad, "\n    ".join(line.strip() for line in compared.lines()))


def require(checks: Sequence[Check], digest: str) -> None:
    """Raise `DeployRefused` with every reason, unless all checks passed."""
    reasons = [f"  {check.name}: {check.text}" for check in checks if not check.passed]
    if reasons:
        raise DeployRefused(
            f"the policy does not allow to release {digest}:\n" + "\n".join(reasons),
            hint="--dry-run shows all checks and does nothing",
        )
