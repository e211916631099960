"""``uenvctl diff``: what is different between two images. From metadata alone; with ``--files`` both are mounted and compared."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from uenvd.ctl import lockfile, output
from uenvd.ctl.arguments import FLAG, Arguments, parse
from uenvd.ctl.client import REGISTRY_ANSWER_S, Client, socket_path
from uenvd.ctl.image_inspect import inspect_file, tests_text
from uenvd.ctl.own import as_file, name_of
from uenvd.errors import NotFound, ProtocolError, RegistryError, RegistryUnreachable, UsageError
from uenvd.label import Description, parse_description
from uenvd.packages import packages_of

HELP = """\
usage: uenvctl diff [--files] UENV UENV

Show what is different between two images: size, date, mount point, views, tests, and the packages that their recipes
name. Nothing is downloaded for that. UENV is a label (mine::... for one of your own images) or the path of a squashfs
file.

--files mounts both images (those of the registry are fetched), compares every file, and takes the packages from what is
installed: Spack's database and Python's metadata.

  --files            compare the files, too
  --all              with --files: list every file that differs; else the first 40
  --locked           the bytes that uenv.lock names, whatever the labels mean by now
  --lock-file PATH   this lock file instead of uenv.lock here or in a directory above
  --json             see docs/json.md
  --socket PATH      uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control

examples:
  uenvctl diff prgenv-gnu/23.11 prgenv-gnu/24.7
  uenvctl diff --files prgenv-gnu/24.7:v1 prgenv-gnu/24.7:v2
"""

OPTIONS = {"--files": FLAG, "--all": FLAG, "--json": FLAG, **lockfile.OPTIONS}
TAKES = ("uenv", "uenv")

_SHOWN_FILES = 40
_FACTS = ("mount", "description", "default_view", "architecture", "size_bytes", "date", "tests", "deprecated")


class Side(NamedTuple):
    """What is known of one image. ``packages`` is name -> version; None where the image's recipe is not known."""

    facts: Mapping[str, Any]
    packages: Mapping[str, str] | None


class Changes(NamedTuple):
    """Names that only the first has, that only the second has, and that both have, but differently: (name, first, second)."""

    removed: tuple[str, ...]
    added: tuple[str, ...]
    changed: tuple[tuple[str, str, str], ...]

    @property
    def none(self) -> bool:
        """Whether there is no difference."""
        return not (self.removed or self.added or self.changed)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON value of docs/json.md."""
        return {
            "removed": list(self.removed),
            "added": list(self.added),
            "changed": [{"name": name, "from": old, "to": new} for name, old, new in self.changed],
        }


def compare(first: Mapping[str, str], second: Mapping[str, str]) -> Changes:
    """Compare two tables; the names of each part are sorted."""
    return Changes(
        tuple(sorted(first.keys() - second.keys())),
        tuple(sorted(second.keys() - first.keys())),
        tuple(
            (name, first[name], second[name])
            for name in sorted(first.keys() & second.keys())
            if first[name] != second[name]
        ),
    )


def main(argv: Sequence[str]) -> int:
    """Handle the command; return the exit status (0 also when there are differences)."""
    arguments = parse(argv, command="diff", options=OPTIONS, words=(2, 2))
    if "--help" in arguments.flags:
        print(HELP, end="")
        return 0
    if "--all" in arguments.flags and "--files" not in arguments.flags:
        raise UsageError("--all is for --files", hint="uenvctl diff --files --all UENV UENV")
    asked = [parse_description(lockfile.pinned_by(arguments, word)) for word in arguments.words]
    output.mention_files(asked)
    wanted = [as_file(one, os.environ) for one in asked]
    socket = socket_path(arguments.values.get("--socket"), os.environ)
    first, second = (_side(one, socket) for one in wanted)
    files: Changes | None = None
    # One digest is one image: there is nothing to look for in its files.
    same = first.facts.get("digest") is not None and first.facts.get("digest") == second.facts.get("digest")
    if "--files" in arguments.flags and not same:
        from uenvd.ctl.mounted import compare_mounted  # namespaces and hashes, for this option only

        files, packages = compare_mounted(
            [_text(one, side) for one, side in zip(asked, (first, second), strict=True)], socket
        )
        if (
            packages[0] is not None and packages[1] is not None
        ):  # else what is installed meets what was asked for
            first, second = first._replace(packages=packages[0]), second._replace(packages=packages[1])
    elif "--files" in arguments.flags:
        files = Changes((), (), ())
    _show(first, second, files, arguments)
    return 0


def _text(wanted: Description, side: Side) -> str:
    """Return a description of the very bytes that were inspected."""
    digest = side.facts.get("digest")
    if wanted.label is None or not isinstance(digest, str):
        return str(wanted)
    return str(wanted._replace(label=wanted.label._replace(digest=digest)))


def _side(wanted: Description, socket: str) -> Side:
    if wanted.path is not None:
        facts = inspect_file(wanted.path, name_of(wanted.path, os.environ))
        files = recipe_of_file(wanted.path)
        return Side(facts, packages_of(files) if files else None)
    with Client(socket) as client:
        facts = client.call("inspect", answer_s=REGISTRY_ANSWER_S, uenv=str(wanted.label)).frame
        digest = facts.get("digest")
        if wanted.label is None or not isinstance(digest, str):
            raise ProtocolError("uenvd's answer to 'inspect' has no digest")
        pinned = str(wanted.label._replace(digest=digest))
        try:
            recipe = client.call("recipe", answer_s=REGISTRY_ANSWER_S, uenv=pinned).frame.get("files")
        except (NotFound, RegistryError, RegistryUnreachable) as error:
            output.note(f"the recipe of {wanted.label} cannot be read: {error.message}")
            recipe = None
    for note in facts.pop("notes", None) or ():
        output.note(str(note))
    if recipe is None:
        return Side(facts, None)
    if not isinstance(recipe, dict):
        raise ProtocolError("uenvd's answer to 'recipe' is malformed")
    return Side(facts, packages_of({str(name): str(text) for name, text in recipe.items()}))


def recipe_of_file(path: str) -> dict[str, str]:
    """Return the recipe's files that say what is in the image, of a squashfs file. Raises what `inspect_file` raises of damaged ones."""
    from uenvd.ctl.image_inspect import open_image

    names = ("environments.yaml", "compilers.yaml", "requirements.lock", "interpreter.lock")
    with open_image(path) as read_file:
        found = {name: read_file(f"meta/recipe/{name}".encode()) for name in names}
    return {name: data.decode(errors="replace") for name, data in found.items() if data is not None}


