"""uenvctl against a real uenvd: what a scientist looks up, pins, compares; tags that move and images that go away meanwhile."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.daemon import Daemon, running_daemon
from support.fusetools import until
from support.publishing import Publisher, env_json, make_squashfs, simple_image
from support.uenvctl import UENVCTL, Desk, Terminal, desk
from uenvd.errors import UnknownLabel
from uenvd.oci.attach import META_TYPE, REFRAME_TYPE, VERDICT, attach, directory_content, json_content
from uenvd.oci.index import Entry, update_index
from uenvd.oci.reference import repository_of

pytestmark = pytest.mark.usefixtures("node")

CONFIG = "mounts: {linger: 100ms}\nresolve: {ttl: 50ms}\n"
M = "/user-environment"
DOCUMENTED = (Path(__file__).parents[2] / "docs" / "json.md").read_text()


@pytest.fixture(scope="module")
def me() -> Iterator[Desk]:
    with desk() as made:
        yield made


@pytest.fixture(scope="module")
def publisher(me: Desk) -> Publisher:
    publisher = Publisher(f"oci-layout:{me.directory.parent / 'layout'}")
    make = me.directory.parent
    first = publisher.push(simple_image(make / "app1.squashfs", "app", "one"), "app/1.0", "v1")
    second = publisher.push(
        make_squashfs(
            make / "app2.squashfs",
            {
                "word": "two",
                "bin/say": "#!/bin/sh\necho two\n",
                "bin/extra": "#!/bin/sh\n",
                "lib/python3.11/site-packages/Num_Py-2.4.dist-info/METADATA": "",
                ".spack-db/index.json": json.dumps(
                    {"database": {"installs": {"abc": {"spec": {"name": "hdf5", "version": "1.14.3"}}}}}
                ),
            },
            meta=env_json(
                "app",
                views={
                    "default": {"list": {}, "scalar": {"WORD": "two"}},
                    "spack": {"list": {}, "scalar": {}},
                },
            ),
        ),
        "app/2.0",
        "v1",
    )
    old = publisher.push(simple_image(make / "old.squashfs", "old", "old"), "old/1", "v1", system="indexed")
    for digest, version, specs in (
        (first, "1.0", "hdf5@1.12\n  - gone\n"),
        (second, "2.0", "hdf5@1.14 +mpi\n"),
    ):
        repository = repository_of("deploy", "demo", "zen3", "app", version)
        recipe = make / version / "meta" / "recipe"
        recipe.mkdir(parents=True)
        (recipe / "environments.yaml").write_text(f"env:\n  specs:\n  - {specs}")
        attach(
            publisher.remote,
            repository,
            digest,
            META_TYPE,
            [directory_content(make / version / "meta", "meta")],
        )
        attach(
            publisher.remote,
            repository,
            digest,
            REFRAME_TYPE,
            [json_content("report.json", b"{}")],
            {VERDICT: "pass" if version == "2.0" else "fail"},
        )
    repository = repository_of("deploy", "indexed", "zen3", "old", "1")
    entry = Entry(
        repository,
        old,
        ("v1",),
        publisher.remote.manifest(repository, old).layers[0].digest,
        1000,
        verdict="passed",
        remark="3 of 3",
        deprecated="use app",
    )
    update_index(
        publisher.remote, "deploy", "indexed", lambda index: index.with_repository(repository, [entry])
    )
    return publisher


@pytest.fixture(scope="module")
def daemon(me: Desk, publisher: Publisher) -> Iterator[Daemon]:
    registry = f"oci-layout:{me.directory.parent / 'layout'}"
    with running_daemon(me.directory.parent / "uenvd", registry, extra=CONFIG) as running:
        assert running.socket_path == me.socket
        yield running


def keys_in(value: Any) -> set[str]:
    """Return every key of a JSON value but those that are names of somebody's things."""
    if isinstance(value, dict):
        return set(value) | {key for part in value.values() for key in keys_in(part)}
    return {key for part in value for key in keys_in(part)} if isinstance(value, list) else set()


