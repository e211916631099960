"""Labels, descriptions and view lists: parse, format, match. Pure: text in, values out.

The grammar is that of the CSCS ``uenv`` command line, plus a pin to a digest (RFC 5234; no whitespace inside)::

    name         = (ALPHA / DIGIT / "_") *(ALPHA / DIGIT / "_" / "." / "-")
    path         = ("/" / ".") *(ALPHA / DIGIT / "_" / "." / "-" / "/")
    label        = [name] ["/" name] [":" name] *(system / uarch / digest)      ; version, tag; each suffix once, in any order
    system       = "@" (name / "*")
    uarch        = "%" name
    digest       = "@sha256:" 64HEXDIG
    ns-label     = [name "::"] label
    description  = (ns-label / path) [":" path]                                 ; the label may not be empty
    descriptions = description *("," description) [","]
    view         = [name ":"] name
    views        = view *("," view) [","]

In a description ``:`` followed by ``/`` or ``.`` introduces the mount point, otherwise a tag; ``@sha256`` followed by a mount point is a
system of that name. A description begins with a name, a path or ``@sha256:``. Descriptions and view lists may have whitespace around
them, labels may not. Inputs are bounded by `MAX_TEXT` characters and parsed in linear time.

Values are named tuples, not dataclasses: ``uenvctl`` imports this module on its fast path, and importing ``dataclasses`` costs more than
all of this package's own start-up.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from uenvd.errors import LabelError

MAX_TEXT = 65536
"""Longest accepted input, in characters (a request on the control socket is bounded by the same number of bytes)."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_PATH = re.compile(r"[/.][A-Za-z0-9_./-]*")
_NAMESPACE = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*)::")
_DIGEST_START = re.compile(r"@sha256:(?![/.])")
_HEX = re.compile(r"[0-9A-Fa-f]*")
_SHORT_ID = re.compile(r"[0-9a-f]{16}\Z|[0-9a-f]{64}\Z")

_VIEW_HINT = "a view list is view or uenv:view, joined by commas, for example default or prgenv-gnu:default,editors:modules"


class Label(NamedTuple):
    """What a label says; ``None`` where it says nothing. ``system`` may be ``"*"``, ``digest`` is ``"sha256:<64 lower-case hex>"``."""

    name: str | None = None
    version: str | None = None
    tag: str | None = None
    system: str | None = None
    uarch: str | None = None
    digest: str | None = None
    namespace: str | None = None

    def __str__(self) -> str:
        """Return the canonical text: ``namespace::name/version:tag@system%uarch@sha256:hex``."""
        parts = (
            (f"{self.namespace}::" if self.namespace is not None else ""),
            (self.name or ""),
            (f"/{self.version}" if self.version is not None else ""),
            (f":{self.tag}" if self.tag is not None else ""),
            (f"@{self.system}" if self.system is not None else ""),
            (f"%{self.uarch}" if self.uarch is not None else ""),
            (f"@{self.digest}" if self.digest is not None else ""),
        )
        return "".join(parts)

    @property
    def short_id(self) -> str | None:
        """The name when it is the only field and could be an image id (16 hex digits) or a whole digest (64), else ``None``."""
        if (
            self.name is None
            or any(field is not None for field in self[1:6])
            or not _SHORT_ID.match(self.name)
        ):
            return None
        return self.name

    def matches(self, record: Label, *, name_prefix: bool = False) -> bool:
        """Tell whether a record (a label with all its fields) is one that this label means.

        A field that this label lacks matches anything, and so does ``@*``. With ``name_prefix`` the name need only begin so.
        """
        if name_prefix and self.name is not None:
            if not (record.name or "").startswith(self.name):
                return False
        elif self.name is not None and self.name != record.name:
            return False
        return all(
            mine is None or mine == theirs or (index == _SYSTEM_INDEX and mine == "*")
            for index, (mine, theirs) in enumerate(zip(self, record, strict=True))
            if index > 0
        )


