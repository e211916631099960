"""A scientist builds an environment of his own: it works by its label for him, and nobody else can read it, or is in his way."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import support.daemon
from support.daemon import Daemon, running_daemon
from support.plans import TEST, source_recipe
from support.registry import FakeRegistry
from support.users import TestUser, ordinary_user
from uenvd.errors import BuildFailed, TestsFailed, UsageError
from uenvd.oci.attach import META_TYPE, REFRAME_TYPE, attachments
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import open_remote
from uenvd.publish.provenance import LOG_TYPE, PROVENANCE_TYPE
from uenvd.publish.sbom import SBOM_TYPE

pytestmark = pytest.mark.usefixtures("node")

BIN = Path(sys.executable).parent
DEADLINE_S = 120.0
EVIDENCE = {META_TYPE, REFRAME_TYPE, SBOM_TYPE, PROVENANCE_TYPE, LOG_TYPE}


@dataclass
class Account:
    """A user who does things."""

    user: TestUser
    socket: str = "/no/socket"

    def run(self, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            list(map(str, words)),
            env={**self.user.environ(), "UENVD_SOCKET": self.socket, **variables},
            cwd=self.user.home,
            user=self.user.uid,
            group=self.user.gid,
            extra_groups=[],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    def build(self, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run(BIN / "uenvd-publish", "build", *words, **variables)

    def uenvctl(self, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run(BIN / "uenvctl", *words, **variables)

    @property
    def store(self) -> Path:
        return self.user.home / ".local/share/uenv"

    @property
    def image(self) -> Path:
        return self.store / "images/tiny/1.0.squashfs"

    def says(self) -> str:
        """Run the image's program by the image's label."""
        done = self.uenvctl("run", "mine::tiny/1.0", "--", "tiny")
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def recipe(public_dir: Path) -> Path:
    recipe = source_recipe(public_dir)
    with (recipe / "environments.yaml").open("a") as file:
        file.write("\n")
    config = recipe / "config.yaml"
    config.write_text(config.read_text() + "default-view: default\n")
    (recipe / "extra/reframe").mkdir(parents=True)
    (recipe / "extra/reframe.yaml").write_text("tiny: {features: [tiny], views: [default]}\n")
    (recipe / "extra/reframe/runs.py").write_text(TEST)
    return recipe


@pytest.fixture
def account(node: None, public_dir: Path) -> Iterator[Account]:
    with ordinary_user(public_dir) as user:
        yield Account(user)


@pytest.fixture
def stranger(node: None, public_dir: Path) -> Iterator[Account]:
    with ordinary_user(public_dir) as user:
        yield Account(user)


def asked_of(who: Account, daemon: Daemon, harness: Path) -> str:
    """Ask the daemon for the image, as the plugin does for a job; return ``ok``, or the code of the refusal."""
    done = who.run(sys.executable, "-P", "-c", ASK, harness, daemon.socket_path)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ASK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from support.daemon import Client
with Client(Path(sys.argv[2])) as client:
    answer = client.ask("mount", uenv="mine::tiny/1.0")
    if answer["ok"]:
        answer = client.ask("wait", lease=answer["lease"])
    print("ok" if answer["ok"] else answer["error"]["code"])
"""


def test_it_is_his_and_nobody_elses(
    account: Account, stranger: Account, recipe: Path, public_dir: Path
) -> None:
    done = account.build(recipe, "tiny/1.0", "--json")
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert (body["label"], body["file"]) == ("mine::tiny/1.0", str(account.image))
    assert "2 of 2 tests passed" in body["tests"]
    assert "srun --uenv=mine::tiny/1.0" in done.stderr
    assert account.says() == "tiny says 42\n"
    layout = open_remote(parse_registry(body["registry"]))
    assert {one.artifact_type for one in attachments(layout, body["repository"], body["digest"])} == EVIDENCE
    label = account.uenvctl("run", "mine::tiny/1.0", "--", "sh", "-c", "echo $UENV_LABEL")
    assert label.stdout == "mine::tiny/1.0\n", "the prompt shows a name"
    assert list((account.store / "builds").iterdir()) == [], "nothing of the build is left"

    # Listed, and looked at, without any daemon.
    listed = account.uenvctl("image", "ls", "--json")
    assert listed.returncode == 0, listed.stderr
    (record,) = json.loads(listed.stdout)["records"]
    assert (record["namespace"], record["name"], record["version"]) == ("mine", "tiny", "1.0")
    assert (record["digest"], record["cached"]) == (body["digest"], True)
    assert "mine::tiny/1.0" in account.uenvctl("image", "ls", "mine::ti").stdout
    assert account.uenvctl("image", "ls", "mine::other").stdout == ""
    assert "description:  for tests" in account.uenvctl("image", "inspect", "mine::tiny/1.0").stdout

    # Another user: not by path, not by label, not by walking there.
    assert stat.S_IMODE(account.store.stat().st_mode) == 0o700
    for path in (account.image, account.store / "oci/index.json", account.store):
        denied = stranger.run("/bin/sh", "-c", f"cat {path} || ls {path}")
        assert denied.returncode != 0 and "Permission denied" in denied.stderr and denied.stdout == ""
    denied = stranger.uenvctl("run", account.image, "--", "tiny")
    assert (denied.returncode, denied.stdout) == (84, ""), denied.stderr
    assert stranger.uenvctl("run", "mine::tiny/1.0", "--", "tiny").returncode != 0
    assert "tiny" not in stranger.uenvctl("image", "ls", "mine::").stdout

    # Through the node's uenvd, as for a job: the label is the asker's, and the file is opened with his rights.
    with running_daemon(public_dir / "uenvd", f"oci-layout:{public_dir}/registry") as daemon:
        account.socket = stranger.socket = str(daemon.socket_path)
        # The harness, where everybody can read it.
        harness = public_dir / "harness/support"
        harness.mkdir(parents=True)
        shutil.copy(support.daemon.__file__, harness / "daemon.py")
        assert asked_of(account, daemon, harness.parent) == "ok"
        assert asked_of(stranger, daemon, harness.parent) != "ok"
        assert account.says() == "tiny says 42\n"