def asked(me: Desk, *arguments: str) -> dict[str, Any]:
    """Run a command with --json; what it writes must be documented."""
    done = me.uenvctl(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["schema_version"] == 1
    unknown = {key for key in keys_in(document) if f"`{key}`" not in DOCUMENTED and "." not in key}
    assert not unknown, f"not in docs/json.md: {unknown}"
    return document


# --- looking up -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("daemon")
def test_listing_says_what_is_here(me: Desk, daemon: Daemon) -> None:
    pulled = asked(me, "image", "pull", "app/1.0")["images"][0]["digest"]
    rows = asked(me, "image", "ls", "app")["records"]
    assert [(one["version"], one["cached"], one["pinned"]) for one in rows] == [
        ("1.0", True, False),
        ("2.0", False, False),
    ]
    assert {"name", "version", "tag", "system", "uarch", "id", "digest", "size", "date"} <= rows[0].keys()
    assert [one["digest"] for one in asked(me, "image", "ls", "--here")["records"]] == [pulled]
    shown = me.uenvctl("image", "ls", "app").stdout.splitlines()
    assert shown[0].split() == ["uenv", "arch", "system", "id", "size(MB)", "date", "here"]
    assert [line.split()[-1] for line in shown[1:]] == ["yes", "-"]
    assert "here" not in me.uenvctl("image", "find", "app").stdout
    assert "deprecated" in me.uenvctl("image", "find", "old@indexed").stdout


def test_everything_is_known_before_the_download(me: Desk, daemon: Daemon) -> None:
    facts = asked(me, "image", "inspect", "app/2.0")
    assert not facts["cached"]
    assert facts["tests"] == {"verdict": "passed", "remark": None}
    assert [view["name"] for view in facts["views"]] == ["default", "spack"]
    assert facts["date"] == "2026-11-01T00:00:00Z"
    assert asked(me, "image", "inspect", "app/1.0")["tests"]["verdict"] == "failed"
    old = me.uenvctl("image", "inspect", "old/1@indexed").stdout
    assert re.search(r"^deprecated: +use app$", old, re.MULTILINE)
    assert re.search(r"^tests: +passed: 3 of 3$", old, re.MULTILINE)
    assert daemon.ask("inspect", uenv="app/2.0")["cached"] is False


def test_only_root_evicts(me: Desk, daemon: Daemon) -> None:
    assert me.uenvctl("image", "pull", "app/1.0").returncode == 0
    refused = me.uenvctl("image", "evict", "app/1.0")
    assert (refused.returncode, refused.stdout) == (84, "")
    until(lambda: is_gone(me, "app/1.0"), "app/1.0 is evicted")
    assert asked(me, "image", "ls", "--here", "app/1.0")["records"] == []


def test_a_pinned_image_is_shown_and_may_be_let_go(me: Desk, daemon: Daemon) -> None:
    assert me.uenvctl("image", "pull", "app/1.0").returncode == 0
    assert me.uenvctl("image", "pin", "app/1.0").returncode == 84, "for root only"
    for command, pinned in (("pin", True), ("unpin", False)):
        done = subprocess.run(
            [UENVCTL, f"--socket={me.socket}", "image", command, "app/1.0"], capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        rows = asked(me, "image", "ls", "--here", "app/1.0")["records"]
        assert [one["pinned"] for one in rows] == [pinned]


def test_no_view_at_all(me: Desk, daemon: Daemon) -> None:
    for view, word in (("default", "two"), ("none", "")):
        done = me.uenvctl(
            "run", f"--view={view}", "app/2.0", "sh", "-c", "echo $WORD; cat /user-environment/word"
        )
        assert done.stdout == f"{word}\ntwo", done.stderr


# --- what a project pins --------------------------------------------------------------------------------------------


def test_a_tag_that_moves_changes_nothing_for_who_has_locked_it(
    me: Desk, daemon: Daemon, publisher: Publisher
) -> None:
    project = me.directory / "project"
    below = project / "a" / "b"
    me.command(["mkdir", "-p", below])
    make = me.directory.parent
    first = publisher.push(simple_image(make / "m1.squashfs", "moves", "old"), "moves/1", "v1")
    assert me.uenvctl("run", "--locked", "moves/1", "true", cwd=below).returncode == 111
    locked = me.uenvctl("lock", "moves/1", cwd=project)
    assert locked.returncode == 0, locked.stderr
    text = (project / "uenv.lock").read_text()
    (one,) = json.loads(text)["images"]
    assert (one["asked"], one["digest"], one["size_bytes"] > 0) == ("moves/1", first, True)
    assert one["registry"].startswith("oci-layout:")
    assert me.uenvctl("lock", "--check", cwd=below).returncode == 0
    assert me.uenvctl("lock", cwd=below).returncode == 0
    assert (project / "uenv.lock").read_text() == text, "nothing has changed"

    second = publisher.push(simple_image(make / "m2.squashfs", "moves", "new"), "moves/1", "v1")
    checked = me.uenvctl("lock", "--check", cwd=below)
    assert checked.returncode == 111
    assert "moves/1 (moved)" in checked.stderr
    assert second in checked.stdout
    word = ["cat", f"{M}/word"]
    assert me.uenvctl("run", "--refresh", "moves/1", *word, cwd=below).stdout == "new"
    assert me.uenvctl("run", "--locked", "moves/1", *word, cwd=below).stdout == "old"
    assert me.uenvctl("run", "--locked", "moves", *word, cwd=below).stdout == "old"
    script = "cat /user-environment/word"
    started = me.uenvctl("start", "--locked", "moves/1", input=script, cwd=below, stdin=None)
    assert started.stdout == "old", started.stderr
    assert first in me.uenvctl("image", "pull", "--locked", cwd=below).stdout

    missing = me.uenvctl("run", "--locked", "app/1.0", "true", cwd=below)
    assert missing.returncode == 111
    assert "app/1.0' is not in" in missing.stderr and "uenvctl lock app/1.0" in missing.stderr
    assert me.uenvctl("lock", cwd=below).returncode == 0
    assert json.loads((project / "uenv.lock").read_text())["images"][0]["digest"] == second
    assert me.uenvctl("run", "--locked", "moves/1", *word, cwd=below).stdout == "new"


def test_the_lock_holds_for_kernels_and_comparisons(me: Desk, daemon: Daemon, publisher: Publisher) -> None:
    project = me.directory / "paper"
    me.command(["mkdir", "-p", project])
    python = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    views = {"default": {"list": {"PATH": [{"op": "prepend", "value": [f"{M}/bin"]}]}, "scalar": {}}}

    def publish(word: str) -> str:
        image = make_squashfs(
            me.directory.parent / f"py-{word}.squashfs",
            {"bin/python3": python, "word": word},
            meta=env_json("py", views=views),
            options=("-action", "chmod(a+x)@name(python3)"),
        )
        return publisher.push(image, "py/1", "v1")

    first = publish("old")
    assert me.uenvctl("lock", "py/1", cwd=project).returncode == 0
    second = publish("new")
    assert me.uenvctl("run", "--refresh", "py/1", "cat", f"{M}/word").stdout == "new"
    installed = me.uenvctl(
        "kernel", "install", "--locked", "--view=default", "--name=paper", "py/1", "--json", cwd=project
    )
    assert installed.returncode == 0, installed.stderr
    argv = json.loads(installed.stdout)["argv"]
    assert any(f"@{first}" in word for word in argv)
    program = argv[: argv.index("-m")]
    word = "import sys; sys.stdout.write(open('/user-environment/word').read())"
    assert me.command([*program, "-c", word], cwd=me.user.home).stdout == "old"

    facts = json.loads(me.uenvctl("diff", "--locked", "py/1", "py/1", "--json", cwd=project).stdout)
    assert [one["digest"] for one in facts["images"]] == [first, first]
    moved = json.loads(me.uenvctl("diff", "py/1", "py/1", "--json").stdout)
    assert moved["images"][0]["digest"] == second
    unknown = me.uenvctl("diff", "--locked", "py/1", "app/1.0", cwd=project)
    assert unknown.returncode == 111


def test_a_locked_image_that_is_gone(me: Desk, daemon: Daemon, publisher: Publisher) -> None:
    lock = {"asked": "app/1.0", "label": "app/1.0:v1@demo%zen3", "digest": "sha256:" + "0" * 64}
    path = me.directory / "gone.lock"
    path.write_text(json.dumps({"version": 1, "images": [lock]}))
    checked = me.uenvctl("lock", "--check", f"--lock-file={path}")
    assert checked.returncode == 111
    assert "app/1.0 (missing)" in checked.stderr
    done = me.uenvctl("run", f"--lock-file={path}", "app/1.0", "true")
    assert done.returncode == 68
    for damage in ("", "{}", '{"version": 2, "images": []}', '{"version": 1, "images": [{"asked": "a"}]}'):
        path.write_text(damage)
        done = me.uenvctl("run", f"--lock-file={path}", "app/1.0", "true")
        assert done.returncode == 111, damage
        assert "is damaged" in done.stderr


# --- what is different ----------------------------------------------------------------------------------------------


def is_gone(me: Desk, label: str) -> bool:
    """Evict an image; tell whether the node has it no more. One that was used a moment ago still lingers."""
    done = subprocess.run(
        [UENVCTL, f"--socket={me.socket}", "image", "evict", label], capture_output=True, check=False
    )
    return done.returncode in (0, UnknownLabel.exit_status)


def test_two_versions_are_compared_without_a_download(me: Desk, daemon: Daemon) -> None:
    until(lambda: is_gone(me, "app/2.0"), "app/2.0 is evicted")
    facts = asked(me, "diff", "app/1.0", "app/2.0")
    assert facts["views"] == {"removed": ["plain"], "added": ["spack"], "changed": []}
    assert facts["packages"] == {
        "removed": ["gone"],
        "added": [],
        "changed": [{"name": "hdf5", "from": "1.12", "to": "1.14"}],
    }
    assert (facts["same"], facts["files"]) == (False, None)
    assert not daemon.ask("inspect", uenv="app/2.0")["cached"]
    shown = me.uenvctl("diff", "app/1.0", "app/2.0").stdout
    assert "  ~ hdf5  1.12 -> 1.14" in shown
    assert "  - plain" in shown
    assert asked(me, "diff", "app/1.0", "app/1.0")["same"] is True


def test_files_are_compared(me: Desk, daemon: Daemon) -> None:
    shutil.copy(me.directory.parent / "app1.squashfs", me.directory / "mine.squashfs")
    facts = asked(me, "diff", "--files", "./mine.squashfs", "app/2.0")
    files = facts["files"]
    assert "bin/extra" in files["added"]
    changed = {one["name"]: one for one in files["changed"]}
    assert changed["word"]["from"].startswith("content "), "same size, other bytes"
    assert "meta/env.json" in changed
    assert asked(me, "diff", "--files", "./mine.squashfs", "app/1.0")["files"] == {
        "removed": [],
        "added": [],
        "changed": [],
    }
    assert asked(me, "diff", "--files", "app/2.0", "app/2.0")["same"]


def test_what_is_installed_is_compared(me: Desk, daemon: Daemon, publisher: Publisher) -> None:
    database = {
        "database": {
            "installs": {
                "a": {"spec": {"name": "hdf5", "version": "1.14.4"}},
                "b": {"spec": {"name": "fftw", "version": "3"}},
                "c": {"spec": {"name": "removed", "version": "1"}, "installed": False},
            }
        }
    }
    image = make_squashfs(
        me.directory.parent / "sci.squashfs",
        {".spack-db/index.json": json.dumps(database)},
        meta=env_json("sci"),
    )
    publisher.push(image, "sci/1", "v1")
    assert asked(me, "diff", "--files", "app/2.0", "sci/1")["packages"] == {
        "removed": ["num-py"],
        "added": ["fftw"],
        "changed": [{"name": "hdf5", "from": "1.14.3", "to": "1.14.4"}],
    }
    with_less = asked(me, "diff", "--files", "app/2.0", "app/1.0")["packages"]
    assert with_less["changed"] == [{"name": "hdf5", "from": "1.14", "to": "1.12"}], "recipes, not a mixture"
    wrong = me.uenvctl("diff", "--files", "./mine.squashfs", "nope/1")
    assert wrong.returncode == 68


# --- a shell's TAB --------------------------------------------------------------------------------------------------


def test_tab_in_bash(me: Desk, daemon: Daemon) -> None:
    assert me.uenvctl("image", "find").returncode == 0  # what is remembered is what somebody has asked for
    with Terminal(["bash", "--norc", "--noprofile", "-i"], me.environ(), cwd=me.directory) as terminal:
        terminal.type("PS1='$ '; source <(uenvctl completion bash); echo rea''dy\n")
        terminal.wait_for("ready")
        for keys, becomes in (
            ("uenvctl ima\tls --he\t", "uenvctl image ls --he"),
            ("uenvctl run app/1\t", "uenvctl run app/1.0:v1 "),
            ("uenvctl run app/1.0:\t", "uenvctl run app/1.0:v1 "),
            ("uenvctl run app/1.0:v1 --view=de\t", "uenvctl run app/1.0:v1 --view=default "),
            ("uenvctl run old/1:v1,app/2\t", "uenvctl run old/1:v1,app/2.0:v1 "),
            ("uenvctl image inspect app/1.0:v1@\t", "uenvctl image inspect app/1.0:v1@demo "),
            ("uenvctl image inspect app/1.0:v1%z\t", "uenvctl image inspect app/1.0:v1%zen3 "),
        ):
            assert typed(terminal, keys) == becomes


def typed(terminal: Terminal, keys: str) -> str:
    """Type at a shell's prompt and return what the line is then: the shell itself is made to print it."""
    since = len(terminal.seen)
    terminal.type(keys + "\x05'>'\x01echo '<'\x05\n")
    said = terminal.wait_for(">\r\n", since=since)
    found = re.search(r"\n(?:\x1b\S*\r)?<(.*)>\r", said)
    assert found is not None, repr(said)
    return found[1]


@pytest.mark.parametrize(
    "setup",
    [
        "autoload -Uz compinit; compinit -D -u; source <(uenvctl completion zsh)",
        "uenvctl completion zsh > _uenvctl; fpath=($PWD $fpath); autoload -Uz compinit; compinit -D -u",
    ],
)
def test_tab_in_zsh(me: Desk, daemon: Daemon, setup: str) -> None:
    assert me.uenvctl("image", "find").returncode == 0
    environ = {**me.environ(), "ZDOTDIR": str(me.directory), "HOME": str(me.directory)}
    with Terminal(["zsh", "-f", "-i"], environ, cwd=me.directory) as terminal:
        terminal.type(f"PS1='$ '; {setup}; echo rea''dy\n")
        terminal.wait_for("ready")
        for keys, becomes in (
            ("uenvctl ima\t", "uenvctl image"),
            ("uenvctl run app/1\t", "uenvctl run app/1.0:v1"),
            ("uenvctl run app/1.0:v1 --view=de\t", "uenvctl run app/1.0:v1 --view=default"),
        ):
            assert typed(terminal, keys).rstrip() == becomes


def test_tab_in_fish(me: Desk, daemon: Daemon) -> None:
    assert me.uenvctl("image", "find").returncode == 0
    environ = {**me.environ(), "HOME": str(me.directory)}

    def candidates(line: str) -> list[str]:
        script = f"source (uenvctl completion fish | psub); complete -C '{line}'"
        done = me.command(["fish", "--no-config", "-c", script], env=environ)
        assert done.stderr == ""
        return [one.split("\t")[0] for one in done.stdout.splitlines()]

    assert candidates("uenvctl ima") == ["image"]
    assert candidates("uenvctl run app/") == ["app/1.0:v1", "app/2.0:v1"]
    assert candidates("uenvctl run app/1.0:v1 --view=d") == ["--view=default"]
    assert "work" in "".join(candidates("uenvctl run ../w"))


def test_tab_without_a_daemon_is_quiet(me: Desk) -> None:
    environ = {**me.environ(), "UENVD_SOCKET": str(me.directory / "none")}
    done = me.uenvctl("__complete", "zsh", "run", "app", env=environ)
    assert (done.returncode, done.stdout, done.stderr) == (0, "words\n", "")


# --- what is wrong --------------------------------------------------------------------------------------------------


def test_the_doctor_finds_nothing_wrong(me: Desk, daemon: Daemon) -> None:
    facts = asked(me, "doctor")
    assert facts["ok"], facts
    assert {"daemon", "registry", "namespaces", "fuse", "mount point", "bashrc"} <= {
        one["name"] for one in facts["checks"]
    }
    node = me.uenvctl("doctor", "--node")
    assert (node.returncode, node.stdout.count("\n")) == (0, 1)
    assert node.stdout.startswith("uenvd ok: ")


def test_the_doctor_finds_a_bashrc_that_hides_views(me: Desk, daemon: Daemon) -> None:
    bashrc = me.user.home / ".bashrc"
    for text, says in (
        ("export PATH=/usr/bin:/bin\n", "replaces PATH"),
        ('export PATH="/opt/mine/bin:$PATH"\n', "/opt/mine/bin"),
        ("export LD_LIBRARY_PATH=/opt/lib\n", "LD_LIBRARY_PATH"),
    ):
        bashrc.write_text(text)
        try:
            shown = me.uenvctl("doctor").stdout
        finally:
            bashrc.unlink()
        (line,) = [line for line in shown.splitlines() if "bashrc:" in line]
        assert says in line
        assert "      do: " in shown


def test_the_node_is_sick_in_time_when_uenvd_hangs(me: Desk, daemon: Daemon) -> None:
    daemon.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        done = me.uenvctl("doctor", "--node")
        took_s = time.monotonic() - began
    finally:
        daemon.signal(signal.SIGCONT)
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert done.stdout.startswith("uenvd FAIL: ")
    assert took_s < 4.5, "2.5 s and the start of a Python on a busy machine"
    gone = me.uenvctl("doctor", "--node", env={**me.environ(), "UENVD_SOCKET": str(me.directory / "none")})
    assert gone.returncode == 1
    assert "there is no socket" in gone.stdout


# --- which image was it ---------------------------------------------------------------------------------------------


def used(daemon: Daemon, uid: int, job: int) -> None:
    """Be the plugin of a job's first step."""
    with daemon.client() as client:
        lease = client.ask("mount", uenv="app/2.0", uid=uid, job={"id": job, "step": 0})["lease"]
        assert client.ask("wait", lease=lease)["ok"]


def test_a_job_and_its_images(me: Desk, daemon: Daemon) -> None:
    digest = daemon.ask("resolve", uenv="app/2.0")["images"][0]["digest"]
    used(daemon, me.user.uid, 4711)
    steps = asked(me, "job", "4711")["steps"]
    assert [(one["step"], one["digest"]) for one in steps] == [(0, digest)]
    assert digest in me.uenvctl("job", "4711.0").stdout
    unknown = me.uenvctl("job", "4712")
    assert unknown.returncode == 112
    assert "sacct -j 4712" in unknown.stderr
    used(daemon, 0, 4713)
    assert me.uenvctl("job", "4713").returncode == 112, "somebody else's"


# --- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [["image", "find"], ["status"], ["--help"], ["--version"], ["completion", "bash"]]
)
def test_nobody_reads(me: Desk, daemon: Daemon, command: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = me.uenvctl(*command, stdout=write_end, capture_output=False, stderr=subprocess.PIPE)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_colours_only_where_they_are_wanted(me: Desk) -> None:
    environ = {**me.environ(), "UENVD_SOCKET": str(me.directory / "none")}
    for extra, coloured in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
        with Terminal(
            [UENVCTL, "doctor", "--node", "--frob"], {**environ, **extra}, cwd=me.directory
        ) as terminal:
            said = terminal.wait_for("see: uenvctl doctor --help")
        assert ("\x1b[" in said) is coloured
    piped = me.uenvctl("doctor", env=environ)
    assert "\x1b" not in piped.stdout + piped.stderr
