"""Arbitrary text: a parser answers or raises `LabelError`, and what it accepts it formats so that it reads the same again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uenvd.errors import LabelError
from uenvd.label import (
    parse_description,
    parse_descriptions,
    parse_label,
    parse_namespaced_label,
    parse_views,
)

PARSERS: list[Callable[[str], Any]] = [
    parse_label,
    parse_namespaced_label,
    parse_description,
    parse_descriptions,
    parse_views,
]
HEX = "0123456789abcdef" * 4

near_labels = st.lists(
    st.sampled_from(
        [
            "a",
            "x.y",
            "-",
            "_",
            "/",
            ":",
            "::",
            "@",
            "%",
            "*",
            ",",
            " ",
            ".",
            "./",
            "/mnt",
            "@sha256:",
            "@sha256:" + HEX,
            HEX,
            "24.7",
            "+",
            "é",
            "\0",
            "\udcff",
        ]
    ),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("parse", PARSERS, ids=lambda parse: parse.__name__)
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(text=st.one_of(near_labels, st.text(max_size=200)))
def test_any_text(parse: Callable[[str], Any], text: str) -> None:
    try:
        parsed = parse(text)
    except LabelError as error:
        why, echo, caret = error.message.split("\n")
        assert why
        assert len(caret) <= len(echo) + 1
        assert echo.strip("?").isprintable()
        return
    listed = parsed if parse in (parse_descriptions, parse_views) else (parsed,)
    assert parse(",".join(map(str, listed))) == parsed