_SYSTEM_INDEX = Label._fields.index("system")


class Description(NamedTuple):
    """One image to mount: exactly one of ``label`` and ``path`` is given; ``mount`` only if the user named a mount point."""

    label: Label | None = None
    path: str | None = None
    mount: str | None = None

    def __str__(self) -> str:
        """Return the canonical text; ``parse_description(str(d)) == d``."""
        what = self.path if self.path is not None else str(self.label)
        return what if self.mount is None else f"{what}:{self.mount}"


class ViewName(NamedTuple):
    """A view as the user named it: ``view`` or ``uenv:view``."""

    uenv: str | None
    view: str

    def __str__(self) -> str:
        return self.view if self.uenv is None else f"{self.uenv}:{self.view}"


def parse_label(text: str) -> Label:
    """Parse a label of which every field may be missing, the empty text too. Raises `LabelError`."""
    scanner = _Scanner(text, "label")
    label = scanner.label(None)
    scanner.finish("a label")
    return label


def parse_namespaced_label(text: str) -> Label:
    """Parse ``[namespace::]label``; every field may be missing. Raises `LabelError`."""
    scanner = _Scanner(text, "label")
    label = scanner.label(scanner.namespace())
    scanner.finish("a label")
    return label


def parse_description(text: str) -> Description:
    """Parse one ``(label or path)[:mount]``. Raises `LabelError`."""
    scanner = _Scanner(text, "uenv description", trim=True)
    description = scanner.description()
    scanner.finish("a uenv description")
    return description


def parse_descriptions(text: str) -> tuple[Description, ...]:
    """Parse a comma list of at least one description; one trailing comma is accepted. Raises `LabelError`."""
    scanner = _Scanner(text, "uenv description", trim=True)
    found = [scanner.description()]
    while scanner.take(",") and not scanner.at_end():
        found.append(scanner.description())
    scanner.finish("a uenv description")
    return tuple(found)


def parse_views(text: str) -> tuple[ViewName, ...]:
    """Parse a comma list of at least one view; one trailing comma is accepted. Raises `LabelError`."""
    scanner = _Scanner(text, "view list", trim=True, hint=_VIEW_HINT)
    found = [scanner.view()]
    while scanner.take(",") and not scanner.at_end():
        found.append(scanner.view())
    scanner.finish("a view name")
    return tuple(found)


