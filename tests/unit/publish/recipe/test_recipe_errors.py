"""Recipes: what is wrong in one is said with file, line and key."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from uenvd.errors import RecipeError, UsageError
from uenvd.publish.recipe import load_recipe

CHECKOUT = Path(__file__).resolve().parents[4]
DIGITS = "0" * 64


@pytest.fixture
def sci(tmp_path: Path) -> Path:
    """A small recipe of ours."""
    directory = tmp_path / "sci" / "1.0"
    files = {
        "config.yaml": "name: sci\nbuilder: python\npython:\n  date: 2026-11-01\n",
        "environments.yaml": "sci:\n  specs: [tiny==1.0]\n  views:\n    default:\n      description: run\n",
        "interpreter.lock": f"# a comment\npython3.11-minimal=3.11.2-6 amd64 sha256:{DIGITS}\n",
        "requirements.lock": f"tiny==1.0 \\\n    --hash=sha256:{DIGITS}\n",
    }
    for name, text in files.items():
        write(directory / name, text)
    return directory


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A recipe in the format of early 2024."""
    target = tmp_path / "quantum-espresso" / "7.1"
    shutil.copytree(CHECKOUT / "recipes/quantum-espresso/7.1", target)
    return target


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def change(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def error_of(directory: Path) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(directory)
    return caught.value


@pytest.mark.parametrize("name", ["prgenv-gnu/23.11", "python-sci/2026.11", "quantum-espresso/7.1"])
def test_the_projects_own_recipes_are_valid(name: str) -> None:
    assert load_recipe(CHECKOUT / "recipes" / name).label == name


def test_a_recipe_of_early_2024_is_recognised(old: Path) -> None:
    recipe = load_recipe(old)
    assert recipe.format == "Stackinator 2-4 (recipe version 1, early 2024)"
    assert recipe.builder == "stackinator"
    assert recipe.compilers == ("gcc@11.3", "nvhpc@22.11")
    assert [view.name for view in recipe.views] == ["default", "develop"]
    assert any(spec.startswith("libxc~cuda") for spec in recipe.environments[0].specs)
    assert recipe.environments[0].mpi == "cray-mpich@8.1.24"


def test_our_recipe(sci: Path) -> None:
    recipe = load_recipe(sci)
    assert (recipe.label, recipe.builder, recipe.mount) == ("sci/1.0", "python", "/user-environment")
    assert recipe.environments[0].specs == ("tiny==1.0",)


def test_version_is_the_directorys_name_also_with_one_per_uarch(sci: Path) -> None:
    deeper = sci / "gh200"
    deeper.mkdir()
    for path in [path for path in sci.iterdir() if path.is_file()]:
        path.rename(deeper / path.name)
    assert load_recipe(deeper).label == "sci/1.0"


@pytest.mark.parametrize(
    ("file", "before", "after", "where"),
    [
        ("config.yaml", "name: sci", "nmae: sci", "config.yaml:1: name: is missing"),
        ("config.yaml", "  date:", "  dtae:", "config.yaml:4: python.dtae: is no key"),
        ("config.yaml", "2026-11-01", "soon", "config.yaml:4: python.date: 'soon' is no day"),
        ("config.yaml", "2026-11-01", "1970-01-01", "config.yaml:4: python.date: '1970-01-01' cannot be"),
        ("config.yaml", "builder: python", "builder: make", "config.yaml:2: builder: 'make' is no builder"),
        ("config.yaml", "name: sci", "name: sci\nstore: here", "config.yaml:2: store: 'here' is no absolute path"),
        ("config.yaml", "name: sci", "name: sci\nspack: {}", "config.yaml:2: spack: is for the builder stackinator"),
        ("config.yaml", "name: sci", "name: sci\ndefault-view: x", "config.yaml:2: default-view: there is no view 'x'"),
        ("config.yaml", "name: sci", "name: [", "config.yaml:3: not valid YAML"),
        ("environments.yaml", "tiny==1.0", "tiny>1", "environments.yaml:2: sci.specs: 'tiny>1' is no requirement"),
        ("environments.yaml", "tiny==1.0", "tiny==2", "environments.yaml:1: sci.specs: 'tiny==2' is pinned to 1.0"),
        ("environments.yaml", "tiny==1.0", "huge", "environments.yaml:1: sci.specs: 'huge' is not in requirements.lock"),
        ("environments.yaml", "  specs", "  compiler: []\n  specs", "environments.yaml:2: sci.compiler: is no key"),
        ("environments.yaml", "    default:", "    a view:", "environments.yaml:4: sci.views.a view: is no name"),
        (
            "environments.yaml",
            "description: run",
            "uenv:\n        env_vars:\n          set:\n            - PATH: /x",
            "environments.yaml:8: sci.views.default.uenv.env_vars.set: PATH is a list of paths",
        ),
        (
            "environments.yaml",
            "description: run",
            "uenv:\n        env_vars:\n          prepend_path:\n            - HOME: /x",
            "environments.yaml:8: sci.views.default.uenv.env_vars.prepend_path: HOME is no list",
        ),
        (
            "environments.yaml",
            "description: run",
            "uenv: {env_vars: {set: [{A: $@nowhere@}]}}",
            "environments.yaml:5: sci.views.default.uenv.env_vars.set: $@nowhere@ is no substitution",
        ),
        ("interpreter.lock", "amd64 ", "", "interpreter.lock:2: python3.11-minimal: is no  name=version"),
        ("requirements.lock", "\\\n    --hash=sha256:", "# ", "requirements.lock:1: tiny==1.0: is no  name==version --hash"),
        ("requirements.lock", "sha256", "md5", "requirements.lock:1: tiny==1.0: is no  name==version --hash"),
    ],
)  # fmt: skip
def test_an_error_of_ours_names_file_line_and_key(
    sci: Path, file: str, before: str, after: str, where: str
) -> None:
    change(sci / file, before, after)
    assert where in error_of(sci).message


@pytest.mark.parametrize(
    ("file", "before", "after", "where"),
    [
        ("config.yaml", "spack:", "python: {}\nspack:", "config.yaml:5: python: is for the builder python"),
        ("config.yaml", "modules: false", "modules: perhaps", "config.yaml:8: modules: must be true or false"),
        ("config.yaml", "modules: false", "version: 7", "config.yaml:8: version: '7' is no recipe format"),
        ("config.yaml", "modules: false", "version: 2", "compilers.yaml:1: bootstrap: is of recipe format 1"),
        ("config.yaml", "  repo:", "  rpeo:", "config.yaml:5: spack.repo: is missing"),
        ("compilers.yaml", "gcc@11.3", "clang@15", "compilers.yaml:2: bootstrap.spec: 'clang@15' is no compiler"),
        ("compilers.yaml", "nvhpc@22.11", "pgi@20", "compilers.yaml:9: llvm.specs: 'pgi@20' is no compiler"),
        ("compilers.yaml", "requires: gcc@11.3", "requires: gcc@12", "compilers.yaml:7: llvm.requires: gcc@12 is not among"),
        ("environments.yaml", "spec: nvhpc@22.11", "spec: nvhpc@23.1", "environments.yaml:7: qe.compiler: nvhpc@23.1 is not in"),
        ("environments.yaml", "toolchain: llvm", "toolchain: nvhpc", "environments.yaml:7: qe.compiler: must be a list"),
        ("environments.yaml", "gpu: cuda", "gpu: tpu", "environments.yaml:11: qe.mpi.gpu: 'tpu' is not one of"),
        ("environments.yaml", "- cuda@11.8", "- scotch@7.0:", "environments.yaml:15: qe.specs: must be a text"),
        ("environments.yaml", "link: all", "link: most", "environments.yaml:30: qe.views.develop.link: 'most' is not"),
        ("environments.yaml", "  unify: true", "  network: {mpi: x}", "environments.yaml:12: qe.network: is no key"),
        ("extra/reframe.yaml", "views: [develop]", "views: [devel]", "reframe.yaml:12: develop.views: there is no view 'devel'"),
    ],
)  # fmt: skip
def test_an_error_of_a_stackinator_recipe_names_file_line_and_key(
    old: Path, file: str, before: str, after: str, where: str
) -> None:
    change(old / file, before, after)
    assert where in error_of(old).message


def test_compilers_may_be_named_loosely(old: Path) -> None:
    change(old / "environments.yaml", "spec: gcc@11.3", "spec: gcc")
    change(old / "environments.yaml", "spec: nvhpc@22.11", "spec: nvhpc@22")
    change(old / "environments.yaml", "exclude: [cmake]", 'exclude: [""]')
    change(old / "environments.yaml", "unify: true", "unify: True")
    change(old / "compilers.yaml", "requires: gcc@11.3", "requires: gcc@11")
    assert load_recipe(old).environments[0].compilers == ("gcc", "nvhpc@22")
    change(old / "environments.yaml", "spec: nvhpc@22", "spec: nvhpc@2")
    assert "nvhpc@2 is not in compilers.yaml" in error_of(old).message


def test_two_views_of_one_name(old: Path) -> None:
    text = (old / "environments.yaml").read_text()
    second = text[text.index("qe:") :].replace("qe:", "qe2:", 1)
    (old / "environments.yaml").write_text(text + second)
    assert "qe2.views.default: there is a view of this name already (line 26)" in error_of(old).message


def test_newer_formats_are_told_apart(old: Path) -> None:
    change(old / "config.yaml", "modules: false", "version: 2\ndefault-view: develop")
    change(old / "config.yaml", "  commit: releases/v0.20", "  commit: v1\n  packages: {repo: r, commit: c}")
    (old / "compilers.yaml").write_text('gcc: {version: "13"}\nnvhpc: {version: "25.1"}\n')
    text = (old / "environments.yaml").read_text()
    begin, end = text.index("  compiler:"), text.index("  unify:")
    (old / "environments.yaml").write_text(
        text[:begin] + "  compiler: [gcc, nvhpc]\n  network: {mpi: cray-mpich}\n" + text[end:]
    )
    recipe = load_recipe(old)
    assert recipe.format == "Stackinator 6 (recipe version 2)"
    assert recipe.environments[0].mpi == "cray-mpich"
    change(old / "compilers.yaml", '"13"', "13.2")
    assert "compilers.yaml:1: gcc.version: 13.2 is a number in YAML" in error_of(old).message
    change(old / "config.yaml", "version: 2\n", "")
    change(old / "config.yaml", "default-view: develop", "")
    assert "version: is missing" in error_of(old).message


def test_missing_files(sci: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no directory"):
        load_recipe(tmp_path / "absent")
    (sci / "requirements.lock").unlink()
    assert "requirements.lock: no such file" in error_of(sci).message
    (sci / "environments.yaml").unlink()
    assert "environments.yaml: no such file" in error_of(sci).message


def test_compilers_and_mirrors_do_not_belong_to_ours(sci: Path) -> None:
    write(sci / "compilers.yaml", "gcc: {}\n")
    assert "compilers.yaml:1:" in error_of(sci).message
    write(sci / "mirrors.yaml", "{}\n")
    assert "mirrors.yaml:1:" in error_of(sci).message


def test_fingerprint_is_of_the_files_only(sci: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere/sci/1.0"
    shutil.copytree(sci, elsewhere)
    write(elsewhere / "extra/__pycache__/x.pyc", "left over")
    write(elsewhere / ".hidden", "")
    assert load_recipe(elsewhere).fingerprint() == load_recipe(sci).fingerprint()
    write(elsewhere / "extra/data", "more")
    assert load_recipe(elsewhere).fingerprint() != load_recipe(sci).fingerprint()
