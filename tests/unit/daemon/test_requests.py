"""Views of a request: what is named, else the default, else, with "none", nothing at all."""

from __future__ import annotations

import pytest

from uenvd.daemon import requests
from uenvd.daemon.requests import Wanted
from uenvd.errors import UnknownView
from uenvd.label import ViewName, parse_descriptions
from uenvd.views import RESTORE, ImageMeta, View

META = ImageMeta(
    "app",
    "",
    "/user-environment",
    "default",
    (View("default", "", (("set", "D", "1"),)), View("none", "", (("set", "N", "1"),))),
)
(DESCRIPTION,) = parse_descriptions("/x/app.squashfs")


def _applied(text: str | None) -> tuple[list[str], str]:
    wanted = Wanted(DESCRIPTION, None, "/x/app.squashfs")
    ops, key = requests.environment([wanted], [META], requests.wanted_views(text))
    return [op[1] for op in ops if op[1] != RESTORE], key


@pytest.mark.parametrize("text", [None, "", "  "])
def test_default_view_where_none_is_named(text: str | None) -> None:
    assert _applied(text) == (["D"], "/x/app.squashfs[default]")


@pytest.mark.parametrize("text", ["none", " none "])
def test_opting_out(text: str) -> None:
    assert requests.wanted_views(text) is None
    assert _applied(text) == ([], "/x/app.squashfs[]")


def test_view_that_is_really_called_so() -> None:
    assert requests.wanted_views("app:none") == (ViewName("app", "none"),)
    assert _applied("app:none") == (["N"], "/x/app.squashfs[none]")


def test_unknown_view() -> None:
    with pytest.raises(UnknownView):
        _applied("other")
