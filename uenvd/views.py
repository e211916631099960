"""Views: an image's metadata -> environment operations -> the changes of an environment. Pure; never runs anything.

An image describes itself in ``meta/env.json`` (Stackinator 5 and later: version 1 of the ``env`` block). Images of early 2024 (Stackinator
4) name only a shell script per view; `uenvd.views_sh` translates it. The reader is lenient, as the reference implementation is: what it
does not understand it leaves out. The wire forms are strict, because a worker that reads hostile bytes sends them.

``docs/protocol.md`` ("The environment") defines the operations; the C implementation of `apply_ops` in the Slurm plugin passes the same
vectors, ``tests/vectors/views/``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from uenvd.errors import UnknownView
from uenvd.label import Label, ViewName

ScalarOp: TypeAlias = tuple[Literal["set"], str, str]
UnsetOp: TypeAlias = tuple[Literal["unset"], str]
ListOp: TypeAlias = tuple[Literal["assign", "prepend", "append"], str, tuple[str, ...]]
EnvOp: TypeAlias = ScalarOp | UnsetOp | ListOp

APPLIED = "UENV_APPLIED"
"""The variable that holds the key of what was applied to an environment."""

RESTORE = "UENV_RESTORE"
"""The variable from which a login shell's hook (etc/profile.d/zz-uenvd.sh) puts the lists of the views back; see `restore_op`."""
MAX_RESTORE_CHARS = 32_768

MAX_FILE_BYTES = 1 << 20
MAX_VIEWS = 1000
MAX_OPS = 10_000
"""Bound of the operations of one image, and of those of one request."""
MAX_ELEMENTS = 10_000
"""Bound of the elements of one list operation."""
MAX_STRING_BYTES = 131_071
"""Longest ``NAME=value`` that the kernel passes to a program (MAX_ARG_STRLEN less the NUL, include/uapi/linux/binfmts.h)."""
MAX_NAME_CHARS = 256
MAX_DESCRIPTION_CHARS = 4096

ENV_JSON = b"meta/env.json"

_SHELL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SEPARATORS = frozenset("|\n")


class View(NamedTuple):
    """One view of an image. ``loadable`` is false when the image names the view but not what it does to the environment."""

    name: str
    description: str
    ops: tuple[EnvOp, ...]
    loadable: bool = True


class ImageMeta(NamedTuple):
    """What an image says about itself. ``mount`` is an absolute path without ``..``, or ``None``."""

    name: str
    description: str
    mount: str | None
    default_view: str | None
    views: tuple[View, ...]

    def to_wire(self) -> dict[str, Any]:
        """Return a JSON-able object, the inverse of `from_wire`."""
        return {
            "name": self.name,
            "description": self.description,
            "mount": self.mount,
            "default_view": self.default_view,
            "views": [
                {
                    "name": v.name,
                    "description": v.description,
                    "ops": ops_to_wire(v.ops),
                    "loadable": v.loadable,
                }
                for v in self.views
            ],
        }

    @classmethod
    def from_wire(cls, obj: Any) -> ImageMeta:  # noqa: ANN401 - any JSON value
        """Check and convert what `to_wire` made. Raises only ValueError, TypeError or KeyError."""
        mount = obj["mount"]
        if mount is not None and clean_mount(mount) != mount:
            raise ValueError("the mount point is no clean absolute path")
        raw_views = _typed(obj["views"], list)
        if len(raw_views) > MAX_VIEWS:
            raise ValueError("too many views")
        views = tuple(
            View(
                _text(raw["name"], MAX_NAME_CHARS),
                _text(raw["description"], MAX_DESCRIPTION_CHARS),
                tuple(ops_from_wire(raw["ops"])),
                _typed(raw["loadable"], bool),
            )
            for raw in raw_views
        )
        if sum(len(view.ops) for view in views) > MAX_OPS:
            raise ValueError("too many operations")
        default = obj["default_view"]
        return cls(
            _text(obj["name"], MAX_NAME_CHARS),
            _text(obj["description"], MAX_DESCRIPTION_CHARS),
            mount,
            None if default is None else _text(default, MAX_NAME_CHARS),
            views,
        )


def _typed(value: Any, kind: type) -> Any:  # noqa: ANN401 - any JSON value
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _text(value: Any, max_chars: int) -> str:  # noqa: ANN401 - any JSON value
    """Check a string: bounded, no NUL, encodable (a lone surrogate is not)."""
    text: str = _typed(value, str)
    if len(text) > max_chars:
        raise ValueError("string too long")
    if "\0" in text:
        raise ValueError("NUL in a string")
    text.encode()
    return text


def _variable(value: Any) -> str:  # noqa: ANN401 - any JSON value
    name = _text(value, MAX_NAME_CHARS)
    if not name or "=" in name:
        raise ValueError("not a name of an environment variable")
    return name


