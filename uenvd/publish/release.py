"""Releases: what is asked for, by which policy, and doing it. ``deploy``, ``promote`` and ``run --deploy`` are this with other words."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from uenvd.errors import DeployRefused, UsageError
from uenvd.oci.remote import Progress, Remote, no_progress
from uenvd.oci.signatures import PrivateKey, read_keys, read_private_key, sign
from uenvd.publish.console import say
from uenvd.publish.demands import Check, Identity, check_policy, check_who, identity, require
from uenvd.publish.deploy import Deployed, deploy_image
from uenvd.publish.options import BUILD, DEPLOY
from uenvd.publish.policy import Policy, load_policy
from uenvd.publish.push import MOVING_TAGS, Target, check_tag

POLICY_VARIABLE: Final = "UENVD_POLICY"
"""Names the policy of a site, where no option does."""


@dataclass(frozen=True)
class Order:
    """A release that is asked for."""

    tag: str
    policy: Policy | None = None
    """None: only the gate, that tests of this very digest passed."""
    key: PrivateKey | None = None
    """Signs the image once all else is right."""
    waiver: str | None = None
    move_latest: bool = True
    namespace: str = DEPLOY


@dataclass(frozen=True)
class Released:
    """What came of an order."""

    checks: tuple[Check, ...]
    deployed: Deployed | None
    """None: it may be released, and was not to be."""


def add_release_options(parser: argparse.ArgumentParser, *, moving: bool = True) -> None:
    """Add how an image is released; ``moving``: also from and to where, and the waiver, which commands that test have already."""
    group = parser.add_argument_group("release")
    group.add_argument(
        "--policy", type=Path, metavar="FILE", help=f"what the site demands; default ${POLICY_VARIABLE}"
    )
    group.add_argument(
        "--sign", type=Path, metavar="KEY", help="sign it with this key once all else is right"
    )
    group.add_argument("--no-latest", action="store_true", help="do not move latest")
    if moving:
        group.add_argument(
            "--waive-tests",
            metavar="REASON",
            help="release it although no test was run, and record who answers for it and why; failed tests cannot be waived",
        )
        group.add_argument(
            "--from",
            dest="source",
            default=BUILD,
            metavar="NS",
            help=f"namespace it comes from; default {BUILD}",
        )
        group.add_argument(
            "--to", default=DEPLOY, metavar="NS", help=f"namespace it goes to; default {DEPLOY}"
        )


def check_release_tag(tag: str, option: str = "--tag") -> None:
    """Refuse a tag that a release cannot have. Raises `UsageError`."""
    check_tag(tag)
    if tag in MOVING_TAGS:
        raise UsageError(
            f"{tag!r} is a tag that moves: a release needs one that stays",
            hint=f"say {option} v1; {tag} follows by itself",
        )


def check_waiver(reason: str | None) -> None:
    """Refuse a waiver without a reason. Raises `UsageError`."""
    if reason is not None and not reason.strip():
        raise UsageError("--waive-tests needs a reason", hint="say who answers for it and why")


def policy_path(arguments: argparse.Namespace) -> Path | None:
    """Return the file of the policy that options or environment name."""
    named: Path | None = arguments.policy
    if named is None and os.environ.get(POLICY_VARIABLE):
        named = Path(os.environ[POLICY_VARIABLE])
    return named


def order_of(arguments: argparse.Namespace, tag: str, option: str = "--tag") -> Order:
    """Return what the options ask for. Raises `UsageError`, `ConfigError` for what can be known to be wrong before anything is done."""
    check_release_tag(tag, option)
    check_waiver(arguments.waive_tests)
    path = policy_path(arguments)
    policy = None if path is None else load_policy(path)
    key = None if arguments.sign is None else read_private_key(arguments.sign)
    believed = policy.keys if policy is not None else None
    if key is not None and believed is not None and key.key_id not in read_keys(believed):
        raise UsageError(
            f"the policy does not believe the key {arguments.sign}", hint=f"put its .pub into {believed}"
        )
    return Order(
        tag,
        policy,
        key,
        arguments.waive_tests,
        not arguments.no_latest,
        getattr(arguments, "to", DEPLOY),
    )


def require_who(order: Order, who: Identity | None = None) -> None:
    """Refuse who may not release, before an image is built for it. Raises `DeployRefused`."""
    if order.policy is None or order.policy.who is None:
        return
    check = check_who(order.policy.who, identity(os.environ) if who is None else who)
    if not check.passed:
        raise DeployRefused(f"the policy does not allow this release: {check.text}")


def release(
    remote: Remote,
    source: Target,
    order: Order,
    *,
    action: str,
    dry_run: bool = False,
    progress: Progress = no_progress,
    say: Callable[[str], None] = say,
) -> Released:
    """Release the image at ``source`` (by digest): policy, signature, then as `deploy_image`. May be repeated after a failure.

    Raises `DeployRefused` with every reason for which the policy does not allow it, and what `deploy_image` raises.
    """
    checks: list[Check] = []
    if order.policy is not None:
        checks = check_policy(
            remote,
            source,
            source.reference,
            order.tag,
            order.policy,
            who=identity(os.environ),
            now=datetime.now(UTC),
            namespace=order.namespace,
            waiver=order.waiver,
            will_be_signed=order.key is not None,
        )
        for check in checks:
            say(str(check))
        require(checks, source.reference)
    if dry_run:
        return Released(tuple(checks), None)
    if order.key is not None:
        sign(remote, source.repository, source.reference, order.key, [order.tag])
    done = deploy_image(
        remote,
        source,
        order.tag,
        namespace=order.namespace,
        waiver=order.waiver,
        move_latest=order.move_latest,
        progress=progress,
        say=say,
        action=action,
        compare=order.policy is None,
    )
    for note in done.notes:
        say(f"note: {note}")
    return Released(tuple(checks), done)
