"""meta/env.json of a recipe: read back by our own reader, it does what the recipe says."""

from __future__ import annotations

import json
from pathlib import Path

from uenvd.publish.build.metadata import activation_script, env_json, prefix_directories
from uenvd.publish.recipe import Environment, PythonBuild, Recipe, View
from uenvd.views import read_image_meta

ROOT = "/user-environment/env/default"


def recipe() -> Recipe:
    views = (
        View("default", 1, "run"),
        View(
            "develop",
            2,
            "it's for those who compile",
            prefix_paths=(("CPATH", ("include", "missing")), ("CMAKE_PREFIX_PATH", (".",))),
            set=(("MPI_HOME", "$@view_path@"), ("GONE", None), ("WHO", "$@view_name@'s")),
            prepend=(("PATH", "$@mount@/tools"),),
            append=(("MANPATH", "$@mount@/man"),),
        ),
    )
    return Recipe(
        Path("/r/sci/1"), "sci", "1", "python", "", "/user-environment", "for tests", "develop", (),
        (Environment("sci", 1, (), views=views),), (), PythonBuild(),
    )  # fmt: skip


def test_env_json_is_what_the_reader_understands() -> None:
    existing = {place: not place.endswith("missing") for place in prefix_directories(recipe())}
    document = json.dumps(env_json(recipe(), existing)).encode()
    meta = read_image_meta(lambda name: document if name == b"meta/env.json" else None)
    assert meta is not None
    assert (meta.name, meta.mount, meta.default_view) == ("sci", "/user-environment", "develop")
    ops = {view.name: list(view.ops) for view in meta.views}
    assert sorted(ops["default"]) == [("prepend", "PATH", (f"{ROOT}/bin",)), ("unset", "PYTHONHOME")]
    assert ("prepend", "CPATH", (f"{ROOT}/include",)) in ops["develop"]
    assert ("prepend", "CMAKE_PREFIX_PATH", (ROOT,)) in ops["develop"]
    assert ("append", "MANPATH", ("/user-environment/man",)) in ops["develop"]
    assert ("set", "MPI_HOME", ROOT) in ops["develop"]
    assert ("set", "WHO", "develop's") in ops["develop"]
    assert ("unset", "GONE") in ops["develop"]


def test_activation_script_for_users_of_stock_tools() -> None:
    script = activation_script(env_json(recipe())["views"]["develop"])
    assert f"export CMAKE_PREFIX_PATH={ROOT}${{CMAKE_PREFIX_PATH:+:$CMAKE_PREFIX_PATH}}\n" in script
    assert "export MANPATH=${MANPATH:+$MANPATH:}/user-environment/man\n" in script
    assert "unset GONE\n" in script
    assert "export WHO='develop'\\''s'\n" in script
