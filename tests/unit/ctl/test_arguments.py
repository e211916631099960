"""Command lines."""

from __future__ import annotations

import pytest

from uenvd.ctl.arguments import FLAG, VALUE, Arguments, parse
from uenvd.errors import UsageError

OPTIONS = {"--view": VALUE, "--json": FLAG}


def _parse(*argv: str, words: tuple[int, int] = (1, 1), rest: bool = False) -> Arguments:
    return parse(argv, command="run", options=OPTIONS, words=words, rest=rest)


def test_options_in_any_order_and_both_forms() -> None:
    for argv in (
        ["--view", "v", "--json", "X"],
        ["X", "--json", "--view=v"],
        ["-v", "v", "X", "--json"],
        ["-v=v", "--json", "X"],
    ):
        assert _parse(*argv) == Arguments(frozenset({"--json"}), {"--view": "v"}, ("X",), ())


def test_the_last_value_counts_and_may_be_empty_or_look_like_an_option() -> None:
    assert _parse("X", "--view", "a", "--view=b").values == {"--view": "b"}
    assert _parse("X", "--view=").values == {"--view": ""}
    assert _parse("X", "--view", "--json").values == {"--view": "--json"}
    assert _parse("X", "--view=a=b").values == {"--view": "a=b"}


@pytest.mark.parametrize(
    ("argv", "rest"),
    [
        (["X", "cmd", "--view", "-x"], ("cmd", "--view", "-x")),
        (["X", "--", "cmd", "--", "x"], ("cmd", "--", "x")),
        (["X", "--view", "v", "cmd", "--json"], ("cmd", "--json")),
        (["X", "--", "--view"], ("--view",)),
        (["X", "-", "a"], ("-", "a")),
        (["X", "", "a"], ("", "a")),
        (["X"], ()),
        (["X", "--"], ()),
    ],
)
def test_what_belongs_to_the_command_is_left_alone(argv: list[str], rest: tuple[str, ...]) -> None:
    arguments = _parse(*argv, rest=True)
    assert arguments.words == ("X",)
    assert arguments.rest == rest


def test_after_two_dashes_everything_is_a_word() -> None:
    assert _parse("--", "--json").words == ("--json",)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "too few"),
        (["X", "Y"], "one argument too many: Y"),
        (["X", "--vew=v"], "unknown option --vew, did you mean --view?"),
        (["X", "-q"], "unknown option -q"),
        (["X", "--view"], "--view needs a value"),
        (["X", "--json=1"], "--json takes no value"),
    ],
)
def test_slips(argv: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        _parse(*argv)
    assert caught.value.hint == "see: uenvctl run --help"


def test_help_needs_nothing_else() -> None:
    assert "--help" in _parse("-h").flags
    assert "--help" in _parse("a", "b", "--help").flags