def clean_mount(path: Any) -> str | None:  # noqa: ANN401 - any JSON value
    """Return an absolute path with single slashes and no trailing one, or ``None`` for anything that cannot be a mount point."""
    if not isinstance(path, str) or not path.startswith("/") or len(path) > 4095 or "\0" in path:
        return None
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or not _encodable(path):
        return None
    return "/" + "/".join(parts)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- operations on the wire ---------------------------------------------------------------------------------------------------------


def ops_to_wire(ops: Iterable[EnvOp]) -> list[list[Any]]:
    """Return the ``env`` array of ``docs/protocol.md``."""
    return [[list(field) if isinstance(field, tuple) else field for field in op] for op in ops]


def ops_from_wire(obj: Any) -> list[EnvOp]:  # noqa: ANN401 - any JSON value
    """Check and convert an ``env`` array. Raises only ValueError, TypeError or KeyError."""
    raw_ops = _typed(obj, list)
    if len(raw_ops) > MAX_OPS:
        raise ValueError("too many operations")
    return [_op(_typed(raw, list)) for raw in raw_ops]


def _op(raw: list[Any]) -> EnvOp:
    """Check one operation of three (or two) fields. Raises ValueError, TypeError."""
    kind, *rest = raw
    if kind == "unset":
        (name,) = rest
        return ("unset", _variable(name))
    name, value = rest
    if kind == "set":
        return ("set", _variable(name), _text(value, MAX_STRING_BYTES))
    if kind not in ("assign", "prepend", "append"):
        raise ValueError("unknown operation")
    elements = _typed(value, list)
    if len(elements) > MAX_ELEMENTS:
        raise ValueError("list too long")
    return (kind, _variable(name), tuple(_text(element, MAX_STRING_BYTES) for element in elements))


# --- reading an image's metadata ----------------------------------------------------------------------------------------------------


def read_image_meta(read_file: Callable[[bytes], bytes | None]) -> ImageMeta | None:
    """Read ``meta/env.json`` (and old images' activation scripts) through `read_file`.

    `read_file` gets a path relative to the image's root and returns the content, or ``None`` when there is no such regular file; it
    should refuse files longer than `MAX_FILE_BYTES`, and longer answers are ignored here. Returns ``None`` for an image without
    metadata; damaged metadata counts as none. Raises only what `read_file` raises.
    """
    data = read_file(ENV_JSON)
    if data is None or len(data) > MAX_FILE_BYTES:
        return None
    try:
        doc = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(doc, dict):
        return None
    mount = clean_mount(doc.get("mount"))
    raw_views = doc.get("views")
    views: list[View] = []
    budget = MAX_OPS
    for name, raw in raw_views.items() if isinstance(raw_views, dict) else ():
        if len(views) == MAX_VIEWS:
            break
        if (
            not isinstance(raw, dict)
            or not _encodable(name)
            or not 0 < len(name) <= MAX_NAME_CHARS
            or "\0" in name
        ):
            continue
        env = raw.get("env")
        ops = list(_env_block(env)) if isinstance(env, dict) else _from_script(read_file, name, raw, mount)
        loadable = ops is not None and len(ops) <= budget
        kept = tuple(ops or ()) if loadable else ()
        budget -= len(kept)
        views.append(View(name, _shortened(raw.get("description"), MAX_DESCRIPTION_CHARS), kept, loadable))
    default = doc.get("default-view")
    if default not in [view.name for view in views]:
        default = None
    name = _shortened(doc.get("name"), MAX_NAME_CHARS) or "unnamed"
    return ImageMeta(
        name, _shortened(doc.get("description"), MAX_DESCRIPTION_CHARS), mount, default, tuple(views)
    )


def _shortened(value: Any, max_chars: int) -> str:  # noqa: ANN401 - any JSON value
    """Return a string fit for `_text`: the value if it is one, cut to length, without NUL and lone surrogates; else empty."""
    if not isinstance(value, str):
        return ""
    return value[:max_chars].replace("\0", "").encode(errors="ignore").decode()


def _env_block(env: dict[str, Any]) -> Iterable[EnvOp]:
    """Yield the operations of a version-1 ``env`` block: scalars first, then lists; whatever is malformed is left out."""
    values = env.get("values")
    if not isinstance(values, dict):
        return
    scalars, lists = values.get("scalar"), values.get("list")
    for name, value in scalars.items() if isinstance(scalars, dict) else ():
        yield from _lenient(["unset", name] if value is None else ["set", name, value])
    for name, changes in lists.items() if isinstance(lists, dict) else ():
        for change in changes if isinstance(changes, list) else ():
            if not isinstance(change, dict):
                continue
            kind = {"set": "assign", "prepend": "prepend", "append": "append"}.get(str(change.get("op")))
            yield from _lenient(["unset", name] if kind is None else [kind, name, change.get("value")])


