"""The manual pages say what --help says, and man can read them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from uenvd.ctl.main import COMMANDS

ROOT = Path(__file__).parents[3]
PAGES = sorted((ROOT / "man").glob("*.1"))


def test_the_pages_are_what_the_texts_say() -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "man_pages.py", "--check"], check=True)


def test_every_command_has_one() -> None:
    names = {page.stem for page in PAGES}
    assert names == {"uenvctl", *("uenvctl-" + command.replace(" ", "-") for command in COMMANDS)}


@pytest.mark.parametrize("page", ["uenvctl", "uenvctl-run", "uenvctl-completion"])
def test_man_shows_them(page: str) -> None:
    done = subprocess.run(
        ["man", "--warnings", "-l", str(ROOT / "man" / f"{page}.1")],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", "MANWIDTH": "100", "LC_ALL": "C.UTF-8", "MANPAGER": "cat"},
    )
    assert done.stderr == ""
    sections = [line for line in done.stdout.splitlines() if line.isupper() and not line.startswith(" ")]
    assert {"NAME", "SYNOPSIS", "DESCRIPTION", "EXAMPLES"} <= set(sections)
    assert "$UENVD_SOCKET" in done.stdout or page == "uenvctl-completion"
