"""docs/recipes.md describes the keys of the builder python and the findings of the audit: all, and no others."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import get_args

from uenvd.publish.build.audit import FindingKind
from uenvd.publish.recipe import environments, python

PAGE = (Path(__file__).resolve().parents[4] / "docs/recipes.md").read_text()


def test_keys_of_the_section_python() -> None:
    known = set(re.findall(r'section\.take\("([a-z-]+)"', inspect.getsource(python.python_build)))
    assert set(re.findall(r"^\| `python\.([a-z-]+)` \|", PAGE, re.MULTILINE)) == known


def test_keys_of_an_environment() -> None:
    known = set(re.findall(r'section\.take\("([a-z-]+)"', inspect.getsource(environments.for_python)))
    assert known == {"specs", "requirements"}
    assert all(
        f"| `{key}` |" in PAGE
        for key in (*known, "views", "views.*.uenv.prefix_paths", "views.*.uenv.env_vars")
    )


def test_findings() -> None:
    described = PAGE[PAGE.index("| finding |") :]
    assert set(re.findall(r"^\| `([a-z-]+)` \|", described, re.MULTILINE)) == set(get_args(FindingKind))
