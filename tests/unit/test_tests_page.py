"""tests/README.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = (TESTS / "README.md").read_text()
NAMES = sorted(set(re.findall(r"`(test_[a-z0-9_]+)(?:::(test_[a-z0-9_]+))?`", PAGE)))


def test_every_test_that_is_named_exists() -> None:
    assert len(NAMES) > 40
    files = {path.stem: path.read_text() for path in TESTS.rglob("test_*.py")}
    missing = [
        f"{file}::{name}" if name else file
        for file, name in NAMES
        if file not in files
        or (name and not re.search(rf"^(async )?def {name}\(", files[file], re.MULTILINE))
    ]
    assert missing == []
