"""Commands that ask the daemon little: what they say to whatever it answers, and to what the user writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.fakedaemon import FakeDaemon, HangUp
from uenvd import __version__
from uenvd.ctl import doctor, image_inspect
from uenvd.ctl.diff import Changes, compare
from uenvd.ctl.job import job_id
from uenvd.ctl.kernel_install import absolute, data_directory, default_name, kernel_name
from uenvd.ctl.main import main
from uenvd.errors import LabelError, UsageError

DIGEST = "sha256:" + "ab" * 32


def run(tmp_path: Path, argv: list[str], script: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    with FakeDaemon(tmp_path / "control", script) as daemon:
        return main([f"--socket={daemon.path}", *argv]), daemon.requests


def test_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = {"step": 0, "time": 0, "label": "app/1:v1", "digest": DIGEST, "views": ["default", "x"], "uid": 5}
    script = {"job": [{"ok": True, "steps": [step, {**step, "step": 2**32 - 5, "views": None}]}]}
    status, requests = run(tmp_path, ["job", "31415.0"], script)
    assert (status, requests) == (0, [{"v": 1, "op": "job", "job": 31415}])
    assert capsys.readouterr().out.splitlines() == [
        "step   time                  uenv      views      digest",
        f"0      1970-01-01T00:00:00Z  app/1:v1  default,x  {DIGEST}",
        f"batch  1970-01-01T00:00:00Z  app/1:v1             {DIGEST}",
    ]
    assert run(tmp_path, ["job", "1", "--json"], script)[0] == 0
    assert json.loads(capsys.readouterr().out)["steps"][0] == step
    assert run(tmp_path, ["job", "1"], {"job": [{"ok": True, "steps": []}]})[0] == 112
    assert "sacct -j 1" in capsys.readouterr().err
    for steps in (None, 3, [3]):
        assert run(tmp_path, ["job", "1"], {"job": [{"ok": True, "steps": steps}]})[0] == 80
    strange = {"step": None, "time": "x", "label": "\x1b[2J"}
    assert run(tmp_path, ["job", "1"], {"job": [{"ok": True, "steps": [strange]}]})[0] == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["0", "-1", "x", "", "1_", "1_x", "1_2_3", str(2**32), "١"])
def test_what_is_no_job(text: str) -> None:
    with pytest.raises(UsageError):
        job_id(text)


@pytest.mark.parametrize(
    ("squeue", "sacct", "number"),
    [
        ("echo 77", "exit 1", 77),
        ("exit 1", "echo 88", 88),
        ("echo", "echo 99", 99),
        ("echo 1 2", "echo x", None),
        (None, None, None),
    ],
)
@pytest.mark.parametrize("text", ["31415_7", "31415+1", "31415_7.batch"])
def test_number_of_a_task_of_an_array(
    text: str,
    squeue: str | None,
    sacct: str | None,
    number: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, body in (("squeue", squeue), ("sacct", sacct)):
        if body is not None:
            (tmp_path / name).write_text(
                f'#!/bin/sh\ncase "$*" in *{text.partition(".")[0]}*) {body};; *) exit 9;; esac\n'
            )
            (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if number is not None:
        assert job_id(text) == number
        return
    with pytest.raises(UsageError, match="neither squeue nor sacct"):
        job_id(text)


def test_pin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = {"pin": [{"ok": True}]}
    status, requests = run(tmp_path, ["image", "pin", "app/1"], script)
    assert (status, requests) == (0, [{"v": 1, "op": "pin", "uenv": "app/1", "pin": True}])
    assert capsys.readouterr() == ("", "uenvctl: app/1 stays in the cache\n")
    status, requests = run(tmp_path, ["image", "unpin", "app/1", "--json"], script)
    assert (status, requests) == (0, [{"v": 1, "op": "pin", "uenv": "app/1", "pin": False}])
    assert json.loads(capsys.readouterr().out) == {"schema_version": 1, "label": "app/1", "pinned": False}
    assert run(tmp_path, ["image", "pin", "./x.squashfs"], script)[0] == 66
    for command in ("pin", "unpin"):
        assert main(["image", command, "--help"]) == 0
        assert f"usage: uenvctl image {command} UENV" in capsys.readouterr().out


def test_evict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = {"evict": [{"ok": True, "freed_bytes": 91_000_000}]}
    assert run(tmp_path, ["image", "evict", "app/1"], script)[0] == 0
    assert capsys.readouterr() == ("", "uenvctl: removed app/1: 91 MB freed\n")
    assert run(tmp_path, ["image", "evict", "app/1", "--json"], script)[0] == 0
    document = {"schema_version": 1, "label": "app/1", "freed_bytes": 91_000_000}
    assert json.loads(capsys.readouterr().out) == document
    assert run(tmp_path, ["image", "evict", "./x.squashfs"], script)[0] == 66


def test_pull_without_anything(tmp_path: Path) -> None:
    assert run(tmp_path, ["image", "pull"], {})[0] == 66


def test_completion_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        assert "uenvctl __complete" in capsys.readouterr().out
    assert main(["completion", "csh"]) == 66


def test_compare() -> None:
    assert compare({"a": "1", "b": "1"}, {"b": "2", "c": "1"}) == Changes(("a",), ("c",), (("b", "1", "2"),))
    assert compare({"a": ""}, {"a": ""}).none


@pytest.mark.parametrize("recipe", [{"files": 3}, {"files": None}])
def test_diff_of_images_without_recipe(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"ok": True, "label": "a", "digest": DIGEST, "views": None, "notes": ["n"], "size_bytes": 5}
    script = {"inspect": [facts], "recipe": [{"ok": True, **recipe}]}
    status = run(tmp_path, ["diff", "a", "b"], script)[0]
    if recipe["files"] is not None:
        assert status == 80
        return
    assert status == 0
    captured = capsys.readouterr()
    assert "packages: not known of both images" in captured.out
    assert "views: not known" in captured.out
    assert captured.err == "uenvctl: n\n" * 2


@pytest.mark.parametrize(
    ("uenv", "view", "name"),
    [
        ("prgenv-gnu/24.7:v1", "default", "prgenv-gnu-24.7-v1-default"),
        ("./My.squashfs", None, "my.squashfs"),
        (f"a/1@{DIGEST}", None, "a-1"),
        ("a,b:/x", "a:v", "a-b-x-a-v"),
    ],
)
def test_names_of_kernels(uenv: str, view: str | None, name: str) -> None:
    assert default_name(uenv, view) == name
    assert kernel_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "../x", "a b", "a/b", "ü"])
def test_what_is_no_name_of_a_kernel(name: str) -> None:
    with pytest.raises(UsageError):
        kernel_name(name)


def test_a_kernel_means_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("./x.squashfs:/mnt,app/1") == f"{tmp_path}/x.squashfs:/mnt,app/1"
    with pytest.raises(LabelError):
        absolute("a//")


def test_where_kernels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert data_directory("/p", {"JUPYTER_DATA_DIR": "/j"}) == "/p/share/jupyter"
    assert data_directory(None, {"JUPYTER_DATA_DIR": "/j"}) == "/j"
    assert data_directory(None, {"XDG_DATA_HOME": "/x"}) == "/x/jupyter"
    assert data_directory(None, {}) == "/home/ada/.local/share/jupyter"


STATUS = {
    "ok": True,
    "version": __version__,
    "images": [],
    "cache": {"path": "/c", "used_bytes": 1, "free_bytes": 10**12},
}


def test_the_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    healthy = {**STATUS, "mount_points": [str(tmp_path)]}
    assert run(tmp_path, ["doctor", "--node"], {"status": [healthy]})[0] == 0
    assert capsys.readouterr().out.startswith(f"uenvd ok: uenvd {__version__} answers")
    full = {"path": "/c", "used_bytes": 2_000_000, "free_bytes": 5}
    held = {"digest": "sha256:x", "leases": 1, "total_bytes": 1_500_000}
    for nobodys in ({**held, "leases": 0}, {**held, "digest": None}, {**held, "total_bytes": 500_000}):
        answer = {**healthy, "cache": full, "images": [nobodys]}
        assert run(tmp_path, ["doctor", "--node"], {"status": [answer]})[0] == 0, "what nobody uses may go"
    capsys.readouterr()
    sick = {
        "no room in /c": {**healthy, "cache": {"path": "/c", "free_bytes": 5}},
        "no room in /c:": {**healthy, "cache": full, "images": [held]},
        "/nowhere/at/all: No such file": {**healthy, "mount_points": ["/nowhere/at/all"]},
    }
    for text, answer in sick.items():
        assert run(tmp_path, ["doctor", "--node"], {"status": [answer]})[0] == 1
        out = capsys.readouterr().out
        assert out.startswith("uenvd FAIL: ")
        assert text in out
        assert out.count("\n") == 1
    assert run(tmp_path, ["doctor", "--node"], {"status": [HangUp()]})[0] == 1
    capsys.readouterr()
    assert run(tmp_path, ["doctor", "--node", "--json"], {"status": [{**healthy, "version": "0"}]})[0] == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"]
    assert {one["name"]: one["state"] for one in document["checks"]}["version"] == "note"


def test_fuse_devices(tmp_path: Path) -> None:
    assert doctor.fuse_device(for_users=True, path=str(tmp_path)).state == "wrong"
    assert doctor.fuse_device(for_users=False, path=str(tmp_path / "none")).do.startswith(
        "load the kernel module"
    )
    assert doctor.fuse_device(for_users=False, path="/dev/null").state == "ok"
    (check,) = doctor.mount_points([str(tmp_path / "none")])
    assert (check.state, "mkdir" in check.do) == ("wrong", True)


@pytest.mark.parametrize(
    ("script", "state"),
    [
        ("export PATH=/usr/bin:/bin", "wrong"),
        ("PATH=/mine:$PATH", "note"),
        ("export LD_LIBRARY_PATH=/mine", "note"),
        ('PATH="$PATH:/mine"; echo hello; exec 2>&1', "ok"),
        ("exit 3", "wrong"),
    ],
)
def test_what_a_bashrc_does(script: str, state: str, tmp_path: Path) -> None:
    (tmp_path / ".bashrc").write_text(script + "\n")
    check = doctor._bashrc({"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})
    assert check.state == state, check


def test_tests_in_words() -> None:
    assert image_inspect.tests_text(None) is None
    assert image_inspect.tests_text({"verdict": "waived", "remark": "why"}) == "waived: why"
