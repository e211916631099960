"""Translate the activation script of an early-2024 image (Stackinator 4) into environment operations. Pure; nothing is ever run.

Such a script is what ``spack env activate --sh`` printed where the image was built: mostly ``export NAME=value;`` lines. Understood are
``export`` and plain assignments and ``unset`` with the shell's quoting, and references ``$NAME``, ``${NAME}`` and ``${NAME:+text}``; any
other statement is left out, and so is an assignment whose value needs more of a shell.

How a value becomes an operation: of a path list (`LIST_VARIABLES`, or a value that refers to its own variable) what stands before the
variable's old value is prepended, what stands after it appended; a list without its old value is prepended too, as it froze the
builder's environment, and the system's own directories in it are dropped. ``SPACK_*`` variables are the builder's and skipped. Other
references become ``${@NAME@}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

LIST_VARIABLES = frozenset(
    {
        "ACLOCAL_PATH",
        "CMAKE_PREFIX_PATH",
        "CPATH",
        "C_INCLUDE_PATH",
        "CPLUS_INCLUDE_PATH",
        "INFOPATH",
        "LD_LIBRARY_PATH",
        "LIBRARY_PATH",
        "MANPATH",
        "MODULEPATH",
        "PATH",
        "PKG_CONFIG_PATH",
        "PYTHONPATH",
        "XDG_DATA_DIRS",
    }
)
SYSTEM_DIRECTORIES = frozenset(
    {"/bin", "/sbin", "/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin"}
)

MAX_STATEMENTS = 20_000

_SKIPPED = re.compile(r"SPACK_|(PWD|OLDPWD|SHLVL|HOME|USER|SHELL|PS1|IFS|_)\Z")
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_REFERENCE = re.compile(
    r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)(?::?\+([^{}$'\"`\\]*)(?:\$\{?([A-Za-z_][A-Za-z0-9_]*)\}?)?([^{}$'\"`\\]*))?\})"
)

_PARENTHESIS = re.compile(r"[()]")

_MARK = "\0"
"""Stands before and after the name of a reference inside a word; NUL cannot occur in a script's text otherwise (it is removed)."""


def script_ops(text: str) -> list[list[Any]]:
    """Return raw operations, ``[kind, variable, value]``, in the order of the script; they are not checked yet. Raises nothing."""
    ops: list[list[Any]] = []
    for words in _statements(text.replace(_MARK, "")):
        if words[0] == "export":
            words = words[1:]
        elif words[0] == "unset":
            if "-f" not in words:
                ops.extend(["unset", name] for name in words[1:] if name is not None and _wanted(name))
            continue
        elif not all(word is not None and _ASSIGNMENT.match(word) for word in words):
            continue
        for word in words:
            assignment = None if word is None else _ASSIGNMENT.match(word)
            if assignment and _wanted(assignment[1]):
                ops.extend(_assignment_ops(assignment[1], assignment[2]))
    return ops


def _wanted(name: str) -> bool:
    return _NAME.match(name) is not None and not _SKIPPED.match(name)


def _assignment_ops(name: str, value: str) -> Iterator[list[Any]]:
    itself = f"{_MARK}{name}{_MARK}"
    if name not in LIST_VARIABLES and itself not in value:
        yield ["set", name, _delayed(value)]
        return
    before, _, after = value.partition(itself)
    prepended, appended = _directories(before), _directories(after.replace(itself, ""))
    if prepended:
        yield ["prepend", name, prepended]
    if appended:
        yield ["append", name, appended]


def _directories(text: str) -> list[str]:
    elements = [_delayed(element) for element in text.split(":")]
    return [element for element in elements if element and element.rstrip("/") not in SYSTEM_DIRECTORIES]


def _delayed(text: str) -> str:
    """Turn marked references into ``${@NAME@}``."""
    parts = text.split(_MARK)
    return "".join(f"${{@{part}@}}" if index % 2 else part for index, part in enumerate(parts))


def _statements(text: str) -> Iterator[list[str | None]]:
    """Yield each simple command as its words; ``None`` stands for a word whose value only a shell could tell."""
    words: list[str | None] = []
    count = 0
    for item in _tokens(text):
        if item != "\n":
            words.append(item[1:] if item else None)
        elif words:
            count += 1
            if count > MAX_STATEMENTS:
                return
            yield words
            words = []
    if words:
        yield words


def _tokens(text: str) -> Iterator[str]:
    r"""Yield ``"\n"`` for the end of a command, ``""`` for a word that cannot be told and ``"=" + word`` for any other."""
    pos, end = 0, len(text)
    while pos < end:
        symbol = text[pos]
        if symbol in " \t\r":
            pos += 1
        elif symbol == "\\" and text[pos + 1 : pos + 2] == "\n":
            pos += 2
        elif symbol in "\n;&|(){}<>" and symbol not in "{}":
            yield "\n"
            pos += 1
        elif symbol == "#":
            newline = text.find("\n", pos)
            pos = end if newline < 0 else newline
        else:
            word, pos = _word(text, pos)
            yield "" if word is None else "=" + word


def _word(text: str, pos: int) -> tuple[str | None, int]:
    """Read one word with the shell's quoting. Returns it (``None`` when it cannot be told) and the position after it."""
    parts: list[str] = []
    known = True
    quoted = False
    end = len(text)
    while pos < end:
        symbol = text[pos]
        if symbol == '"':
            quoted = not quoted
            pos += 1
        elif symbol == "'" and not quoted:
            close = text.find("'", pos + 1)
            if close < 0:
                return None, end
            parts.append(text[pos + 1 : close])
            pos = close + 1
        elif symbol == "\\":
            escaped = text[pos + 1 : pos + 2]
            if escaped != "\n":
                parts.append(escaped if not quoted or escaped in '"\\$`' else symbol + escaped)
            pos += 2
        elif symbol == "$" and (reference := _REFERENCE.match(text, pos)):
            parts.append(_reference_text(reference))
            pos = reference.end()
        elif symbol == "`" or text.startswith("$(", pos):
            known = False
            pos = _substitution_end(text, pos)
        elif symbol == "$":
            known = known and text[pos + 1 : pos + 2] in ("", " ", "\t", "\n", '"', ":", "/")
            parts.append(symbol)
            pos += 1
        elif not quoted and symbol in " \t\r\n;&|()<>":
            break
        else:
            parts.append(symbol)
            pos += 1
    return ("".join(parts) if known and not quoted else None), pos


def _substitution_end(text: str, pos: int) -> int:
    """Return the position after the command substitution at `pos`; what it would run is of no interest."""
    if text[pos] == "`":
        close = text.find("`", pos + 1)
        return len(text) if close < 0 else close + 1
    depth = 0
    for found in _PARENTHESIS.finditer(text, pos):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def _reference_text(reference: re.Match[str]) -> str:
    """Return a reference with its name between marks; of ``${NAME:+a$NAME}`` the part after the ``+``, as if NAME were set."""
    plain, braced, lead, inner, trail = reference.groups()
    if plain or lead is None:
        return f"{_MARK}{plain or braced}{_MARK}"
    return lead + (f"{_MARK}{inner}{_MARK}" if inner else "") + trail