def _lenient(raw: list[Any]) -> Iterable[EnvOp]:
    try:
        yield _op(raw)
    except (ValueError, TypeError):
        return


def _from_script(
    read_file: Callable[[bytes], bytes | None], name: str, raw: dict[str, Any], mount: str | None
) -> list[EnvOp] | None:
    """Return the operations of a view that has only a shell script, ``None`` when that cannot be read."""
    candidates = [raw.get("activate")]
    if isinstance(raw.get("root"), str):
        candidates.append(raw["root"] + "/activate.sh")
    candidates.append(f"{mount or ''}/env/{name}/activate.sh")
    for candidate in candidates:
        path = clean_mount(candidate)
        if path is None:
            continue
        if mount is not None:
            if not path.startswith(mount + "/"):
                continue
            path = path.removeprefix(mount)
        data = read_file(path[1:].encode())
        if data is not None and len(data) <= MAX_FILE_BYTES:
            from uenvd.views_sh import script_ops  # few images need it

            return [op for raw_op in script_ops(data.decode(errors="replace")) for op in _lenient(raw_op)]
    return None


# --- choosing views -----------------------------------------------------------------------------------------------------------------


class Selected(NamedTuple):
    """A view that is to be applied, and the index of its image in the request."""

    image: int
    view: View


def select_views(
    images: Sequence[tuple[Label | None, ImageMeta | None]], wanted: Sequence[ViewName], use_default: bool
) -> list[Selected]:
    """Find the wanted views in the images.

    A view is named ``view`` or ``uenv:view``, where ``uenv`` is the name in the image's label or in its metadata. With `use_default`
    an image of which no view is wanted gets its own default view, if it has one; default views come first, in the images' order, then
    the wanted ones in theirs, each once. Raises `UnknownView` with what there is.
    """
    chosen: list[Selected] = []
    for name in wanted:
        found = [
            Selected(index, view)
            for index, (label, meta) in enumerate(images)
            if meta is not None and (name.uenv is None or name.uenv in _names(label, meta))
            for view in meta.views
            if view.name == name.view
        ]
        if not found:
            raise UnknownView(f"there is no view '{name}'", hint=_available(images))
        if len(found) > 1:
            rivals = ", ".join(_qualified(images, one) for one in found)
            raise UnknownView(
                f"the view '{name}' is ambiguous: {rivals}", hint="say which one you mean: --view=uenv:view"
            )
        if not found[0].view.loadable:
            raise UnknownView(
                f"the view '{name}' cannot be loaded: the image does not say what it does to the environment",
                hint="tell whoever made the image: neither its metadata nor an activation script in it describes the view",
            )
        if found[0] not in chosen:
            chosen.append(found[0])
    if not use_default:
        return chosen
    used = {one.image for one in chosen}
    defaults = [
        Selected(index, view)
        for index, (_label, meta) in enumerate(images)
        if meta is not None and index not in used
        for view in meta.views
        if view.name == meta.default_view and view.loadable
    ]
    return defaults + chosen


def _names(label: Label | None, meta: ImageMeta) -> tuple[str, ...]:
    return (meta.name,) if label is None or label.name is None else (label.name, meta.name)


def _qualified(images: Sequence[tuple[Label | None, ImageMeta | None]], one: Selected) -> str:
    label, meta = images[one.image]
    return f"{_names(label, meta)[0]}:{one.view.name}" if meta is not None else one.view.name


def _available(images: Sequence[tuple[Label | None, ImageMeta | None]]) -> str:
    names = [
        _qualified(images, Selected(index, view))
        for index, (_label, meta) in enumerate(images)
        if meta is not None
        for view in meta.views
    ]
    if not names:
        return "the image has no views" if len(images) == 1 else "none of the images has views"
    shown = ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
    return f"available views: {shown}"


def view_ops(selected: Iterable[Selected]) -> list[EnvOp]:
    """Return the operations of the selected views in the order in which they are applied."""
    return [op for one in selected for op in one.view.ops]


def with_restore(ops: Iterable[EnvOp]) -> list[EnvOp]:
    """Return the operations with one `restore_op` for all of them at the end; those that parts of them had are dropped."""
    plain = [op for op in ops if op[1] != RESTORE]
    return [*plain, restore_op(plain)] if len(plain) < MAX_OPS else plain


