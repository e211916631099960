"""The console script: every failure becomes text and a status; and it starts fast."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.fakedaemon import FakeDaemon, failure, progress
from uenvd import __version__
from uenvd.ctl import main as main_module
from uenvd.ctl.main import COMMANDS, main
from uenvd.errors import InternalError, UnknownLabel

HEAVY = {
    "trio", "pyfuse3", "requests", "urllib3", "oras", "yaml", "logging", "argparse", "subprocess", "asyncio",
    "importlib.metadata", "zstandard", "lz4", "sqlite3", "email", "http",
}  # fmt: skip
DIGEST = "sha256:" + "ab" * 32


@pytest.fixture(autouse=True)
def sigint() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


RECORD = {
    "name": "app", "version": "1", "tag": "v1", "system": "demo", "uarch": "zen3", "namespace": "deploy",
    "digest": DIGEST, "size_bytes": 91_226_112, "date": "2026-11-03T10:00:00Z", "cached": True,
}  # fmt: skip
ABSENT = {**RECORD, "tag": None, "uarch": "a100", "cached": False, "date": None, "size_bytes": 5_000_000_000}


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"uenvctl {__version__}\n"
    for argv in (["--help"], ["-h"], ["help"]):
        assert main(argv) == 0
        assert "usage: uenvctl" in capsys.readouterr().out
    assert main(["image", "--help"]) == 0
    assert "image find" in capsys.readouterr().out
    assert main(["kernel"]) == 66
    assert main(["help", "image", "find"]) == 0
    assert "usage: uenvctl image find" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    captured = capsys.readouterr()
    module = importlib.import_module(f"uenvd.ctl.{COMMANDS[command]}")
    assert captured.out == module.HELP
    assert captured.out.startswith(f"usage: uenvctl {command}")
    assert all(len(line) <= 120 for line in captured.out.splitlines())
    assert captured.err == ""
    assert "\nexamples:\n" in captured.out
    assert all(f"  {option}" in captured.out or f", {option}" in captured.out for option in module.OPTIONS)


def test_a_bug_is_told_without_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_words: list[str]) -> int:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(main_module, "_dispatch", broken)
    monkeypatch.delenv("UENVD_DEBUG", raising=False)
    assert main([]) == InternalError.exit_status
    assert capsys.readouterr().err.startswith("uenvctl: unexpected fault: ZeroDivisionError: oops\nhint: ")
    monkeypatch.setenv("UENVD_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main([])


def _run(tmp_path: Path, argv: list[str], script: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    with FakeDaemon(tmp_path / "control", script) as daemon:
        status = main([f"--socket={daemon.path}", *argv])
        return status, daemon.requests


SCHEMA = {"schema_version": 1}
ADDED = {"id": "ab" * 8, "size": 91_226_112}
ABSENT_ADDED = {"id": "ab" * 8, "size": 5_000_000_000}


def test_find(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deprecated = {**RECORD, "deprecated": "old"}
    script = {"find": [{"ok": True, "records": [deprecated, ABSENT], "notes": ["the registry is away"]}]}
    status, requests = _run(tmp_path, ["image", "find", "app", "--refresh"], script)
    assert status == 0
    assert requests == [{"v": 1, "op": "find", "uenv": "app", "refresh": True}]
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "uenv      arch  system  id                size(MB)  date",
        "app/1:v1  zen3  demo    abababababababab        91  2026-11-03 deprecated",
        "app/1     a100  demo    abababababababab      5000",
    ]
    assert captured.err == "uenvctl: the registry is away\n"
    _run(tmp_path, ["image", "find", "--no-header"], script)
    assert len(capsys.readouterr().out.splitlines()) == 2
    _run(tmp_path, ["image", "find", "--json"], script)
    assert json.loads(capsys.readouterr().out) == {
        **SCHEMA,
        "records": [{**deprecated, **ADDED}, {**ABSENT, **ABSENT_ADDED}],
    }


def test_ls_is_find_and_what_only_the_node_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    orphan = {**RECORD, "tag": "v0", "pinned": True}
    script = {
        "find": [{"ok": True, "records": [RECORD, ABSENT]}],
        "images": [{"ok": True, "records": [{**RECORD, "pinned": True}, orphan]}],
    }
    assert _run(tmp_path, ["image", "ls"], script)[0] == 0
    assert capsys.readouterr().out.splitlines() == [
        "uenv      arch  system  id                size(MB)  date        here",
        "app/1     a100  demo    abababababababab      5000              -",
        "app/1:v0  zen3  demo    abababababababab        91  2026-11-03  yes",
        "app/1:v1  zen3  demo    abababababababab        91  2026-11-03  yes",
    ]
    _run(tmp_path, ["image", "ls", "--json"], script)
    records = json.loads(capsys.readouterr().out)["records"]
    assert [one["pinned"] for one in records] == [False, True, True]
    status, requests = _run(tmp_path, ["image", "ls", "--here"], script)
    assert [one["op"] for one in requests] == ["images"]
    assert len(capsys.readouterr().out.splitlines()) == 3
    away = {**script, "find": [failure("registry-unreachable", "the registry is away")]}
    assert _run(tmp_path, ["image", "ls"], away)[0] == status == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert captured.err == "uenvctl: the registry is away; listed is only what is on this node\n"


@pytest.mark.parametrize("command", ["find", "ls"])
def test_listing_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    script = {op: [{"ok": True, "records": []}] for op in ("find", "images")}
    assert _run(tmp_path, ["image", command], script)[0] == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"uenvctl image {command}" in captured.err
    assert _run(tmp_path, ["image", command, "--no-header"], script)[0] == 0
    assert capsys.readouterr() == ("", "")
    assert _run(tmp_path, ["image", command, "--json"], script)[0] == 0
    assert json.loads(capsys.readouterr().out) == {**SCHEMA, "records": []}


def test_listing_garbage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for records in (None, 3, [3], {}):
        assert _run(tmp_path, ["image", "find"], {"find": [{"ok": True, "records": records}]})[0] == 80
    hostile = {"name": "a\x1b[2J\n", "digest": 3, "size_bytes": "x", "date": []}
    assert _run(tmp_path, ["image", "find"], {"find": [{"ok": True, "records": [hostile]}]})[0] == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_wrong_label_is_told_without_the_daemon(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--socket=/nonexistent", "image", "find", "app//1"]) == 67
    assert "\n      ^" in capsys.readouterr().err


def test_errors_of_the_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _requests = _run(
        tmp_path,
        ["image", "inspect", "app"],
        {"inspect": [failure("unknown-label", "no image 'app'", "look")]},
    )
    assert status == UnknownLabel.exit_status
    assert capsys.readouterr() == ("", "uenvctl: no image 'app'\nhint: look\n")


INSPECTED = {
    "ok": True, "label": "app/1:v1", "digest": DIGEST, "size_bytes": 91_226_112, "cached": False, "date": "2026-11-03", "mount": "/user-environment",
    "description": "the app", "default_view": "default", "views": [{"name": "default", "description": "all"}, {"name": "x", "description": ""}],
    "architecture": "x86_64", "annotations": {}, "notes": ["n"], "tests": {"verdict": "passed", "remark": "3 of 3"},
    "deprecated": "too old", "tags": ["latest", "v1"],
}  # fmt: skip


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, requests = _run(tmp_path, ["image", "inspect", "app:/mnt"], {"inspect": [INSPECTED]})
    assert status == 0
    assert requests == [{"v": 1, "op": "inspect", "uenv": "app"}]
    captured = capsys.readouterr()
    assert captured.err == "uenvctl: n\n"
    assert captured.out == (
        "uenv:          app/1:v1\n"
        "deprecated:    too old\n"
        "description:   the app\n"
        "mount:         /user-environment\n"
        f"digest:        {DIGEST}\n"
        "size:          91 MB\n"
        "date:          2026-11-03\n"
        "tags:          latest, v1\n"
        "tests:         passed: 3 of 3\n"
        "architecture:  x86_64\n"
        "here:          no, will be fetched when it is used\n"
        "views:\n"
        "  default (default)  all\n"
        "  x\n"
    )
    _run(tmp_path, ["image", "inspect", "app", "--json"], {"inspect": [INSPECTED]})
    assert json.loads(capsys.readouterr().out) == {
        **SCHEMA,
        **{key: value for key, value in INSPECTED.items() if key not in ("ok", "notes")},
    }
    _run(tmp_path, ["image", "inspect", "app"], {"inspect": [{**INSPECTED, "views": None}]})
    assert "not known before" in capsys.readouterr().out
    assert _run(tmp_path, ["image", "inspect", "app"], {"inspect": [{**INSPECTED, "views": [3]}]})[0] == 80


def test_pull(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = {"label": "app/1:v1", "digest": DIGEST}
    script = {"pull": [progress(1, 2), progress(2, 2), {"ok": True, "images": [image], "notes": []}]}
    assert _run(tmp_path, ["image", "pull", "app"], script)[0] == 0
    assert capsys.readouterr().out == f"app/1:v1  {DIGEST}\n"
    _run(tmp_path, ["image", "pull", "app", "--json"], script)
    assert json.loads(capsys.readouterr().out) == {**SCHEMA, "images": [image]}


def test_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = {
        "digest": DIGEST,
        "label": "app/1:v1",
        "state": "serving",
        "leases": 2,
        "done_bytes": 5,
        "total_bytes": 91_226_112,
    }
    answer = {
        "ok": True, "version": "0.1.0", "system": "demo", "uarch": "zen3", "registry": "localhost:5000", "images": [image],
        "cache": {"path": "/cache", "used_bytes": 91_226_112, "free_bytes": 10**12}, "connections": 3,
    }  # fmt: skip
    assert _run(tmp_path, ["status"], {"status": [answer]})[0] == 0
    assert capsys.readouterr().out.splitlines() == [
        "session:  none",
        "uenvd:    0.1.0, system demo, uarch zen3, registry localhost:5000",
        "cache:    /cache, 91 MB used, 1000000 MB free",
        "image     state    users  fetched(MB)  size(MB)",
        "app/1:v1  serving      2          0.0        91",
    ]
    _run(tmp_path, ["status", "--json"], {"status": [answer]})
    facts = json.loads(capsys.readouterr().out)
    assert facts == {
        **SCHEMA,
        "session": [],
        "daemon": {key: value for key, value in answer.items() if key != "ok"},
        "error": None,
    }
    assert _run(tmp_path, ["status"], {"status": [{"ok": True, "images": 3, "cache": 4}]})[0] == 0


def modules_after(code: str, tmp_path: Path) -> set[str]:
    """Return the modules that are loaded when the code has run; what it writes is dropped."""
    program = f"import sys\n{code}\nopen({str(tmp_path / 'loaded')!r}, 'w').write('\\n'.join(sys.modules))"
    subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, check=True)
    return set((tmp_path / "loaded").read_text().split())


@pytest.mark.parametrize(
    "module", ["main", "session", "execute", "start", "files", "records", "complete", "run"]
)
def test_the_fast_path_imports_nothing_heavy(module: str, tmp_path: Path) -> None:
    loaded = modules_after(f"import uenvd.ctl.{module}", tmp_path)
    assert not HEAVY & loaded
    assert not [
        name for name in loaded if name.startswith(("uenvd.fuse", "uenvd.oci", "uenvd.cache", "uenvd.daemon"))
    ]


def test_what_is_loaded_is_counted(tmp_path: Path) -> None:
    """Times depend on the machine, the number of modules does not: each costs 0.1 to 1 ms. tests/bench/uenvctl_latency.py has the times."""
    bare = modules_after("", tmp_path)
    complete = (
        "from uenvd.ctl.main import main; main(['--socket=/nonexistent', '__complete', 'zsh', 'run', 'a'])"
    )
    cases = {
        "from uenvd.ctl.main import main; main(['--version'])": 4,
        complete: 60,
        "import uenvd.ctl.run, uenvd.ctl.session, uenvd.ctl.execute": 64,
    }
    for code, limit in cases.items():
        loaded = modules_after(code, tmp_path) - bare
        assert len(loaded) <= limit, sorted(loaded)
