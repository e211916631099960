"""Comments that start pipelines, and the allow-list of who may start which. Pure: text in, values out.

The grammar is that of CSCS's CI service; the first line counts, what follows is for people::

    comment   = "cscs-ci run" 1*SP pipeline *("," pipeline) *(";" KEY "=" VALUE)

None of ``, ; =`` can be part of a name or value. ``system``, ``uarch`` and ``uenv`` (``name:version`` or ``name/version``, or only a
name) choose cells; other keys are variables of the run, where the allow-list lets them through.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import yaml

from uenvd import yamlfile as y
from uenvd.errors import TriggerRefused, UsageError

COMMAND: Final = "cscs-ci run"
ALLOW_FILE: Final = ".uenvd-ci.yaml"
SELECTORS: Final = ("system", "uarch", "uenv")
MAX_LINE: Final = 4096
"""Characters of a comment's first line."""
EXAMPLE: Final = f"{COMMAND} alps;system=eiger;uarch=zen2;uenv=prgenv-gnu:23.11"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_UENV = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*([:/][A-Za-z0-9_][A-Za-z0-9_.-]*)?")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DIALECT: Final = y.Dialect(TriggerRefused, "docs/pipelines.md")


@dataclass(frozen=True)
class Comment:
    """What a comment asks for."""

    pipelines: tuple[str, ...]
    selectors: Mapping[str, str] = field(hash=False)
    """Of `SELECTORS`, those that were given; ``uenv`` as ``name/version`` or ``name``."""
    variables: Mapping[str, str] = field(hash=False)
    """The other keys."""


@dataclass(frozen=True)
class Pipeline:
    """A pipeline of the allow-list."""

    name: str
    users: frozenset[str]
    config: str
    """The site's configuration, relative to the allow-list."""
    variables: frozenset[str]
    """Further keys that a comment may give."""
    arguments: tuple[str, ...]
    """Of ``uenvd-publish run``."""


def parse_comment(text: str, command: str = COMMAND) -> Comment | None:
    """Parse a comment; None if it is no command. Raises `UsageError` for a command that does not follow the grammar."""
    lines = text.splitlines()
    line = lines[0].strip() if lines else ""
    words = command.split()
    match = re.match(r"\s+".join(re.escape(word) for word in words) + r"(\s+|$)", line)
    if match is None:
        return None
    if len(line) > MAX_LINE:
        raise UsageError(f"the comment's first line is longer than {MAX_LINE} characters")
    names, *assignments = line[match.end() :].split(";")
    pipelines = tuple(name.strip() for name in names.split(","))
    for name in pipelines:
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} is no name of a pipeline", hint=f"for example: {EXAMPLE}")
    values: dict[str, str] = {}
    for assignment in assignments:
        key, equals, value = (part.strip() for part in assignment.partition("="))
        if not equals or not _KEY.fullmatch(key) or not value or re.search(r"[,=]", value):
            raise UsageError(
                f"{assignment.strip()!r} is not KEY=VALUE, with none of , ; = in either",
                hint=f"for example: {EXAMPLE}",
            )
        if not value.isprintable():
            raise UsageError(f"the value of {key} has characters that cannot be printed")
        if key in values:
            raise UsageError(f"{key} is given twice")
        values[key] = value
    selectors: dict[str, str] = {key: values.pop(key) for key in SELECTORS if key in values}
    for key, value in selectors.items():
        if not (_UENV if key == "uenv" else _NAME).fullmatch(value):
            raise UsageError(f"{value!r} is no {key}", hint=f"for example: {EXAMPLE}")
    if "uenv" in selectors:
        selectors["uenv"] = selectors["uenv"].replace(":", "/")
    return Comment(tuple(dict.fromkeys(pipelines)), MappingProxyType(selectors), MappingProxyType(values))


def parse_allow_list(text: str, file: str) -> dict[str, Pipeline]:
    """Parse an allow-list. Raises `TriggerRefused` that names file, line and key: what cannot be read allows nothing."""
    document = y.Section(file, "", y.compose(text, file, _DIALECT), 1, _DIALECT)
    section = document.section("pipelines")
    document.end()
    found = {}
    for name in section:
        if not _NAME.fullmatch(name):
            section.fail(name, "is no name of a pipeline")
        body = section.section(name)
        found[name] = Pipeline(
            name,
            users=frozenset(body.need("users", lambda node: y.each(node, _user))),
            config=body.take("config", _file, "config.yaml"),
            variables=frozenset(body.take("variables", lambda node: y.each(node, _variable), None) or ()),
            arguments=body.take("arguments", y.texts, None) or (),
        )
        body.end()
    return found


def permit(comment: Comment, user: str, allowed: Mapping[str, Pipeline], where: str) -> list[Pipeline]:
    """Return the pipelines that a user's comment asks for. Raises `TriggerRefused` if any of it is not allowed: then nothing is started.

    ``where`` is the allow-list's name in messages. User names are compared exactly.
    """
    result = []
    for name in comment.pipelines:
        pipeline = allowed.get(name)
        if pipeline is None:
            raise TriggerRefused(
                f"there is no pipeline {name!r} in {where}",
                hint=f"there are: {', '.join(sorted(allowed)) or 'none'}",
            )
        if user not in pipeline.users:
            raise TriggerRefused(
                f"{user!r} may not start {name!r}: {where} does not list them",
                hint="somebody listed there can start it, or add the user on the base branch",
            )
        refused = sorted(set(comment.variables) - pipeline.variables)
        if refused:
            raise TriggerRefused(
                f"a comment may not set {', '.join(refused)} for {name!r}",
                hint=f"it may set: {', '.join([*SELECTORS, *sorted(pipeline.variables)])}",
            )
        result.append(pipeline)
    return result


def _user(node: yaml.Node) -> str:
    value = y.text(node)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*(\[bot\])?", value):
        raise ValueError(f"{value!r} is no name of a user (no patterns: each is listed)")
    return value


def _file(node: yaml.Node) -> str:
    value = y.text(node)
    if value.startswith("/") or ".." in value.split("/"):
        raise ValueError(f"{value!r} is no file of the repository")
    return value


def _variable(node: yaml.Node) -> str:
    value = y.text(node)
    # A comment must not decide which programs and libraries the run uses.
    if not _KEY.fullmatch(value) or re.match(
        r"(PATH|HOME|SHELL|ENV|BASH_ENV|IFS|LD_|PYTHON|GIT_|UENVD_)", value
    ):
        raise ValueError(f"{value!r} cannot be left to a comment")
    return value
