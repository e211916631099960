"""What a shell offers at TAB: ``uenvctl __complete SHELL ...``, called by the scripts of ``uenvctl completion``.

The answer's first line says what the rest is: ``words``; ``part`` (words after which no space is wanted); ``files`` or ``command``, which the
shell completes itself. Then one candidate a line, for zsh and fish with a tab and a description. Nothing is ever asked of the registry: labels
are those that uenvd remembers. Whatever goes wrong, the answer is no candidates: a TAB is no place for an error.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from uenvd.ctl.arguments import COMMON, FLAG, SHORT
from uenvd.ctl.image_inspect import inspect_file
from uenvd.ctl.main import COMMANDS, GROUPS, HELP
from uenvd.ctl.output import printable
from uenvd.ctl.own import as_file
from uenvd.ctl.own import records as own_records
from uenvd.errors import UenvError
from uenvd.label import parse_description
from uenvd.own import NAMESPACE

CONNECT_S = 0.3
ANSWER_S = 1.0
FRESH_S = 60.0
"""An answer older than this is asked for anew, for the next TAB; nobody waits for it."""

_FILE_OPTIONS = frozenset({"--socket", "--lock-file", "--prefix"})
_BREAKS = frozenset(":=<>|&;(")
"""At which bash ends a word. ``@`` belongs to the word that it begins (readline's rl_special_prefixes)."""

Ask = Callable[..., Mapping[str, Any]]
"""Asks uenvd: (operation, fields) -> the final frame. Raises `UenvError`."""


class Reply(NamedTuple):
    """The answer: its kind, and (word, description) of each candidate."""

    kind: str
    candidates: tuple[tuple[str, str], ...] = ()


NOTHING = Reply("words")


def main(argv: Sequence[str]) -> int:
    """Answer one TAB; return the exit status."""
    if not argv:
        return 1
    shell, words = argv[0], list(argv[1:])
    typed = ""
    if shell == "bash":
        line, typed = [*words, "", ""][:2]
        words = split(line)[1:]
    try:
        reply = complete(words or [""], _ask, os.environ)
    except UenvError:
        reply = NOTHING
    lines = [reply.kind]
    for word, description in reply.candidates:
        if not word.isprintable():
            continue  # no name of ours: it could drive the terminal, or look like two
        if shell == "bash":
            lines.append(word[replaced_from(words[-1] if words else "", typed) :])
        else:
            about = " ".join(printable(description).split())
            lines.append(f"{word}\t{about}" if about else word)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def split(line: str) -> list[str]:
    """Split a command line up to the cursor into words as a shell does, quotes removed; the last one is that of the cursor."""
    words, word, quote, begun = [], "", "", False
    characters = iter(line)
    for character in characters:
        if quote:
            quote, word = ("", word) if character == quote else (quote, word + character)
        elif character in "'\"":
            quote, begun = character, True
        elif character == "\\":
            word += next(characters, "")
        elif character.isspace():
            if word or begun:
                words.append(word)
            word, begun = "", False
        else:
            word += character
    return [*words, word]


def replaced_from(word: str, typed: str) -> int:
    """Return where in ``word`` that part begins which bash replaces: what its own splitting, which breaks at ``:``, took for the word."""
    typed = typed.lstrip("'\"")
    if all(character in _BREAKS for character in typed):
        return len(word)
    longest = next((end for end in range(len(typed), 0, -1) if word.endswith(typed[:end])), 0)
    return len(word) - longest


def complete(words: Sequence[str], ask: Ask, environ: Mapping[str, str] = MappingProxyType({})) -> Reply:
    """Return what may stand in the place of the last of the words after ``uenvctl``. Raises `UenvError`.

    ``environ`` says where the user's own images are, which are looked up without asking anybody.
    """
    *before, now = words
    while before and before[0].startswith("-"):  # options of uenvctl itself
        option = before.pop(0)
        if option == "--socket" and before:
            before.pop(0)
        elif option == "--socket":
            return Reply("files")
    if before and before[0] == "help":
        before = before[1:]
        if " ".join(before) in COMMANDS:
            return NOTHING
    if not before:
        options = ["--help", "--version", "--socket="] if now.startswith("-") else []
        return _matching(now, [(option, "") for option in options] or _first_words())
    name = before.pop(0)
    if name in GROUPS:
        if not before:
            return _matching(now, _second_words(name))
        name = f"{name} {before.pop(0)}"
    if name not in COMMANDS:
        return NOTHING
    module = importlib.import_module(f"uenvd.ctl.{COMMANDS[name]}")
    return _argument(module.OPTIONS, module.TAKES, before, now, _Known(ask, environ))


class _Known:
    """The images that can be offered: what uenvd remembers, and the user's own."""

    def __init__(self, ask: Ask, environ: Mapping[str, str]) -> None:
        self._ask = ask
        self._environ = environ

    def records(self, kind: str, namespace: str) -> Sequence[Mapping[str, Any]]:
        """Return records of the images that may stand where a word of a kind (``TAKES``) is wanted; ``namespace`` is empty, or ends with ``::``."""
        own = own_records(namespace, self._environ) if kind in ("uenv", "listed") else []
        if namespace == f"{NAMESPACE}::":
            return own
        asked: dict[str, Any] = {"op": "images"} if kind == "cached" else {"op": "find", "remembered": True}
        try:
            frame = self._ask(**asked, uenv=namespace)
        except UenvError:
            if not own:
                raise
            return own
        return [*own, *(record for record in frame.get("records") or () if isinstance(record, dict))]

    def views(self, label: str) -> Sequence[Mapping[str, Any]]:
        """Return name and description of an image's views. Raises `UenvError`."""
        file = as_file(parse_description(label), self._environ)
        facts = inspect_file(file.path) if file.path else self._ask("inspect", uenv=label, remembered=True)
        return facts.get("views") or ()


def _argument(
    options: Mapping[str, bool], takes: Sequence[str], before: Sequence[str], now: str, images: _Known
) -> Reply:
    """Complete an argument of a command that has these options and takes these kinds of words."""
    known = {**COMMON, **options}
    found: list[str] = []
    words = iter(before)
    for word in words:
        if word == "--":
            return Reply("command") if "command" in takes else _word(takes, found, now, images)
        if word == "-" or not word.startswith("-"):
            found.append(word)
            if "command" in takes and len(found) > takes.index("command"):
                return Reply("command")
            continue
        name, equals, _value = word.partition("=")
        name = SHORT.get(name, name)
        if known.get(name, FLAG) is not FLAG and not equals and next(words, None) is None:
            return _value_of(name, "", now, found, images)
    name, equals, value = now.partition("=")
    if now.startswith("-"):
        if equals:
            return _value_of(SHORT.get(name, name), f"{name}=", value, found, images)
        return _matching(now, [(name if known[name] is FLAG else f"{name}=", "") for name in sorted(known)])
    return _word(takes, found, now, images)


def _value_of(name: str, prefix: str, value: str, found: Sequence[str], images: _Known) -> Reply:
    """Complete the value of an option, written behind ``prefix``."""
    if name in _FILE_OPTIONS:
        return Reply("files")
    if name != "--view" or not found:
        return NOTHING
    done, comma, last = value.rpartition(",")
    views: dict[str, str] = {} if done else {"none": "no view, not even a default one"}
    labels = [text for text in found[0].split(",") if text and text[0] not in "./"]
    for label in labels:
        for view in images.views(label):
            whose = (
                f"{label.rpartition('::')[2].partition('/')[0].partition(':')[0]}:" if len(labels) > 1 else ""
            )
            views[f"{whose}{view.get('name')}"] = str(view.get("description") or "")
    return _matching(last, views.items(), prefix + done + comma)


def _word(takes: Sequence[str], found: Sequence[str], now: str, images: _Known) -> Reply:
    kind = takes[len(found)] if len(found) < len(takes) else ""
    if kind == "shell":
        return _matching(now, [("bash", ""), ("zsh", ""), ("fish", "")])
    if kind == "command":
        return Reply("command")
    if kind not in ("uenv", "registry", "label", "listed", "cached"):
        return NOTHING
    done, comma, last = now.rpartition(",") if kind in ("uenv", "registry") else ("", "", now)
    if kind == "uenv" and last[:1] in ("/", ".", "~"):
        return Reply("files")
    namespace, colons, rest = last.rpartition("::")
    labels: dict[str, str] = {}
    for record in images.records(kind, namespace + colons):
        own = f"{NAMESPACE}::" if record.get("namespace") == NAMESPACE and not colons else ""
        labels |= {own + text: about for text, about in _label(record, rest)}
    return _matching(rest, sorted(labels.items()), done + comma + namespace + colons)


def _label(record: Mapping[str, Any], typed: str) -> list[tuple[str, str]]:
    """Return a record's label, as much of it as the typed text asks for, and what to say about it."""
    if record.get("deprecated"):
        return []
    text = str(record.get("name"))
    for name, sign in (("version", "/"), ("tag", ":"), ("system", "@"), ("uarch", "%")):
        if record.get(name) and (name in ("version", "tag") or sign in typed):
            text += f"{sign}{record[name]}"
    size = record.get("size_bytes")
    uarch = record.get("uarch")
    about = [f"%{uarch}" if uarch else "", f"{size / 1e6:.0f} MB" if isinstance(size, int) else ""]
    return [(text, " ".join(filter(None, [*about, "here" if record.get("cached") else ""])))]


def _matching(typed: str, candidates: Any, prefix: str = "") -> Reply:  # noqa: ANN401 - an iterable of pairs
    found = tuple((prefix + word, about) for word, about in candidates if word.startswith(typed))
    return Reply("part" if len(found) == 1 and found[0][0].endswith("=") else "words", found)


def _first_words() -> list[tuple[str, str]]:
    words = {name.partition(" ")[0]: "" for name in (*COMMANDS, "help")}
    about = {"image": "find, list, inspect, pull images", "kernel": "kernels of Jupyter"}
    return [(word, about.get(word) or _about(word)) for word in words]


def _second_words(group: str) -> list[tuple[str, str]]:
    return [(name.partition(" ")[2], _about(name)) for name in COMMANDS if name.startswith(f"{group} ")]


def _about(command: str) -> str:
    """Return what the list of commands says about one."""
    for line in HELP.splitlines():
        if line.startswith(f"  {command} "):
            return line[30:].strip()
    return ""


def _ask(op: str, **fields: Any) -> Mapping[str, Any]:  # noqa: ANN401 - any JSON value
    from uenvd.ctl.client import Client, socket_path

    with Client(socket_path(None, os.environ), connect_s=CONNECT_S) as client:
        age_s: object = None
        try:
            frame = client.call(op, answer_s=ANSWER_S, **fields).frame
            age_s = frame.get("age_s")
        finally:
            is_fresh = isinstance(age_s, (int, float)) and age_s < FRESH_S
            if op == "find" and not is_fresh:
                client.post(op, uenv=fields.get("uenv"))
    return frame
