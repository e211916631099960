"""Command lines: options in any order, then a verbatim rest. No argparse: importing it costs as much as all the rest of a fast command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from uenvd.errors import UsageError

FLAG = False
VALUE = True

COMMON: Mapping[str, bool] = {"--help": FLAG, "--socket": VALUE}
"""Options of every command."""
SHORT: Mapping[str, str] = {"-h": "--help", "-v": "--view"}


class Arguments(NamedTuple):
    """A parsed command line: ``flags`` that were given, ``values`` of options, ``words`` and the verbatim ``rest``."""

    flags: frozenset[str]
    values: Mapping[str, str]
    words: tuple[str, ...]
    rest: tuple[str, ...]


def parse(
    argv: Sequence[str],
    *,
    command: str,
    options: Mapping[str, bool],
    words: tuple[int, int] = (0, 0),
    rest: bool = False,
) -> Arguments:
    """Parse the arguments of a command.

    Args:
        argv: the arguments after the command's name.
        command: the command's name, for messages.
        options: long names -> `VALUE` or `FLAG`; `COMMON` ones are added. ``--name=value`` and ``--name value`` are the same.
        words: how many arguments that are no options there must and may be.
        rest: whether everything from the argument after the last word on belongs to somebody else.

    Raises:
        UsageError: something is unknown, missing or too much. Not raised when ``--help`` is there.

    """
    known = {**COMMON, **options}
    hint = f"see: uenvctl {command} --help" if command else "see: uenvctl --help"
    flags: set[str] = set()
    values: dict[str, str] = {}
    found: list[str] = []
    index = 0
    while index < len(argv):
        word = argv[index]
        index += 1
        if word == "--":
            if not rest:
                found.extend(argv[index:])
                index = len(argv)
            break
        if word == "-" or not word.startswith("-"):
            if rest and len(found) == words[1]:
                index -= 1
                break
            found.append(word)
            continue
        name, equals, value = word.partition("=")
        name = SHORT.get(name, name)
        if name not in known:
            raise UsageError(f"unknown option {name}{_suggestion(name, known)}", hint=hint)
        if known[name] is FLAG:
            if equals:
                raise UsageError(f"{name} takes no value", hint=hint)
            flags.add(name)
            continue
        if not equals:
            if index == len(argv):
                raise UsageError(f"{name} needs a value", hint=hint)
            value = argv[index]
            index += 1
        values[name] = value
    if "--help" not in flags:
        if len(found) < words[0]:
            raise UsageError("too few arguments", hint=hint)
        if len(found) > words[1]:
            raise UsageError(f"one argument too many: {found[words[1]]}", hint=hint)
    return Arguments(frozenset(flags), values, tuple(found), tuple(argv[index:]) if rest else ())


def _suggestion(name: str, known: Mapping[str, bool]) -> str:
    import difflib  # only for an error

    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]}?" if near else ""
