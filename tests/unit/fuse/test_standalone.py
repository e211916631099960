"""The command line of uenvd-fs."""

from __future__ import annotations

import pytest

from uenvd.errors import UsageError
from uenvd.fuse.standalone import Command, _libfuse_options, parse


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
