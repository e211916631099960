"""Why an image is built again: which of its inputs changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from uenvd.publish.build import Site, builder_of
from uenvd.publish.build.inputlock import changes, inputs_of, parse_lock
from uenvd.publish.recipe import Recipe, load_recipe

DIGITS = "0" * 64


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    directory = tmp_path / "lib" / "1.0"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("name: lib\nbuilder: source\n")
    (directory / "environments.yaml").write_text(
        "lib:\n  packages:\n  - {name: lib, version: 1.0, source: lib.tar.gz, build: make}\n  views: {default: }\n"
    )
    (directory / "toolchain.lock").write_text(
        f"gcc-12=12.2.0-14 amd64 sha256:{DIGITS}\nmake=4.3 amd64 sha256:{DIGITS}\n"
    )
    (directory / "sources.lock").write_text(f"lib.tar.gz sha256:{DIGITS} https://example.org/lib.tar.gz#x\n")
    return load_recipe(directory)


def document(recipe: Recipe, **environment: str) -> dict[str, object]:
    found = inputs_of(recipe, builder_of(recipe), Site(), environment)
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def test_equal_inputs_change_nothing(recipe: Recipe) -> None:
    assert changes(document(recipe, A="1"), document(recipe, A="1")) == []
    assert changes({**document(recipe), "image": "sha256:1"}, document(recipe)) == []


def test_each_input_is_named(recipe: Recipe) -> None:
    before = document(recipe, TOKEN="old", GONE="1")
    chain = recipe.directory / "toolchain.lock"
    chain.write_text(chain.read_text().replace("12.2.0-14", "12.2.0-15") + f"sed=4.9 amd64 sha256:{DIGITS}\n")
    sources = recipe.directory / "sources.lock"
    sources.write_text(sources.read_text().replace("00 ", "01 "))
    (recipe.directory / "post-install").write_text("#!/bin/sh\n")
    before["builder"] = "uenvd 0 (source, 123)"
    tools = before["tools"]
    assert isinstance(tools, dict)
    tools["patchelf"] = "0.1"
    lines = changes(before, document(recipe, TOKEN="new"))
    text = "\n".join(lines)
    assert "uenvd's builder changed: uenvd 0 (source, 123) -> uenvd" in text
    assert "the recipe's file toolchain.lock has other contents" in lines
    assert "the recipe's file post-install is new" in lines
    assert "the deb gcc-12=12.2.0-14 amd64 is now 12.2.0-15 amd64" in lines
    assert "the deb sed=4.9 amd64 is new" in lines
    assert "the source lib.tar.gz has other contents" in lines
    assert "this machine's patchelf: 0.1 -> " in text
    assert "the variable TOKEN has other contents" in lines
    assert "the variable GONE is gone" in lines


def test_values_of_variables_are_not_in_it(recipe: Recipe) -> None:
    text = json.dumps(document(recipe, TOKEN="hunter2"))
    assert "TOKEN" in text
    assert "hunter2" not in text
    assert "scrypt:" in text


def test_a_program_is_another_input_than_a_text(recipe: Recipe) -> None:
    hook = recipe.directory / "post-install"
    hook.write_text("#!/bin/sh\n")
    before = document(recipe)
    hook.chmod(0o755)
    assert changes(before, document(recipe)) == ["the recipe's file post-install has other contents"]


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"version": 2}', b"[" * 100_000, b"\xff"])
def test_what_is_no_such_document(data: bytes) -> None:
    assert parse_lock(data) is None


def test_a_damaged_document_explains_something(recipe: Recipe) -> None:
    damaged = {"version": 1, "recipe": [1], "inputs": "x", "tools": {"patchelf": 7}, "builder": None}
    assert changes(damaged, document(recipe))
