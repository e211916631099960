"""The command line of uenvd-fs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from uenvd.errors import UsageError
from uenvd.fuse import standalone
from uenvd.fuse.standalone import Command, _libfuse_options, parse, require_effect


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("i m", Command("i", "m")),
        ("i m -f", Command("i", "m", foreground=True)),
        ("-f i m", Command("i", "m", foreground=True)),
        ("-o allow_other,ro i m -oexec", Command("i", "m", flags={"allow_other", "exec"})),
        (
            "i m -o offset=12,cache=1,fsname=n",
            Command("i", "m", offset_bytes=12, cache_bytes=1 << 20, fsname="n"),
        ),
        ("-- -i -m", Command("-i", "-m")),
        ("i m -o dev,nodev,noexec,exec,suid,suid", Command("i", "m", flags={"nodev", "exec", "suid"})),
        ("i m -o transport=channel,workers=3", Command("i", "m", transport="channel", workers=3)),
        ("i m -o ,,ro,", Command("i", "m")),
    ],
)
def test_accepted(line: str, command: Command) -> None:
    assert parse(line.split()) == command


@pytest.mark.parametrize(
    "line",
    [
        "",
        "i",
        "i m x",
        "i m -o",
        "i m -o rw",
        "i m -o offset=x",
        "i m -o allow_other=1",
        "-q i m",
        "i m -o fsname=",
        "i m -o transport=pyfuse3,workers=2",
        "i m -o workers=2 -o transport=pyfuse3",
    ],
)
def test_refused(line: str) -> None:
    with pytest.raises(UsageError):
        parse(line.split())


def test_paths_are_escaped_for_libfuse() -> None:
    options = _libfuse_options(Command("/a,b\\c/\u00e9", "m", flags={"dev"}))
    assert options == {
        "ro",
        "default_permissions",
        "subtype=uenvd",
        "dev",
        "fsname=/a\\,b\\\\c/\\\\xc3\\\\xa9",
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("workers=2", "workers= needs transport=channel, and that the right to mount"),
        ("dev", "dev takes effect only for root"),
        ("exec,suid", "suid takes effect only for root"),
    ],
)
def test_what_would_have_no_effect_for_an_ordinary_user_is_refused(
    monkeypatch: pytest.MonkeyPatch, options: str, words: str
) -> None:
    monkeypatch.setattr(standalone, "_may_mount", lambda: False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UsageError, match=words):
        require_effect(parse(["i", "m", "-o", options]))


def test_a_user_namespace_has_no_device_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(standalone, "_UID_MAP", tmp_path / "map")
    for line, first in (("0 0 4294967295", True), ("0 1000 1", False)):
        (tmp_path / "map").write_text(f"         {line}\n")
        require_effect(parse(["i", "m", "-o", "suid"]))
        if first:
            require_effect(parse(["i", "m", "-o", "dev"]))
        else:
            with pytest.raises(UsageError, match="dev takes effect only for root of the machine"):
                require_effect(parse(["i", "m", "-o", "dev"]))