def test_a_new_build_takes_the_label(account: Account, recipe: Path) -> None:
    why = account.build(recipe, "tiny/1.0:old", "--explain")
    assert (why.returncode, why.stdout) == (0, "there is no image mine::tiny/1.0:old yet\n"), why.stderr
    assert not account.store.exists(), "an explanation makes nothing"
    first = account.build(recipe, "tiny/1.0:old", "--no-tests")
    assert first.returncode == 0, first.stderr
    why = account.build(recipe, "tiny/1.0:old", "--explain", "--json")
    assert json.loads(why.stdout) == {"label": "mine::tiny/1.0:old", "build": False, "reasons": []}
    again = account.build(recipe, "tiny/1.0:old", "--no-tests")
    assert again.stdout == first.stdout
    assert "built from the same recipe already" in again.stderr
    with account.image.open("rb") as held:
        before = held.read()
        (recipe / "make-tiny").write_text(
            (recipe / "make-tiny").read_text() + "cp tiny.c $UENV_ROOT/bin/more\n"
        )
        for other in ((), ("--against", "mine::tiny/1.0:old")):
            why = account.build(recipe, "tiny/1.0", "--explain", *other)
            assert why.stdout == "the recipe's file make-tiny has other contents\n", why.stderr
        assert account.says() == "tiny says 42\n", "an explanation builds nothing"
        done = account.build(recipe, "tiny/1.0:new", "--check", "--run")
        assert done.returncode == 0, done.stderr
        assert "the same image: sha256:" in done.stderr
        assert "its smoke tests pass elsewhere, too" in done.stderr
        held.seek(0)
        assert held.read() == before, "who has it open goes on with it"
    assert done.stdout.split()[0] == "mine::tiny/1.0:new" != first.stdout.split()[0]
    assert account.image.samefile(account.image.parent / "1.0/new.squashfs")
    assert not account.image.samefile(account.image.parent / "1.0/old.squashfs")

    # One that is another image each time, or works only here, or fails its tests, does not take the label.
    before = account.image.stat().st_ino
    make = (recipe / "make-tiny").read_text()
    (recipe / "make-tiny").write_text(make + "date +%N > $UENV_ROOT/bin/when\n")
    failed = account.build(recipe, "tiny/1.0", "--check")
    assert failed.returncode == BuildFailed.exit_status, failed.stderr
    assert "bin/when: other content" in failed.stderr
    (recipe / "make-tiny").write_text(make)
    assert account.image.stat().st_ino == before
    (recipe / "extra/reframe/runs.py").write_text(TEST.replace("says 42", "says 43"))
    failed = account.build(recipe, "tiny/1.0")
    assert failed.returncode == TestsFailed.exit_status, failed.stderr
    assert account.image.samefile(account.image.parent / "1.0/new.squashfs")
    assert account.says() == "tiny says 42\n"

    for label, text in (
        ("other/1.0", "the recipe's name is 'tiny'"),
        ("deploy::tiny/1.0", "is for everybody"),
        ("tiny/1.0@sha256:" + 64 * "a", "is no label to build under"),
    ):
        done = account.build(recipe, label)
        assert (done.returncode, text in done.stderr) == (UsageError.exit_status, True), done.stderr


def test_a_site_with_a_namespace_for_each_user(account: Account, recipe: Path) -> None:
    name = account.user.name
    with FakeRegistry() as registry:
        variables = {
            "UENVD_REGISTRY": registry.url,
            "UENVD_USER_NAMESPACE": "user-%u",
            "UENVD_SYSTEM": "demo",
            "UENVD_UARCH": "zen3",
        }
        done = account.build(recipe, "tiny/1.0", "--no-tests", **variables)
        assert done.returncode == 0, done.stderr
        label, digest = done.stdout.split()
        assert label == f"user-{name}::tiny/1.0@demo%zen3"
        remote = open_remote(parse_registry(registry.url))
        place = f"user-{name}/demo/zen3/tiny/1.0"
        assert remote.resolve(place, "latest") == digest
        assert {one.artifact_type for one in attachments(remote, place, digest)} == EVIDENCE - {REFRAME_TYPE}
        assert not account.image.exists()
        done = account.build(recipe, "tiny/1.0", **{**variables, "UENVD_USER_NAMESPACE": "users"})
        assert (done.returncode, "does not hold %u" in done.stderr) == (UsageError.exit_status, True)
        done = account.build(recipe, "tiny/1.0", "--no-tests", "--run", **variables)
        assert (done.returncode, done.stdout.split()) == (0, [label, digest]), done.stderr
        assert "already" in done.stderr and "pass elsewhere" in done.stderr
        done = account.build(recipe, "mine::tiny/1.0", "--no-tests", **variables)
        assert done.returncode == 0, done.stderr
        assert account.image.exists(), "asked for by its name, the account is as good"
