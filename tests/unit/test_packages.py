"""What recipes say that an image holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uenvd.packages import packages_of

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    ("recipe", "has"),
    [
        (
            "python-sci/2026.11",
            {"numpy": "2.4.6", "mpich": "5.0.2", "python3.11-minimal": "3.11.2-6+deb12u9"},
        ),
        (
            "prgenv-gnu/23.11",
            {"hdf5": "", "python": "3.11", "cray-mpich": "8.1.27", "openblas": "", "gcc": "12.3"},
        ),
        ("quantum-espresso/7.1", {"quantum-espresso": "7.1", "cuda": "11.8", "fftw": "3.3.10", "libxc": ""}),
    ],
)
def test_the_recipes_of_this_project(recipe: str, has: dict[str, str]) -> None:
    directory = RECIPES / recipe
    files = {path.name: path.read_text() for path in directory.iterdir() if path.is_file()}
    found = packages_of(files)
    assert has.items() <= found.items()
    assert not {"default", "specs", "mpi", "+mpi", "description"} & found.keys()


@pytest.mark.parametrize(
    ("spec", "name", "version"),
    [
        ("hdf5", "hdf5", ""),
        ("hdf5@1.14", "hdf5", "1.14"),
        ("hdf5@=1.14.3 +mpi", "hdf5", "1.14.3"),
        ("'hdf5@1.12:1.14'", "hdf5", "1.12:1.14"),
        ("cuda@11.8%nvhpc", "cuda", "11.8"),
        ("libxc~cuda", "libxc", ""),
        ("numpy==2.0", "numpy", "2.0"),
        ("py-h5py ^hdf5@1.10  # comment", "py-h5py", ""),
    ],
)
def test_specs(spec: str, name: str, version: str) -> None:
    assert packages_of({"environments.yaml": f"e:\n  specs:\n  - {spec}\n  views: {{}}\n"}) == {name: version}
    assert packages_of({"environments.yaml": f"e:\n  specs:\n    - {spec}\n"}) == {name: version}


def test_other_lists_are_not_packages() -> None:
    text = "e:\n  specs: [a@1, b]\n  variants:\n  - +mpi\n  - cuda_arch=80\n  views:\n    default:\n      exclude: [c]\n"
    assert packages_of({"environments.yaml": text}) == {"a": "1", "b": ""}
    assert packages_of({"config.yaml": text, "notes.md": text}) == {}


def test_what_was_installed_goes_before_what_was_asked_for() -> None:
    files = {
        "environments.yaml": "e:\n  specs:\n  - numpy\n",
        "requirements.lock": "Num_Py==1\nnumpy==2.4 --hash=x\n",
    }
    assert packages_of(files) == {"num-py": "1", "numpy": "2.4"}


@given(st.dictionaries(st.sampled_from(["environments.yaml", "a.lock", "b.txt"]), st.text(max_size=300)))
def test_any_text_can_be_read(files: dict[str, str]) -> None:
    for name, version in packages_of(files).items():
        assert name and "\n" not in name + version