class _Scanner:
    """A position in the text that is parsed, and the errors that point at it."""

    def __init__(self, text: str, kind: str, *, trim: bool = False, hint: str | None = None) -> None:
        self.text = text
        self.kind = kind
        self.hint = hint
        self.pos = 0
        self.end = len(text)
        if len(text) > MAX_TEXT:
            self.pos = MAX_TEXT
            raise self.error(f"longer than {MAX_TEXT} characters")
        if trim:
            self.end = len(text.rstrip(" \t\r\n\v\f"))
            self.pos = self.end - len(text[: self.end].lstrip(" \t\r\n\v\f"))

    def error(self, why: str) -> LabelError:
        """Return the error with the input echoed and a caret under the present position."""
        echo, column = _excerpt(self.text, self.pos)
        return LabelError(f"invalid {self.kind}: {why}\n  {echo}\n  {' ' * column}^", hint=self.hint)

    def at_end(self) -> bool:
        return self.pos >= self.end

    def peek(self) -> str:
        return "" if self.at_end() else self.text[self.pos]

    def take(self, symbol: str) -> bool:
        if self.text.startswith(symbol, self.pos, self.end):
            self.pos += len(symbol)
            return True
        return False

    def match(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self.text, self.pos, self.end)
        if found is None:
            return None
        self.pos = found.end()
        return found.group()

    def found(self) -> str:
        """Describe what stands at the present position, for an error."""
        symbol = self.peek()
        if not symbol:
            return "the end"
        return "a space" if symbol.isspace() else f"'{_shown(symbol)}'"

    def name(self, what: str) -> str:
        name = self.match(_NAME)
        if name is None:
            raise self.error(f"expected {what}, found {self.found()}")
        return name

    def finish(self, what: str) -> None:
        """Raise unless everything was parsed."""
        if not self.at_end():
            raise self.error(f"{self.found()} cannot be part of {what} here")

    def namespace(self) -> str | None:
        prefix = self.match(_NAMESPACE)
        return None if prefix is None else prefix[:-2]

    def label(self, namespace: str | None) -> Label:
        name = self.match(_NAME)
        version = self.name("a version after '/'") if self.take("/") else None
        tag = None
        if self.peek() == ":" and not self.mount_follows():
            self.take(":")
            tag = self.name("a tag after ':'")
        system = uarch = digest = None
        while True:
            if _DIGEST_START.match(self.text, self.pos, self.end):
                if digest is not None:
                    raise self.error("a second digest")
                digest = self.digest()
            elif self.peek() == "@":
                if system is not None:
                    raise self.error("a second '@system'")
                self.take("@")
                system = "*" if self.take("*") else self.name("a system after '@'")
            elif self.peek() == "%":
                if uarch is not None:
                    raise self.error("a second '%uarch'")
                self.take("%")
                uarch = self.name("a microarchitecture after '%'")
            else:
                return Label(name, version, tag, system, uarch, digest, namespace)

    def mount_follows(self) -> bool:
        return self.kind == "uenv description" and self.text[self.pos + 1 : self.pos + 2] in ("/", ".")

    def digest(self) -> str:
        self.take("@sha256:")
        digits = self.match(_HEX) or ""
        if len(digits) != 64:
            if len(digits) > 64:
                self.pos -= len(digits) - 64
            raise self.error(f"a sha256 digest has 64 hexadecimal digits, this one {len(digits)}")
        return "sha256:" + digits.lower()

    def description(self) -> Description:
        label = path = mount = None
        if self.peek() in ("/", "."):
            path = self.match(_PATH)
        else:
            namespace = self.namespace()
            if not _NAME.match(self.text, self.pos, self.end) and not _DIGEST_START.match(
                self.text, self.pos, self.end
            ):
                raise self.error(
                    f"expected a label (name/version:tag) or a path (/… or ./…), found {self.found()}"
                )
            label = self.label(namespace)
        if self.take(":"):
            mount = self.match(_PATH)
            if mount is None:
                late = label is not None and (label.system or label.uarch or label.digest)
                why = "the tag goes before '@' and '%', and " if late and self.peek() else ""
                raise self.error(f"{why}a mount point begins with '/', found {self.found()}")
        return Description(label, path, mount)

    def view(self) -> ViewName:
        first = self.name("the name of a view")
        if self.take(":"):
            return ViewName(first, self.name(f"the name of a view of '{first}' after ':'"))
        return ViewName(None, first)


_EXCERPT = 72


def _excerpt(text: str, pos: int) -> tuple[str, int]:
    """Return a printable part of `text` around `pos`, one column a character, and the column of `pos` in it."""
    start = max(0, min(pos - _EXCERPT // 2, len(text) - _EXCERPT))
    stop = min(len(text), start + _EXCERPT)
    before = "…" if start else ""
    after = "…" if stop < len(text) else ""
    return before + "".join(map(_shown, text[start:stop])) + after, len(before) + pos - start


def _shown(symbol: str) -> str:
    """Return the character if it takes exactly one column of a terminal, else ``?``."""
    if symbol.isascii():
        return symbol if symbol.isprintable() else "?"
    import unicodedata  # only for an error that echoes non-ASCII text

    narrow = symbol.isprintable() and not unicodedata.combining(symbol)
    return symbol if narrow and unicodedata.east_asian_width(symbol) not in "WF" else "?"
