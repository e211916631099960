"""docs/uenvctl.md shows what the programs say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("node")


def test_the_page_shows_what_the_programs_say() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to make an ordinary user")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "doc_examples.py", "--check"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
