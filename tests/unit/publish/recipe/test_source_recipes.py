"""Recipes of the builder source: what is wrong in one is said with file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from uenvd.errors import RecipeError
from uenvd.publish.recipe import load_recipe

CHECKOUT = Path(__file__).resolve().parents[4]
DIGITS = "0" * 64


@pytest.fixture
def lib(tmp_path: Path) -> Path:
    directory = tmp_path / "lib" / "1.0"
    directory.mkdir(parents=True)
    files = {
        "config.yaml": "name: lib\nbuilder: source\nsource:\n  date: 2026-11-01\n  memory: 2G\n",
        "environments.yaml": (
            "lib:\n  packages:\n    - name: lib\n      version: 1.0\n      source: lib.tar.gz\n      build: cmake\n"
            "      options: [-DA=$@view_path@]\n      environment: {CFLAGS: -O3}\n  views:\n    default:\n"
        ),
        "toolchain.lock": f"gcc=4:12.2.0-3 amd64 sha256:{DIGITS}\n",
        "sources.lock": f"lib.tar.gz sha256:{DIGITS} https://example.org/a#b debian:lib=1:1.0-1 # why\n",
    }
    for name, text in files.items():
        (directory / name).write_text(text)
    return directory


def change(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def test_our_own_is_valid() -> None:
    recipe = load_recipe(CHECKOUT / "recipes/fits/2026.11")
    assert [package.name for package in recipe.environments[0].packages] == ["zlib", "cfitsio"]
    assert recipe.environments[0].specs == ("zlib@1.2.13", "cfitsio@4.2.0")


def test_what_it_says(lib: Path) -> None:
    recipe = load_recipe(lib)
    assert recipe.source is not None
    assert (recipe.source.toolchain, recipe.source.memory_bytes, recipe.date_s) == (
        "toolchain.lock",
        2 << 30,
        1793491200,
    )
    (package,) = recipe.environments[0].packages
    assert (package.system, package.environment, package.install) == (
        "cmake",
        (("CFLAGS", "-O3"),),
        ("install",),
    )


def test_the_version_may_be_told(lib: Path) -> None:
    assert load_recipe(lib, version="7").label == "lib/7"


@pytest.mark.parametrize(
    ("file", "before", "after", "where"),
    [
        ("config.yaml", "  memory: 2G", "  memory: lots", "config.yaml:5: source.memory: 'lots' is no size"),
        ("config.yaml", "  memory", "  stirp: no\n  memory", "config.yaml:5: source.stirp: is no key"),
        ("config.yaml", "builder: source", "builder: python", "config.yaml:3: source: is for the builder source"),
        ("config.yaml", "builder: source\n", "", "config.yaml:2: source: is for the builder source"),
        ("config.yaml", "name: lib", "name: lib\nspack: {}", "config.yaml:2: spack: is for another builder"),
        ("environments.yaml", "build: cmake", "build: bazel", "environments.yaml:6: lib.packages[0].build: 'bazel' is not one of"),
        ("environments.yaml", "build: cmake", "biuld: cmake", "environments.yaml:3: lib.packages[0].build: is missing"),
        ("environments.yaml", "build: cmake", "build: make", "environments.yaml:7: lib.packages[0].options: is for configure, cmake"),
        ("environments.yaml", "build: cmake", "build: script", "lib.packages[0].script: names the program"),
        ("environments.yaml", "{CFLAGS: -O3}", "{C FLAGS: -O3}", "environments.yaml:8: lib.packages[0].environment: 'C FLAGS'"),
        ("environments.yaml", "source: lib", "source: other", "environments.yaml:3: lib: lib: other.tar.gz is not in sources.lock"),
        ("environments.yaml", "      build", "      patches: [a.patch]\n      build", "lib: lib: the recipe has no file a.patch"),
        ("environments.yaml", "      build", "      jobs: 0\n      build", "environments.yaml:6: lib.packages[0].jobs: '0' is no number"),
        ("environments.yaml", "  views:\n    default:\n", "", "environments.yaml:1: lib.views: is missing"),
        ("environments.yaml", "  views", "    - {name: lib, version: 2, source: lib.tar.gz, build: make}\n  views", "there is a package lib already"),
        ("sources.lock", "https://example.org/a#b", "ftp://x", "sources.lock:1: lib.tar.gz: is no  file sha256"),
        ("sources.lock", "https://example.org", "https://user@example.org", "sources.lock:1: lib.tar.gz: is no  file sha256"),
        ("sources.lock", "lib.tar.gz", "../lib.tar.gz", "sources.lock:1: ../lib.tar.gz: is no  file sha256"),
        ("toolchain.lock", "gcc=4:12.2.0-3", "gcc", "toolchain.lock:1: gcc amd64"),
    ],
)  # fmt: skip
def test_errors_name_file_line_and_key(lib: Path, file: str, before: str, after: str, where: str) -> None:
    change(lib / file, before, after)
    with pytest.raises(RecipeError) as caught:
        load_recipe(lib)
    assert where in caught.value.message


def test_the_tool_chain_of_the_machine_needs_no_lock(lib: Path) -> None:
    (lib / "toolchain.lock").unlink()
    with pytest.raises(RecipeError, match=r"toolchain\.lock: no such file"):
        load_recipe(lib)
    change(lib / "config.yaml", "  memory", "  toolchain: host\n  memory")
    recipe = load_recipe(lib)
    assert recipe.source is not None
    assert recipe.source.toolchain is None


def test_compilers_are_stackinators(lib: Path) -> None:
    (lib / "compilers.yaml").write_text("")
    with pytest.raises(RecipeError, match=r"compilers\.yaml:1: is for the builder 'stackinator'"):
        load_recipe(lib)
