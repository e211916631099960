"""The tests that every image gets, whatever its recipe brings: each view loads, libraries resolve, declared commands run. Pure.

They are tests of ReFrame like others (`uenvd.publish.reframe.builtin`): they run where those run, here or in jobs, and are in the same report. What
one does is a script of the shell that needs nothing but ``sh``, ``ldd`` and the usual tools, the host's: the view is loaded only for what is tested.
An administrator can run it by hand.

``extra/smoke.yaml`` of a recipe (``meta/extra/smoke.yaml`` of an image) may add to them: commands by view, and libraries that only the machines have
on which the image is used (drivers).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import yaml

from uenvd import yamlfile
from uenvd.publish.reframe.environments import MANUAL
from uenvd.views import APPLIED, RESTORE, EnvOp, ImageMeta, View, apply_ops

SMOKE_FILE: Final = "meta/extra/smoke.yaml"
"""Inside an image."""
MAX_PROGRAMS: Final = 2000
"""Of one view; more are not looked at, and the script says so."""
OK: Final = "uenv-smoke: ok"
PROBLEM: Final = "uenv-smoke: problem:"
DRIVERS: Final = (
    "libcuda.so.*",
    "libnvidia-*.so.*",
    "libnvcuvid.so.*",
    "libnvoptix.so.*",
    "libamdhip64-driver.so.*",
)
"""Patterns of libraries that come with a driver: they may be missing where an image is tested."""
COMMAND_LIMIT_S: Final = 60

_DIALECT: Final = yamlfile.Dialect(manual=MANUAL)
_SHELL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATTERN = re.compile(r"[A-Za-z0-9_.*?+-]+")


@dataclass(frozen=True)
class SmokeTests:
    """What a recipe adds."""

    commands: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """View -> commands that must end with status 0."""
    host_libraries: tuple[str, ...] = ()
    """Patterns (as in file names) of libraries that may be missing, besides `DRIVERS`."""


def parse_smoke(text: str, source: str) -> SmokeTests:
    """Parse the file's text; ``source`` is its name in messages. Raises `ConfigError` that names file, line and key."""
    top = yamlfile.Section(source, "", yamlfile.compose(text, source, _DIALECT), 1, _DIALECT)
    section = top.section("commands")
    commands = {view: section.need(view, yamlfile.texts) for view in section}
    found = SmokeTests(commands, top.take("host_libraries", _patterns, ()))
    top.end()
    return found


def _patterns(node: yaml.Node) -> tuple[str, ...]:
    found = yamlfile.texts(node)
    for pattern in found:
        if not _PATTERN.fullmatch(pattern):
            raise ValueError(f"{pattern!r} is no pattern of the name of a library")
    return found


def check_views(tests: SmokeTests, meta: ImageMeta | None) -> str | None:
    """Return the first view of the commands that the image has not; None if it has all."""
    there = {view.name for view in meta.views} if meta is not None else set()
    return next((view for view in tests.commands if view not in there), None)


@dataclass(frozen=True)
class Script:
    """One smoke test."""

    view: str
    """Empty: of an image without views."""
    text: str


def scripts(
    meta: ImageMeta | None, mount: str, tests: SmokeTests, environ: Mapping[str, str]
) -> list[Script]:
    """Return the smoke tests of an image: one for each view, or one in all for an image without.

    Args:
        meta: what the image says of itself.
        mount: where it is mounted.
        tests: what its recipe adds.
        environ: in which a user's session begins, before the views.

    """
    views: Sequence[View | None] = meta.views if meta is not None and meta.views else (None,)
    return [_script(view, mount, tests, environ) for view in views]


def _script(view: View | None, mount: str, tests: SmokeTests, environ: Mapping[str, str]) -> Script:
    name = view.name if view is not None else ""
    lines = [_HEAD.format(mount=shlex.quote(mount), problem=PROBLEM)]
    if view is not None and not view.loadable:
        lines.append(f"problem {shlex.quote(f'the image does not say what the view {name} does')}")
    ops = view.ops if view is not None else ()
    changes = []
    for variable, value in apply_ops(list(ops), "", environ).items():
        if variable in {APPLIED, RESTORE} or not _SHELL_NAME.fullmatch(variable):
            continue
        changes.append(f"unset {variable}" if value is None else f"export {variable}={shlex.quote(value)}")
    # What is beside a library its programs find, by a path of their own that the library need not have.
    changes.append(
        '[ -z "$beside" ] || export LD_LIBRARY_PATH="$beside${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"'
    )
    lines.append("\n    ".join(["in_view() (", *changes, 'exec "$@"']) + "\n)")
    directories = _program_directories(ops, mount)
    if view is not None:
        lines += _view_checks(name, ops, mount)
    allowed = "|".join((*DRIVERS, *tests.host_libraries))
    lines.append(
        _LIBRARIES.format(
            allowed=allowed, maximum=MAX_PROGRAMS, directories=" ".join(map(shlex.quote, directories))
        )
    )
    for command in tests.commands.get(name, ()):
        lines.append(f"runs {shlex.quote(command)} {COMMAND_LIMIT_S}")
    lines.append(_TAIL.format(ok=OK))
    return Script(name, "\n".join(lines) + "\n")


