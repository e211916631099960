"""Recipes of every generation of Stackinator, built: the real 4.0 with a stand-in for Spack, stand-ins for the later ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.planning import SITE
from support.stubspack import make_spack, make_system, stand_in_stack_config
from uenvd.errors import BuildFailed, ResourceMissing, UsageError
from uenvd.publish.build import Site, build
from uenvd.publish.build.of_stackinator import choose
from uenvd.publish.recipe import Recipe, load_recipe

PROGRAMS = Path(sys.executable).parent
CHECKOUT = Path(__file__).resolve().parents[2]
MEMORY_BYTES = 1 << 29


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Our recipe in the format of early 2024, with the stand-in for Spack."""
    target = tmp_path / "prgenv-gnu" / "23.11"
    shutil.copytree(CHECKOUT / "recipes/prgenv-gnu/23.11", target)
    config = target / "config.yaml"
    url = make_spack(tmp_path / "spack")
    config.write_text(config.read_text().replace("https://github.com/spack/spack.git", url))
    (target / "post-install").write_text("#!/bin/sh\nls -A /tmp ~ > {{ env.mount }}/seen\n")
    return target


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(
        (str(PROGRAMS / "stack-config"),), make_system(tmp_path / "system"), memory_bytes=MEMORY_BYTES
    )


def contents(image: Path, path: str) -> str:
    return subprocess.run(
        ["unsquashfs", "-cat", image, path], capture_output=True, text=True, check=False
    ).stdout


def test_the_real_one_of_early_2024(old: Path, site: Site, tmp_path: Path) -> None:
    built = build(load_recipe(old), tmp_path / "out", site=site)
    meta = json.loads(contents(built.image, "meta/env.json"))
    assert meta["mount"] == "/user-environment"
    assert list(meta["views"]) == ["default"]
    activate = contents(built.image, "env/default/activate.sh")
    assert activate.startswith("export PATH=")
    assert "SPACK_ENV" not in activate, "Stackinator's own script worked on it"
    # What is true of this build only is beside the image.
    assert contents(built.image, "meta/configure.json") == ""
    said = json.loads((built.meta_dir / "stackinator-configure.json").read_text())
    assert said["stackinator"]["version"] == "4.0"
    seen = contents(built.image, "seen").split()
    if not PROGRAMS.is_relative_to("/tmp"):
        assert seen == ["/tmp:", "/uenvd-build/home:"], "both are empty"
    else:  # what a build needs is not hidden from it
        assert seen[0] == "/tmp:" and seen[-1] == "/uenvd-build/home:", "that is empty"
    lock = json.loads(built.lock.read_text())
    assert lock["tools"]["stackinator"] == "4.0"
    assert {"system compilers.yaml", "system site/packages/sitetool/package.py"} < set(lock["inputs"])
    assert build(load_recipe(old), tmp_path / "out", site=site).reused


@pytest.mark.parametrize("version", ["5.0.1", "6.1.0", "7.0.0"])
def test_later_generations(version: str, tmp_path: Path, site: Site) -> None:
    recipe = _recipe_for(version, tmp_path)
    program = stand_in_stack_config(tmp_path / "stack-config", version)
    mirror = tmp_path / "mirror.yaml"
    mirror.write_text("handed on\n")
    site = Site((str(PROGRAMS / "stack-config"), str(program)), site.system, mirror, MEMORY_BYTES)
    built = build(recipe, tmp_path / "out", site=site)
    text = contents(built.image, "env/default/bin/hello")
    assert f"generation {version}" in text
    assert (text.split()[-1] != version) == (version[0] == "7"), "only format 3 is told the number of jobs so"
    assert (built.meta_dir / "stackinator-configure.json").exists()
    if version == "6.1.0":
        # Its configure.json has the time of the day; the image is the same.
        assert build(recipe, tmp_path / "elsewhere/out", site=site, again=True).digest == built.digest


def test_what_a_failed_build_finished_goes_to_the_build_cache(tmp_path: Path, site: Site) -> None:
    program = stand_in_stack_config(tmp_path / "stack-config", "6.1.0")
    mirror = tmp_path / "mirror.yaml"
    mirror.write_text("handed on\n")
    site = Site((str(program),), site.system, mirror, MEMORY_BYTES)
    steps: list[str] = []
    with pytest.raises(BuildFailed, match=r"make --keep-going -j1 SANDBOX= store\.squashfs failed"):
        build(
            _recipe_for("6", tmp_path),
            tmp_path / "out",
            site=site,
            environment={"STUB_FAILS": "1"},
            say=steps.append,
        )
    assert steps[-2:] == ["make, once more with fewer processes", "keeping in the build cache what was built"]
    assert (tmp_path / "mirror.yaml.pushed").read_text() == "pushed\n"
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".log"]


def _recipe_for(version: str, directory: Path) -> Recipe:
    """Copy a recipe of the test site: /tmp, where this checkout may lie, is hidden from a build that needs nothing of it."""
    wanted = {"5": "Stackinator 5", "6": "Stackinator 6", "7": "Stackinator 7"}[version[0]]
    for path in sorted((SITE / "recipes").glob("*/*/**/config.yaml")):
        recipe = load_recipe(path.parent)
        if recipe.format.startswith(wanted):
            return load_recipe(shutil.copytree(path.parent, directory / "recipe" / path.parent.name))
    raise AssertionError(f"the test site has no recipe for {wanted}")


def test_a_program_that_does_not_say_its_format_is_told_by_the_site(tmp_path: Path, site: Site) -> None:
    program = stand_in_stack_config(tmp_path / "stack-config", "7.0.0-dev")
    recipe = _recipe_for("6", tmp_path)
    with pytest.raises(ResourceMissing, match="does not say which format it takes") as caught:
        choose(recipe, Site((str(program),), site.system))
    assert "UENVD_STACK_CONFIG=2=" in caught.value.hint
    assert choose(recipe, Site((f"2={program}",), site.system))[0].version == "7.0.0-dev"
    with pytest.raises(ResourceMissing, match="no installed Stackinator takes it"):
        choose(recipe, Site((f"3={program}",), site.system))


def test_the_systems_configuration_must_be_named(old: Path, site: Site, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs the system's configuration") as caught:
        build(load_recipe(old), tmp_path / "out", site=Site(site.stack_configs))
    assert "UENVD_STACK_SYSTEM" in caught.value.hint
