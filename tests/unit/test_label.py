"""The label grammar: the reference implementation's cases, and ours."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from uenvd.errors import LabelError
from uenvd.label import (
    MAX_TEXT,
    Description,
    Label,
    ViewName,
    parse_description,
    parse_descriptions,
    parse_label,
    parse_namespaced_label,
    parse_views,
)

VECTORS = json.loads(Path(__file__).parent.joinpath("../vectors/labels/grammar.json").read_text())
DIGEST = "sha256:" + "0123456789abcdef" * 4

PARSERS: dict[str, Callable[[str], Any]] = {
    "label": parse_label,
    "namespaced": parse_namespaced_label,
    "descriptions": parse_descriptions,
    "views": parse_views,
}


def _expected(case: dict[str, Any]) -> object:
    if "views" in case:
        return tuple(ViewName(uenv, view) for uenv, view in case["views"])
    if "descriptions" in case:
        return tuple(
            Description(None if d["label"] is None else Label(**d["label"]), d["path"], d["mount"])
            for d in case["descriptions"]
        )
    return Label(**case["label"])


@pytest.mark.parametrize("case", VECTORS["valid"], ids=lambda case: f"{case['kind']}-{case['text']!r}")
def test_valid(case: dict[str, Any]) -> None:
    parse = PARSERS[case["kind"]]
    parsed = parse(case["text"])
    assert parsed == _expected(case)
    canonical = str(parsed) if isinstance(parsed, Label) else ",".join(map(str, parsed))
    assert canonical == case["canonical"]
    assert parse(canonical) == parsed


@pytest.mark.parametrize("case", VECTORS["invalid"], ids=lambda case: f"{case['kind']}-{case['text']!r}")
def test_invalid_says_why_and_points_there(case: dict[str, Any]) -> None:
    with pytest.raises(LabelError) as caught:
        PARSERS[case["kind"]](case["text"])
    why, echo, caret = caught.value.message.split("\n")
    assert case["says"] in why
    if len(case["text"]) <= 72:
        assert caret == "  " + " " * case["column"] + "^"
    else:  # only a part is echoed
        assert echo[caret.index("^") :][:1] == case["text"][case["column"] :][:1]
    assert echo.startswith("  ")
    assert echo.isprintable()
    assert caught.value.hint


def test_one_description_is_one() -> None:
    assert parse_description(" app/1:/mnt ") == Description(Label("app", "1"), None, "/mnt")
    with pytest.raises(LabelError, match="','"):
        parse_description("a,b")


def test_long_input_is_refused_and_echoed_in_part() -> None:
    with pytest.raises(LabelError) as caught:
        parse_label("a" * (MAX_TEXT + 1))
    assert len(caught.value.message) < 400
    _why, echo, caret = caught.value.message.split("\n")
    assert echo.startswith("  …a")
    assert len(caret) <= len(echo) + 1


def test_caret_stands_under_the_error_in_a_long_input() -> None:
    text = "x" * 500 + "+" + "y" * 500
    with pytest.raises(LabelError) as caught:
        parse_label(text)
    _why, echo, caret = caught.value.message.split("\n")
    assert echo[caret.index("^")] == "+"
    assert echo.endswith("…")


def test_wide_and_combining_characters_take_one_column_in_the_echo() -> None:
    with pytest.raises(LabelError) as caught:
        parse_label("世\u0301é\udcff+")
    assert caught.value.message.split("\n")[1] == "  ??é?+"


@pytest.mark.parametrize(
    "text", ["a," * 32768, "a" * 65536, "./" * 32768, "@" * 65536, " " * 65536, "a::" * 20000]
)
def test_parsing_takes_linear_time(text: str) -> None:
    start = time.process_time()
    for parse in (*PARSERS.values(), parse_description):
        try:
            parse(text)
        except LabelError:
            continue
    assert time.process_time() - start < 2.0


RECORD = Label("prgenv-gnu", "24.7", "v1", "santis", "a100", DIGEST, "deploy")


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("", True),
        ("prgenv-gnu", True),
        ("prgenv", False),
        ("prgenv-gnu/24.7:v1@santis%a100", True),
        ("prgenv-gnu/24", False),
        (":v2", False),
        ("@*", True),
        ("@daint", False),
        ("%zen2", False),
        (f"@{DIGEST}", True),
        ("@sha256:" + "0" * 64, False),
        ("deploy::", True),
        ("build::prgenv-gnu", False),
    ],
)
def test_matching(text: str, matches: bool) -> None:
    assert parse_namespaced_label(text).matches(RECORD) is matches


def test_matching_a_prefix_of_the_name_only() -> None:
    assert parse_label("prg").matches(RECORD, name_prefix=True)
    assert not parse_label("gnu").matches(RECORD, name_prefix=True)
    assert not parse_label("prg/24").matches(RECORD, name_prefix=True)
    assert not parse_label("a").matches(Label(), name_prefix=True)


def test_a_record_that_lacks_a_field_does_not_match_it() -> None:
    assert not Label("app", tag="v1").matches(Label("app"))
    assert Label("app", system="*").matches(Label("app"))


def test_short_ids() -> None:
    assert parse_label("0123456789abcdef").short_id == "0123456789abcdef"
    assert parse_label("0" * 64).short_id == "0" * 64
    assert parse_label("0123456789abcdef/1").short_id is None
    assert parse_label("prgenv-gnu").short_id is None
    assert parse_label("").short_id is None
