"""Metadata of images -> views -> the changed environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uenvd import views
from uenvd.errors import UnknownView
from uenvd.label import Label, ViewName, parse_label
from uenvd.views import (
    APPLIED,
    MAX_RESTORE_CHARS,
    RESTORE,
    EnvOp,
    ImageMeta,
    Selected,
    View,
    applied_key,
    applied_views,
    apply_ops,
    clean_mount,
    ops_from_wire,
    ops_to_wire,
    read_image_meta,
    restore_op,
    select_views,
    view_ops,
    with_restore,
)

VECTORS = Path(__file__).parent / "../vectors/views"
APPLY = json.loads((VECTORS / "apply.json").read_text())
META = json.loads((VECTORS / "meta.json").read_text())


@pytest.mark.parametrize("case", APPLY, ids=lambda case: case["name"])
def test_apply(case: dict[str, Any]) -> None:
    ops = ops_from_wire(case["ops"])
    assert apply_ops(ops, case["applied"], case["environ"]) == case["expect"]
    assert ops_to_wire(ops) == case["ops"]


@pytest.mark.parametrize("case", APPLY, ids=lambda case: case["name"])
def test_applying_twice_changes_nothing_more(case: dict[str, Any]) -> None:
    if case["name"] == "unset, then append":
        return  # the second time the unset is not repeated, and the element is there
    ops = ops_from_wire(case["ops"])
    scratch = {
        op[1] for op in ops if op[0] == "unset"
    }  # what a case builds up and takes away again is not idempotent
    environ = {**case["environ"], **case["expect"]}
    environ = {name: value for name, value in environ.items() if value is not None}
    again = apply_ops(ops, case["applied"], environ)
    lists = {op[1] for op in ops if op[0] in ("prepend", "append")}
    if scratch:
        assert set(again) <= lists
    else:
        assert again == {}


def test_there_are_enough_vectors() -> None:
    assert len(APPLY) >= 40
    assert len({case["name"] for case in APPLY}) == len(APPLY)


def test_undecodable_bytes_of_the_environment_survive() -> None:
    environ = {"PATH": "/bin:/\udcff", "X": "\udcfe"}
    changes = apply_ops([("prepend", "PATH", ("/a",)), ("set", "Y", "${@X@}")], "k", environ)
    assert changes == {"PATH": "/a:/bin:/\udcff", "Y": "\udcfe", "UENV_APPLIED": "k"}


# --- metadata -----------------------------------------------------------------------------------------------------------------------


def _reader(files: dict[str, Any]) -> Any:
    contents = {
        name.encode(): (
            value
            if isinstance(value, bytes)
            else value.encode()
            if isinstance(value, str)
            else json.dumps(value).encode()
        )
        for name, value in files.items()
    }
    return contents.get


@pytest.mark.parametrize("case", META, ids=lambda case: case["name"])
def test_read_image_meta(case: dict[str, Any]) -> None:
    meta = read_image_meta(_reader(case["files"]))
    assert (None if meta is None else meta.to_wire()) == case["expect"]
    if meta is not None:
        assert ImageMeta.from_wire(json.loads(json.dumps(meta.to_wire()))) == meta


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 200_000, b"{}" + b" " * (1 << 20), b"1e999"],
    ids=["empty", "cut", "array", "null", "string", "binary", "deep", "long", "number"],
)
def test_damaged_metadata_counts_as_none(content: bytes) -> None:
    assert read_image_meta(_reader({"meta/env.json": content})) is None


def test_views_and_operations_are_bounded() -> None:
    doc = {"views": {f"v{i}": {"env": {"values": {"scalar": {"X": "1"}}}} for i in range(2000)}}
    meta = read_image_meta(_reader({"meta/env.json": doc}))
    assert meta is not None
    assert len(meta.views) == 1000
    doc = {"views": {n: {"env": {"values": {"scalar": {f"X{i}": "1" for i in range(6000)}}}} for n in "ab"}}
    meta = read_image_meta(_reader({"meta/env.json": doc}))
    assert meta is not None
    assert [view.loadable for view in meta.views] == [True, False]
    assert ImageMeta.from_wire(meta.to_wire()) == meta


def test_only_files_of_the_image_are_read() -> None:
    asked: list[bytes] = []

    def read(path: bytes) -> bytes | None:
        asked.append(path)
        doc = {
            "mount": "/m",
            "views": {
                "v": {"activate": "/etc/passwd"},
                "w": {"activate": "/m/../etc/passwd"},
                "x": {"activate": 3},
            },
        }
        return json.dumps(doc).encode() if path == b"meta/env.json" else None

    meta = read_image_meta(read)
    assert meta is not None
    assert [view.loadable for view in meta.views] == [False] * 3
    assert asked == [b"meta/env.json", b"env/v/activate.sh", b"env/w/activate.sh", b"env/x/activate.sh"]


@pytest.mark.parametrize(
    ("path", "clean"),
    [
        ("/user-environment", "/user-environment"),
        ("//a///b/./c/", "/a/b/c"),
        ("/", None),
        ("", None),
        ("a", None),
        ("./a", None),
        ("/a/../b", None),
        ("/a\0b", None),
        ("/a\ud800", None),
        (None, None),
        (3, None),
        ("/" + "a" * 5000, None),
    ],
)
def test_clean_mount(path: object, clean: str | None) -> None:
    assert clean_mount(path) == clean


# --- the wire -----------------------------------------------------------------------------------------------------------------------

WIRE = ImageMeta(
    "n", "d", "/m", "v", (View("v", "", (("set", "A", "1"), ("unset", "B"), ("append", "L", ("x",)))),)
).to_wire()


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3},
        {"name": "x" * 1000},
        {"name": "a\0"},
        {"name": "\ud800"},
        {"mount": "relative"},
        {"mount": "/a/../b"},
        {"mount": 3},
        {"default_view": 3},
        {"views": {}},
        {"views": [3]},
        {"views": [{}]},
        {"views": [{"name": "v", "description": "", "loadable": 1, "ops": []}]},
        {"views": [{"name": "v", "description": "", "loadable": True, "ops": {}}]},
        {"views": [{"name": "v", "description": "", "loadable": True, "ops": []}] * 1001},
        {"views": [{"name": "v", "description": "", "loadable": True, "ops": [["unset", "X"]] * 6000}] * 2},
    ],
    ids=str,
)
def test_malformed_metadata_on_the_wire(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        ImageMeta.from_wire({**WIRE, **change})


@pytest.mark.parametrize("missing", sorted(WIRE))
def test_missing_metadata_on_the_wire(missing: str) -> None:
    with pytest.raises(KeyError):
        ImageMeta.from_wire({name: value for name, value in WIRE.items() if name != missing})


@pytest.mark.parametrize(
    "ops",
    [
        None,
        {},
        "x",
        [3],
        [[]],
        [["set"]],
        [["set", "A"]],
        [["set", "A", "1", "2"]],
        [["set", "A", ["1"]]],
        [["set", "A", None]],
        [["set", "", "1"]],
        [["set", "A=B", "1"]],
        [["set", "A\0", "1"]],
        [["set", "A", "\0"]],
        [["set", "A", "\ud800"]],
        [["set", "A" * 257, "1"]],
        [["set", "A", "x" * 131_072]],
        [["unset"]],
        [["unset", "A", "B"]],
        [["unset", 3]],
        [["prepend", "A", "x"]],
        [["prepend", "A", [3]]],
        [["assign", "A", None]],
        [["assign", "A", ["x"] * 10_001]],
        [["remove", "A", ["x"]]],
        [[None, "A", "x"]],
        [[["set"], "A", "x"]],
        [["set", "A", "1"]] * 10_001,
    ],
    ids=lambda ops: str(ops)[:40],
)
def test_malformed_operations(ops: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        ops_from_wire(ops)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["set", "env", "views", "/m"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "name",
                    "mount",
                    "views",
                    "default-view",
                    "default_view",
                    "env",
                    "values",
                    "list",
                    "scalar",
                    "op",
                    "value",
                    "activate",
                    "root",
                    "ops",
                    "description",
                    "loadable",
                    "X",
                ]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=25,
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(value=json_values, script=st.text(max_size=80))
def test_any_metadata_is_read_or_left_out(value: Any, script: str) -> None:
    def read(path: bytes) -> bytes | None:
        return json.dumps(value).encode() if path == b"meta/env.json" else script.encode(errors="replace")

    meta = read_image_meta(read)
    if meta is not None:
        assert ImageMeta.from_wire(meta.to_wire()) == meta
    for parse in (ImageMeta.from_wire, ops_from_wire):
        try:
            parse(value)
        except (ValueError, TypeError, KeyError):
            continue


# --- choosing -----------------------------------------------------------------------------------------------------------------------


def _meta(name: str, *view_names: str, default: str | None = None) -> ImageMeta:
    return ImageMeta(
        name, "", "/m", default, tuple(View(v, "", (("set", f"{name}_{v}", "1"),)) for v in view_names)
    )


APP = (parse_label("app/42:v1"), _meta("app", "default", "modules", default="default"))
TOOL = (parse_label("tools/17"), _meta("tool", "default", "tool"))
BARE = (None, None)


def _chosen(
    images: list[tuple[Label | None, ImageMeta | None]], *wanted: str, use_default: bool = True
) -> list[str]:
    names = [ViewName(*name.split(":")) if ":" in name else ViewName(None, name) for name in wanted]
    return [f"{one.image}:{one.view.name}" for one in select_views(images, names, use_default)]


def test_views_are_found_by_label_and_by_metadata_name() -> None:
    assert _chosen([APP, TOOL], "tool") == ["0:default", "1:tool"]
    assert _chosen([APP, TOOL], "tools:default", "app:modules") == ["1:default", "0:modules"]
    assert _chosen([APP, TOOL], "tool:default", use_default=False) == ["1:default"]
    assert _chosen([BARE, TOOL], "default") == ["1:default"]


def test_default_view_only_where_none_was_chosen() -> None:
    assert _chosen([APP]) == ["0:default"]
    assert _chosen([APP], "modules") == ["0:modules"]
    assert _chosen([APP], use_default=False) == []
    assert _chosen([TOOL]) == []


def test_a_view_named_twice_is_applied_once() -> None:
    assert _chosen([APP], "modules", "app:modules") == ["0:modules"]


def test_unknown_view_lists_what_there_is() -> None:
    with pytest.raises(UnknownView, match="no view 'wombat:tool'") as caught:
        _chosen([APP, TOOL], "wombat:tool")
    assert caught.value.hint == "available views: app:default, app:modules, tools:default, tools:tool"
    with pytest.raises(UnknownView) as caught:
        _chosen([BARE], "x")
    assert caught.value.hint == "the image has no views"
    with pytest.raises(UnknownView) as caught:
        _chosen([BARE, BARE], "x")
    assert caught.value.hint == "none of the images has views"


def test_a_long_list_of_views_is_cut() -> None:
    with pytest.raises(UnknownView) as caught:
        _chosen([(None, _meta("n", *(f"v{i}" for i in range(100))))], "x")
    assert caught.value.hint.endswith("n:v39 and 60 more")


def test_ambiguous_view_names_the_rivals() -> None:
    with pytest.raises(UnknownView, match="ambiguous: app:default, tools:default") as caught:
        _chosen([APP, TOOL], "default")
    assert "uenv:view" in caught.value.hint


def test_a_view_without_environment_cannot_be_chosen() -> None:
    image = (None, ImageMeta("old", "", "/m", "v", (View("v", "", (), loadable=False),)))
    with pytest.raises(UnknownView, match="cannot be loaded"):
        _chosen([image], "v")
    assert _chosen([image]) == []


def test_operations_in_order_and_the_key() -> None:
    chosen = select_views([APP, TOOL], [ViewName(None, "tool"), ViewName("app", "modules")], use_default=True)
    assert view_ops(chosen) == [("set", "tool_tool", "1"), ("set", "app_modules", "1")]
    key = applied_key(["sha256:aa", "/x.squashfs@1.2"], chosen)
    assert key == "sha256:aa[modules];/x.squashfs@1.2[tool]"
    assert applied_views(key) == [("sha256:aa", ("modules",)), ("/x.squashfs@1.2", ("tool",))]


def test_keys_differ_with_images_views_and_order() -> None:
    view_a, view_b = View("a", "", ()), View("b", "", ())
    keys = {
        applied_key(["x"], []),
        applied_key(["y"], []),
        applied_key(["x", "y"], []),
        applied_key(["x"], [Selected(0, view_a)]),
        applied_key(["x"], [Selected(0, view_a), Selected(0, view_b)]),
        applied_key(["x"], [Selected(0, view_b), Selected(0, view_a)]),
    }
    assert len(keys) == 6


@pytest.mark.parametrize("key", ["", ";", "x", "x]", "[", "x[a", "x[]y"])
def test_a_foreign_key_tells_no_views(key: str) -> None:
    assert applied_views(key) == []


def test_pure() -> None:
    assert "os" not in vars(views)


# --- what a login shell puts back ---------------------------------------------------------------------------------------------------


def test_lists_are_put_back_and_scalars_are_not() -> None:
    ops: list[EnvOp] = [
        ("set", "S", "1"),
        ("prepend", "PATH", ("/a", "/b c")),
        ("unset", "U"),
        ("append", "PATH", ("/z:/y",)),
        ("assign", "L", ("x",)),
        ("prepend", "MANPATH", ("${@HOME@}/man",)),
    ]
    assert restore_op(ops) == ("set", RESTORE, "PATH=/a:/b c|PATH+=/z:/y|MANPATH=${@HOME@}/man")
    assert with_restore(ops) == [*ops, restore_op(ops)]
    assert with_restore(with_restore(ops)) == with_restore(ops)


def test_nothing_to_put_back_clears_what_an_outer_image_left() -> None:
    for ops in (
        [],
        [("set", "S", "1")],
        [("prepend", "BAD-NAME", ("/a",))],
        [("append", "P", ("a|b", "c\nd", ""))],
    ):
        assert restore_op(ops) == ("unset", RESTORE)
    assert apply_ops(with_restore([]), "k", {RESTORE: "PATH=/old"}) == {RESTORE: None, APPLIED: "k"}


def test_what_would_burden_every_process_is_left_out() -> None:
    assert restore_op([("prepend", "P", ("x" * MAX_RESTORE_CHARS,))]) == ("unset", RESTORE)


def test_references_are_replaced_when_it_is_applied() -> None:
    changed = apply_ops(with_restore([("prepend", "P", ("${@HOME@}/p",))]), "k", {"HOME": "/home/me"})
    assert changed[RESTORE] == "P=/home/me/p"
