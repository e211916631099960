"""docs/recipes.md describes the keys of the builders python and source and the findings of the audit: all, and no others."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import get_args

from uenvd.publish.build import kinds
from uenvd.publish.build.audit import FindingKind
from uenvd.publish.recipe import environments, python, source

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


def test_keys_of_the_section_source() -> None:
    known = set(re.findall(r'section\.take\("([a-z-]+)"', inspect.getsource(source.source_build)))
    assert set(re.findall(r"^\| `source\.([a-z-]+)` \|", PAGE, re.MULTILINE)) == known


def test_keys_of_a_package() -> None:
    known = set(re.findall(r'section\.(?:take|need)\("([a-z-]+)"', inspect.getsource(source._package)))
    start = PAGE.index("and `packages`, a list of:")
    rows = re.findall(
        r"^\| (`[a-z`, ]+`) \|", PAGE[start : PAGE.index("`$@view_path@` and", start)], re.MULTILINE
    )
    assert {name for row in rows for name in re.findall(r"`([a-z]+)`", row)} == known


def test_variables_of_a_machine_that_builds() -> None:
    for variable in (
        kinds.PROGRAMS_VARIABLE,
        kinds.SYSTEM_VARIABLE,
        kinds.MIRROR_VARIABLE,
        kinds.MEMORY_VARIABLE,
    ):
        assert f"`{variable}`" in PAGE


def test_findings() -> None:
    described = PAGE[PAGE.index("| finding |") :]
    assert set(re.findall(r"^\| `([a-z-]+)` \|", described, re.MULTILINE)) == set(get_args(FindingKind))