# --- what is shown --------------------------------------------------------------------------------------------------


def _views(side: Side) -> dict[str, str] | None:
    views = side.facts.get("views")
    if not isinstance(views, list):
        return None
    return {str(one.get("name")): str(one.get("description") or "") for one in views if isinstance(one, dict)}


def _fact(side: Side, name: str) -> str:
    value = side.facts.get(name)
    if value is None:
        return "-"
    if name == "size_bytes":
        return f"{output.megabytes(value)} MB" if isinstance(value, int) else "-"
    if name == "tests":
        return tests_text(value) or "-"
    return str(value)


def _show(first: Side, second: Side, files: Changes | None, arguments: Arguments) -> None:
    sides = (first, second)
    views, packages = [_views(side) for side in sides], [side.packages for side in sides]
    view_changes = compare(views[0], views[1]) if views[0] is not None and views[1] is not None else None
    package_changes = (
        compare(packages[0], packages[1]) if packages[0] is not None and packages[1] is not None else None
    )
    if "--json" in arguments.flags:
        output.data_json(
            {
                "images": [
                    {name: side.facts.get(name) for name in ("label", "digest", *_FACTS)} for side in sides
                ],
                "same": all(part is None or part.none for part in (view_changes, package_changes, files))
                and all(first.facts.get(name) == second.facts.get(name) for name in ("digest", *_FACTS)),
                "views": None if view_changes is None else view_changes.to_json(),
                "packages": None if package_changes is None else package_changes.to_json(),
                "files": None if files is None else files.to_json(),
            }
        )
        return
    rows = [("", *(str(side.facts.get("label")) for side in sides))]
    digests = [str(side.facts.get("digest") or "-").removeprefix("sha256:")[:16] for side in sides]
    rows.append(("id", *digests))
    for name in _FACTS:
        shown = [_fact(side, name) for side in sides]
        if shown[0] != shown[1]:
            rows.append((name.removesuffix("_bytes").replace("_", " "), *shown))
    output.data(output.table((), rows))
    _list("views", view_changes, "not known of both images")
    _list("packages", package_changes, "not known of both images: without a recipe only --files tells")
    if files is not None:
        _list("files", files, "", limit=None if "--all" in arguments.flags else _SHOWN_FILES)


def _list(title: str, changes: Changes | None, unknown: str, limit: int | None = None) -> None:
    if changes is None:
        output.data(f"{title}: {unknown}")
        return
    if changes.none:
        output.data(f"{title}: the same")
        return
    parts = [len(part) for part in changes]
    output.data(f"{title}: {parts[0]} only in the first, {parts[1]} only in the second, {parts[2]} changed")
    lines = [
        *((f"  - {name}", "") for name in changes.removed),
        *((f"  + {name}", "") for name in changes.added),
        *((f"  ~ {name}", f"{old or '?'} -> {new or '?'}") for name, old, new in changes.changed),
    ]
    output.data(output.table((), lines[:limit]))
    if limit is not None and len(lines) > limit:
        output.data(f"  and {len(lines) - limit} more: --all")
