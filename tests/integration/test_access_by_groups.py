"""Images for members of a group, and users' own images: whoever asks, and however he names them."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import support.daemon
from support.daemon import Daemon, running_daemon
from support.fusetools import NOBODY, session
from support.publishing import Publisher, simple_image

pytestmark = pytest.mark.usefixtures("node")

GROUP = "games"  # an ordinary group that every system has
GID = 60
STRANGER, MEMBER = NOBODY, pwd.getpwnam(GROUP).pw_uid
MOUNT_POINT = "/user-environment"

ASK = """
import sys, json
sys.path.insert(0, sys.argv.pop(1))
from support.daemon import Client
from pathlib import Path
path, *requests = sys.argv[1:]
client = Client(Path(path))
for request in requests:
    answer = client.ask(**json.loads(request))
    if answer["ok"] and "lease" in answer:
        answer = client.ask("wait", lease=answer["lease"])
    print(json.dumps(answer), flush=True)
"""


@dataclass
class Site:
    daemon: Daemon
    harness: Path
    secret: str
    """Digest of the image that is for members."""
    public: str

    def ask(self, uid: int, *requests: dict[str, Any], groups: tuple[int, ...] = ()) -> list[dict[str, Any]]:
        """Ask as somebody, on one connection."""
        done = subprocess.run(
            [sys.executable, "-c", ASK, self.harness, self.daemon.socket_path, *map(json.dumps, requests)],
            user=uid,
            group=NOBODY,
            extra_groups=list(groups),
            capture_output=True,
            text=True,
            cwd="/",
            timeout=60,
            check=True,
        )
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    top = Path(tempfile.mkdtemp(prefix="uenvd-test-", dir="/var/tmp"))
    top.chmod(0o755)
    try:
        registry = f"oci-layout:{top / 'registry'}"
        publisher = Publisher(registry)
        public = publisher.push(simple_image(top / "app.squashfs", "app", "hello"), "app/1.0", "v1")
        secret = publisher.push(simple_image(top / "vasp.squashfs", "vasp", "secret"), "vasp/6.4", "v1")
        harness = top / "harness/support"
        harness.mkdir(mode=0o755, parents=True)
        shutil.copy(support.daemon.__file__, harness / "daemon.py")
        own = top / "own" / pwd.getpwuid(NOBODY).pw_name / "tool"
        own.mkdir(parents=True)
        simple_image(own / "2.0.squashfs", "tool", "mine")
        (own / "2.0.squashfs").chmod(0o600)
        os.chown(own / "2.0.squashfs", NOBODY, NOBODY)
        extra = (
            f"mounts: {{linger: 100ms}}\naccess:\n  deploy::vasp: [{GROUP}]\nsources:\n  mine: {top}/own/%u\n"
        )
        with running_daemon(top / "uenvd", registry, extra=extra) as daemon:
            assert daemon.ask("pull", uenv="vasp/6.4")["ok"], "root may everything"
            yield Site(daemon, harness.parent, secret, public)
    finally:
        shutil.rmtree(top, ignore_errors=True)


def code(answer: dict[str, Any]) -> str:
    return "ok" if answer["ok"] else str(answer["error"]["code"])


def ways(site: Site) -> list[dict[str, Any]]:
    """Every request that names the image, by every name: it is in the cache already."""
    names = [
        "vasp/6.4",
        "vasp",
        f"vasp/6.4@{site.secret}",
        f"@{site.secret}",
        f"deploy::vasp/6.4@{site.secret}",
    ]
    named = [{"op": op, "uenv": name} for op in ("resolve", "mount", "pull", "inspect") for name in names]
    # The right to one image is no right to another, under whatever name:
    return [*named, {"op": "mount", "uenv": f"app/1.0@{site.secret}"}, {"op": "recipe", "uenv": "vasp/6.4"}]


def test_a_stranger_gets_nothing_and_sees_nothing(site: Site) -> None:
    answers = site.ask(STRANGER, *ways(site))
    for request, answer in zip(ways(site), answers, strict=True):
        expected = {"access-denied"} if "app/1.0" not in request["uenv"] else {"unknown-label", "not-found"}
        assert code(answer) in expected, (request, answer)
    assert GROUP in answers[0]["error"]["message"] and answers[0]["error"]["hint"]
    seen = site.ask(
        STRANGER,
        {"op": "find"},
        {"op": "images"},
        {"op": "status"},
        {"op": "resolve", "uenv": "vasq"},
        {"op": "find", "uenv": "vasp"},
    )
    assert [record["name"] for record in seen[0]["records"]] == ["app"]
    assert "vasp" not in json.dumps(seen), "not even a hint"


def test_a_member_may_also_through_a_second_group(site: Site) -> None:
    answers = site.ask(STRANGER, *ways(site)[:-2], {"op": "find"}, {"op": "images"}, groups=(GID,))
    assert {code(answer) for answer in answers} == {"ok"}
    assert {record["name"] for record in answers[-2]["records"]} == {"app", "vasp"}


def test_root_asks_for_a_user_with_that_users_rights(site: Site) -> None:
    """As slurmstepd does."""
    for uid, expected in ((STRANGER, "access-denied"), (MEMBER, "ok")):
        for op in ("resolve", "mount", "inspect"):
            assert code(site.daemon.ask(op, uenv="vasp/6.4", uid=uid)) == expected
        names = {record["name"] for record in site.daemon.ask("find", uid=uid)["records"]}
        assert ("vasp" in names) == (expected == "ok")
    assert code(site.daemon.ask("mount", uenv="vasp/6.4")) == "ok"


def test_what_a_member_has_mounted_is_not_shown_to_strangers(site: Site) -> None:
    with site.daemon.client() as client:
        assert client.ask("mount", uenv="vasp/6.4", uid=MEMBER)["ok"]
        (theirs,) = site.ask(STRANGER, {"op": "status"})
        assert "vasp" not in json.dumps(theirs)
        assert "vasp" in json.dumps(site.daemon.ask("status"))


def test_own_images_by_name(site: Site) -> None:
    with site.daemon.client() as client:
        answer = client.ask("mount", uenv="mine::tool/2.0:/user-environment", uid=NOBODY)
        assert answer["ok"], answer
        assert client.ask("wait", lease=answer["lease"])["ok"]
        with session(NOBODY, client.descriptors[0], MOUNT_POINT) as inside:
            assert inside.eval(f"open('{MOUNT_POINT}/word').read()") == "mine"
    for name in ("tool/2.0", "tool"):
        answer = site.daemon.ask("resolve", uenv=f"mine::{name}:/user-environment", uid=NOBODY)
        assert answer["resolved"] == "mine::tool/2.0:/user-environment", "what a job is submitted with"


def test_own_images_that_are_not_there_are_refused_before_a_job_is(site: Site) -> None:
    for op in ("resolve", "mount"):
        error = site.daemon.ask(op, uenv="mine::tool/9.9", uid=NOBODY)["error"]
        assert error["code"] == "unknown-label"
        assert error["message"].startswith("there is no own image tool/9.9 in ")
        assert "there is: mine::tool/2.0" in error["hint"]
    # His directory may be one that only other nodes have.
    answer = site.daemon.ask("resolve", uenv="mine::tool/9.9", uid=MEMBER, submit=True)
    assert answer["resolved"] == "mine::tool/9.9"


@pytest.mark.parametrize(
    ("uenv", "uid", "expected"),
    [
        ("mine::tool/2.0:/user-environment", MEMBER, "unknown-label"),  # his directory, not the owner's
        ("mine::tool/9.9:/user-environment", NOBODY, "unknown-label"),
        ("mine::tool@demo:/user-environment", NOBODY, "label-syntax"),
    ],
)
def test_own_images_are_opened_with_the_users_rights(site: Site, uenv: str, uid: int, expected: str) -> None:
    with site.daemon.client() as client:
        answer = client.ask("mount", uenv=uenv, uid=uid)
        if answer["ok"]:
            answer = client.ask("wait", lease=answer["lease"])
        assert code(answer) == expected, answer
