"""Builders: one for each word that recipes may say, each with its two halves, and an identity that only its own code changes."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import get_args

import pytest

from uenvd.publish.build import identity, kinds
from uenvd.publish.build.kinds import builders
from uenvd.publish.recipe.model import Builder


def test_every_builder_of_recipes_is_there() -> None:
    assert set(builders()) == set(get_args(Builder))
    for name in builders():
        module = importlib.import_module(f"uenvd.publish.build.inside_{name}")
        assert isinstance(module.NETWORK, bool)
        assert callable(module.make)


def test_a_change_of_one_builder_is_none_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "build"
    shutil.copytree(Path(kinds.__file__).parent, copy)
    monkeypatch.setattr(kinds, "__file__", str(copy / "kinds.py"))
    before = {name: identity(builder) for name, builder in builders().items()}
    with (copy / "toolchain.py").open("a") as file:
        file.write("# changed\n")
    after = {name: identity(builder) for name, builder in builders().items()}
    assert {name for name in before if before[name] != after[name]} == {"source"}
    with (copy / "workshop.py").open("a") as file:
        file.write("# changed\n")
    assert all(identity(builder) != after[name] for name, builder in builders().items())


def test_modules_whose_code_shows_are_named() -> None:
    """What the inside half imports of this package must be in the identity."""
    here = Path(kinds.__file__).parent
    for builder in builders().values():
        named = {*kinds._COMMON, *builder.modules}
        waiting, seen = [f"inside_{builder.name}"], set()
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            text = (here / f"{name}.py").read_text()
            waiting += [path.stem for path in here.glob("*.py") if _imports(text, path.stem)]
        assert seen <= named, builder.name


def _imports(text: str, name: str) -> bool:
    return any(
        line.startswith(
            (f"from uenvd.publish.build.{name} import", f"from uenvd.publish.build import {name}")
        )
        or (
            line.startswith("from uenvd.publish.build import")
            and name in line.partition("import")[2].replace(",", " ").split()
        )
        for line in text.splitlines()
    )