def restore_op(ops: Iterable[EnvOp]) -> EnvOp:
    """Return the operation that sets `RESTORE` to what a login shell, which resets ``PATH``, has to put back.

    Its value is a list of records, separated by ``|``: ``NAME=a:b`` for a prepend, ``NAME+=a:b`` for an append, in the order of the operations.
    These are the operations that are done in every step, too; scalars are the user's to change. Left out is what a shell could not name or
    tell apart: odd names, and elements with ``|`` or a newline. Nothing at all when it would be longer than `MAX_RESTORE_CHARS`.
    """
    records = []
    for op in ops:
        if (op[0] == "prepend" or op[0] == "append") and _SHELL_NAME.fullmatch(op[1]):
            elements = [element for element in op[2] if element and not _SEPARATORS.intersection(element)]
            if elements:
                records.append(f"{op[1]}{'+' if op[0] == 'append' else ''}={':'.join(elements)}")
    value = "|".join(records)
    return ("set", RESTORE, value) if 0 < len(value) <= MAX_RESTORE_CHARS else ("unset", RESTORE)


def applied_key(identities: Sequence[str], selected: Sequence[Selected]) -> str:
    """Return the key of these images with these views.

    `identities` has one string for each image of the request that stands for its bytes: the digest, or what the client knows of a
    file (path, size, time).
    """
    views: dict[int, list[str]] = {index: [] for index in range(len(identities))}
    for one in selected:
        views[one.image].append(one.view.name)
    return ";".join(f"{identity}[{','.join(views[index])}]" for index, identity in enumerate(identities))


def applied_views(key: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return the identities and views of a key that `applied_key` made (or several, joined by ``;``); what is not of its form is left out."""
    found = []
    for part in key.split(";"):
        identity, bracket, views = part.partition("[")
        if bracket and views.endswith("]"):
            found.append((identity, tuple(view for view in views[:-1].split(",") if view)))
    return found


# --- applying -----------------------------------------------------------------------------------------------------------------------


def apply_ops(ops: Iterable[EnvOp], applied: str, environ: Mapping[str, str]) -> dict[str, str | None]:
    """Return how the environment changes: only variables that differ afterwards, ``None`` for one that is removed.

    The rules are those of ``docs/protocol.md``, "The environment". An operation is skipped when its expanded values together or the
    resulting ``NAME=value`` are longer than `MAX_STRING_BYTES` bytes: no program could be started with that, and a chain of
    ``${@X@}${@X@}`` would double for ever.
    """
    again = environ.get(APPLIED) == applied
    changed: dict[str, str | None] = {}

    def current(name: str) -> str:
        return (changed[name] if name in changed else environ.get(name)) or ""

    def put(name: str, value: str | None) -> None:
        if value is None or _size(name) + 1 + _size(value) <= MAX_STRING_BYTES:
            changed[name] = value

    for op in ops:
        name = op[1]
        if op[0] == "prepend" or op[0] == "append":
            values = _expand_all(op[2], current)
            if values is not None:
                there = _unique(current(name).split(":"))
                missing = [element for element in _elements(values) if element not in there]
                put(name, _joined([*missing, *there] if op[0] == "prepend" else [*there, *missing]))
        elif again:
            continue
        elif op[0] == "unset":
            put(name, None)
        elif op[0] == "set":
            values = _expand_all((op[2],), current)
            if values is not None:
                put(name, values[0])
        else:
            values = _expand_all(op[2], current)
            if values is not None:
                put(name, _joined(_elements(values)))
    changed[APPLIED] = applied
    return {name: value for name, value in changed.items() if value != environ.get(name)}


def _size(text: str) -> int:
    """Return how many bytes the kernel sees of a string of ``os.environ`` (which holds undecodable bytes as surrogates)."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogateescape"))


def _elements(values: Iterable[str]) -> dict[str, None]:
    """Split values into list elements: ordered, none empty, none twice."""
    return _unique(element for value in values for element in value.split(":"))


def _unique(elements: Iterable[str]) -> dict[str, None]:
    return dict.fromkeys(element for element in elements if element)


def _joined(elements: Iterable[str]) -> str | None:
    return ":".join(elements) or None


def _expand_all(values: Iterable[str], current: Callable[[str], str]) -> list[str] | None:
    """Replace each ``${@NAME@}`` by NAME's present value; ``None`` if the values together get too long.

    What is inserted is not looked at again.
    """
    budget = MAX_STRING_BYTES
    expanded = []
    for value in values:
        parts = []
        start = 0
        while True:
            mark = value.find("${@", start)
            parts.append(value[start:] if mark < 0 else value[start:mark])
            budget -= _size(parts[-1])
            close = value.find("@}", mark + 3) if mark >= 0 else -1
            if close < 0:
                break
            name = value[mark + 3 : close]
            if name.isascii() and name.replace("_", "a").isalnum():
                parts.append(current(name))
                budget -= _size(parts[-1])
            if budget < 0:
                return None
            start = close + 2
        if budget < 0:
            return None
        expanded.append("".join(parts))
    return expanded