def _program_directories(ops: Sequence[EnvOp], mount: str) -> list[str]:
    """Return where programs and libraries are: what a view puts into PATH and LD_LIBRARY_PATH, else ``bin`` and ``lib`` of the image."""
    found = []
    for op in ops:
        if op[0] in {"prepend", "append", "assign"} and op[1] in {"PATH", "LD_LIBRARY_PATH"}:
            found += [element for element in op[2] if f"{element}/".startswith(f"{mount}/")]
    places = found or [f"{mount}/bin"]
    beside = [
        f"{place.removesuffix('/bin')}/{library}"
        for place in places
        if place.endswith("/bin")
        for library in ("lib", "lib64")
    ]
    return list(dict.fromkeys([*places, *beside]))


def _view_checks(name: str, ops: Sequence[EnvOp], mount: str) -> list[str]:
    """Return checks that a view leads into the image: of what it puts into PATH, at least one directory must be there."""
    places = [
        element
        for op in ops
        if op[0] in {"prepend", "append", "assign"} and op[1] == "PATH"
        for element in op[2]
        if f"{element}/".startswith(f"{mount}/")
    ]
    if not places:
        return []
    tests = " || ".join(f"[ -d {shlex.quote(place)} ]" for place in places)
    return [
        f"{{ {tests}; }} || problem {shlex.quote(f'nothing that the view {name} puts into PATH is in the image: {places[0]}')}"
    ]


_HEAD = r"""#!/bin/sh
# A smoke test of uenvd-publish: reads the image, changes nothing.
mount={mount}
beside= problems=0 programs=0 libraries=0 commands=0
problem() {{
    problems=$((problems + 1))
    [ "$problems" -gt 20 ] || printf '%s %s\n' '{problem}' "$*"
}}
runs() {{
    commands=$((commands + 1))
    in_view timeout "$2" sh -c "$1" >smoke.out 2>&1 </dev/null
    status=$?
    [ "$status" -eq 0 ] || problem "$1: status $status: $(tail -n 2 smoke.out | tr '\n' ' ' | cut -c 1-200)"
}}
[ -n "$(ls -A "$mount" 2>/dev/null)" ] || problem "nothing is mounted at $mount"
"""

_LIBRARIES = r"""allowed() {{
    case "$1" in {allowed}) return 0 ;; esac
    return 1
}}
elf() {{
    [ "$(head -c 4 "$1" 2>/dev/null | od -An -c | tr -d ' ')" = '177ELF' ]
}}
resolve() {{
    # ldd takes $ORIGIN from the name that it is given; the kernel from what a link leads to.
    LC_ALL=C beside=$beside in_view ldd "$(readlink -f "$1")" >smoke.ldd 2>&1 </dev/null
    while IFS= read -r line; do
        case "$line" in
            *'not found'*)
                name=$(printf '%s' "$line" | sed 's/^[[:space:]]*//; s/ .*//')
                case "$line" in
                    *"version "*) problem "$1: $line" ;;
                    *) allowed "$name" || problem "$1: $name is not found" ;;
                esac ;;
        esac
    done <smoke.ldd
}}
interpreter() {{
    line=$(head -c 300 "$1" | head -n 1 | tr -d '\0')
    set -f
    # shellcheck disable=SC2086 -- as the kernel does
    set -- "$1" ${{line#??}}
    set +f
    shift
    case "$1" in
        */env)
            shift
            [ "$1" != -S ] || shift
            case "$1" in -*|*=*|'') return ;; esac
            in_view sh -c 'command -v "$1"' sh "$1" >/dev/null 2>&1 || problem "$script: there is no $1" ;;
        /*) [ -x "$1" ] || problem "$script: there is no $1" ;;
    esac
}}
for directory in {directories}; do
    [ -d "$directory" ] || continue
    for file in "$directory"/*; do
        [ -f "$file" ] || {{ [ ! -L "$file" ] || [ -e "$file" ] || problem "$file leads nowhere"; continue; }}
        [ $((programs + libraries)) -lt {maximum} ] || {{ echo 'uenv-smoke: note: more than {maximum} files, the rest is not looked at'; break 2; }}
        case "${{file##*/}}" in
            *.so|*.so.*) if elf "$file"; then libraries=$((libraries + 1)); beside=$directory; resolve "$file"; beside=; fi ;;
            *)
                [ -x "$file" ] || continue
                programs=$((programs + 1))
                if elf "$file"; then resolve "$file"
                elif [ "$(head -c 2 "$file" 2>/dev/null)" = '#!' ]; then script=$file; interpreter "$file"
                fi ;;
        esac
    done
done"""

_TAIL = r"""rm -f smoke.out smoke.ldd
[ "$problems" -eq 0 ] || {{ echo "uenv-smoke: $problems problems"; exit 1; }}
echo "{ok}: $programs programs, $libraries libraries, $commands commands"
"""
