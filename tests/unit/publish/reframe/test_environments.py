"""extra/reframe.yaml: what it may say, and that each error names file, line and key."""

from __future__ import annotations

import pytest

from uenvd.errors import ConfigError
from uenvd.publish.reframe.environments import TestEnvironment, parse_environments

CSCS = """\
default:
  features:
    - mpi
    - cuda
  cc: mpicc
  cxx: mpic++
  ftn: mpifort
  views: [default]
run:
  activation: ['. /user-environment/activate.sh', 'export X=1']
  extras: {gpus: 4, name: x, list: [1, 2]}
plain:
  features: [serial]
  uenv: false
nothing:
"""


def test_the_keys_of_cscs_and_ours() -> None:
    default, run, plain, nothing = parse_environments(CSCS, "reframe.yaml")
    assert default == TestEnvironment(
        "default", ("mpi", "cuda"), ("default",), cc="mpicc", cxx="mpic++", ftn="mpifort"
    )
    assert run.activation == (". /user-environment/activate.sh", "export X=1")
    assert run.extras == {"gpus": 4, "name": "x", "list": [1, 2]}
    assert run.features == ()
    assert (plain.uenv, default.uenv) == (False, True)
    assert nothing == TestEnvironment("nothing")
    assert parse_environments("", "f") == ()


def test_a_script_as_in_recipes_of_early_2024() -> None:
    (environment,) = parse_environments("a:\n  activation: /user-environment/activate.sh\n", "f")
    assert environment.activation == (". /user-environment/activate.sh",)


@pytest.mark.parametrize(
    ("text", "where", "hint"),
    [
        ("a:\n  fetures: [x]\n", "f:2: a.fetures: is no key", "features"),
        ("a:\n  features: {x: 1}\n", "f:2: a.features: must be a list", ""),
        ("a:\n  features: ['1x']\n", "f:2: a.features: '1x' is no feature", ""),
        ("a:\n\n  views: ['x y']\n", "f:3: a.views: 'x y' is no name of a view", ""),
        (
            "a:\n  activation: activate.sh\n",
            "f:2: a.activation: must be a list of shell commands",
            "a script",
        ),
        ("a:\n  uenv: maybe\n", "f:2: a.uenv: must be true or false", ""),
        ("a:\n  uenv: false\n  views: [x]\n", "f:3: a.views: an environment without a uenv", ""),
        ("a:\n  extras: [1]\n", "f:2: a.extras: must be a mapping", ""),
        ("a:\n  extras: {a-b: 1}\n", "f:2: a.extras: 'a-b' is no name", ""),
        ("1a: {}\n", "f:1: 1a: is no name of an environment", ""),
        ("a: {}\na: {}\n", "f:2: a: is given twice", ""),
        ("- a\n", "f:1: the file: must be a mapping", ""),
        ("a: [\n", "f:2: not valid YAML", ""),
    ],
)
def test_errors_name_file_line_and_key(text: str, where: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_environments(text, "f")
    assert where in caught.value.message
    assert hint in caught.value.hint
