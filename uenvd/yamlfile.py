"""YAML documents read key by key: every error names file, line and key, and a key that nobody asked for is an error.

A misspelt key that is silently ignored is worse than a program that does not start. Used for uenvd's configuration and for recipes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

import yaml

from uenvd.errors import ConfigError, UenvError

T = TypeVar("T")


class BadItem(ValueError):
    """One item of a list cannot be converted; ``line`` says which."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class Dialect(NamedTuple):
    """What the readers of one kind of file share."""

    error: type[UenvError] = ConfigError
    """The class of every error."""
    manual: str = "docs/admin.md"
    """Where the keys are described."""


def compose(text: str, name: str, dialect: Dialect) -> yaml.Node | None:
    """Parse a text into nodes, which know their lines; None for an empty document. Raises the dialect's error."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise dialect.error(f"{name}:{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise dialect.error(f"{name}:1: not valid YAML: {error}") from error


class Section:
    """A mapping of the document, read key by key; `end` refuses what was not read.

    Args:
        file: the file's name for messages.
        prefix: the keys that lead here, each followed by a dot.
        node: what stands here; None or nothing is an empty mapping.
        line: where this section begins, from 1.
        dialect: see there.

    """

    def __init__(
        self, file: str, prefix: str, node: yaml.Node | None, line: int = 1, dialect: Dialect | None = None
    ) -> None:
        self._dialect = dialect or Dialect()
        self.file = file
        self.prefix = prefix
        self.line = line
        self._values: dict[str, yaml.Node] = {}
        self._lines: dict[str, int] = {}
        self._known: set[str] = set()
        if node is None or is_null(node):
            return
        if not isinstance(node, yaml.MappingNode):
            raise self._dialect.error(
                f"{file}:{line}: {prefix.rstrip('.') or 'the file'}: must be a mapping of keys to values"
            )
        for key_node, value_node in node.value:
            key = str(key_node.value)
            key_line = key_node.start_mark.line + 1
            if key in self._values:
                raise self._dialect.error(
                    f"{file}:{key_line}: {prefix}{key}: is given twice (first in line {self._lines[key]})"
                )
            self._values[key] = value_node
            self._lines[key] = key_line

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def line_of(self, key: str) -> int:
        """Return the line of a key, or of the section if it has none such."""
        return self._lines.get(key, self.line)

    def fail(self, key: str, problem: str, *, hint: str | None = None, line: int | None = None) -> NoReturn:
        """Raise the dialect's error about a key."""
        raise self._dialect.error(
            f"{self.file}:{line or self.line_of(key)}: {self.prefix}{key}: {problem}", hint=hint
        )

    def node(self, key: str) -> yaml.Node | None:
        """Return the value of a key, which is known from now on; None if it is not there."""
        self._known.add(key)
        return self._values.get(key)

    def section(self, key: str) -> Section:
        """Return the mapping under a key, empty if it is not there."""
        return Section(self.file, f"{self.prefix}{key}.", self.node(key), self.line_of(key), self._dialect)

    def part(self, name: str, node: yaml.Node) -> Section:
        """Return a mapping that is an item of a list of this section; ``name`` is what messages call it."""
        return Section(self.file, f"{self.prefix}{name}.", node, line_of(node), self._dialect)

    def take(self, key: str, convert: Callable[[yaml.Node], T], default: T | None) -> T:
        """Return a converted value, or the default. A ValueError of the conversion becomes the dialect's error."""
        node = self.node(key)
        if node is None:
            return default  # type: ignore[return-value]  # None only where T admits it
        try:
            return convert(node)
        except BadItem as error:
            self.fail(key, str(error), line=error.line)
        except ValueError as error:
            self.fail(key, str(error))

    def need(self, key: str, convert: Callable[[yaml.Node], T]) -> T:
        """Return a converted value that must be there."""
        if self.node(key) is None:
            self.fail(key, "is missing")
        return self.take(key, convert, None)

    def end(self) -> None:
        """Refuse keys that were not read."""
        for key in self._values:
            if key not in self._known:
                near = difflib.get_close_matches(key, self._known, n=1)
                self.fail(
                    key,
                    "is no key that uenvd knows",
                    hint=f"did you mean {near[0]!r}?" if near else f"see {self._dialect.manual}",
                )


def is_null(node: yaml.Node) -> bool:
    """Tell whether a value is YAML's null (also when nothing was written)."""
    return isinstance(node, yaml.ScalarNode) and (node.value == "" or node.tag == "tag:yaml.org,2002:null")


def line_of(node: yaml.Node) -> int:
    """Return the line of a node, from 1."""
    return int(node.start_mark.line) + 1


def text(node: yaml.Node) -> str:
    """Convert a scalar. This and all further conversions raise ValueError."""
    if not isinstance(node, yaml.ScalarNode) or not node.value:
        raise ValueError("must be a text")
    return str(node.value)


def word(node: yaml.Node) -> str:
    """Convert a name that can be part of a label or a file name."""
    value = text(node)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", value):
        raise ValueError(f"{value!r} is no name (letters, digits, '_', '.', '-')")
    return value


def items(node: yaml.Node) -> list[yaml.Node]:
    """Return the nodes of a list; a scalar is a list of one."""
    if isinstance(node, yaml.ScalarNode):
        return [node]
    if not isinstance(node, yaml.SequenceNode):
        raise ValueError("must be a list")  # noqa: TRY004  # a wrong value of the document, not of our caller
    return list(node.value)


def each(node: yaml.Node, convert: Callable[[yaml.Node], T]) -> tuple[T, ...]:
    """Convert every item of a list; an error is about the line of the item."""
    found = []
    for item in items(node):
        try:
            found.append(convert(item))
        except ValueError as error:
            raise BadItem(str(error), line_of(item)) from error
    return tuple(found)


def words(node: yaml.Node) -> tuple[str, ...]:
    """Convert a list of names."""
    return each(node, word)


def texts(node: yaml.Node) -> tuple[str, ...]:
    """Convert a list of texts."""
    return each(node, text)


def word_map(node: yaml.Node) -> dict[str, str]:
    """Convert a mapping of names to names."""
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("must be a mapping of names to names")  # noqa: TRY004
    return {word(key): word(value) for key, value in node.value}


def truth(node: yaml.Node) -> bool:
    """Convert a YAML boolean."""
    if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:bool":
        raise ValueError("must be true or false")
    return str(node.value).lower() in {"true", "yes", "on"}


def path(node: yaml.Node) -> Path:
    """Convert an absolute path."""
    value = text(node)
    if not value.startswith("/"):
        raise ValueError(f"{value!r} is no absolute path")
    return Path(value)


def paths(node: yaml.Node) -> tuple[str, ...]:
    """Convert a list of absolute paths."""
    return tuple(str(path(item)) for item in items(node))


def seconds(node: yaml.Node) -> float:
    """Convert a duration."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)?", text(node))
    if not match:
        raise ValueError(f"{node.value!r} is no duration (for example 60s, 500ms, 5m)")
    return float(match[1]) * {None: 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}[match[2]]


def size(node: yaml.Node) -> int:
    """Convert a size in bytes."""
    match = re.fullmatch(r"(\d+)\s*(KiB|MiB|GiB|TiB|B)?", text(node))
    if not match:
        raise ValueError(f"{node.value!r} is no size (for example 64MiB, 20GiB)")
    return int(match[1]) << {None: 0, "B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}[match[2]]


def count(node: yaml.Node) -> int:
    """Convert a number from 1 up."""
    value = text(node)
    if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) < 1:
        raise ValueError(f"{value!r} is no number from 1 up")
    return int(value)
