"""What is offered at TAB, whatever was typed before it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fakedaemon import FakeDaemon, failure
from uenvd.ctl import complete
from uenvd.ctl.complete import Reply, replaced_from, split
from uenvd.errors import UnknownLabel

RECORDS = [
    {"name": "app", "version": "1", "tag": "v1", "system": "demo", "uarch": "zen3", "size_bytes": 91_000_000, "cached": True},
    {"name": "app", "version": "2", "tag": "v1", "system": "demo", "uarch": "zen3"},
    {"name": "old", "version": "1", "tag": "v1", "system": "demo", "uarch": "zen3", "deprecated": "x"},
]  # fmt: skip
VIEWS = {"views": [{"name": "default", "description": "all"}, {"name": "develop", "description": ""}]}


def ask(op: str, **fields: Any) -> Mapping[str, Any]:
    assert fields.get("remembered") or op == "images", "a TAB never asks the registry"
    if op == "inspect":
        if fields["uenv"].startswith("nope"):
            raise UnknownLabel("nope")
        return VIEWS
    return {"records": RECORDS[:1] if op == "images" else RECORDS}


def offered(line: str) -> list[str]:
    reply = complete.complete(line.split(" "), ask)
    return [f"({reply.kind})", *(word for word, _about in reply.candidates)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("im", ["(words)", "image"]),
        ("ker", ["(words)", "kernel"]),
        ("--so", ["(part)", "--socket="]),
        ("--socket ", ["(files)"]),
        ("--socket /x im", ["(words)", "image"]),
        ("image e", ["(words)", "evict"]),
        ("nonsense ", ["(words)"]),
        ("image nonsense ", ["(words)"]),
        ("help st", ["(words)", "start", "status"]),
        ("help image p", ["(words)", "pull", "pin"]),
        ("help run ", ["(words)"]),
        ("run ", ["(words)", "app/1:v1", "app/2:v1"]),
        ("run app/2", ["(words)", "app/2:v1"]),
        ("run app/1:v1@", ["(words)", "app/1:v1@demo"]),
        ("run app/1:v1%", ["(words)", "app/1:v1%zen3"]),
        ("run x,app/1", ["(words)", "x,app/1:v1"]),
        ("run build::app/1", ["(words)", "build::app/1:v1"]),
        ("run ./x", ["(files)"]),
        ("run a,/x", ["(files)"]),
        ("run --vi", ["(part)", "--view="]),
        ("run app/1 --view=de", ["(words)", "--view=default", "--view=develop"]),
        ("run app/1 --view=default,dev", ["(words)", "--view=default,develop"]),
        ("run app/1 --view n", ["(words)", "none"]),
        ("run app/1 -v def", ["(words)", "default"]),
        ("run app/1,b/2 --view=b:de", ["(words)", "--view=b:default", "--view=b:develop"]),
        ("run ./x --view=", ["(words)", "--view=none"]),
        ("run --view=", ["(words)"]),
        ("run --lock-file=", ["(files)"]),
        ("run --lock-file ", ["(files)"]),
        ("run app/1 ", ["(command)"]),
        ("run app/1 -- ", ["(command)"]),
        ("run app/1 ls ", ["(command)"]),
        ("start app/1 ", ["(words)"]),
        ("diff app/1 app/2", ["(words)", "app/2:v1"]),
        ("image evict ", ["(words)", "app/1:v1"]),
        ("image find --no", ["(words)", "--no-header"]),
        ("completion z", ["(words)", "zsh"]),
        ("job ", ["(words)"]),
        ("kernel install --python ", ["(words)"]),
    ],
)
def test_what_is_offered(line: str, expected: list[str]) -> None:
    assert offered(line) == expected


def test_every_command_is_described() -> None:
    reply = complete.complete([""], ask)
    assert len(reply.candidates) >= 11
    assert all(about for _word, about in reply.candidates)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", [""]),
        ("uenvctl ", ["uenvctl", ""]),
        ("uenvctl run 'a b'", ["uenvctl", "run", "a b"]),
        ('uenvctl run "a b" ', ["uenvctl", "run", "a b", ""]),
        ("uenvctl run 'a b", ["uenvctl", "run", "a b"]),
        (r"uenvctl a\ b", ["uenvctl", "a b"]),
        ("uenvctl ''  x", ["uenvctl", "", "x"]),
        ("a\\", ["a"]),
    ],
)
def test_lines_are_split_as_a_shell_does(line: str, words: list[str]) -> None:
    assert split(line) == words


@given(st.text(max_size=60))
def test_any_line_can_be_split(line: str) -> None:
    assert split(line)


@pytest.mark.parametrize(
    ("word", "typed", "start"),
    [
        ("app/1", "app/1", 0),
        ("app/1:", ":", 6),
        ("app/1:v", "v", 6),
        ("app/1:v1@", "@", 8),
        ("--view=de", "de", 7),
        ("--view=", "=", 7),
        ("--view=", "", 7),
        ("app", "'app", 0),
        ("app", "apple", 0),  # the cursor is inside of the word
    ],
)
def test_what_bash_replaces(word: str, typed: str, start: int) -> None:
    assert replaced_from(word, typed) == start


def test_bash_gets_what_it_replaces_and_nobody_gets_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script: dict[str, Any] = {"find": [{"ok": True, "records": RECORDS, "age_s": 1.0}]}
    with FakeDaemon(tmp_path / "control", script) as daemon:
        monkeypatch.setenv("UENVD_SOCKET", str(daemon.path))
        assert complete.main(["bash", "uenvctl run app/1:", ":"]) == 0
        assert capsys.readouterr().out == "words\nv1\n"
        assert complete.main(["fish", "run", "app/1"]) == 0
        assert capsys.readouterr().out == "words\napp/1:v1\t%zen3 91 MB here\n"
        assert complete.main(["zsh"]) == 0
        assert complete.main([]) == 1
        capsys.readouterr()
        assert len(daemon.requests) == 2, "what is fresh is not asked for again"
    for script in (
        {"find": [{"ok": True, "records": RECORDS, "age_s": 1e6}]},
        {"find": [failure("registry-unreachable", "never asked")]},
    ):
        with FakeDaemon(tmp_path / "control", script) as daemon:
            assert complete.main(["zsh", "run", "app/1"]) == 0
            assert daemon.wait_until(lambda one: len(one.requests) == 2)
            assert "remembered" in daemon.requests[0]
            assert daemon.requests[1] == {"v": 1, "op": "find", "uenv": ""}, "for the next TAB"
    capsys.readouterr()
    assert complete.main(["zsh", "run", "app/1"]) == 0
    assert capsys.readouterr() == ("words\n", "")


def test_hostile_names_are_no_lines_of_their_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        complete, "complete", lambda *_: Reply("words", (("a\nb", ""), ("\x1b[2J", ""), ("c", "d\n\x1be")))
    )
    assert complete.main(["zsh", ""]) == 0
    assert capsys.readouterr().out == "words\nc\td ?e\n"


WORDS = st.sampled_from(
    [
        "run",
        "image",
        "find",
        "kernel",
        "install",
        "--view",
        "-v",
        "--view=",
        "--",
        "-",
        "",
        "a,b",
        "x::",
        "help",
    ]
)


@given(st.lists(WORDS | st.text(max_size=5), min_size=1, max_size=6))
def test_whatever_was_typed_there_is_an_answer(words: list[str]) -> None:
    reply = complete.complete(words, ask)
    assert reply.kind in ("words", "part", "files", "command")
    assert all(word.startswith(words[-1]) for word, _about in reply.candidates)
