from __future__ import annotations

import grp
from collections.abc import Mapping

import pytest
import trio

from uenvd.config import AccessRule, parse
from uenvd.daemon import access
from uenvd.daemon.access import Access, Permit
from uenvd.daemon.peer import Identity
from uenvd.errors import AccessDenied, ConfigError
from uenvd.label import Label

VASP = Label("vasp", "6.4", None, "demo", "zen3", None, "deploy")
OTHER = Label("app", "1.0", None, "demo", "zen3", None, "deploy")
LICENSED = VASP._replace(namespace="licensed")
GROUPS = {"vasp": 1001, "staff": 1002}


def rules(text: str) -> tuple[AccessRule, ...]:
    return parse(f"system: s\nregistry: oci-layout:/r\naccess:\n{text}", "c.yaml").access


def permit(
    text: str, *groups: int, uid: int = 1000, gid: int = 1000, known: Mapping[str, int] = GROUPS
) -> Permit:
    return Permit(Identity(uid, gid, groups), rules(text), known)


def test_a_rule_is_for_its_images_only() -> None:
    outsider = permit("  deploy::vasp: [vasp]\n")
    assert outsider.allows(OTHER) and outsider.allows(LICENSED)
    assert not outsider.allows(VASP)
    with pytest.raises(AccessDenied, match="group vasp") as caught:
        outsider.require(VASP)
    assert caught.value.hint


def test_any_of_the_groups_is_enough_also_the_primary_one() -> None:
    text = "  deploy::vasp: [vasp, staff]\n"
    assert permit(text, 1001).allows(VASP) and permit(text, 1002).allows(VASP)
    assert permit(text, gid=1001).allows(VASP)
    assert not permit(text, 1003).allows(VASP)


def test_every_rule_that_an_image_meets_must_be_satisfied() -> None:
    text = "  licensed: [staff]\n  licensed::vasp/6.4: [vasp]\n"
    assert not permit(text, 1001).allows(LICENSED) and not permit(text, 1002).allows(LICENSED)
    assert permit(text, 1001, 1002).allows(LICENSED)
    assert permit(text, 1002).allows(LICENSED._replace(version="6.3"))


def test_a_group_that_nobody_knows_lets_nobody_in_but_root() -> None:
    text = "  licensed: [missing]\n"
    assert not permit(text, 0, 1001, known={}).allows(LICENSED)
    assert permit(text, uid=0, known={}).allows(LICENSED)


async def test_groups_are_looked_up_now_and_then_and_kept_when_the_database_is_away(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"vasp": 7}
    monkeypatch.setattr(access, "look_up_groups", lambda names: {n: known[n] for n in names if n in known})
    site = Access(rules("  deploy::vasp: [vasp]\n"))
    member = Identity(1000, 1000, (7,))
    assert (await site.permit(member)).allows(VASP)
    known["vasp"] = 8
    assert (await site.permit(member)).allows(VASP)
    await trio.sleep(access.TTL_S + 1)
    assert not (await site.permit(member)).allows(VASP)
    known.clear()
    await trio.sleep(access.TTL_S + 1)
    assert (await site.permit(Identity(1000, 1000, (8,)))).allows(VASP)


def test_the_systems_groups_are_found() -> None:
    assert access.look_up_groups({"root", "no-such-group"}) == {"root": grp.getgrnam("root").gr_gid}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("  deploy::vasp:v1: [vasp]\n", 4, "neither a namespace nor"),
        ("  deploy::vasp: []\n", 4, "no group"),
        ("  'deploy::a b': [x]\n", 4, "label"),
        ("  - x\n", 3, "mapping"),
        ("  deploy::vasp: ['a b']\n", 4, "no name"),
    ],
)
def test_rules_that_are_none_are_refused(text: str, line: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rules(text)
    assert words in caught.value.message
    assert f"c.yaml:{line}:" in caught.value.message or f"c.yaml:{line - 1}:" in caught.value.message
